"""Rows that several ranks share, a slice of the positions each (Ulysses, Jacobs et al. 2023): in, this rank's
slice of queries, keys and values of all heads; out, the whole row of some heads, and after attention the
slice of all heads again.

Only attention looks beyond a slice, so only attention exchanges anything: four times in a layer, and four
times in its backward, a slice's queries, keys, values and results but for the share that stays. Nothing here
knows ranks: `swap` connects them. Shapes: B rows, T positions, t of a slice, N heads, n of a rank, H head
dim, R ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trifold.modeling.batch import Batch

AllToAll = Callable[
    [Tensor], Tensor
]  # (R, ...) to (R, ...): piece r goes to rank r, and the one in its place came from there


@dataclass(frozen=True)
class SequenceShard:
    """One of `size` ranks that share rows, and which slice it holds."""

    place: int
    size: int
    swap: AllToAll

    def local(self, batch: Batch) -> Batch:
        """This rank's slice of a batch of whole rows. The segments stay whole, for attention; of the picks
        those of the slice are left.
        """

        def cut(x_BT: Tensor | None) -> Any:
            return None if x_BT is None else x_BT.unflatten(1, (self.size, -1))[:, self.place]

        mine = replace(
            batch,
            tokens=cut(batch.tokens),
            targets=cut(batch.targets),
            source=cut(batch.source),
            parts=cut(batch.parts),
            types=cut(batch.types),
        )
        if batch.picked is None:
            return mine
        width = mine.tokens.shape[1]
        at = batch.picked - self.place * width  # below 0: padding, and slices before
        return replace(mine, picked=at.where(at < width, -1).topk(min(width, at.shape[1])).values)

    def gather(self, x_BNtH: Tensor) -> Tensor:
        """A slice of all heads to the whole row of this rank's heads, (B, n, T, H)."""
        pieces = x_BNtH.unflatten(1, (self.size, -1)).permute(
            1, 3, 0, 2, 4
        )  # R, t, B, n, H: what comes back is T by a view
        return self._swapped(pieces).flatten(0, 1).permute(1, 2, 0, 3)

    def slice(self, x_BnTH: Tensor) -> Tensor:
        """The whole row of this rank's heads to a slice of all heads, (B, N, t, H)."""
        pieces = x_BnTH.unflatten(2, (self.size, -1)).permute(2, 3, 0, 1, 4)
        return self._swapped(pieces).permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2)

    def local_heads(self, bias_1NQK: Tensor) -> Tensor:
        """What belongs to this rank's heads, (1, n, Q, K)."""
        return bias_1NQK.chunk(self.size, dim=1)[self.place].contiguous()

    def _swapped(self, pieces: Tensor) -> Tensor:
        swapped: Tensor = _Swapped.apply(pieces.contiguous(), self.swap)
        return swapped


class _Swapped(torch.autograd.Function):
    """An exchange between all ranks; gradients go back the way their values came, by the same exchange."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, swap: AllToAll) -> Tensor:
        ctx.swap = swap
        return swap(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.swap(grads[0].contiguous()), None
