"""Segments side by side in rows, and rows in batches: segments of any number of rows come in, Row and Batch
go out.

Example: two rows of capacity 5, the first of segments of 2 and 1 tokens, the second of one segment of 3; pad
0:

    >>> segments = [Segment(np.array([7, 8]), np.array([8, 9])), Segment(np.array([6]), np.array([9]))]
    >>> longer = Segment(np.array([4, 5, 6]), np.array([5, 6, 9]))
    >>> first, second = assemble([segments, [longer]], RowCapacity(tokens=5), pad=0)
    >>> first.tokens.tolist(), first.segments.tolist(), first.targets.tolist()
    ([7, 8, 6, 0, 0], [1, 1, 2, 0, 0], [8, 9, 9, -100, -100])
    >>> second.tokens.tolist(), second.segments.tolist()
    ([4, 5, 6, 0, 0], [1, 1, 1, 0, 0])
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from trifold.modeling.batch import IGNORE, Batch
from trifold.pretrain.data.objectives import Segment, SegmentGroup, Segments
from trifold.pretrain.data.packing import RowCapacity
from trifold.pretrain.data.ragged import EMPTY, ragged_arange


@dataclass(frozen=True)
class Row:
    """One packed row, all int64 and as in Batch: tokens, segments, targets (T,), source, source_segments
    (S,), picked (P,), parts and types (T,).
    """

    tokens: np.ndarray
    segments: np.ndarray
    targets: np.ndarray
    source: np.ndarray | None = None
    source_segments: np.ndarray | None = None
    picked: np.ndarray | None = None
    parts: np.ndarray | None = None
    types: np.ndarray | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that there are, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}

    @property
    def num_targets(self) -> int:
        """Targets that are predicted."""
        return int(np.count_nonzero(self.targets != IGNORE))

    @property
    def num_tokens(self) -> int:
        """Positions that are not padding, on both sides."""
        sides = (self.segments, self.source_segments)
        return sum(int(np.count_nonzero(side)) for side in sides if side is not None)

    @property
    def hash(self) -> int:
        """63 bits of the row's content. The sum over the rows of a step tells two steps apart, however the
        ranks shared the rows.
        """
        digest = hashlib.blake2b(digest_size=8)
        for array in self.arrays.values():
            digest.update(array.data)
        return int.from_bytes(digest.digest(), "little") >> 1


def assemble(
    rows: Sequence[Sequence[Segment]], capacity: RowCapacity, pad: int, with_types: bool = False
) -> list[Row]:
    """Rows of single segments. `with_types`: they have token types, and so have the rows."""
    segments = [segment for row in rows for segment in row]
    tokens, sizes = _concatenate([segment.tokens for segment in segments])
    targets, _ = _concatenate([segment.targets for segment in segments])
    sources = _concatenate([segment.source for segment in segments if segment.source is not None])
    group = SegmentGroup(0, np.arange(len(segments)), Segments(tokens, targets, sizes, *sources))
    arranged = arrange_rows([group], [len(row) for row in rows], capacity, pad)
    if not with_types:
        return arranged
    return [
        replace(row, types=_types(members, capacity.tokens))
        for row, members in zip(arranged, rows, strict=True)
    ]


def _types(segments: Sequence[Segment], width: int) -> np.ndarray:
    """The token types of a row, 0 in its padding."""
    types, end = np.zeros(width, np.int64), 0
    for segment in segments:
        begin, end = end, end + len(segment.tokens)
        if segment.types is not None:
            types[begin:end] = segment.types
    return types


def _concatenate(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The arrays one after another, and their lengths."""
    return np.concatenate([EMPTY, *arrays]), np.array([len(array) for array in arrays], np.int64)


