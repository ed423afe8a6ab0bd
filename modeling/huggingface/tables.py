"""Name tables: a published architecture's names of our tensors, as data that is read in both directions.

A line is `stock name = our name [, our name ...] [| op]`; it continues on the next one after `=` or a comma.
    several names        are stacked along their first dimension (fused projections)
    {i}                  runs over the layers
    {p}                  is `weight`, and `bias` too where the model has biases
    one source twice     is written twice; when read, both copies must be equal
    name? =              exists where the model has its first source (an untied head, ModernBERT's first norm)
    name?other =         exists where the model has `other` too; `name?!other`: where it does not.
                         A line that is not written may be read as a copy
    name~ = source       is never written; it may be read as a copy, which must be equal (tied heads)
    name~ = nothing      is never written; it is dropped when read (poolers, buffers), and reported
Every tensor of ours is used and every line resolves, in both directions; anything else is rejected by name.
"""

from collections.abc import Callable, Collection, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError


def _identity(v: Tensor) -> Tensor:
    return v


def _transpose(v: Tensor) -> Tensor:
    return v.mT if v.ndim == 2 else v


# op -> (ours to stock, stock to ours)
OPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "": (_identity, _identity),
    "t": (_transpose, _transpose),  # GPT-2's Conv1D: weights are transposed
    "minus1": (
        lambda v: v - 1,
        lambda v: v + 1,
    ),  # norms that multiply by (1 + w); exact for ours in [0.5, 2]
    "row": (lambda v: v[None], lambda v: v[0]),
}


@dataclass(frozen=True)
class Architecture:
    """One published architecture: its stock class, its tensor names, and its config in both directions."""

    stock_class: str
    model_type: str
    table: str
    # (config, special token ids) -> stock config, with every field that affects the logits.
    write: Callable[[ModelConfig, Mapping[str, int]], dict[str, Any]]
    # A stock config -> the same, with defaults filled in and older spellings replaced.
    complete: Callable[[dict[str, Any]], dict[str, Any]]
    # A completed stock config -> fields of ModelConfig.
    read: Callable[[dict[str, Any]], dict[str, Any]]
    # Stock classes without this one's head, or with additional ones, whose folders are read as this one's.
    also: tuple[str, ...] = ()
    prefix: str = ""  # of tensor names, which those of bare classes lack
    # Dotted fields of the stock config that are our dropout: of the embeddings and of each sublayer's output.
    dropout: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """One line of a table for one layer: `stock` is `op` of the stacked `sources`."""

    stock: str
    sources: tuple[str, ...]
    op: str
    mark: str  # "", "?" or "~"
    needs: str

    def written(self, ours: Container[str]) -> bool:
        """Whether a model with these tensors has this stock tensor."""
        if self.mark != "?":
            return not self.mark
        if self.needs.startswith("!"):
            return self.needs[1:] not in ours
        return self.sources[0] in ours and (not self.needs or self.needs in ours)


def spell(table: str, config: ModelConfig) -> Iterator[Line]:
    """Every line, for every layer and parameter."""
    for template in _templates(table):
        layers = range(config.num_layers) if "{i}" in template else (0,)
        leaves = ("weight", "bias") if "{p}" in template and config.bias else ("weight",)
        for i in layers:
            for leaf in leaves:
                yield _parse(template.replace("{i}", str(i)).replace("{p}", leaf))


def _templates(table: str) -> list[str]:
    """The lines of a table without comments, continued ones joined."""
    templates, unfinished = [], ""
    for line in table.splitlines():
        unfinished += line.split("#")[0].strip() + " "
        if not unfinished.rstrip().endswith((",", "=")):
            templates.append(unfinished.strip())
            unfinished = ""
    return [template for template in templates if template]


def _parse(text: str) -> Line:
    name, _, rest = text.partition(" = ")
    mark = next((mark for mark in "?~" if mark in name), "")
    stock, _, needs = name.partition(mark) if mark else (name, "", "")
    sources, _, op = (part.strip() for part in rest.partition("|"))
    names = () if sources == "nothing" else tuple(source.strip() for source in sources.split(","))
    return Line(stock.strip(), names, op, mark, needs.strip())


def lines(table: str, config: ModelConfig, ours: Collection[str]) -> list[Line]:
    """The lines that are written for a model whose tensors are called `ours`."""
    written = [line for line in spell(table, config) if line.written(ours)]
    used = {source for line in written for source in line.sources}
    _check_names("the model and its name table", have=set(ours), want=used)
    assert len({line.stock for line in written}) == len(written), "two lines have one stock name"
    return written


