"""Documents into rows, from their lengths alone: in, the lengths of a block of documents; out, which pieces
share which row.

A document becomes pieces (`cut`), pieces fill rows best-fit decreasing (`pack`), and `Table` holds the one
thing that must be known about every block before any row can be found: how many rows it makes. A block is
about 2**20 tokens of consecutive documents, packed once whatever the epoch, so 1e12 tokens are 1e6 blocks.

Cost on one slow core, rows of 1,024: a block of 3,500 documents of 300 tokens packs in 4 ms (spans: 6), one
of 10,000 documents of 100 tokens in 12 ms (spans: 19). The table of 1e12 tokens costs 1 to 5 core-hours,
shared among `processes`, and is then a file of 32 MB. Waste is 0.1 to 0.2 % for causal and masked rows of
such documents, 0.8 % for spans (source and target together).
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

BLOCK_TOKENS = 2**20
DOCUMENTS_AT_ONCE = 2**24  # lengths held in memory while blocks are found: 1e9 documents are too many
BLOCKS_AT_ONCE = (
    256  # what one process measures in one go: 1 to 5 s, so that small corpora start no processes
)
MAX_CANDIDATES = 32  # amounts of room that best fit looks at before it opens a new row


class RowCapacity(NamedTuple):
    """What one row holds: positions of tokens, and of source or picks where the objective has them (never
    both).
    """

    tokens: int
    source: int = 0
    picked: int = 0


@dataclass(frozen=True)
class Chunks:
    """Pieces (N,) of a block's documents: which document, from where to where in it with its marks, and what
    room they need.
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    tokens: np.ndarray  # positions in the row's tokens
    source_or_picked_tokens: (
        np.ndarray
    )  # positions in its source, or picks; zeros where the objective has neither
    num_over_sentinel_limit: int = 0  # pieces that deserved more sentinels than there are


class Chunker(Protocol):
    """The half of an objective that packing needs: what a row holds, and the pieces that documents of these
    lengths make.
    """

    @property
    def capacity(self) -> RowCapacity: ...
    def chunks(self, lengths: np.ndarray) -> Chunks: ...


@dataclass(frozen=True)
class PackedBlock:
    """A block's pieces (N,) row by row: row r holds those from offsets[r] to offsets[r + 1], in the order of
    the documents.
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    offsets: np.ndarray

    def row(self, row: int) -> slice:
        """Which pieces are in a row; their documents count from the block's first."""
        return slice(self.offsets[row], self.offsets[row + 1])


