"""Rows of a run, by number: token shards and an objective come in, `Rows.row(i)` goes out, a pure function of
(fingerprint, seed, i).

Nothing is remembered from row to row, so there is no loader state, and neither the number of ranks nor the
order of reading matters. Row i is made in four steps: the mixture's schedule names its stream, the stream's
RowOrder names a block and a row in it (row_order.py), the packed block names the chunks (packing.py), and the
objective makes segments of them with random numbers keyed by the row's position (keyed_random.py).

Cost on one slow core, packing and hash included (docs/performance.md has all figures): a row of 1,024 with
documents of 340 tokens 97 us (causal), 141 us (masked); one of 256 with documents of 85 tokens 54 us and
69 us.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from trifold.modeling.errors import UserError
from trifold.pretrain.config import pretraining
from trifold.pretrain.config.objectives import MixtureConfig
from trifold.pretrain.data import keyed_random
from trifold.pretrain.data.collate import Row, arrange_rows
from trifold.pretrain.data.objectives import Chunk, ObjectiveMixture, Vocabulary
from trifold.pretrain.data.packing import BlockStats, PackedBlock, block_starts, block_table, pack_chunks
from trifold.pretrain.data.row_order import WINDOW, RowOrder, mixture_schedule
from trifold.pretrain.storage.fingerprint import fingerprint

# raised when the same data and seed begin to give other rows: old tables and checkpoints are then rejected,
# not misread
FORMAT = 2
POSITIONS_AT_ONCE = 2**15  # of rows that are made together: 256 KB for each array


class Corpus(Protocol):
    """What rows need of token shards."""

    fingerprint: str
    num_documents: int
    num_tokens: int
    num_bytes: int

    @property
    def lengths(self) -> np.ndarray: ...
    def document(self, i: int) -> np.ndarray: ...


class RowSource(Protocol):
    """Rows by number: all that a loader and an evaluation need of them."""

    num_rows: int
    targets_per_byte: float | None

    @property
    def member_names(self) -> Sequence[str]:
        """The names of a mixture's members; none where there is no mixture."""
        ...

    def row(self, i: int) -> Row: ...
    def rows(self, numbers: Sequence[int]) -> list[Row]: ...
    def empty_row(self) -> Row: ...


class ChunksOfRow(NamedTuple):
    """What one row is made of."""

    random_key: tuple[int, int, int]  # the stream's key, the epoch, the position in the epoch
    members: np.ndarray  # (N,) the member of the mixture for each chunk
    chunks: list[Chunk]


class CorpusRows:
    """One corpus under one objective. `key` seeds its shuffles and its random numbers. Without `shuffled`, an
    epoch's rows come in the corpus' order.
    """

    def __init__(
        self,
        corpus: Corpus,
        objective: ObjectiveMixture,
        fingerprint: str,
        key: tuple[int, ...],
        shuffled: bool,
        cache: Path | None,
        processes: int,
    ) -> None:
        self.corpus, self.objective, self.fingerprint = corpus, objective, fingerprint
        self.random_key = int(_fingerprint(*key)[:16], 16)
        self.starts = block_starts(corpus.lengths)
        file = cache and cache / f"rows-{fingerprint}.npy"
        self.table = block_table(corpus.lengths, self.starts, objective, file, processes)
        self.totals = BlockStats(*self.table.sum(axis=0).tolist())
        self.order = RowOrder(self.table[:, 0], (*key, 0) if shuffled else None)
        self._packed = lru_cache(WINDOW + 8)(self._pack)

    def row(self, index: int) -> ChunksOfRow:
        """What row `index` of this stream is made of."""
        epoch, position, block, row = self.order.locate(index)
        packed, members = self._packed(block)
        in_row = packed.row(row)
        first = int(self.starts[block])
        chunks = []
        for document, start, stop in zip(
            packed.document[in_row].tolist(),
            packed.start[in_row].tolist(),
            packed.stop[in_row].tolist(),
            strict=True,
        ):
            chunks.append(Chunk(self.corpus.document(first + document), start, stop))
        return ChunksOfRow((self.random_key, epoch, position), members[in_row], chunks)

    @property
    def padding_fraction(self) -> float:
        """The fraction of an epoch's positions that is padding, from the table."""
        capacity = self.objective.capacity
        used = self.totals.tokens
        if capacity.source:
            used += self.totals.source_or_picked_tokens
        return 1 - used / (self.totals.rows * (capacity.tokens + capacity.source))

    def _pack(self, block: int) -> tuple[PackedBlock, np.ndarray]:
        """A block's chunks, and the member of the mixture that each belongs to."""
        lengths = np.asarray(self.corpus.lengths[self.starts[block] : self.starts[block + 1]])
        packed = pack_chunks(self.objective.chunks(lengths), self.objective.capacity)
        return packed, self.objective.member_of(packed.document, packed.start)


