"""Packed rows of examples, by number: segments come in, `TaskRows.row(i)` goes out, a pure function of
(fingerprint, seed, i), as in pretraining.

The examples of a set are packed once (best fit), and each epoch visits the rows in an order drawn from (seed,
epoch). Several sets alternate by weight. Examples never see each other. Cost: 30,000 pairs pack in 0.1 s;
all of them are kept in memory.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from trifold.pretrain.data.collate import Row, assemble
from trifold.pretrain.data.objectives import Segment
from trifold.pretrain.data.packing import Chunks, RowCapacity, pack_chunks
from trifold.pretrain.data.row_order import RowOrder, mixture_schedule


class TaskRows:
    """With a seed: endless and shuffled, the sets alternating by weight. Without: the only set's rows once,
    in order.
    """

    targets_per_byte: float | None = None
    member_names: Sequence[str] = ()

    def __init__(
        self,
        sets: Sequence[Sequence[Segment]],
        capacity: RowCapacity,
        pad: int,
        weights: Sequence[float],
        seed: int | None,
    ) -> None:
        self.sets, self.capacity, self.pad = sets, capacity, pad
        self.with_types = any(segment.types is not None for segments in sets for segment in segments)
        self.packed = [pack_chunks(_chunks(segments), capacity) for segments in sets]
        sizes = [len(packed.offsets) - 1 for packed in self.packed]
        self.num_rows = sum(sizes)
        keys = [None if seed is None else (seed, 2, number) for number in range(len(sets))]
        self.orders = [RowOrder(np.array([size]), key) for size, key in zip(sizes, keys, strict=True)]
        self._schedule = mixture_schedule(weights)

        used = sum(_num_tokens(segment) for segments in sets for segment in segments)
        self.padding_fraction = 1 - used / (self.num_rows * (capacity.tokens + capacity.source))
        self.fingerprint = _fingerprint(sets, capacity, weights)

    def row(self, i: int) -> Row:
        """Row i of the run."""
        return self.rows([i])[0]

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        """Several rows."""
        located = [self._locate(i) for i in numbers]
        members = [[self.sets[number][j] for j in indices] for number, indices in located]
        return assemble(members, self.capacity, self.pad, self.with_types)

    def empty_row(self) -> Row:
        """A row of padding, to fill up a micro-batch: no targets."""
        return assemble([[]], self.capacity, self.pad, self.with_types)[0]

    def members(self, i: int) -> list[int]:
        """Indices of the examples of row i, in the order of their segments (which count from 1)."""
        return self._locate(i)[1]

    def _locate(self, i: int) -> tuple[int, list[int]]:
        """The set that row i is made of, and the indices of its examples."""
        number, index = self._schedule.locate(i)
        row = self.orders[number].locate(index).row
        packed = self.packed[number]
        return number, packed.document[packed.row(row)].tolist()


def row_capacity(sets: Sequence[Sequence[Segment]], row_length: int) -> RowCapacity:
    """What a row holds: `row_length` positions; where there are sources, those, and as many target positions
    as they have on average.
    """
    segments = [segment for segments in sets for segment in segments]
    if segments[0].source is None:
        return RowCapacity(row_length)
    targets = [len(segment.tokens) for segment in segments]
    sources = sum(len(segment.source) for segment in segments if segment.source is not None)
    needed = max(*targets, round(row_length * sum(targets) / sources))
    return RowCapacity(-(-needed // 8) * 8, row_length)  # rounded up to a multiple of 8


def _num_tokens(segment: Segment) -> int:
    return len(segment.tokens) + (0 if segment.source is None else len(segment.source))


def _chunks(segments: Sequence[Segment]) -> Chunks:
    index = np.arange(len(segments))
    tokens = np.array([len(segment.tokens) for segment in segments])
    sources = np.array([0 if segment.source is None else len(segment.source) for segment in segments])
    return Chunks(index, np.zeros_like(index), tokens, tokens, sources)


def _fingerprint(sets: Sequence[Sequence[Segment]], capacity: RowCapacity, weights: Sequence[float]) -> str:
    settings = [list(capacity), list(weights), [len(segments) for segments in sets]]
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
    for segments in sets:
        for segment in segments:
            for array in (segment.tokens, segment.targets, segment.source, segment.types):
                if array is not None:
                    digest.update(len(array).to_bytes(4, "little") + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
