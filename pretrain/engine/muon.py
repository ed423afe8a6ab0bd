"""Muon over sharded state: matrices are put together from the ranks' pieces, orthogonalised by one rank each,
and handed back.

In: flat fp32 tensors with their gradients, as ZeRO hands them to its optimizer, and a table of where each
rank's pieces lie. Out: the same tensors, updated. The momentum is sharded like an Adam moment, so it is
sliced, saved and resumed alike; clipping and the check for values that are not finite come before, on the raw
gradient (DeepSpeed's own Muon clips the orthogonalised update). Cost: two all-to-all exchanges of this rank's
share per step; at stages 1 and 2 only matrices that cross a border between ranks travel.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class FlatRange:
    """One rank's elements [start, start + numel) of a matrix, at `offset` in its flat tensor; numel 0 where
    it holds none.
    """

    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Matrix:
    shape: tuple[int, int]
    shares: tuple[FlatRange, ...]  # by rank
    owner: int  # the rank that orthogonalises it


class Muon(torch.optim.AdamW):
    """AdamW, except in groups with a `momentum`: those are flat tensors of matrices, updated as
    torch.optim.Muon does (Jordan et al. 2024).

    `tables` must be filled, by id of a flat tensor and alike on all ranks, before the first step;
    `grad_scale` and `found_inf`: lean.py.
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
        orthogonal = self._exchange(update, self.tables[id(flat)])
        flat.mul_(1 - group["lr"] * group["weight_decay"]).add_(orthogonal, alpha=-group["lr"])

    def _exchange(self, update: Tensor, matrices: list[Matrix]) -> Tensor:
        """Each matrix of `update` orthogonalised and scaled to its shape; what this rank holds of it."""
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = [m for m in matrices if m.owner == rank]
        out = [
            [m.shares[rank] for m in matrices if m.owner == r] for r in range(world)
        ]  # what goes to each owner, and comes back
        into = [[m.shares[r] for m in mine] for r in range(world)]
        sent = [update[s.offset : s.offset + s.numel] for shares in out for s in shares]
        received = _all_to_all(torch.cat(sent), out, into).split([s.numel for shares in into for s in shares])
        by_matrix = [
            torch.cat(received[i :: len(mine)]) for i in range(len(mine))
        ]  # a matrix's pieces lie in the order of the ranks
        done = [
            _orthogonalise(flat.view(m.shape), self.dtype).flatten()
            for flat, m in zip(by_matrix, mine, strict=True)
        ]
        back = [
            flat[s.start : s.start + s.numel] for shares in into for flat, s in zip(done, shares, strict=True)
        ]
        returned = _all_to_all(torch.cat([*back, update[:0]]), into, out).split(
            [s.numel for shares in out for s in shares]
        )
        result = torch.zeros_like(update)
        for share, values in zip([s for shares in out for s in shares], returned, strict=True):
            result[share.offset : share.offset + share.numel] = values
        return result


def assign_owners(pieces: list[dict[str, tuple[tuple[int, int], FlatRange]]]) -> list[Matrix]:
    """The matrices of one flat tensor from every rank's {name: (shape, share)}: each goes to the rank that
    holds most of it, which leaves least to send; equal shares take turns.
    """
    shapes = {name: shape for rank in pieces for name, (shape, _) in rank.items()}
    matrices = []
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        shares = tuple(rank[name][1] if name in rank else FlatRange(0, 0, 0) for rank in pieces)
        turn = [(r + i) % len(pieces) for r in range(len(pieces))]
        matrices.append(Matrix(shape, shares, max(turn, key=lambda r: shares[r].numel)))
    return matrices


def _all_to_all(tensor: Tensor, out: list[list[FlatRange]], into: list[list[FlatRange]]) -> Tensor:
    out_sizes, into_sizes = ([sum(s.numel for s in shares) for shares in side] for side in (out, into))
    received = tensor.new_empty(sum(into_sizes))
    dist.all_to_all_single(received, tensor, into_sizes, out_sizes)
    return received


def _orthogonalise(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearly U V^T of x = U S V^T, by five Newton-Schulz steps with Jordan's coefficients, times sqrt(max(1,
    rows / columns)).
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