class Rows:
    """All rows of a run (`for_training`: endless, shuffled, sources interleaved by weight) or of its held-out
    text (`heldout`: each once, in order, and the same whatever the seed).
    """

    def __init__(
        self,
        config: pretraining.PretrainConfig,
        vocabulary: Vocabulary,
        corpora: Sequence[Corpus],
        seed: tuple[int, int],
        weights: Sequence[float] | None,
        row_length: int,
        cache: Path | None,
        processes: int,
    ) -> None:
        """For `for_training` and `heldout`. `weights` of the corpora, None: each row once, in order."""
        self.row_length = row_length
        self.objective = ObjectiveMixture(config.objective, vocabulary, row_length)
        self.capacity, self.pad = self.objective.capacity, vocabulary.pad
        config.engine.check_sharable("the target side of a row", self.capacity.tokens)
        config.engine.check_sharable("the source side of a row", self.capacity.source)
        is_mixture = isinstance(config.objective, MixtureConfig)
        self.member_names = self.objective.labels if is_mixture else []

        objective = config.objective.model_dump(exclude={"weight"})
        self.streams = []
        for number, corpus in enumerate(corpora):
            stream_fingerprint = _fingerprint(
                corpus.fingerprint, row_length, objective, vocabulary.fingerprint
            )
            stream = CorpusRows(
                corpus,
                self.objective,
                stream_fingerprint,
                key=(*seed, number),
                shuffled=weights is not None,
                cache=cache,
                processes=processes,
            )
            self.streams.append(stream)

        rows_of_streams = [stream.order.num_rows for stream in self.streams]
        self.num_rows = sum(rows_of_streams)  # of one epoch of every source
        self.num_bytes = sum(corpus.num_bytes for corpus in corpora)
        self.num_over_sentinel_limit = sum(stream.totals.num_over_sentinel_limit for stream in self.streams)
        shares = rows_of_streams if weights is None else weights
        self.fingerprint = _fingerprint(*(stream.fingerprint for stream in self.streams), shares)
        padding = [stream.padding_fraction for stream in self.streams]
        self.padding_fraction = float(np.average(padding, weights=shares))
        targets = sum(corpus.num_tokens + corpus.num_documents for corpus in corpora)
        self.targets_per_byte = targets / self.num_bytes if config.objective.kind == "causal" else None

        self._schedule = None if weights is None else mixture_schedule(weights)
        self._stream_ends = np.cumsum(rows_of_streams)
        self.first = 0  # number of the first row
        self._first_of_stream = [0] * len(self.streams)

    @classmethod
    def for_training(
        cls,
        config: pretraining.PretrainConfig,
        vocabulary: Vocabulary,
        corpora: Sequence[Corpus],
        cache: Path | None = None,
        processes: int = 1,
        row_length: int | None = None,
        after: "tuple[Rows, int] | None" = None,
    ) -> "Rows":
        """Rows to train on. `corpora` belong to config.data.sources one by one; row tables are kept in the
        folder `cache`.

        `row_length` is that of a stage, None the config's. With `after` (rows, i), these are the run's rows
        from number i on, and continue in the text where `rows` stopped, each source at the first window of
        blocks (row_order.py) that it had not finished. Raises UserError where a corpus has no text.
        """
        check_corpora(corpora, "train", "give more text")
        weights = [source.weight for source in config.data.sources]
        length = row_length or config.data.row_length
        rows = cls(config, vocabulary, corpora, (config.seed, 0), weights, length, cache, processes)
        if after is not None:
            rows._continue_after(*after)
        return rows

    @classmethod
    def heldout(
        cls,
        config: pretraining.PretrainConfig,
        vocabulary: Vocabulary,
        corpora: Sequence[Corpus],
        cache: Path | None = None,
        processes: int = 1,
    ) -> "Rows":
        """Rows to evaluate on. Raises UserError where a corpus has no text."""
        check_corpora(corpora, "heldout", "raise data.heldout_fraction, or give data.heldout or more text")
        return cls(config, vocabulary, corpora, (0, 1), None, config.data.row_length, cache, processes)

    def row(self, i: int) -> Row:
        """Row i of the run, not before `first`. Held-out rows end at `num_rows`."""
        return self.rows([i])[0]

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        """Several rows, which cost less than one by one: numpy is called once for as many as fit into the
        processor's cache.
        """
        at_once = max(1, POSITIONS_AT_ONCE // self.capacity.tokens)
        rows: list[Row] = []
        for first in range(0, len(numbers), at_once):
            rows += self._make(numbers[first : first + at_once])
        return rows

    def empty_row(self) -> Row:
        """A row of padding, to fill up a micro-batch: it has no targets."""
        return arrange_rows([], [0], self.capacity, self.pad, bool(self.member_names))[0]

    def _make(self, numbers: Sequence[int]) -> list[Row]:
        parts = []
        for number in numbers:
            stream, index = self._locate(number)
            parts.append(self.streams[stream].row(index))
        random_keys, members, chunks_of_rows = zip(*parts, strict=True)
        counts = [len(chunks) for chunks in chunks_of_rows]
        keys = _chunk_keys(np.array(random_keys, np.uint64), counts)
        chunks = [chunk for chunks in chunks_of_rows for chunk in chunks]
        groups = self.objective.segments(np.concatenate(members), chunks, keys)
        return arrange_rows(groups, counts, self.capacity, self.pad, bool(self.member_names))

    def _locate(self, i: int) -> tuple[int, int]:
        """The stream of row i, and the row's number in the stream."""
        if self._schedule is not None:
            stream, given = self._schedule.locate(i - self.first)
            return stream, self._first_of_stream[stream] + given
        stream = int(np.searchsorted(self._stream_ends, i, side="right"))
        assert stream < len(self.streams), f"held-out row {i} of {self.num_rows}"
        stream_start = int(self._stream_ends[stream]) - self.streams[stream].order.num_rows
        return stream, i - stream_start

    def _next_of_streams(self, i: int) -> list[int]:
        """The next row of each stream, once all rows before i were read."""
        assert self._schedule is not None
        given = self._schedule.rows_before(i - self.first)
        return [first + more for first, more in zip(self._first_of_stream, given, strict=True)]

    def _continue_after(self, before: "Rows", i: int) -> None:
        """Make these the rows of the run from number i on, after `before`."""
        self.first = i
        self._first_of_stream = []
        for stream, other, index in zip(
            self.streams, before.streams, before._next_of_streams(i), strict=True
        ):
            self._first_of_stream.append(stream.order.continue_index(other.order, index))
        self.fingerprint = _fingerprint(before.fingerprint, i, self.fingerprint)


def check_corpora(corpora: Sequence[Corpus], split: str, advice: str) -> None:
    """Raises UserError where a corpus has no text."""
    for number, corpus in enumerate(corpora):
        if corpus.num_tokens == 0:
            raise UserError(
                f"corpus {number} of the {split} data has 0 tokens in {corpus.num_documents} documents:"
                f" {advice} (in plain text an empty line ends a document; with `documents: line` of its"
                " source, each line is one)."
            )


def _chunk_keys(random_keys: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """A key for each chunk of rows of `counts` chunks; `random_keys` (rows, 3): see ChunksOfRow."""
    stream, epoch, position = random_keys.T
    row_keys = keyed_random.nth_random(keyed_random.nth_random(stream, epoch), position)
    index_in_row = np.concatenate([np.arange(count) for count in counts])
    return keyed_random.nth_random(np.repeat(row_keys, counts), index_in_row)


def _fingerprint(*values: Any) -> str:
    return fingerprint([FORMAT, *values])
