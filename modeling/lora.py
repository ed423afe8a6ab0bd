"""Low-rank adapters (LoRA, Hu et al. 2022): beside a frozen matrix W a trained product of two thin ones, W +
scale * B A.

In: a built model, and the names of its linear maps that get one. Out: the same model with parameters `NAME.a`
(r, in) and `NAME.b` (out, r); B begins at zero, so that nothing is changed at first. `merged` makes plain
weights of it again, which is what is published.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifold.modeling.config import Lora
from trifold.modeling.errors import UserError
from trifold.modeling.transformer import Transformer, seeded_generator


class LoraLinear(nn.Linear):
    """A linear map with an adapter; its own weight and bias keep their names."""

    def __init__(self, linear: nn.Linear, lora: Lora) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = linear.in_features, linear.out_features, lora.scale
        self.weight, self.bias = linear.weight, linear.bias
        self.a = nn.Parameter(torch.empty(lora.rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, lora.rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.a), self.b) * self.scale


def add_lora(model: Transformer, lora: Lora, seed: int) -> None:
    """Give the model its adapters, and freeze all else but a task's head. A is uniform within 1 / sqrt(in),
    keyed by (seed, name).
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".blocks." in f".{name}"
    ]
    if not found:
        raise UserError(
            f"lora adapts the linear maps of blocks, and a model of cell {model.config.cell} has none: leave"
            " it out."
        )
    for target in lora.targets:
        if not any(name.endswith(f".{target}") for name, _ in found):
            raise UserError(
                f"lora.targets names {target!r}; the linear maps here are"
                f" {', '.join(sorted({n.split('.')[-1] for n, _ in found}))}."
            )
    for name, module in found:
        parent, _, last = name.rpartition(".")
        if last in lora.targets:
            adapted = LoraLinear(module, lora)
            bound = module.in_features**-0.5
            nn.init.uniform_(adapted.a, -bound, bound, generator=seeded_generator(seed, f"{name}.a"))
            setattr(model.get_submodule(parent), last, adapted)
    for parameter in model.head.labels.parameters() if model.head.labels is not None else ():
        parameter.requires_grad_(True)


def merge_lora(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The plain weights that an adapted model's state amounts to."""
    plain = {name: tensor for name, tensor in state.items() if not name.endswith((".a", ".b"))}
    for name in (name.removesuffix(".a") for name in state if name.endswith(".a")):
        plain[f"{name}.weight"] = plain[f"{name}.weight"] + scale * state[f"{name}.b"] @ state[f"{name}.a"]
    return plain
