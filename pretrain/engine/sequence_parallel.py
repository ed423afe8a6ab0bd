"""Sequence parallelism in the engine: `engine.sequence_parallel` neighbouring ranks share each row, a slice
of its positions each.

With two a row, ranks 0 and 1 of four have the same rows. The group says which rows a rank reads, cuts its
slice of them, and does the all-to-all exchange inside attention (modeling/sequence_parallel.py). Gradients
need nothing new: each rank's loss is its slice's, and the engine's mean is over all ranks. With
sequence_parallel 1 this is a no-op.
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
    """The ranks that share this rank's rows. `index` is this rank's slice among them."""

    def __init__(self, rank: int, world: int, config: EngineConfig) -> None:
        """The process group of all ranks must exist. Raises UserError where `world` is not a multiple of the
        group's size.
        """
        size = config.sequence_parallel
        self.num_groups = config.data_parallel_size(world)
        self.group, self.index = divmod(rank, size)
        self.shard = SequenceShard(self.index, size, self._all_to_all) if size > 1 else None
        self._process_group = dist.new_subgroups(size)[0] if size > 1 else None

    @property
    def data_rank(self) -> tuple[int, int, bool]:
        """Which of how many groups reads the rows, and whether this rank is the one that counts them (its
        group's first).
        """
        return self.group, self.num_groups, self.index == 0

    def slice(self, batch: Batch) -> Batch:
        """This rank's slice of complete rows."""
        return batch if self.shard is None else self.shard.local(batch)

    def gather(self, x_BT: Tensor) -> Tensor:
        """Values of all positions (B, T, ...), on every rank, from this rank's slice of them (B, t, ...)."""
        if self.shard is None:
            return x_BT
        slices = [
            torch.empty_like(x_BT, memory_format=torch.contiguous_format) for _ in range(self.shard.size)
        ]
        dist.all_gather(slices, x_BT.contiguous(), self._process_group)
        return torch.cat(slices, dim=1)

    @contextmanager
    def disabled(self, model: Transformer) -> Iterator[None]:
        """Within the context this rank computes complete rows by itself."""
        model.set_sequence_shard(None)
        try:
            yield
        finally:
            model.set_sequence_shard(self.shard)

    def _all_to_all(self, x: Tensor) -> Tensor:
        output = torch.empty_like(x)
        dist.all_to_all_single(output, x, group=self._process_group)
        return output
