"""Measurements of a trained model besides its scores: how far back a prediction depends on its input, speed
by row length, attention maps.

A run folder, or the model in it, comes in; plain numbers for figures come out. Everything runs on the CPU in
fp32, in this process, in a few seconds each.
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trifold.finetune.evaluation.model_selection import best_step
from trifold.launch.recipe.reader import checkpoint_root_of_run
from trifold.modeling.batch import IGNORE, Batch
from trifold.modeling.block import Attention
from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.modeling.generation.generate import generate
from trifold.modeling.recurrent.stack import Alignment
from trifold.modeling.transformer import Transformer, build
from trifold.pretrain.data.collate import stack
from trifold.pretrain.data.rows import RowSource
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.publish.publish import find_checkpoint, read_checkpoint_model

LENGTHS = (16, 32, 64, 128, 256, 512)
POSITIONS = 2048  # of each batch whose speed is measured
ENOUGH = 8  # documents without which a mean is not drawn


class Map(NamedTuple):
    """Attention weights: one row per attending token, one column per attended token."""

    title: str
    rows: list[str]
    columns: list[str]
    weights: list[list[float]]


def opened(run: Path) -> Transformer:
    """The model that was scored: of the best checkpoint, or of pretraining's newest one."""
    root = checkpoint_root_of_run(run)
    source = find_checkpoint(run, lambda event, **facts: None, best_step(root), root)
    model_config, state = read_checkpoint_model(source)
    model = Transformer(model_config).eval()
    model.load_state_dict(state)
    return model


def reach(model: Transformer, rows: RowSource, documents: int = 64) -> list[float]:
    """How much a document's last prediction leans on its inputs: the norm of the loss's gradient there, d
    tokens back, over that at d = 0.

    The mean over documents, as far back as there are enough of them. What vanishes here cannot be learned
    from.
    """
    sums: dict[int, list[float]] = {}
    if model.decoder is None:
        return []
    for batch, _ in zip(_documents(rows), range(documents), strict=False):
        x_1TD = model.embedded(batch.tokens).detach().requires_grad_()
        memory = (
            None
            if batch.source is None or model.encoder is None
            else model.encoder(model.embedded(batch.source), None)
        )
        h_1TD = model.decoder(x_1TD, None, memory, None)
        losses = model.head.losses(h_1TD[:, -1:], model.embed, batch.targets[:, -1:], None)
        (gradient,) = torch.autograd.grad(losses.total, x_1TD)
        norms = gradient[0].norm(dim=-1).flip(0)
        for distance, norm in enumerate((norms / norms[0]).tolist()):
            sums.setdefault(distance, []).append(norm)
    return [sum(norms) / len(norms) for _, norms in sorted(sums.items()) if len(norms) >= ENOUGH]