def chunk_documents(extents: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, stop) of the pieces of documents of `extents` positions each: full pieces of
    `longest`, then the rest.
    """
    counts = np.maximum(-(-extents // longest), 1)
    document = np.repeat(np.arange(len(extents)), counts)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(document)) - firsts) * longest
    return document, start, np.minimum(start + longest, extents[document])


def pack_chunks(pieces: Chunks, room: RowCapacity) -> PackedBlock:
    """Best fit decreasing (Johnson 1973) over two sizes, of which the scarcer leads: pieces go by their
    larger share of a row, each into the row with the least of the leading room that has the other room too.
    Rows that TRIES times in turn lacked it are closed.
    """
    sizes = [(pieces.tokens, room.tokens), (pieces.source_or_picked_tokens, max(room.source, room.picked, 1))]
    shares = [size / whole for size, whole in sizes]
    if shares[1].sum() > shares[0].sum():
        sizes.reverse()
    (leading, leading_room), (other, other_room) = sizes
    share = np.maximum(*shares)
    assert share.max(initial=0) <= 1, "a piece is larger than a row"
    decreasing = np.argsort(-share, kind="stable")
    open_rows = _OpenRows()
    other_left: list[int] = []
    row_of = np.empty(len(share), np.int64)
    for piece, need, other_need in zip(
        decreasing.tolist(), leading[decreasing].tolist(), other[decreasing].tolist(), strict=True
    ):
        refused = []
        for left in islice(open_rows.with_room(need), MAX_CANDIDATES):
            if other_left[open_rows.at[left][-1]] >= other_need:
                row = open_rows.take(left)
                break
            refused.append(left)
        else:
            if len(refused) == MAX_CANDIDATES:
                for left in refused:
                    open_rows.take(left)
            row, left = len(other_left), leading_room
            other_left.append(other_room)
        row_of[piece] = row
        other_left[row] -= other_need
        open_rows.put(left - need, row)
    _, first_piece, row_of = np.unique(row_of, return_index=True, return_inverse=True)
    row_of = np.argsort(np.argsort(first_piece))[
        row_of
    ]  # rows in the order of their first documents, not long ones first
    order = np.argsort(row_of, kind="stable")
    offsets = np.searchsorted(row_of[order], np.arange(len(other_left) + 1))
    return PackedBlock(pieces.document[order], pieces.start[order], pieces.stop[order], offsets)


class _OpenRows:
    """Rows that are not full, by the leading room they have left."""

    def __init__(self) -> None:
        self.at: defaultdict[int, list[int]] = defaultdict(list)
        self.bits = 0  # bit n is set while `at[n]` is not empty

    def put(self, left: int, row: int) -> None:
        self.at[left].append(row)
        self.bits |= 1 << left

    def take(self, left: int) -> int:
        row = self.at[left].pop()
        if not self.at[left]:
            self.bits ^= 1 << left
        return row

    def with_room(self, need: int) -> Iterator[int]:
        """What rows have left, of at least `need`, the least first."""
        left, fits = need, self.bits >> need
        while fits:
            skip = (fits & -fits).bit_length() - 1  # to the lowest bit that is set
            yield left + skip
            left, fits = left + skip + 1, fits >> (skip + 1)


def block_starts(lengths: np.ndarray) -> np.ndarray:
    """The first document of each block, then the number of documents: block b is documents `starts[b]` to
    `starts[b + 1]`.
    """
    starts, before, last = [], 0, -1
    for first in range(0, len(lengths), DOCUMENTS_AT_ONCE):
        sizes = (
            lengths[first : first + DOCUMENTS_AT_ONCE].astype(np.int64) + 2
        )  # + 2: marks, so that empty documents count too
        ends = before + np.cumsum(sizes)
        block = (ends - sizes) // BLOCK_TOKENS
        starts.append(first + np.flatnonzero(np.diff(block, prepend=last)))
        before, last = int(ends[-1]), int(block[-1])
    return np.concatenate([*starts, [len(lengths)]]).astype(np.int64)


class BlockStats(NamedTuple):
    """What is remembered of every packed block; a table (blocks, 4) int64 has these columns."""

    rows: int
    tokens: int  # positions used, of rows * room.tokens
    source_or_picked_tokens: int
    num_over_sentinel_limit: int


def block_table(
    lengths: np.ndarray, starts: np.ndarray, cutter: Chunker, file: Path | None = None, processes: int = 1
) -> np.ndarray:
    """The Block of every block, read from `file` where it exists, else packed (in `processes`) and written
    there.

    `file` must be named by the fingerprint of everything that it follows from. It appears whole or not at
    all.
    """
    if file is not None and file.exists():
        with suppress(ValueError, EOFError):  # cut short when the machine died: packed again
            return np.load(file, allow_pickle=False)
    parts = [starts[b : b + BLOCKS_AT_ONCE + 1] for b in range(0, len(starts) - 1, BLOCKS_AT_ONCE)]
    jobs = [(cutter, lengths[part[0] : part[-1]], part - part[0]) for part in parts]
    if min(processes, len(jobs)) > 1:
        with ProcessPoolExecutor(min(processes, len(jobs)), get_context("spawn")) as pool:
            rows = np.concatenate(list(pool.map(_measure_blocks, *zip(*jobs, strict=True))))
    else:
        rows = np.concatenate([_measure_blocks(*job) for job in jobs])
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.uname().nodename}.{os.getpid()}")
        with part.open("wb") as out:
            np.save(out, rows)
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)
    return rows


def _measure_blocks(cutter: Chunker, lengths: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.array([_block_stats(cutter, lengths[first:stop]) for first, stop in pairwise(starts)], np.int64)


def _block_stats(cutter: Chunker, lengths: np.ndarray) -> BlockStats:
    packed = pack_chunks(pieces := cutter.chunks(np.asarray(lengths)), cutter.capacity)
    return BlockStats(
        len(packed.offsets) - 1,
        int(pieces.tokens.sum()),
        int(pieces.source_or_picked_tokens.sum()),
        pieces.num_over_sentinel_limit,
    )
