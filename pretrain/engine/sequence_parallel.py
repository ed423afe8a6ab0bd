"""Ranks that share rows: in, this rank's place among all and how many share (`engine.sequence_parallel`);
out, which rows are dealt to it, its slice of them, and the exchange that attention goes through
(modeling/sequence_parallel.py).

Neighbours share: with two a row, ranks 0 and 1 of four have the same. Gradients need nothing new: each rank's
loss is its slice's, and the engine's mean is over all ranks. With one a row, nothing here does anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from trifold.modeling.batch import Batch
from trifold.modeling.sequence_parallel import SequenceShard
from trifold.modeling.transformer import Transformer
from trifold.pretrain.config.training import EngineConfig


class SequenceParallelGroup:
    """This rank and those that share its rows. Made once all ranks have met."""

    def __init__(self, rank: int, world: int, settings: EngineConfig) -> None:
        """Raises UserError where the ranks make no whole number of groups."""
        size = settings.sequence_parallel
        self.data_parallel_size = settings.data_parallel_size(world)
        self.group, self.place = divmod(rank, size)
        self.shared = SequenceShard(self.place, size, self._swap) if size > 1 else None
        self._group = dist.new_subgroups(size)[0] if size > 1 else None

    @property
    def data_rank(self) -> tuple[int, int, bool]:
        """To whom rows are dealt: which of how many, ranks that share them being one; and whether this one
        counts them, their first.
        """
        return self.group, self.data_parallel_size, self.place == 0

    def slice(self, batch: Batch) -> Batch:
        """This rank's slice of whole rows."""
        return batch if self.shared is None else self.shared.local(batch)

    def gather(self, x_BT: Tensor) -> Tensor:
        """What belongs to positions, (B, t, ...), of all slices (B, T, ...), on every rank."""
        if self.shared is None:
            return x_BT
        slices = [
            torch.empty_like(x_BT, memory_format=torch.contiguous_format) for _ in range(self.shared.size)
        ]
        dist.all_gather(slices, x_BT.contiguous(), self._group)
        return torch.cat(slices, dim=1)

    @contextmanager
    def disabled(self, model: Transformer) -> Iterator[None]:
        """While inside, this rank computes on whole rows by itself."""
        model.set_sequence_shard(None)
        try:
            yield
        finally:
            model.set_sequence_shard(self.shared)

    def _swap(self, x: Tensor) -> Tensor:
        swapped = torch.empty_like(x)
        dist.all_to_all_single(swapped, x, group=self._group)
        return swapped
