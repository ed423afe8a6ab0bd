"""Name tables: how a published architecture calls our tensors, as data that is read both ways.

A line is `stock name = our name [, our name ...] [| op]`:
    several names        are stacked along their first dimension (fused projections)
    {i}                  runs over the layers
    {p}                  is `weight`, and `bias` too where the model has biases
    one source twice     is written twice; reading wants both copies equal
    name? =              stands where the model has its first source (a head of its own, ModernBERT's first norm)
    name?other =         stands where the model has `other` too; `name?!other`: where it has not. Not written, it may be read as a copy
    name~ = source       is never written; read where it is there, as a copy that must be equal (tied heads that some folders hold)
    name~ = nothing      is never written; dropped where it is there (poolers, buffers), and said
Every tensor of ours is used, and every line resolves, in both directions; whatever is left over is refused by
name.
"""

from collections.abc import Callable, Collection, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError

OPS: dict[
    str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
] = {  # ours -> stock, stock -> ours
    "": (lambda v: v, lambda v: v),
    "t": (
        lambda v: v.mT if v.ndim == 2 else v,
        lambda v: v.mT if v.ndim == 2 else v,
    ),  # Conv1D of GPT-2: weights lie transposed
    "minus1": (
        lambda v: v - 1,
        lambda v: v + 1,
    ),  # norms that multiply by (1 + w); exact for our weights in [0.5, 2]
    "row": (lambda v: v[None], lambda v: v[0]),
}


@dataclass(frozen=True)
class Architecture:
    """One published architecture: its stock class, its names, and its config both ways."""

    stock_class: str
    model_type: str
    table: str
    write: Callable[
        [ModelConfig, Mapping[str, int]], dict[str, Any]
    ]  # every field that bears on the logits, explicitly
    complete: Callable[
        [dict[str, Any]], dict[str, Any]
    ]  # a stock config, with what it leaves out or spells as in older versions
    read: Callable[[dict[str, Any]], dict[str, Any]]  # a completed stock config -> dials of ModelConfig
    also: tuple[
        str, ...
    ] = ()  # stock classes without this one's head, or with more, whose folders are read as this one's
    prefix: str = ""  # which those of bare classes leave out of every name


@dataclass(frozen=True)
class Line:
    """One line for one layer: `stock` is made of `sources` by `op`, where `mark` and `needs` let it."""

    stock: str
    sources: tuple[str, ...]
    op: str
    mark: str  # "", "?" or "~"
    needs: str

    def written(self, ours: Container[str]) -> bool:
        """Whether a model with these tensors has it."""
        if self.mark != "?":
            return not self.mark
        if self.needs.startswith("!"):
            return self.needs[1:] not in ours
        return self.sources[0] in ours and (not self.needs or self.needs in ours)


def spell(table: str, config: ModelConfig) -> Iterator[Line]:
    """Every line, for every layer and parameter."""
    for text in filter(None, (line.split("#")[0].strip() for line in table.splitlines())):
        for i in range(config.num_layers) if "{i}" in text else (0,):
            for p in ("weight", "bias") if "{p}" in text and config.bias else ("weight",):
                name, _, rest = text.replace("{i}", str(i)).replace("{p}", p).partition(" = ")
                stock, mark, needs = next(name.partition(mark) for mark in "?~ " if mark in f"{name} ")
                sources, _, op = (part.strip() for part in rest.partition("|"))
                yield Line(
                    stock,
                    () if sources == "nothing" else tuple(s.strip() for s in sources.split(",")),
                    op,
                    mark,
                    needs,
                )


def lines(table: str, config: ModelConfig, ours: Collection[str]) -> list[Line]:
    """The lines that are written for a model whose tensors are called `ours`."""
    written = [line for line in spell(table, config) if line.written(ours)]
    used = {source for line in written for source in line.sources}
    _refuse_difference("the model and its name table", have=set(ours), want=used)
    assert len({line.stock for line in written}) == len(written), "a stock name stands in two lines"
    return written


