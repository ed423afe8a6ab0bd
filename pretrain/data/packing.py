"""Documents into rows, from their lengths alone: the lengths of a block of documents come in, the chunks that
share each row go out.

A document is cut into chunks (`chunk_documents`), chunks fill rows by best fit decreasing (`pack_chunks`),
and `block_table` holds what must be known of every block before any row can be located: how many rows it
makes. A block is about 2**20 tokens of consecutive documents, packed once and the same in every epoch, so
1e12 tokens are 1e6 blocks.

Example: documents of 3, 7 and 2 positions, rows of 5. The second is cut into chunks of 5 and 2:

    >>> document, start, stop = chunk_documents(np.array([3, 7, 2]), 5)
    >>> list(zip(document.tolist(), start.tolist(), stop.tolist()))
    [(0, 0, 3), (1, 0, 5), (1, 5, 7), (2, 0, 2)]

Sizes 3, 5, 2, 2 go in decreasing order: 5 fills a row, 3 opens another, the first 2 fits beside the 3, the
second 2 opens a third row. Rows come in the order of their first chunks, so row 0 is the one with the 3:

    >>> chunks = Chunks(document, start, stop, stop - start, np.zeros(4, np.int64))
    >>> packed = pack_chunks(chunks, RowCapacity(tokens=5))
    >>> packed.document.tolist(), packed.start.tolist(), packed.offsets.tolist()
    ([0, 1, 1, 2], [0, 5, 0, 0], [0, 2, 3, 4])

Cost on one slow core, rows of 1,024: a block of 3,500 documents of 300 tokens packs in 4 ms (spans: 6), one
of 10,000 documents of 100 tokens in 12 ms (spans: 19). The table of 1e12 tokens costs 1 to 5 core-hours,
shared among `processes`, and is then a file of 32 MB. Padding is 0.1 to 0.2 % for causal and masked rows of
such documents, 0.8 % for spans (source and target together).
"""

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from itertools import islice, pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from trifold.pretrain.storage.atomic import replace_file

BLOCK_TOKENS = 2**20
DOCUMENTS_AT_ONCE = 2**24  # lengths in memory while block starts are computed: 1e9 documents are too many
# blocks that one process packs as one job: 1 to 5 s, so that small corpora start no processes
BLOCKS_AT_ONCE = 256
MAX_CANDIDATES = 32  # different remaining capacities that best fit tries before it opens a new row


class RowCapacity(NamedTuple):
    """What one row holds: positions of tokens, and of source tokens or picked positions where the objective
    has them (never both).
    """

    tokens: int
    source: int = 0
    picked: int = 0


@dataclass(frozen=True)
class Chunks:
    """Chunks (N,) of a block's documents: the document, the range of its positions (special tokens included),
    and the capacity that each needs.
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    tokens: np.ndarray  # positions in the row's tokens
    # positions in the row's source, or picked positions; zeros where the objective has neither
    source_or_picked_tokens: np.ndarray
    num_over_sentinel_limit: int = 0  # chunks that should have more sentinels than there are


class Chunker(Protocol):
    """The half of an objective that packing needs: what a row holds, and the chunks that documents of given
    lengths make.
    """

    @property
    def capacity(self) -> RowCapacity: ...
    def chunks(self, lengths: np.ndarray) -> Chunks: ...


@dataclass(frozen=True)
class PackedBlock:
    """A block's chunks (N,) row by row: row r holds the chunks offsets[r] to offsets[r + 1], in document
    order.
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    offsets: np.ndarray

    def row(self, row: int) -> slice:
        """The chunks of a row. Their documents count from the block's first."""
        return slice(self.offsets[row], self.offsets[row + 1])


