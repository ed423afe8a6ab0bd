"""Name tables: how a published architecture calls our tensors, as data that is read both ways.

A line is `stock name = our name [, our name ...] [| op]`:
    several names        are stacked along their first dimension (fused projections)
    {i}                  runs over the layers
    {p}                  is `weight`, and `bias` too where the model has biases
    ? after a stock name drops the line where the model lacks its first source (a tied head, ModernBERT's first norm)
    one source twice     is written twice; reading wants both copies equal
    = zeros:2xdim        is a constant without a source (a number, or a dial of ModelConfig); reading wants exactly that
Every tensor of ours is used, and every line resolves, in both directions; whatever is left over is refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling.config import ModelConfig, Refused

OPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {  # ours -> stock, stock -> ours
    "": (lambda v: v, lambda v: v),
    "t": (lambda v: v.mT if v.ndim == 2 else v, lambda v: v.mT if v.ndim == 2 else v),  # Conv1D of GPT-2: weights lie transposed
    "minus1": (lambda v: v - 1, lambda v: v + 1),  # norms that multiply by (1 + w); exact for our weights in [0.5, 2]
    "pad2": (lambda v: torch.cat([torch.zeros_like(v[:2]), v]), lambda v: v[2:]),  # BART: positions start at 2
    "row": (lambda v: v[None], lambda v: v[0]),
}


@dataclass(frozen=True)
class Architecture:
    """One published architecture: its stock class, its names, and its config both ways."""

    stock_class: str
    model_type: str
    table: str
    write: Callable[[ModelConfig, Mapping[str, int]], dict[str, Any]]  # every field that bears on the logits, explicitly
    complete: Callable[[dict[str, Any]], dict[str, Any]]  # a stock config, with what it leaves out or spells as in older versions
    read: Callable[[dict[str, Any]], dict[str, Any]]  # a completed stock config -> dials of ModelConfig


@dataclass(frozen=True)
class Line:
    """One line for one layer: `stock` is made of `sources` by `op`, or is zeros of the shape `zeros`."""

    stock: str
    sources: tuple[str, ...]
    op: str = ""
    zeros: tuple[int, ...] = ()


def lines(table: str, config: ModelConfig, ours: Mapping[str, Any]) -> list[Line]:
    """The table spelled out for a model whose tensors are the keys of `ours`."""
    spelled = []
    for text in filter(None, (line.split("#")[0].strip() for line in table.splitlines())):
        for i in range(config.num_layers) if "{i}" in text else (0,):
            for p in ("weight", "bias") if "{p}" in text and config.bias else ("weight",):
                stock, _, rest = text.replace("{i}", str(i)).replace("{p}", p).partition(" = ")
                sources, _, op = (part.strip() for part in rest.partition("|"))
                if sources.startswith("zeros:"):
                    shape = tuple(int(d) if d.isdigit() else getattr(config, d) for d in sources[6:].split("x"))
                    spelled.append(Line(stock.strip(), (), zeros=shape))
                    continue
                line = Line(stock.strip().rstrip("?"), tuple(s.strip() for s in sources.split(",")), op)
                if not stock.strip().endswith("?") or line.sources[0] in ours:
                    spelled.append(line)
    used = {source for line in spelled for source in line.sources}
    _refuse_difference("the model and its name table", have=set(ours), want=used)
    assert len({line.stock for line in spelled}) == len(spelled), "a stock name stands in two lines"
    return spelled


def to_stock(table: str, config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under stock names: contiguous fp32, no two tensors sharing memory (safetensors wants that)."""
    stock: dict[str, Tensor] = {}
    written: set[str] = set()
    for line in lines(table, config, state):
        if line.zeros:
            stock[line.stock] = torch.zeros(line.zeros)
            continue
        parts = [state[source].detach().float() for source in line.sources]
        value = OPS[line.op][0](torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous()
        stock[line.stock] = value.clone() if line.sources[0] in written else value
        written.update(line.sources)
    return stock


def from_stock(table: str, config: ModelConfig, shapes: Mapping[str, torch.Size], stock: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A stock state dict under our names, in fp32. `shapes` are those of our tensors.

    Raises Refused naming missing and unexpected tensors, a tensor of another shape, and copies that differ.
    """
    spelled = lines(table, config, shapes)
    _refuse_difference("the folder's weights", have=set(stock), want={line.stock for line in spelled})
    state: dict[str, Tensor] = {}
    for line in spelled:
        value = stock[line.stock].float()
        want = torch.Size(line.zeros) if line.zeros else _stock_shape(line, shapes)
        if value.shape != want:
            raise Refused(f"{line.stock} has the shape {tuple(value.shape)}; this config.json means {tuple(want)}")
        if line.zeros and value.any():
            raise Refused(f"{line.stock} should be all zeros (Trifold has no such tensor), but holds values up to {value.abs().max():.3g}")
        if not line.sources:
            continue
        parts = OPS[line.op][1](value).split([shapes[source][0] for source in line.sources])
        for source, part in zip(line.sources, parts, strict=True):
            if not torch.equal(state.setdefault(source, part.contiguous()), part):
                raise Refused(f"{line.stock} is a second copy of {source} here, but differs from the first one")
    return state


def _stock_shape(line: Line, shapes: Mapping[str, torch.Size]) -> torch.Size:
    stacked = torch.cat([torch.empty(shapes[source], device="meta") for source in line.sources])
    return OPS[line.op][0](stacked).shape


def _refuse_difference(what: str, have: set[str], want: set[str]) -> None:
    if have != want:
        missing, unexpected = sorted(want - have), sorted(have - want)
        said = [f"{kind} {_few(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names]
        raise Refused(f"{what} do not fit: {'; '.join(said)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
