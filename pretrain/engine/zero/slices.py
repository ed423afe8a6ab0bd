"""Parameter slices: the part of the fp32 master weights and moments that this rank owns, by parameter name.

In: a DeepSpeed ZeRO optimizer of any stage. Out: pieces (where a parameter's numbers lie in the optimizer's
flat tensors), which are read into slices of host memory and written back from them, so state moves between
any two worlds and stages. No collective is needed to read.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.slice import ReadSlice, Slice


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a parameter, which lie at [offset, offset + numel) of `flat`."""

    name: str
    parameter: Any  # the model's own, with what DeepSpeed hangs on it
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: Tensor
    offset: int

    def view(self, flat: Tensor) -> Tensor:
        """This piece's view of `flat` or of a moment of the same size."""
        return flat.detach()[self.offset : self.offset + self.numel]


def flat_tensors(zero: Any, stage: int) -> list[tuple[Tensor, dict[str, Any]]]:
    """The fp32 tensors that this rank's optimizer updates, with the parameter group of each; alike in number
    and order on all ranks.
    """
    groups = zero.optimizer.param_groups
    if stage == 3:
        return [
            (flat, groups[zero.sub_group_to_group_id[i]])
            for i, flat in enumerate(zero.fp32_partitioned_groups_flat)
        ]
    return [(group["params"][0], group) for group in groups]


def fragments(zero: Any, module: nn.Module, stage: int) -> list[Fragment]:
    """What this rank owns, in the module's order; a parameter without elements here has no piece. Frozen ones
    are held apart: whole on rank 0 at stages 1 and 2, in every rank's share at stage 3.
    """
    found = _fragment_zero3 if stage == 3 else _fragment_zero12
    return [
        piece
        for name, p in module.named_parameters()
        if (piece := found(zero, name, p)) is not None and piece.numel > 0
    ]


def _fragment_zero12(zero: Any, name: str, p: Any) -> Fragment | None:
    if not p.requires_grad:
        return Fragment(
            name, p, tuple(p.shape), 0, p.numel() if dist.get_rank() == 0 else 0, p.detach().view(-1), 0
        )
    link = p._hp_mapping
    if link is None:
        return None
    flat = zero.optimizer.param_groups[link.param_group_index]["params"][0]
    here, there = link.lp_fragment_address, link.hp_fragment_address
    return Fragment(name, p, tuple(p.shape), here.start, here.numel, flat, there.start)


def _fragment_zero3(zero: Any, name: str, p: Any) -> Fragment:
    share = p.ds_tensor.numel()  # every rank has as much; the last ones are padded
    start = min(dist.get_rank() * share, p.ds_numel)
    numel = min(share, p.ds_numel - start)
    if not p.requires_grad:
        return Fragment(name, p, tuple(p.ds_shape), start, numel, p.ds_tensor.view(-1), 0)
    group, offset, _ = zero.grad_position[zero.get_param_id(p)]
    return Fragment(
        name, p, tuple(p.ds_shape), start, numel, zero.fp32_partitioned_groups_flat[group], offset
    )


def read_slices(owned: list[Fragment], state: dict[Tensor, dict[str, Tensor]]) -> dict[str, Slice]:
    """Copies in host memory: what is trained on after this call does not change them."""
    return {
        p.name: Slice(p.start, p.shape, {key: _snapshot(p.view(t)) for key, t in _tensors(p, state).items()})
        for p in owned
    }


@torch.no_grad()
def write_slices(owned: list[Fragment], state: dict[Tensor, dict[str, Tensor]], read: ReadSlice) -> None:
    """Fill the pieces from `read`. Raises UserError where a moment is missing there."""
    for p in owned:
        values = read(p.name, p.start, p.start + p.numel)
        values = {"ema": values["fp32"], **values}  # where no average was kept, it starts from here
        for key, tensor in _tensors(p, state).items():
            if key not in values:
                raise UserError(
                    f"the checkpoint holds {sorted(values)} of {p.name}, and this recipe needs its {key}"
                    " too: it was frozen, or trained by"
                    " another optimizer.kind. Continue with the recipe that wrote it, or start a new run"
                    " from its weights."
                )
            p.view(tensor).copy_(values[key])


def _tensors(piece: Fragment, state: dict[Tensor, dict[str, Tensor]]) -> dict[str, Tensor]:
    moments = state.get(piece.flat, {})
    return {
        "fp32": piece.flat,
        **{key: moment for key, moment in moments.items() if moment.shape == piece.flat.shape},
    }


def _snapshot(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)