def speed(model_config: ModelConfig) -> dict[int, float]:
    """Tokens a CPU second of one thread, forward and backward, in rows of each length, as many positions a
    batch (an encoder-decoder reads as many more). CPU time, so that a machine that others use too gives the
    same.
    """
    torch.set_num_threads(1)
    model, made = build(model_config, 0), {}
    for length in (n for n in LENGTHS if n <= model_config.max_positions):
        tokens = torch.randint(
            0,
            model_config.vocab_size,
            (POSITIONS // length, length),
            generator=torch.Generator().manual_seed(0),
        )
        targets, segments = torch.zeros_like(tokens), torch.ones_like(tokens) if model_config.spans else None
        if model_config.spans:
            targets[:, 2:] = IGNORE
        batch = Batch(tokens, segments, targets, tokens if model_config.family == "encoder-decoder" else None)
        times = []
        for _ in range(3):
            start = time.process_time()
            model(batch).total.backward()
            times.append(time.process_time() - start)
        made[length] = tokens.numel() / min(times)
    return made


def maps(model: Transformer, tokenizer: Tokenizer, text: str, word: str | None = None) -> list[Map]:
    """The attention maps of a model that reads the text, or translates it, and of every head from `word`.
    Empty for a model without attention.
    """
    at = len(tokenizer.encode_batch([text[: ends(text, word)]])[0]) if word else None  # behind bos
    ids = tokenizer.encode_batch([text])[0].tolist()
    source = torch.tensor([[tokenizer.bos, *ids, tokenizer.eos]])
    if model.decoder is None or model.encoder is None:
        return _attention_maps(
            model, tokenizer, Batch(source[:, :-1], torch.ones_like(source[:, :-1]), source[:, 1:]), at
        )
    how = Generation(max_new=64)
    [made] = generate(model, source.tolist(), how, bos=tokenizer.bos, eos=tokenizer.eos, pad=tokenizer.pad)
    written = torch.tensor([[tokenizer.bos, *made]])
    tokens = written[:, :-1]
    return _attention_maps(
        model,
        tokenizer,
        Batch(tokens, torch.ones_like(tokens), written[:, 1:], source, torch.ones_like(source)),
        at,
    )


def ends(text: str, word: str) -> int:
    """Where a word of the text ends, in characters. Raises UserError where the text does not have it."""
    if found := re.search(rf"\b{re.escape(word)}\b", text):
        return found.end()
    raise UserError(
        f"--word {word!r} is not a word of the sentence {text!r}: give a --sentence that contains it."
    )


@torch.no_grad()
def _attention_maps(model: Transformer, tokenizer: Tokenizer, batch: Batch, at: int | None) -> list[Map]:
    """Alignments of a recurrent decoder. Of a transformer: the heads of the last layer over the text, the
    mean of its cross-attention heads, and all heads from position `at`.
    """
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, module: nn.Module, given: tuple[Any, ...], result: Any) -> None:
        weights = result[2] if isinstance(module, Alignment) else module.weights(*given[:2])[0]  # type: ignore[operator]
        seen.setdefault(name, []).append(weights)

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, Alignment | Attention):
            hooks.append(
                module.register_forward_hook(lambda m, given, result, name=name: keep(name, m, given, result))
            )
    model.logits(batch)
    for hook in hooks:
        hook.remove()
    read = _pieces(tokenizer, batch.tokens if batch.source is None else batch.source)
    if "decoder.align" in seen:
        return [
            Map(
                "alignment",
                _pieces(tokenizer, batch.targets),
                read,
                torch.cat(seen["decoder.align"]).tolist(),
            )
        ]
    reader = "decoder" if batch.source is None and model.decoder is not None else "encoder"
    layers = [f"blocks.{i}" for i in range(model.config.num_layers)]
    found = []
    if cross := seen.get(f"decoder.{layers[-1]}.cross.f"):
        found.append(
            Map(
                "last layer, mean of the heads",
                _pieces(tokenizer, batch.targets),
                read,
                cross[0].mean(0).tolist(),
            )
        )
    if heads := seen.get(f"{reader}.{layers[-1]}.attn.f"):
        found += [
            Map(f"{reader}, last layer, head {i + 1}", read, read, head.tolist())
            for i, head in enumerate(heads[0])
        ]
        if at is not None:
            looks = torch.cat([seen[f"{reader}.{layer}.attn.f"][0][:, at] for layer in layers])
            count = len(looks) // len(layers)
            names = [f"layer {i // count + 1}, head {i % count + 1}" for i in range(len(looks))]
            found.append(Map(f"every head, from {read[at]!r}", names, read, looks.tolist()))
    return found


def _pieces(tokenizer: Tokenizer, tokens_1T: Tensor) -> list[str]:
    names = {tokenizer.bos: "<s>", tokenizer.eos: "</s>"}
    texts = [names.get(i) or tokenizer.decode([i]).strip() for i in tokens_1T[0].tolist()]
    return [text if text.isprintable() and text else "_" for text in texts]


def _documents(rows: RowSource) -> Iterator[Batch]:
    """The documents of packed rows that end in a target, each alone."""
    for number in range(rows.num_rows):
        row = stack([rows.row(number)])
        assert row.segments is not None
        for segment in range(1, int(row.segments.max()) + 1):
            own = row.segments[0] == segment
            targets = row.targets[:, own]
            source = (
                None
                if row.source is None or row.source_segments is None
                else row.source[:, row.source_segments[0] == segment]
            )
            if own.any() and targets[0, -1] != IGNORE:
                yield Batch(row.tokens[:, own], None, targets, source)
