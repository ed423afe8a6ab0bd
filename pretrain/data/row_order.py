"""Where a row of the run lies, in closed form: in, a row's number and the rows that each block makes; out, a
block and a row in it.

An epoch visits the blocks in an order drawn from (seed, epoch), 64 at a time; the rows of such a window are
drawn together, keyed by (seed, epoch, window), so that neighbouring rows come from different documents and
yet only 64 packed blocks are kept at hand. Several streams take turns in a fixed pattern (`turns`), and
ranges of rows may be left out (`row_of`). Nothing here has state.

Cost: 10 us a row; the first row of an epoch 60 ms at 1e6 blocks, the first of a window 1 ms, before its
blocks are packed.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

WINDOW = 64  # blocks whose rows are shuffled together
PERIOD = 1024  # turns after which the pattern of a mixture repeats: a weight is a multiple of 1 / 1024


class RowOrder:
    """All rows of one stream. `rows` (blocks,) int64 per block; `key` seeds the shuffles, None keeps the
    natural order.
    """

    def __init__(self, rows: np.ndarray, key: tuple[int, ...] | None) -> None:
        self.rows, self.key = rows, key
        self.num_rows = int(rows.sum())
        self._epoch = lru_cache(2)(self._draw_epoch)
        self._window = lru_cache(2)(self._draw_window)

    def locate(self, index: int) -> tuple[int, int, int, int]:
        """(epoch, place in the epoch, block, row in the block) of a row; every row of every block comes once
        per epoch.
        """
        epoch, place = divmod(index, self.num_rows)
        blocks, ends = self._epoch(epoch)
        first, drawn = self._window(epoch, self._window_of(epoch, place))
        drawn_place = first + int(drawn[place - first])
        at = int(ends.searchsorted(drawn_place, side="right"))
        block = int(blocks[at])
        return epoch, place, block, drawn_place - int(ends[at]) + int(self.rows[block])

    def continue_index(self, before: "RowOrder", index: int) -> int:
        """Where to go on when `before`, other rows of the same blocks under the same key, stopped ahead of
        its row `index`: the first row of the window in which that one lies. Both visit the same windows of
        blocks, so no earlier window comes again.
        """
        epoch, place = divmod(index, before.num_rows)
        return epoch * self.num_rows + self._window(epoch, before._window_of(epoch, place))[0]

    def _window_of(self, epoch: int, place: int) -> int:
        return int(self._epoch(epoch)[1].searchsorted(place, side="right")) // WINDOW

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in this epoch's order, and the rows up to the end of each."""
        blocks = (
            np.arange(len(self.rows))
            if self.key is None
            else np.random.default_rng((*self.key, epoch)).permutation(len(self.rows))
        )
        return blocks, np.cumsum(self.rows[blocks])

    def _draw_window(self, epoch: int, window: int) -> tuple[int, np.ndarray]:
        """The place of a window's first row, and the order of its rows."""
        _, ends = self._epoch(epoch)
        first = int(ends[window * WINDOW - 1]) if window else 0
        size = int(ends[min((window + 1) * WINDOW, len(ends)) - 1]) - first
        return first, np.arange(size) if self.key is None else np.random.default_rng(
            (*self.key, epoch, window)
        ).permutation(size)


def mixture_schedule(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whose turn it is: stream (PERIOD,) of each turn, how many turns it had before (PERIOD,), and turns per
    period (streams,).

    Weights become multiples of 1 / PERIOD, never 0. After any number of turns every stream has had its share
    to within one turn (earliest deadline first among those that are due: Tijdeman 1980, "The chairman
    assignment problem").
    """
    shares = np.array(weights) / sum(weights) * PERIOD
    counts = np.ones(len(weights), np.int64)
    for _ in range(PERIOD - len(weights)):
        counts[np.argmax(shares - counts)] += 1
    streams, before = np.empty(PERIOD, np.int64), np.empty(PERIOD, np.int64)
    had = np.zeros_like(counts)
    for turn in range(PERIOD):
        due = counts * (turn + 1) > had * PERIOD
        stream = int(np.argmin(np.where(due, (had + 1) / counts, np.inf)))
        streams[turn], before[turn] = stream, had[stream]
        had[stream] += 1
    return streams, before, counts


def row_at_cursor(cursor: int, skips: Sequence[tuple[int, int]]) -> int:
    """The row that a cursor stands for, when the rows from first to last, both included, of each of `skips`
    are left out.
    """
    row, reached = cursor, 0
    for first, last in sorted(skips):
        if first > row:
            break
        row += max(last + 1 - max(first, reached), 0)
        reached = max(reached, last + 1)
    return row