def to_stock(table: str, config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under stock names: contiguous, fp32, no two tensors sharing memory (for safetensors)."""
    stock: dict[str, Tensor] = {}
    written: set[str] = set()
    for line in lines(table, config, state):
        sources = [state[source].detach().float() for source in line.sources]
        value = OPS[line.op][0](torch.cat(sources) if len(sources) > 1 else sources[0]).contiguous()
        stock[line.stock] = value.clone() if line.sources[0] in written else value
        written.update(line.sources)
    return stock


def known_names(
    table: str, prefix: str, config: ModelConfig, stock: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A folder's tensors under the names of the table.

    Bare classes leave out the prefix, and the oldest BERTs call a norm's parameters gamma and beta.
    """
    known = {line.stock for line in spell(table, config)}

    def table_name(name: str) -> str:
        newer = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        )
        candidates = (name, newer, prefix + newer)
        return next((candidate for candidate in candidates if candidate in known), name)

    return {table_name(name): tensor for name, tensor in stock.items()}


def from_stock(
    table: str,
    config: ModelConfig,
    shapes: Mapping[str, torch.Size],
    stock: Mapping[str, Tensor],
    headless: bool = False,
) -> tuple[dict[str, Tensor], list[str]]:
    """A stock state dict under our names, in fp32, and the names of the tensors that were dropped.

    `shapes` are those of our tensors. `headless`: tensors of the head may be missing, and are then left out.
    Raises UserError naming missing and unexpected tensors, a tensor of another shape or with NaN, and unequal
    copies.
    """
    written = [
        line
        for line in lines(table, config, shapes)
        if line.stock in stock or not headless or not line.sources[0].startswith("head.")
    ]
    required = {line.stock for line in written}
    optional = [line for line in spell(table, config) if line.stock in stock and line.stock not in required]
    optional = [line for line in optional if not line.sources or line.sources[0] in shapes]
    unexplained = set(stock) - {line.stock for line in optional}
    _check_names("the folder's weights", have=unexplained, want=required)

    state: dict[str, Tensor] = {}
    for line in [*written, *(line for line in optional if line.sources)]:
        value = stock[line.stock].float()
        _check_value(line, value, _stock_shape(line, shapes))
        sizes = [shapes[source][0] for source in line.sources]
        for source, tensor in zip(line.sources, OPS[line.op][1](value).split(sizes), strict=True):
            if not torch.equal(state.setdefault(source, tensor.contiguous()), tensor):
                raise UserError(
                    f"{line.stock} is a second copy of {source} here, but differs from the first one"
                )
    return state, [line.stock for line in optional if not line.sources]


def gradients(
    table: str, config: ModelConfig, shapes: Mapping[str, torch.Size], stock: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The gradients of our tensors from those of the stock tensors; those of two copies are added."""
    total: dict[str, Tensor] = {}
    for line in lines(table, config, shapes):
        to_ours = OPS[line.op][1]
        zero = torch.zeros_like(stock[line.stock])
        gradient = to_ours(stock[line.stock]) - to_ours(
            zero
        )  # the constant of an op (minus1) has no gradient
        sizes = [shapes[source][0] for source in line.sources]
        for source, value in zip(line.sources, gradient.split(sizes), strict=True):
            total[source] = total[source] + value if source in total else value
    return total


def _stock_shape(line: Line, shapes: Mapping[str, torch.Size]) -> torch.Size:
    stacked = torch.cat([torch.empty(shapes[source], device="meta") for source in line.sources])
    return OPS[line.op][0](stacked).shape


def _check_value(line: Line, value: Tensor, shape: torch.Size) -> None:
    if value.shape != shape:
        raise UserError(
            f"{line.stock} has the shape {tuple(value.shape)}; this config.json means {tuple(shape)}"
        )
    if value.isnan().any():
        raise UserError(
            f"{line.stock} contains NaN, with which no model can compute: copy the folder again, or publish"
            " an earlier checkpoint"
        )


def _check_names(what: str, have: set[str], want: set[str]) -> None:
    missing, unexpected = sorted(want - have), sorted(have - want)
    clauses = [f"missing {_few(missing)}"] if missing else []
    clauses += [f"unexpected {_few(unexpected)}"] if unexpected else []
    if clauses:
        raise UserError(f"{what} do not match: {'; '.join(clauses)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
