"""Sequence parallelism (Ulysses, Jacobs et al. 2023): ranks share rows, each with a slice of the positions.

Before attention, slices of all heads become complete rows of some heads; after it, slices of all heads again.
Only attention looks beyond a slice, so only attention communicates: four exchanges in a layer and four in its
backward, of a slice's queries, keys, values and outputs. This file knows no process group: `swap` is the
collective. Shapes: B rows, T positions, t positions of a slice, N heads, n heads of a rank, H head dim, R
ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trifold.modeling.batch import Batch

# (R, ...) to (R, ...): chunk r goes to rank r, and the chunk in its place came from there.
AllToAll = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SequenceShard:
    """This rank's index among the `size` ranks that share rows."""

    index: int
    size: int
    swap: AllToAll

    def local(self, batch: Batch) -> Batch:
        """This rank's slice of a batch of complete rows.

        Segments stay complete, because attention needs them; of the picked positions those in the slice
        remain.
        """
        local = replace(
            batch,
            tokens=self._slice(batch.tokens),
            targets=self._slice(batch.targets),
            source=self._slice(batch.source),
            parts=self._slice(batch.parts),
            types=self._slice(batch.types),
        )
        if batch.picked is None:
            return local
        width = local.tokens.shape[1]
        picked = batch.picked - self.index * width  # below 0: padding, and positions of earlier slices
        picked = picked.where(picked < width, -1).topk(min(width, picked.shape[1])).values
        return replace(local, picked=picked)

    def gather(self, x_BNtH: Tensor) -> Tensor:
        """A slice of all heads to complete rows of this rank's heads, (B, n, T, H)."""
        chunks = x_BNtH.unflatten(1, (self.size, -1))
        chunks = chunks.permute(1, 3, 0, 2, 4)  # R, t, B, n, H: in this order (R, t) is T by a view
        return self._swapped(chunks).flatten(0, 1).permute(1, 2, 0, 3)

    def slice(self, x_BnTH: Tensor) -> Tensor:
        """Complete rows of this rank's heads to a slice of all heads, (B, N, t, H)."""
        chunks = x_BnTH.unflatten(2, (self.size, -1)).permute(2, 3, 0, 1, 4)
        return self._swapped(chunks).permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2)

    def local_heads(self, bias_1NQK: Tensor) -> Tensor:
        """The bias of this rank's heads, (1, n, Q, K)."""
        return bias_1NQK.chunk(self.size, dim=1)[self.index].contiguous()

    def _slice(self, x_BT: Tensor | None) -> Any:
        return None if x_BT is None else x_BT.unflatten(1, (self.size, -1))[:, self.index]

    def _swapped(self, chunks: Tensor) -> Tensor:
        swapped: Tensor = _Swapped.apply(chunks.contiguous(), self.swap)
        return swapped


class _Swapped(torch.autograd.Function):
    """The exchange between all ranks, which is its own inverse and its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, swap: AllToAll) -> Tensor:
        ctx.swap = swap
        return swap(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.swap(grads[0].contiguous()), None
