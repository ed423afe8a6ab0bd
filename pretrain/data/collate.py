"""Segments side by side in rows, and rows in batches: in, segments of any number of rows; out, Row and
Batch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trifold.modeling.batch import IGNORE, Batch
from trifold.pretrain.data.objectives import Segment, SegmentGroup, Segments
from trifold.pretrain.data.packing import RowCapacity
from trifold.pretrain.data.ragged import EMPTY, ragged_arange


@dataclass(frozen=True)
class Row:
    """One packed row: tokens, segments, targets (T,), source, source_segments (S,), picked (P,), parts (T,),
    all int64, as in Batch.
    """

    tokens: np.ndarray
    segments: np.ndarray
    targets: np.ndarray
    source: np.ndarray | None = None
    source_segments: np.ndarray | None = None
    picked: np.ndarray | None = None
    parts: np.ndarray | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {name: array for name, array in vars(self).items() if array is not None}

    @property
    def num_targets(self) -> int:
        """Targets that are predicted."""
        return int(np.count_nonzero(self.targets != IGNORE))

    @property
    def num_tokens(self) -> int:
        """Positions that are not padding, of both sides."""
        return sum(
            int(np.count_nonzero(side)) for side in (self.segments, self.source_segments) if side is not None
        )

    @property
    def hash(self) -> int:
        """63 bits of what is in the row; their sum over the rows of a step tells two steps apart, however
        rows were shared out.
        """
        digest = hashlib.blake2b(digest_size=8)
        for array in self.arrays.values():
            digest.update(array.data)
        return int.from_bytes(digest.digest(), "little") >> 1


def assemble(rows: Sequence[Sequence[Segment]], room: RowCapacity, pad: int) -> list[Row]:
    """Rows of segments that are at hand one by one."""

    def joined(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate([EMPTY, *arrays]), np.array([len(array) for array in arrays], np.int64)

    segments = [segment for row in rows for segment in row]
    tokens, sizes = joined([segment.tokens for segment in segments])
    targets, _ = joined([segment.targets for segment in segments])
    sources = joined([segment.source for segment in segments if segment.source is not None])
    group = SegmentGroup(0, np.arange(len(segments)), Segments(tokens, targets, sizes, *sources))
    return arrange_rows([group], [len(row) for row in rows], room, pad)


def arrange_rows(
    groups: Sequence[SegmentGroup], counts: Sequence[int], room: RowCapacity, pad: int, mixed: bool = False
) -> list[Row]:
    """Rows of the next `counts` segments each, side by side and numbered from 1; the rest is padding (segment
    0, target IGNORE, picked -1). `mixed`: of several parts, and the rows say which.
    """
    many = np.array(counts, np.int64)  # also of no rows at all
    row_of, firsts = np.repeat(np.arange(len(counts)), many), many.cumsum() - many
    number = np.arange(1, len(row_of) + 1) - firsts[row_of]

    def places(width: int, sizes: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Where in its row each segment begins, and where what each group has goes among all rows'
        numbers.
        """
        ends = np.zeros(len(row_of) + 1, np.int64)
        for group, its in zip(groups, sizes, strict=True):
            ends[group.pieces + 1] = its
        ends = ends.cumsum()
        begin = ends[:-1] - ends[firsts][row_of]
        return begin, [
            ragged_arange((begin + row_of * width)[group.pieces], its)
            for group, its in zip(groups, sizes, strict=True)
        ]

    def filled(width: int, *values: int) -> list[np.ndarray]:
        return [np.full((len(counts), width), value) for value in values]

    tokens, numbers, targets = filled(room.tokens, pad, 0, IGNORE)
    [parts] = filled(room.tokens if mixed else 0, 0)
    begin, at = places(room.tokens, [group.segments.sizes for group in groups])
    for (part, pieces, made), where in zip(groups, at, strict=True):
        tokens.put(where, made.tokens)
        targets.put(where, made.targets)
        numbers.put(where, np.repeat(number[pieces], made.sizes))
        if mixed:
            parts.put(where, part)
    source, source_numbers = filled(room.source, pad, 0)
    if room.source:
        for (_, pieces, made), where in zip(
            groups, places(room.source, [g.segments.source_sizes for g in groups])[1], strict=True
        ):
            source.put(where, made.source)
            source_numbers.put(where, np.repeat(number[pieces], made.source_sizes))
    [picked] = filled(room.picked, -1)
    if room.picked:
        for (_, pieces, made), where in zip(
            groups, places(room.picked, [g.segments.picked_sizes for g in groups])[1], strict=True
        ):
            shift = begin[pieces] - (made.sizes.cumsum() - made.sizes)
            picked.put(where, made.picked + np.repeat(shift, made.picked_sizes))
    rest = [
        array if array.shape[1] else [None] * len(counts) for array in (source, source_numbers, picked, parts)
    ]
    return [Row(*arrays) for arrays in zip(tokens, numbers, targets, *rest, strict=True)]


def stack(rows: Sequence[Row], pin: bool = False) -> Batch:
    """Rows of one shape as a batch, in pinned memory if asked (for copies to a GPU that do not block)."""
    shape = (len(rows), -1)  # concatenate: np.stack costs four times as much for rows this short
    arrays = {
        name: torch.from_numpy(np.concatenate([getattr(row, name) for row in rows]).reshape(shape))
        for name in rows[0].arrays
    }
    return Batch(**{name: array.pin_memory() if pin else array for name, array in arrays.items()})
