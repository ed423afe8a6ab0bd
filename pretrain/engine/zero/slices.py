"""Parameter slices: this rank's share of the fp32 master weights and moments, by parameter name.

A `Fragment` says where a parameter's elements lie in the flat tensors of a DeepSpeed ZeRO optimizer, of any
stage. Fragments are read into slices in host memory and written back from them, so state moves between any
two world sizes and stages. Reading requires no collective.
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
    parameter: Any  # the model's own, with the attributes that DeepSpeed adds to it
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: Tensor
    offset: int

    def view(self, flat: Tensor) -> Tensor:
        """This fragment of `flat`, or of a moment of the same size, as a view."""
        return flat.detach()[self.offset : self.offset + self.numel]


def flat_tensors(zero: Any, stage: int) -> list[tuple[Tensor, dict[str, Any]]]:
    """The fp32 tensors that this rank's optimizer updates, with the parameter group of each; the same number
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
    """This rank's fragments, in the module's order; parameters without elements here have none.

    The optimizer does not hold frozen parameters: at stages 1 and 2 rank 0 has them completely, at stage 3
    every rank has its shard.
    """
    make = _fragment_zero3 if stage == 3 else _fragment_zero12
    candidates = [make(zero, name, parameter) for name, parameter in module.named_parameters()]
    return [fragment for fragment in candidates if fragment is not None and fragment.numel > 0]


def _fragment_zero12(zero: Any, name: str, p: Any) -> Fragment | None:
    if not p.requires_grad:
        numel = p.numel() if dist.get_rank() == 0 else 0
        return Fragment(name, p, tuple(p.shape), 0, numel, p.detach().view(-1), 0)
    mapping = p._hp_mapping
    if mapping is None:
        return None
    flat = zero.optimizer.param_groups[mapping.param_group_index]["params"][0]
    in_parameter, in_flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(name, p, tuple(p.shape), in_parameter.start, in_parameter.numel, flat, in_flat.start)


def _fragment_zero3(zero: Any, name: str, p: Any) -> Fragment:
    shard = p.ds_tensor.numel()  # the same on every rank; the last ones are padded
    start = min(dist.get_rank() * shard, p.ds_numel)
    numel = min(shard, p.ds_numel - start)
    if not p.requires_grad:
        return Fragment(name, p, tuple(p.ds_shape), start, numel, p.ds_tensor.view(-1), 0)
    group, offset, _ = zero.grad_position[zero.get_param_id(p)]
    flat = zero.fp32_partitioned_groups_flat[group]
    return Fragment(name, p, tuple(p.ds_shape), start, numel, flat, offset)


def read_slices(owned: list[Fragment], state: dict[Tensor, dict[str, Tensor]]) -> dict[str, Slice]:
    """Copies of the fragments in host memory, which further training does not change."""
    slices = {}
    for fragment in owned:
        tensors = _tensors(fragment, state)
        copies = {key: _copy_to_host(fragment.view(flat)) for key, flat in tensors.items()}
        slices[fragment.name] = Slice(fragment.start, fragment.shape, copies)
    return slices


@torch.no_grad()
def write_slices(owned: list[Fragment], state: dict[Tensor, dict[str, Tensor]], read: ReadSlice) -> None:
    """Fill the fragments from `read`. Raises UserError where it lacks a moment."""
    for fragment in owned:
        saved = read(fragment.name, fragment.start, fragment.start + fragment.numel)
        values = {"ema": saved["fp32"], **saved}  # an average that was not kept starts from the weights
        for key, flat in _tensors(fragment, state).items():
            if key not in values:
                raise UserError(
                    f"the checkpoint has {sorted(saved)} of {fragment.name}, and this recipe requires its"
                    f" {key} too: it was frozen, or trained by another optimizer.kind. Continue with the"
                    " recipe that wrote it, or start a new run from its weights."
                )
            fragment.view(flat).copy_(values[key])


def _tensors(fragment: Fragment, state: dict[Tensor, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The flat tensors that hold the fragment: "fp32", and the moments by name (not AdamW's `step`)."""
    flat = fragment.flat
    moments = {key: value for key, value in state.get(flat, {}).items() if value.shape == flat.shape}
    return {"fp32": flat, **moments}


def _copy_to_host(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)