def arrange_rows(
    groups: Sequence[SegmentGroup],
    counts: Sequence[int],
    capacity: RowCapacity,
    pad: int,
    mixed: bool = False,
) -> list[Row]:
    """Rows of `counts` segments each, side by side and numbered from 1. The rest is padding: segment 0,
    target IGNORE, picked -1. With `mixed`, rows tell the member of the mixture of each position (`parts`).
    """
    layout = _RowLayout(groups, counts)
    tokens, segments, targets = (layout.full(capacity.tokens, value) for value in (pad, 0, IGNORE))
    sizes = [group.segments.sizes for group in groups]
    begins = layout.begins(sizes)
    indices = layout.flat_indices(begins, sizes, capacity.tokens)
    _put(tokens, indices, [group.segments.tokens for group in groups])
    _put(targets, indices, [group.segments.targets for group in groups])
    _put(segments, indices, layout.segment_numbers(sizes))
    optional: dict[str, np.ndarray] = {}

    if capacity.source:
        source, source_segments = (layout.full(capacity.source, value) for value in (pad, 0))
        source_sizes = [group.segments.source_sizes for group in groups]
        indices_of_source = layout.flat_indices(layout.begins(source_sizes), source_sizes, capacity.source)
        _put(source, indices_of_source, [group.segments.source for group in groups])
        _put(source_segments, indices_of_source, layout.segment_numbers(source_sizes))
        optional |= {"source": source, "source_segments": source_segments}

    if capacity.picked:
        picked = layout.full(capacity.picked, -1)
        picked_sizes = [group.segments.picked_sizes for group in groups]
        indices_of_picked = layout.flat_indices(layout.begins(picked_sizes), picked_sizes, capacity.picked)
        _put(picked, indices_of_picked, [_picked_in_row(group, begins) for group in groups])
        optional["picked"] = picked

    if mixed:
        parts = layout.full(capacity.tokens, 0)
        _put(parts, indices, [np.array(group.member) for group in groups])
        optional["parts"] = parts

    rows = []
    for i in range(len(counts)):
        extra = {name: array[i] for name, array in optional.items()}
        rows.append(Row(tokens[i], segments[i], targets[i], **extra))
    return rows


class _RowLayout:
    """The row of each of N segments, and its number there. Segments are numbered over all rows; each group
    has the numbers of its own.
    """

    def __init__(self, groups: Sequence[SegmentGroup], counts: Sequence[int]) -> None:
        self.groups, self.num_rows = groups, len(counts)
        counts_array = np.array(counts, np.int64)  # int64 also where there are no rows
        self.row_of = np.repeat(np.arange(self.num_rows), counts_array)
        self.first_segment = counts_array.cumsum() - counts_array
        self.numbers = np.arange(1, len(self.row_of) + 1) - self.first_segment[self.row_of]

    def full(self, width: int, value: int) -> np.ndarray:
        return np.full((self.num_rows, width), value)

    def begins(self, sizes: Sequence[np.ndarray]) -> np.ndarray:
        """(N,) the position in its row at which each segment begins; `sizes`: those of each group."""
        ends = np.zeros(len(self.row_of) + 1, np.int64)
        for group, group_sizes in zip(self.groups, sizes, strict=True):
            ends[group.indices + 1] = group_sizes
        ends = ends.cumsum()
        return ends[:-1] - ends[self.first_segment][self.row_of]

    def flat_indices(self, begins: np.ndarray, sizes: Sequence[np.ndarray], width: int) -> list[np.ndarray]:
        """For each group, the indices of its values in the flat array of all rows of `width`."""
        flat_begins = begins + self.row_of * width
        indices = []
        for group, group_sizes in zip(self.groups, sizes, strict=True):
            indices.append(ragged_arange(flat_begins[group.indices], group_sizes))
        return indices

    def segment_numbers(self, sizes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """For each group, the segment's number in its row at each of its positions."""
        numbers = []
        for group, group_sizes in zip(self.groups, sizes, strict=True):
            numbers.append(np.repeat(self.numbers[group.indices], group_sizes))
        return numbers


def _picked_in_row(group: SegmentGroup, begins: np.ndarray) -> np.ndarray:
    """A group's picked positions, counted in their rows."""
    segments = group.segments
    shift = begins[group.indices] - (segments.sizes.cumsum() - segments.sizes)
    return segments.picked + np.repeat(shift, segments.picked_sizes)


def _put(array: np.ndarray, indices: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> None:
    for group_indices, group_values in zip(indices, values, strict=True):
        array.put(group_indices, group_values)


def stack(rows: Sequence[Row], pin: bool = False) -> Batch:
    """Rows of one shape as a batch; `pin`: in pinned memory, for copies to a GPU that do not block."""
    shape = (len(rows), -1)  # concatenate: np.stack costs four times as much for rows this short
    arrays = {}
    for name in rows[0].arrays:
        joined = np.concatenate([getattr(row, name) for row in rows]).reshape(shape)
        tensor = torch.from_numpy(joined)
        arrays[name] = tensor.pin_memory() if pin else tensor
    return Batch(**arrays)
