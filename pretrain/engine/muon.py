"""Muon over sharded state: each matrix is gathered from the ranks' shards, orthogonalised by one rank, and
scattered back.

It steps flat fp32 tensors with their gradients, as ZeRO hands them to its optimizer, and has a table of
where each rank's ranges of each matrix lie in them. The momentum is sharded like an Adam moment, so it is
sliced, saved and resumed alike. Clipping and the check for values that are not finite come before, on the
raw gradient (DeepSpeed's own Muon clips the orthogonalised update). Cost: two all-to-all exchanges of this
rank's share per step; at stages 1 and 2 only matrices that cross a border between ranks travel.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class FlatRange:
    """One rank's elements [start, start + numel) of a matrix, at `offset` in its flat tensor; numel 0 where
    it has none.
    """

    start: int
    numel: int
    offset: int

    @property
    def in_flat(self) -> slice:
        return slice(self.offset, self.offset + self.numel)

    @property
    def in_matrix(self) -> slice:
        return slice(self.start, self.start + self.numel)


@dataclass(frozen=True)
class Matrix:
    shape: tuple[int, int]
    ranges: tuple[FlatRange, ...]  # by rank
    owner: int  # the rank that orthogonalises it


class Muon(torch.optim.AdamW):
    """AdamW, except for groups with a `momentum`: flat tensors of matrices, updated as torch.optim.Muon does
    (Jordan et al. 2024).

    `tables` must be filled, by the id of a flat tensor and alike on all ranks, before the first step.
    `grad_scale` and `found_inf` are set by zero/zero1_step.py.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, **adam: Any) -> None:
        super().__init__(groups, **adam)
        self.dtype = dtype  # of Newton-Schulz
        self.tables: dict[int, list[Matrix]] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        super().step()
        self.param_groups = groups

        if self.found_inf is not None and self.found_inf:
            return
        for group in groups:
            if "momentum" in group:
                for flat in group["params"]:
                    self._step_matrices(flat, group)

    def _step_matrices(self, flat: Tensor, group: dict[str, Any]) -> None:
        assert flat.grad is not None
        if self.grad_scale is not None:
            flat.grad.div_(self.grad_scale)
        momentum = self.state[flat]["momentum"].lerp_(flat.grad, 1 - group["momentum"])
        update = flat.grad.lerp(momentum, group["momentum"])  # Nesterov
        orthogonal = self._orthogonalise_all(update, self.tables[id(flat)])
        flat.mul_(1 - group["lr"] * group["weight_decay"]).add_(orthogonal, alpha=-group["lr"])

    def _orthogonalise_all(self, update: Tensor, matrices: list[Matrix]) -> Tensor:
        """`update` with each matrix replaced by its orthogonalised one. All tensors are this rank's share.

        Each rank sends its range of every matrix to the matrix's owner, who orthogonalises the complete
        matrix and sends every rank its range of the result.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        owned_by = [[m for m in matrices if m.owner == owner] for owner in range(world)]
        owned = owned_by[rank]
        # ranges[r] is exchanged with rank r: of this rank, in the matrices of owner r; of rank r, in its own
        local_ranges = [[m.ranges[rank] for m in owned_by[owner]] for owner in range(world)]
        owned_ranges = [[m.ranges[other] for m in owned] for other in range(world)]

        sent = [update[r.in_flat] for r in chain(*local_ranges)]
        received = _all_to_all(sent, update, local_ranges, owned_ranges)
        results = []
        for i, matrix in enumerate(owned):
            shards = received[i :: len(owned)]  # of this matrix, in the order of ranks
            full = torch.cat(shards).view(matrix.shape)
            results.append(_orthogonalise(full, self.dtype).flatten())

        sent = []
        for ranges in owned_ranges:
            sent += [result[r.in_matrix] for result, r in zip(results, ranges, strict=True)]
        returned = _all_to_all(sent, update, owned_ranges, local_ranges)
        output = torch.zeros_like(update)
        for r, values in zip(chain(*local_ranges), returned, strict=True):
            output[r.in_flat] = values
        return output


def assign_owners(ranks: list[dict[str, tuple[tuple[int, int], FlatRange]]]) -> list[Matrix]:
    """The matrices of one flat tensor from every rank's {name: (shape, range)}.

    Each is owned by the rank that has most of it, which leaves least to send; where ranks have equally much,
    the ranks alternate.
    """
    shapes = {name: shape for rank in ranks for name, (shape, _) in rank.items()}
    matrices = []
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        ranges = tuple(rank[name][1] if name in rank else FlatRange(0, 0, 0) for rank in ranks)
        sizes = [r.numel for r in ranges]
        alternating = [(rank + i) % len(ranks) for rank in range(len(ranks))]
        matrices.append(Matrix(shape, ranges, owner=max(alternating, key=sizes.__getitem__)))
    return matrices


def _all_to_all(
    tensors: list[Tensor], like: Tensor, outgoing: list[list[FlatRange]], incoming: list[list[FlatRange]]
) -> list[Tensor]:
    """Send `tensors`, one for each of the `outgoing` ranges by rank; returns one for each of the `incoming`.
    All are flat, of the dtype and device of `like`.
    """
    output = like.new_empty(_numel(chain(*incoming)))
    dist.all_to_all_single(
        output,
        torch.cat([like[:0], *tensors]),
        [_numel(ranges) for ranges in incoming],
        [_numel(ranges) for ranges in outgoing],
    )
    return list(output.split([r.numel for r in chain(*incoming)]))


def _numel(ranges: Iterable[FlatRange]) -> int:
    return sum(r.numel for r in ranges)


def _orthogonalise(x: Tensor, dtype: torch.dtype) -> Tensor:
    """About U V^T of x = U S V^T, by five Newton-Schulz steps with Jordan's coefficients, times
    sqrt(max(1, rows / columns)).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.to(dtype)
    tall = x.size(0) > x.size(1)
    y = y.T if tall else y
    y = y / y.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    y = y.T if tall else y
    return y.to(x.dtype) * math.sqrt(max(1.0, x.size(0) / x.size(1)))
