"""The position of every row of a run, in closed form: a row's number and the row count of each block come in,
a block and a row inside it go out.

An epoch visits the blocks in an order drawn from (seed, epoch), 64 blocks (a window) at a time. The rows of a
window are shuffled together, keyed by (seed, epoch, window), so that neighbouring rows come from different
documents, and yet only 64 packed blocks are in memory. Several streams are interleaved by a fixed schedule
(`mixture_schedule`), and ranges of rows may be left out (`row_at_cursor`). Nothing here has state.

Example: blocks of 2, 3 and 1 rows, WINDOW = 2, and an epoch whose block order is [2, 0, 1]. Its rows end at
[1, 3, 6]: positions 0 to 2 are the first window (blocks 2 and 0), positions 3 to 5 the second (block 1). If
the first window's permutation is [2, 0, 1], then row 0 of the run is that window's row 2, the last of block
0: `locate(0)` is (epoch 0, position 0, block 0, row 1).

Cost: 10 us for each row; the first row of an epoch 60 ms at 1e6 blocks, the first of a window 1 ms, before
its blocks are packed.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

WINDOW = 64  # blocks whose rows are shuffled together
PERIOD = 1024  # rows after which the schedule of a mixture repeats: a weight is a multiple of 1 / 1024


class RowPosition(NamedTuple):
    """The position of one row of a stream."""

    epoch: int
    position: int  # in the epoch
    block: int
    row: int  # in the block


class RowOrder:
    """All rows of one stream. `rows` (blocks,) int64: the row count of each block; `key` seeds the shuffles,
    None keeps the natural order.
    """

    def __init__(self, rows: np.ndarray, key: tuple[int, ...] | None) -> None:
        self.rows, self.key = rows, key
        self.num_rows = int(rows.sum())
        self._epoch = lru_cache(2)(self._draw_epoch)
        self._window = lru_cache(2)(self._draw_window)

    def locate(self, index: int) -> RowPosition:
        """The position of row `index`. Every row of every block comes once in each epoch."""
        epoch, position = divmod(index, self.num_rows)
        blocks, ends = self._epoch(epoch)
        first, permutation = self._window(epoch, self._window_of(epoch, position))
        shuffled = first + int(permutation[position - first])
        nth_block = int(ends.searchsorted(shuffled, side="right"))
        block = int(blocks[nth_block])
        block_start = int(ends[nth_block]) - int(self.rows[block])
        return RowPosition(epoch, position, block, shuffled - block_start)

    def continue_index(self, before: "RowOrder", index: int) -> int:
        """The row at which to continue when `before`, other rows of the same blocks under the same key,
        stopped before its row `index`: the first row of the window that holds it. Both visit the same windows
        of blocks, so no earlier window is repeated.
        """
        epoch, position = divmod(index, before.num_rows)
        first, _ = self._window(epoch, before._window_of(epoch, position))
        return epoch * self.num_rows + first

    def _window_of(self, epoch: int, position: int) -> int:
        _, ends = self._epoch(epoch)
        return int(ends.searchsorted(position, side="right")) // WINDOW

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in this epoch's order, and the position at which the rows of each end."""
        if self.key is None:
            blocks = np.arange(len(self.rows))
        else:
            blocks = np.random.default_rng((*self.key, epoch)).permutation(len(self.rows))
        return blocks, np.cumsum(self.rows[blocks])

    def _draw_window(self, epoch: int, window: int) -> tuple[int, np.ndarray]:
        """The position of a window's first row, and the permutation of its rows."""
        _, ends = self._epoch(epoch)
        first = int(ends[window * WINDOW - 1]) if window else 0
        stop = int(ends[min((window + 1) * WINDOW, len(ends)) - 1])
        if self.key is None:
            return first, np.arange(stop - first)
        return first, np.random.default_rng((*self.key, epoch, window)).permutation(stop - first)


class MixtureSchedule(NamedTuple):
    """Which stream gives each row of a period."""

    streams: np.ndarray  # (PERIOD,) the stream of each row of the period
    before: np.ndarray  # (PERIOD,) how many rows of the period that stream gave before this one
    counts: np.ndarray  # (streams,) rows of each stream in a period

    def locate(self, i: int) -> tuple[int, int]:
        """(stream, number of rows that the stream gave before) of row i."""
        period, position = divmod(i, len(self.streams))
        stream = int(self.streams[position])
        return stream, period * int(self.counts[stream]) + int(self.before[position])

    def rows_before(self, i: int) -> list[int]:
        """How many of the rows before i each stream gave."""
        period, position = divmod(i, len(self.streams))
        in_period = np.bincount(self.streams[:position], minlength=len(self.counts))
        return (period * self.counts + in_period).tolist()


def mixture_schedule(weights: Sequence[float]) -> MixtureSchedule:
    """The schedule of streams with these weights.

    Weights become multiples of 1 / PERIOD, never 0. After any number of rows each stream has had its share to
    within one row (earliest deadline first among those that are due: Tijdeman 1980, "The chairman assignment
    problem"). Weights 2 and 1 give the streams 0, 0, 1, 0, 0, 1, ...
    """
    shares = np.array(weights) / sum(weights) * PERIOD
    counts = np.ones(len(weights), np.int64)
    for _ in range(PERIOD - len(weights)):
        counts[np.argmax(shares - counts)] += 1

    streams, before = np.empty(PERIOD, np.int64), np.empty(PERIOD, np.int64)
    given = np.zeros_like(counts)
    for position in range(PERIOD):
        due = counts * (position + 1) > given * PERIOD
        deadlines = np.where(due, (given + 1) / counts, np.inf)
        stream = int(np.argmin(deadlines))
        streams[position], before[position] = stream, given[stream]
        given[stream] += 1
    return MixtureSchedule(streams, before, counts)


def row_at_cursor(cursor: int, skips: Sequence[tuple[int, int]]) -> int:
    """The row number for a cursor when the ranges `skips` (first, last), last included, are left out.

    With skips [(2, 3)] the cursors 0, 1, 2, 3 stand for the rows 0, 1, 4, 5.
    """
    row, reached = cursor, 0
    for first, last in sorted(skips):
        if first > row:
            break
        row += max(last + 1 - max(first, reached), 0)
        reached = max(reached, last + 1)
    return row
