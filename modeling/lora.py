"""Low-rank adapters (LoRA, Hu et al. 2022): W becomes W + scale * B A, where only A and B are trained.

`add_lora` gives linear maps of a built model the parameters `NAME.a` (rank, in) and `NAME.b` (out, rank); B
starts at zero, so the model computes the same at first. `merge_lora` turns its state back into plain weights,
which are what is published.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifold.modeling.config import Lora
from trifold.modeling.errors import UserError
from trifold.modeling.transformer import Transformer, seeded_generator


class LoraLinear(nn.Linear):
    """A linear map with an adapter; its weight and bias keep their names."""

    def __init__(self, linear: nn.Linear, lora: Lora) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = lora.scale
        self.weight, self.bias = linear.weight, linear.bias
        self.a = nn.Parameter(torch.empty(lora.rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, lora.rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.a), self.b) * self.scale


def add_lora(model: Transformer, lora: Lora, seed: int) -> None:
    """Add the adapters, and freeze everything else but a task's head.

    A is uniform within 1 / sqrt(in), keyed by (seed, name).
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    linears = _linear_maps_of_blocks(model, lora)
    for name, linear in linears.items():
        parent, _, last = name.rpartition(".")
        if last in lora.targets:
            adapted = LoraLinear(linear, lora)
            bound = linear.in_features**-0.5
            nn.init.uniform_(adapted.a, -bound, bound, generator=seeded_generator(seed, f"{name}.a"))
            setattr(model.get_submodule(parent), last, adapted)
    if model.head.labels is not None:
        model.head.labels.requires_grad_(True)


def _linear_maps_of_blocks(model: Transformer, lora: Lora) -> dict[str, nn.Linear]:
    """By name. Raises UserError where there are none, or none of a target's name."""
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".blocks." in name
    }
    if not linears:
        raise UserError(
            f"lora adapts the linear maps of transformer blocks, and a model of cell {model.config.cell} has"
            " none: remove it."
        )
    kinds = {name.rpartition(".")[2] for name in linears}
    for target in lora.targets:
        if target not in kinds:
            raise UserError(
                f"lora.targets names {target!r}; this model's linear maps are {', '.join(sorted(kinds))}."
            )
    return linears


def merge_lora(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The plain weights that are equivalent to an adapted model's state."""
    merged = {name: tensor for name, tensor in state.items() if not name.endswith((".a", ".b"))}
    adapted = [name.removesuffix(".a") for name in state if name.endswith(".a")]
    for name in adapted:
        product = scale * state[f"{name}.b"] @ state[f"{name}.a"]
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + product
    return merged
