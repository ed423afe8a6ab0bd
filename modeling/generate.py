"""Greedy generation: prompts in, the most likely continuations out, batched, with cached keys and values.

Prompts of unequal length are padded on the left, sources on the right; padding is segment 0 and nobody sees it.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.attention import Cache
from modeling.config import Refused
from modeling.transformer import Stack, Transformer


@torch.no_grad()
def generate(model: Transformer, prompts: list[list[int]], *, max_new: int, bos: int, eos: int, pad: int) -> list[list[int]]:
    """At most `max_new` new tokens for each prompt; the last one is `eos` where the model ended there.

    A decoder continues its prompt (an empty one becomes `bos`). An encoder-decoder reads it as the source and starts from `bos`.
    Raises Refused for an encoder, and where the table of learned positions is too short.
    """
    if model.decoder is None:
        raise Refused(f"A model of family {model.config.family} does not generate text: take a decoder or an encoder-decoder.")
    if not prompts:
        return []
    training = model.training
    model.eval()
    try:
        rows = torch.cat(list(_steps(model, model.decoder, prompts, max_new, bos, eos, pad)), dim=1).tolist()
    finally:
        model.train(training)
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def _steps(model: Transformer, decoder: Stack, prompts: list[list[int]], max_new: int, bos: int, eos: int, pad: int) -> Iterator[Tensor]:
    """The next token of every row, (B, 1) at a time, `pad` after a row's end, until every row has ended."""
    memory = sources = None
    if model.encoder is not None:
        tokens, sources = _padded(model, prompts, pad, left=False)
        memory = model.encoder(model.embedded(tokens), sources)
        prompts = [[]] * len(prompts)
    tokens, segments = _padded(model, [prompt or [bos] for prompt in prompts], pad, left=True)
    begin, end = tokens.shape[1], tokens.shape[1] + max_new
    _fits(model, end)
    segments = F.pad(segments, (0, max_new), value=1)
    caches = [(Cache(end), Cache(0 if memory is None else memory.shape[1])) for _ in decoder.blocks]
    going = torch.ones_like(tokens[:, :1], dtype=torch.bool)
    for used in range(begin, end):
        h = decoder(model.embedded(tokens), segments[:, :used], memory, sources, caches)
        best = model.head(h[:, -1:], model.embed).argmax(-1)
        tokens = torch.where(going, best, pad)
        yield tokens
        going = going & (tokens != eos)
        if not going.any():
            return


def _padded(model: Transformer, rows: list[list[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of equal length, and their segments: 1, and 0 where padded."""
    width = max(1, *map(len, rows))
    _fits(model, width)
    fill = [[0] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    segments = torch.tensor([f + o if left else o + f for f, o in zip(fill, ones, strict=True)], device=model.embed.weight.device)
    tokens = [f + row if left else row + f for f, row in zip(fill, rows, strict=True)]
    return torch.tensor(tokens, device=segments.device).where(segments > 0, pad), segments


def _fits(model: Transformer, length: int) -> None:
    if model.config.position == "learned" and length > model.config.max_positions:
        raise Refused(
            f"Generation needs {length} positions, and this model has learned {model.config.max_positions}:"
            " shorten the prompt or ask for fewer new tokens."
        )