def chunk_documents(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, stop) of the chunks of documents with `lengths` positions each: chunks of
    `max_length`, then the rest.
    """
    counts = np.maximum(-(-lengths // max_length), 1)
    document = np.repeat(np.arange(len(lengths)), counts)
    first_chunk = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(document)) - first_chunk) * max_length
    return document, start, np.minimum(start + max_length, lengths[document])


def pack_chunks(chunks: Chunks, capacity: RowCapacity) -> PackedBlock:
    """Best fit decreasing (Johnson 1973) over two sizes: tokens, and source or picked tokens.

    The size with the larger sum of shares leads. Chunks go by their larger share of a row, each into the row
    with the least remaining capacity of the leading size that also has the other. Rows that lacked the other
    size MAX_CANDIDATES times in a row are closed.
    """
    first = (chunks.tokens, capacity.tokens)
    second = (chunks.source_or_picked_tokens, max(capacity.source, capacity.picked, 1))
    first_share, second_share = first[0] / first[1], second[0] / second[1]
    share = np.maximum(first_share, second_share)
    assert share.max(initial=0) <= 1, "a chunk is larger than a row"

    by_size = np.argsort(-share, kind="stable")
    leading, other = (second, first) if second_share.sum() > first_share.sum() else (first, second)
    row_of, num_rows = _assign_rows(by_size, leading, other)

    # number the rows by their first documents, not by the sizes of their chunks
    _, first_chunk, row_of = np.unique(row_of, return_index=True, return_inverse=True)
    row_of = np.argsort(np.argsort(first_chunk))[row_of]
    order = np.argsort(row_of, kind="stable")
    offsets = np.searchsorted(row_of[order], np.arange(num_rows + 1))
    return PackedBlock(chunks.document[order], chunks.start[order], chunks.stop[order], offsets)


def _assign_rows(
    by_size: np.ndarray, leading: tuple[np.ndarray, int], other: tuple[np.ndarray, int]
) -> tuple[np.ndarray, int]:
    """The row of each chunk (N,), and the number of rows. `by_size`: the chunks, largest first; `leading` and
    `other`: the sizes (N,) of the chunks and the capacity of a row.
    """
    (sizes, row_capacity), (other_sizes, other_capacity) = leading, other
    open_rows = _OpenRows()
    other_remaining: list[int] = []
    row_of = np.empty(len(by_size), np.int64)
    needs = zip(by_size.tolist(), sizes[by_size].tolist(), other_sizes[by_size].tolist(), strict=True)

    for chunk, need, other_need in needs:
        without_other = []
        for remaining in islice(open_rows.remaining_at_least(need), MAX_CANDIDATES):
            if other_remaining[open_rows.rows[remaining][-1]] >= other_need:
                row = open_rows.take(remaining)
                break
            without_other.append(remaining)
        else:
            if len(without_other) == MAX_CANDIDATES:
                for remaining in without_other:  # close these rows
                    open_rows.take(remaining)
            row, remaining = len(other_remaining), row_capacity
            other_remaining.append(other_capacity)

        row_of[chunk] = row
        other_remaining[row] -= other_need
        open_rows.put(remaining - need, row)
    return row_of, len(other_remaining)


class _OpenRows:
    """Rows that are not full, by the capacity of the leading size that remains in them."""

    def __init__(self) -> None:
        self.rows: defaultdict[int, list[int]] = defaultdict(list)
        self.bits = 0  # bit n is set while `rows[n]` is not empty

    def put(self, remaining: int, row: int) -> None:
        self.rows[remaining].append(row)
        self.bits |= 1 << remaining

    def take(self, remaining: int) -> int:
        row = self.rows[remaining].pop()
        if not self.rows[remaining]:
            self.bits ^= 1 << remaining
        return row

    def remaining_at_least(self, need: int) -> Iterator[int]:
        """The remaining capacities of at least `need` that some row has, the least first."""
        remaining, bits = need, self.bits >> need
        while bits:
            skip = (bits & -bits).bit_length() - 1  # to the lowest bit that is set
            remaining += skip
            yield remaining
            remaining, bits = remaining + 1, bits >> (skip + 1)


def block_starts(lengths: np.ndarray) -> np.ndarray:
    """The first document of each block, then the number of documents: block b is documents `starts[b]` to
    `starts[b + 1]`.
    """
    starts, tokens_before, last_block = [], 0, -1
    for first in range(0, len(lengths), DOCUMENTS_AT_ONCE):
        # + 2: special tokens, so that empty documents count too
        sizes = lengths[first : first + DOCUMENTS_AT_ONCE].astype(np.int64) + 2
        ends = tokens_before + np.cumsum(sizes)
        block = (ends - sizes) // BLOCK_TOKENS
        starts.append(first + np.flatnonzero(np.diff(block, prepend=last_block)))
        tokens_before, last_block = int(ends[-1]), int(block[-1])
    return np.concatenate([*starts, [len(lengths)]]).astype(np.int64)


class BlockStats(NamedTuple):
    """What is stored of every packed block: the columns of a table (blocks, 4) int64."""

    rows: int
    tokens: int  # positions used, of rows * capacity.tokens
    source_or_picked_tokens: int
    num_over_sentinel_limit: int


def block_table(
    lengths: np.ndarray, starts: np.ndarray, chunker: Chunker, file: Path | None = None, processes: int = 1
) -> np.ndarray:
    """The BlockStats of every block (blocks, 4), read from `file` where it exists, else computed by
    `processes` processes and written there.

    `file` must be named by the fingerprint of everything that the table follows from. It ends with a hash of
    its content: one that was truncated or changed is computed again.
    """
    if file is not None and (table := _read_table(file)) is not None:
        return table

    table = _compute_table(lengths, starts, chunker, processes)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        buffer = BytesIO()
        np.save(buffer, table)
        replace_file(file, buffer.getvalue() + sha256(buffer.getvalue()).digest())
    return table


def _read_table(file: Path) -> np.ndarray | None:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    array, digest = content[:-32], content[-32:]
    if sha256(array).digest() != digest:
        return None
    return np.load(BytesIO(array), allow_pickle=False)


def _compute_table(lengths: np.ndarray, starts: np.ndarray, chunker: Chunker, processes: int) -> np.ndarray:
    jobs = []
    for first in range(0, len(starts) - 1, BLOCKS_AT_ONCE):
        job_starts = starts[first : first + BLOCKS_AT_ONCE + 1]
        jobs.append((chunker, lengths[job_starts[0] : job_starts[-1]], job_starts - job_starts[0]))

    if min(processes, len(jobs)) <= 1:
        return np.concatenate([_pack_blocks(*job) for job in jobs])
    with ProcessPoolExecutor(min(processes, len(jobs)), get_context("spawn")) as pool:
        return np.concatenate(list(pool.map(_pack_blocks, *zip(*jobs, strict=True))))


def _pack_blocks(chunker: Chunker, lengths: np.ndarray, starts: np.ndarray) -> np.ndarray:
    stats = [_block_stats(chunker, lengths[first:stop]) for first, stop in pairwise(starts)]
    return np.array(stats, np.int64)


def _block_stats(chunker: Chunker, lengths: np.ndarray) -> BlockStats:
    chunks = chunker.chunks(np.asarray(lengths))
    packed = pack_chunks(chunks, chunker.capacity)
    return BlockStats(
        rows=len(packed.offsets) - 1,
        tokens=int(chunks.tokens.sum()),
        source_or_picked_tokens=int(chunks.source_or_picked_tokens.sum()),
        num_over_sentinel_limit=chunks.num_over_sentinel_limit,
    )
