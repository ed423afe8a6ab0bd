"""Generation: prompts in, continuations out, batched, with cached keys and values; greedy, by sampling, or by
beams (modeling/generation/beam_search.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trifold.modeling.config import Generation
from trifold.modeling.errors import UserError
from trifold.modeling.generation.beam_search import search
from trifold.modeling.generation.decoding import DecodingState
from trifold.modeling.transformer import Transformer


def generate(
    model: Transformer,
    prompts: list[list[int]],
    how: Generation = Generation(),  # noqa: B008 (frozen)
    *,
    bos: int,
    eos: int,
    pad: int,
    anyone: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """At most `max_new` new tokens for each prompt; the last one is `eos` where the model ended there.

    A decoder continues its prompt (an empty one becomes `bos`). An encoder-decoder reads it as the source and
    starts from `bos`. `anyone(going)` says whether any of several ranks that generate side by side still goes
    on: all then take as many steps. Raises UserError for an encoder, and where the table of learned positions
    is too short.
    """
    return [best[0][0] for best in hypotheses(model, prompts, how, bos=bos, eos=eos, pad=pad, anyone=anyone)]


@torch.no_grad()
def hypotheses(
    model: Transformer,
    prompts: list[list[int]],
    how: Generation,
    *,
    bos: int,
    eos: int,
    pad: int,
    anyone: Callable[[bool], bool] = bool,
) -> list[list[tuple[list[int], float]]]:
    """For each prompt its `num_best` best beams, best first, with their scores; without beams the one text,
    and 0.
    """
    if model.decoder is None or model.config.outputs:
        kind = f"family {model.config.family}" + (" with a task's head" if model.config.outputs else "")
        raise UserError(f"A model of {kind} does not generate text: take a decoder or an encoder-decoder.")
    if how.beams > 1 and (how.sample or how.num_best > how.beams):
        raise UserError(
            f"{how.beams} beams cannot give {how.num_best} texts or be sampled: raise beams, or set beams to"
            " 1 for sampling."
        )
    if not prompts:
        return []
    training = model.training
    model.eval()
    try:
        read = DecodingState(model, prompts, how, bos, pad)
        if how.beams > 1:
            return search(read, how, eos, pad, anyone)
        return [
            [(row[: row.index(eos) + 1] if eos in row else row, 0.0)]
            for row in _sample_or_greedy(read, how, eos, pad, anyone)
        ]
    finally:
        model.train(training)


def _sample_or_greedy(
    read: DecodingState, how: Generation, eos: int, pad: int, anyone: Callable[[bool], bool]
) -> list[list[int]]:
    """The next token of every row, likeliest or drawn, `pad` after a row's end, until every row has ended."""
    draw = torch.Generator(read.tokens.device).manual_seed(how.seed)
    going = torch.ones_like(read.tokens[:, 0], dtype=torch.bool)
    while read.start < how.max_new and anyone(bool(going.any())):
        scores = read.next_log_probs(eos)
        chosen = _sample(scores, how, draw) if how.sample else scores.argmax(-1)
        read.add(torch.where(going, chosen, pad))
        going = going & (chosen != eos)
    return read.tokens[:, read.begin :].tolist()


def _sample(scores_BV: Tensor, how: Generation, draw: torch.Generator) -> Tensor:
    """Temperature, then top-k, then top-p (nucleus: Holtzman et al. 2020), then a draw."""
    scores = scores_BV / how.temperature
    if how.top_k:
        scores = scores.masked_fill(
            scores < scores.topk(min(how.top_k, scores.shape[1]))[0][:, -1:], float("-inf")
        )
    ordered, index = scores.softmax(-1).sort(descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= how.top_p, 0)  # the likeliest always stays
    return index.gather(1, torch.multinomial(ordered, 1, generator=draw))[:, 0]
