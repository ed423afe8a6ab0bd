"""Packed rows of examples, by number: in, segments; out, `Rows.row(i)`, a pure function of (fingerprint,
seed, i), as in pretraining.

The examples of a set are packed once (best fit), and each epoch visits the rows in an order drawn from (seed,
epoch). Several sets take turns by weight. Examples never see each other. Cost: 30,000 pairs pack in 0.1 s;
all of them stand in memory.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from trifold.pretrain.data.collate import Row, assemble
from trifold.pretrain.data.objectives import Segment
from trifold.pretrain.data.packing import Chunks, RowCapacity, pack_chunks
from trifold.pretrain.data.row_order import RowOrder, mixture_schedule


class TaskRows:
    """With a seed: endless, shuffled, the sets taking turns by weight. Without: the only set's rows once, in
    order.
    """

    targets_per_byte: float | None = None
    member_names: Sequence[str] = ()

    def __init__(
        self,
        sets: Sequence[Sequence[Segment]],
        room: RowCapacity,
        pad: int,
        weights: Sequence[float],
        seed: int | None,
    ) -> None:
        self.sets, self.capacity, self.pad = sets, room, pad
        self.with_types = any(segment.types is not None for segments in sets for segment in segments)
        self.packed = [pack_chunks(_pieces(segments), room) for segments in sets]
        sizes = [len(packed.offsets) - 1 for packed in self.packed]
        self.num_rows = sum(sizes)
        keys = [None if seed is None else (seed, 2, number) for number in range(len(sets))]
        self.orders = [RowOrder(np.array([size]), key) for size, key in zip(sizes, keys, strict=True)]
        self._turns = mixture_schedule(weights)
        used = sum(
            len(s.tokens) + (0 if s.source is None else len(s.source)) for segments in sets for s in segments
        )
        self.padding_fraction = 1 - used / (self.num_rows * (room.tokens + room.source))
        self.fingerprint = _fingerprint(sets, room, weights)

    def row(self, i: int) -> Row:
        """Row i of the run."""
        return self.rows([i])[0]

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        """Several rows."""
        places = [self._place(i) for i in numbers]
        segments = [[self.sets[number][j] for j in members] for number, members in places]
        return assemble(segments, self.capacity, self.pad, self.with_types)

    def empty_row(self) -> Row:
        """A row of padding, to fill up a micro: no targets."""
        return assemble([[]], self.capacity, self.pad, self.with_types)[0]

    def members(self, i: int) -> list[int]:
        """Which examples stand in row i, in the order of their segments (which count from 1)."""
        return self._place(i)[1]

    def _place(self, i: int) -> tuple[int, list[int]]:
        """The set that row i is made of, and which of its examples."""
        streams, before, counts = self._turns
        period, turn = divmod(i, len(streams))
        number = int(streams[turn])
        _, _, _, row = self.orders[number].locate(period * int(counts[number]) + int(before[turn]))
        packed = self.packed[number]
        return number, packed.document[packed.row(row)].tolist()


def row_capacity(sets: Sequence[Sequence[Segment]], row_length: int) -> RowCapacity:
    """What a row holds: `row_length` positions; where there are sources, those, and as many target positions
    as go with them on average.
    """
    segments = [segment for segments in sets for segment in segments]
    if segments[0].source is None:
        return RowCapacity(row_length)
    targets = [len(segment.tokens) for segment in segments]
    sources = sum(len(segment.source) for segment in segments if segment.source is not None)
    return RowCapacity(-(-max(*targets, round(row_length * sum(targets) / sources)) // 8) * 8, row_length)


def _pieces(segments: Sequence[Segment]) -> Chunks:
    index = np.arange(len(segments))
    tokens = np.array([len(segment.tokens) for segment in segments])
    sources = np.array([0 if segment.source is None else len(segment.source) for segment in segments])
    return Chunks(index, np.zeros_like(index), tokens, tokens, sources)


def _fingerprint(sets: Sequence[Sequence[Segment]], room: RowCapacity, weights: Sequence[float]) -> str:
    digest = hashlib.blake2b(
        repr((room, list(weights), [len(segments) for segments in sets])).encode(), digest_size=16
    )
    for segment in (segment for segments in sets for segment in segments):
        for array in (segment.tokens, segment.targets, segment.source, segment.types):
            if array is not None:
                digest.update(len(array).to_bytes(4, "little") + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