def to_stock(table: str, config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under stock names: contiguous fp32, no two tensors sharing memory (safetensors wants
    that).
    """
    stock: dict[str, Tensor] = {}
    written: set[str] = set()
    for line in lines(table, config, state):
        parts = [state[source].detach().float() for source in line.sources]
        value = OPS[line.op][0](torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous()
        stock[line.stock] = value.clone() if line.sources[0] in written else value
        written.update(line.sources)
    return stock


def known_names(
    table: str, prefix: str, config: ModelConfig, stock: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A folder's tensors under the names of the table: bare classes leave the prefix out, and the oldest
    BERTs say gamma and beta.
    """
    known = {line.stock for line in spell(table, config)}

    def name(found: str) -> str:
        newer = found.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        )
        return next((name for name in (found, newer, prefix + newer) if name in known), found)

    return {name(found): tensor for found, tensor in stock.items()}


def from_stock(
    table: str,
    config: ModelConfig,
    shapes: Mapping[str, torch.Size],
    stock: Mapping[str, Tensor],
    headless: bool = False,
) -> tuple[dict[str, Tensor], list[str]]:
    """A stock state dict under our names, in fp32, and the names of what was dropped. `shapes` are those of
    our tensors.

    `headless`: tensors of the head may be missing, and are then left out. Raises UserError naming missing and
    unexpected tensors, a tensor of another shape or with NaN in it, and copies that differ.
    """
    written = [
        line
        for line in lines(table, config, shapes)
        if line.stock in stock or not headless or not line.sources[0].startswith("head.")
    ]
    wanted = {line.stock for line in written}
    besides = [line for line in spell(table, config) if line.stock not in wanted and line.stock in stock]
    besides = [line for line in besides if not line.sources or line.sources[0] in shapes]
    _refuse_difference(
        "the folder's weights", have=set(stock) - {line.stock for line in besides}, want=wanted
    )
    state: dict[str, Tensor] = {}
    for line in [*written, *(line for line in besides if line.sources)]:
        value, want = stock[line.stock].float(), _stock_shape(line, shapes)
        if value.shape != want:
            raise UserError(
                f"{line.stock} has the shape {tuple(value.shape)}; this config.json means {tuple(want)}"
            )
        if value.isnan().any():
            raise UserError(
                f"{line.stock} holds NaN, which no model computes with: copy the folder again, or publish a"
                " sound checkpoint"
            )
        parts = OPS[line.op][1](value).split([shapes[source][0] for source in line.sources])
        for source, part in zip(line.sources, parts, strict=True):
            if not torch.equal(state.setdefault(source, part.contiguous()), part):
                raise UserError(
                    f"{line.stock} is a second copy of {source} here, but differs from the first one"
                )
    return state, [line.stock for line in besides if not line.sources]


def gradients(
    table: str, config: ModelConfig, shapes: Mapping[str, torch.Size], stock: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The gradients of our tensors, given those of the stock class's: of one that is written twice both
    copies count.
    """
    total: dict[str, Tensor] = {}
    for line in lines(table, config, shapes):
        back = OPS[line.op][1]
        gradient = back(stock[line.stock]) - back(
            torch.zeros_like(stock[line.stock])
        )  # what an op adds (minus1) is no slope
        for source, part in zip(
            line.sources, gradient.split([shapes[source][0] for source in line.sources]), strict=True
        ):
            total[source] = total[source] + part if source in total else part
    return total


def _stock_shape(line: Line, shapes: Mapping[str, torch.Size]) -> torch.Size:
    stacked = torch.cat([torch.empty(shapes[source], device="meta") for source in line.sources])
    return OPS[line.op][0](stacked).shape


def _refuse_difference(what: str, have: set[str], want: set[str]) -> None:
    if have != want:
        missing, unexpected = sorted(want - have), sorted(have - want)
        said = [
            f"{kind} {_few(names)}"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise UserError(f"{what} do not fit: {'; '.join(said)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
