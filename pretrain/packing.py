"""Documents into rows, from their lengths alone: in, the lengths of a block of documents; out, which pieces share which row.

A document becomes pieces (`cut`), pieces fill rows best-fit decreasing (`pack`), and `Table` holds the one thing that must be
known about every block before any row can be found: how many rows it makes. A block is about 2**20 tokens of consecutive
documents, packed once whatever the epoch, so 1e12 tokens are 1e6 blocks and a table of 48 MB.

Cost on one slow core, rows of 1,024: a block of 3,500 documents of 300 tokens packs in 5 ms, of 10,000 documents in 12 ms;
the table of 1e12 tokens is 1.5 core-hours, shared among `processes`, and then read from its file.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

BLOCK_TOKENS = 2**20
TRIES = 32  # amounts of room that best fit looks at before it opens a new row


class Room(NamedTuple):
    """What one row holds: positions of tokens, and of source or picks where the objective has them (never both)."""

    tokens: int
    source: int = 0
    picked: int = 0


@dataclass(frozen=True)
class Pieces:
    """Pieces (N,) of a block's documents: which document, from where to where in it with its marks, and what room they need."""

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    tokens: np.ndarray  # positions in the row's tokens
    second: np.ndarray  # positions in its source, or picks; zeros where the objective has neither
    capped: int = 0  # pieces that deserved more sentinels than there are


class Cutter(Protocol):
    """The half of an objective that packing needs: what a row holds, and the pieces that documents of these lengths make."""

    @property
    def room(self) -> Room: ...
    def pieces(self, lengths: np.ndarray) -> Pieces: ...


@dataclass(frozen=True)
class Packed:
    """A block's pieces in rows: row r holds pieces `order[offsets[r]:offsets[r + 1]]`, in the order of the documents."""

    pieces: Pieces
    order: np.ndarray
    offsets: np.ndarray

    def row(self, row: int) -> Iterator[tuple[int, int, int]]:
        """(document, start, stop) of each piece of a row; documents count from the block's first."""
        at = self.order[self.offsets[row] : self.offsets[row + 1]]
        pieces = self.pieces
        return zip(pieces.document[at].tolist(), pieces.start[at].tolist(), pieces.stop[at].tolist(), strict=True)


def cut(extents: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, stop) of the pieces of documents of `extents` positions each: full pieces of `longest`, then the rest."""
    counts = np.maximum(-(-extents // longest), 1)
    document = np.repeat(np.arange(len(extents)), counts)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(document)) - firsts) * longest
    return document, start, np.minimum(start + longest, extents[document])


def pack(pieces: Pieces, room: Room) -> Packed:
    """Best fit decreasing (Johnson 1973) over two sizes: the piece with the larger share of a row goes first, into the row with the
    least room for tokens left that has the second room too."""
    second_room = max(room.source, room.picked)
    share = np.maximum(pieces.tokens / room.tokens, pieces.second / max(second_room, 1))
    assert len(share) == 0 or share.max() <= 1, "a piece is larger than a row"
    open_rows: defaultdict[int, list[int]] = defaultdict(list)  # room for tokens left -> rows
    rooms = 0  # bit n is set while some row has room for exactly n more tokens
    second_left: list[int] = []
    row_of = np.empty(len(share), np.int64)
    decreasing = np.argsort(-share, kind="stable")
    sizes = zip(decreasing.tolist(), pieces.tokens[decreasing].tolist(), pieces.second[decreasing].tolist(), strict=True)
    for piece, tokens, second in sizes:
        left, fits = tokens, rooms >> tokens
        for _ in range(TRIES):
            skip = (fits & -fits).bit_length() - 1  # to the lowest bit that is set; -1: no row has the room
            left += skip
            if skip < 0 or second_left[open_rows[left][-1]] >= second:
                break
            left, fits = left + 1, fits >> (skip + 1)
        else:
            fits = 0
        if fits:
            row = open_rows[left].pop()
            if not open_rows[left]:
                rooms ^= 1 << left
        else:
            row, left = len(second_left), room.tokens
            second_left.append(second_room)
        row_of[piece] = row
        second_left[row] -= second
        open_rows[left - tokens].append(row)
        rooms |= 1 << (left - tokens)
    order = np.argsort(row_of, kind="stable")
    return Packed(pieces, order, np.searchsorted(row_of[order], np.arange(len(second_left) + 1)))


def block_starts(lengths: np.ndarray) -> np.ndarray:
    """The first document of each block, then the number of documents: block b is documents `starts[b]` to `starts[b + 1]`."""
    starts, before, last = [], 0, -1
    for first in range(0, len(lengths), 2**24):  # in parts: the lengths of 1e9 documents are too many to sum at once
        sizes = lengths[first : first + 2**24].astype(np.int64) + 2  # + 2: its marks, so that an empty document counts too
        ends = before + np.cumsum(sizes)
        block = (ends - sizes) // BLOCK_TOKENS
        starts.append(first + np.flatnonzero(np.diff(block, prepend=last)))
        before, last = int(ends[-1]), int(block[-1])
    return np.concatenate([*starts, [len(lengths)]]).astype(np.int64)


class Block(NamedTuple):
    """What is remembered of every packed block; a table (blocks, 4) int64 has these columns."""

    rows: int
    tokens: int  # positions used, of rows * room.tokens
    second: int
    capped: int


def table(lengths: np.ndarray, starts: np.ndarray, cutter: Cutter, file: Path | None = None, processes: int = 1) -> np.ndarray:
    """The Block of every block, read from `file` where it exists, else packed (in `processes`) and written there.

    `file` must be named by the fingerprint of everything that it follows from. It appears whole or not at all.
    """
    if file is not None and file.exists():
        return np.load(file, allow_pickle=False)
    spans = [(starts[b], starts[min(b + 16, len(starts) - 1)], starts[b : b + 17]) for b in range(0, len(starts) - 1, 16)]
    jobs = ((cutter, lengths[first:stop], inner - first) for first, stop, inner in spans)
    if processes > 1:
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            rows = np.concatenate(list(pool.map(_measure, *zip(*jobs, strict=True))))
    else:
        rows = np.concatenate([_measure(*job) for job in jobs])
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.uname().nodename}.{os.getpid()}")
        with part.open("wb") as out:
            np.save(out, rows)
        part.replace(file)
    return rows


def _measure(cutter: Cutter, lengths: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.array([_block(cutter, lengths[first:stop]) for first, stop in pairwise(starts)], np.int64)


def _block(cutter: Cutter, lengths: np.ndarray) -> Block:
    packed = pack(pieces := cutter.pieces(np.asarray(lengths)), cutter.room)
    return Block(len(packed.offsets) - 1, int(pieces.tokens.sum()), int(pieces.second.sum()), pieces.capped)
