"""Rows of a run, by number: in, token shards and an objective; out, `Rows.row(i)`, a pure function of
(fingerprint, seed, i).

Nothing is remembered from row to row, so there is no loader state, and neither the world nor the order of
reading matters.

Cost on one slow core, packing and hash included, docs/performance.md has all: a row of 1,024 with documents
of 340 tokens 97 us (causal), 141 us (masked); one of 256 with documents of 85 tokens 54 us and 69 us.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from trifold.modeling.errors import UserError
from trifold.pretrain.config import pretraining
from trifold.pretrain.config.objectives import MixtureConfig
from trifold.pretrain.data import keyed_random
from trifold.pretrain.data.collate import Row, arrange_rows
from trifold.pretrain.data.objectives import Chunk, ObjectiveMixture, Vocabulary
from trifold.pretrain.data.packing import BlockStats, PackedBlock, block_starts, block_table, pack_chunks
from trifold.pretrain.data.row_order import WINDOW, RowOrder, mixture_schedule

# to be raised when the same data and seed begin to give other rows: old tables and checkpoints are then
# refused, not misread
FORMAT = 2
POSITIONS_AT_ONCE = 2**15  # of rows that are made together: 256 KB an array


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
        """The names of a mixture's parts; none where there is no mixture."""
        ...

    def row(self, i: int) -> Row: ...
    def rows(self, numbers: Sequence[int]) -> list[Row]: ...
    def empty_row(self) -> Row: ...


class CorpusRows:
    """One corpus under one objective. `key` seeds its shuffles and draws; unshuffled, an epoch's rows come in
    the corpus' order.
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
        self.corpus, self.objective, self.fingerprint, self.key = corpus, objective, fingerprint, key
        self.chance = int(_digest(*key)[:16], 16)
        self.starts = block_starts(corpus.lengths)
        file = cache and cache / f"rows-{fingerprint}.npy"
        self.table = block_table(corpus.lengths, self.starts, objective, file, processes)
        self.totals = BlockStats(*self.table.sum(axis=0).tolist())
        self.order = RowOrder(self.table[:, 0], (*key, 0) if shuffled else None)
        self._packed = lru_cache(WINDOW + 8)(self._pack)

    def row(self, index: int) -> tuple[tuple[int, int, int], np.ndarray, list[Chunk]]:
        """What keys a row's chance, the parts of its pieces, and the pieces."""
        epoch, place, block, row = self.order.locate(index)
        first = int(self.starts[block])
        packed, part_of = self._packed(block)
        here = packed.row(row)
        of, starts, stops = (facts[here].tolist() for facts in (packed.document, packed.start, packed.stop))
        pieces = [
            Chunk(self.corpus.document(first + i), start, stop)
            for i, start, stop in zip(of, starts, stops, strict=True)
        ]
        return (self.chance, epoch, place), part_of[here], pieces

    @property
    def padding_fraction(self) -> float:
        """The share of an epoch's positions that is padding, from the table."""
        room, used = (
            self.objective.capacity,
            self.totals.tokens
            + (self.totals.source_or_picked_tokens if self.objective.capacity.source else 0),
        )
        return 1 - used / (self.totals.rows * (room.tokens + room.source))

    def _pack(self, block: int) -> tuple[PackedBlock, np.ndarray]:
        """A block's pieces, and the part of a mixture that each belongs to."""
        lengths = np.asarray(self.corpus.lengths[self.starts[block] : self.starts[block + 1]])
        packed = pack_chunks(self.objective.chunks(lengths), self.objective.capacity)
        return packed, self.objective.part_of(packed.document, packed.start)


class Rows:
    """All rows of a run ("train": endless, shuffled, sources taking turns by weight) or of its held-out text
    ("heldout": each once, in order, and the same whatever the seed).
    """

    def __init__(
        self,
        recipe: pretraining.PretrainConfig,
        vocabulary: Vocabulary,
        corpora: Sequence[Corpus],
        split: Literal["train", "heldout"],
        cache: Path | None = None,
        processes: int = 1,
        row_length: int | None = None,
        after: "tuple[Rows, int] | None" = None,
    ) -> None:
        """`corpora` belong to recipe.data.sources one by one, or are the held-out ones; row tables are kept
        in the folder `cache`.

        `row_length` is that of a stage, None the recipe's. `after` (rows, i): these are the run's rows from
        number i on, and go on in the text where `rows` stopped, each source at the first window of blocks
        (order.py) that it had not finished. Raises UserError where a corpus has no text.
        """
        for number, corpus in enumerate(corpora):
            if corpus.num_tokens == 0:
                advice = (
                    "give more text"
                    if split == "train"
                    else "raise data.heldout_fraction, or give data.heldout or more text"
                )
                advice += " (in plain text an empty line ends a document; with `documents: line` of its source, each line is one)"
                raise UserError(
                    f"corpus {number} of the {split} data has 0 tokens in {corpus.num_documents} documents:"
                    f" {advice}."
                )
        self.row_length = row_length or recipe.data.row_length
        self.objective = goal = ObjectiveMixture(recipe.objective, vocabulary, self.row_length)
        dials = [self.row_length, recipe.objective.model_dump(exclude={"weight"}), vocabulary.fingerprint]
        seed = (recipe.seed, 0) if split == "train" else (0, 1)
        self.capacity, self.pad = goal.capacity, vocabulary.pad
        for side, length in (("target", goal.capacity.tokens), ("source", goal.capacity.source)):
            recipe.engine.check_sharable(f"the {side} side of a row", length)
        self.member_names = goal.labels if isinstance(recipe.objective, MixtureConfig) else []
        self.streams = [
            CorpusRows(
                corpus,
                goal,
                _digest(corpus.fingerprint, *dials),
                (*seed, number),
                split == "train",
                cache,
                processes,
            )
            for number, corpus in enumerate(corpora)
        ]
        self.num_rows = sum(stream.order.num_rows for stream in self.streams)  # of one epoch of every source
        self.num_bytes = sum(corpus.num_bytes for corpus in corpora)
        self.num_over_sentinel_limit = sum(stream.totals.num_over_sentinel_limit for stream in self.streams)
        weights = (
            [source.weight for source in recipe.data.sources]
            if split == "train"
            else [s.order.num_rows for s in self.streams]
        )
        self.fingerprint = _digest(*(stream.fingerprint for stream in self.streams), weights)
        self.padding_fraction = float(
            np.average([stream.padding_fraction for stream in self.streams], weights=weights)
        )
        targets = sum(corpus.num_tokens + corpus.num_documents for corpus in corpora)
        self.targets_per_byte = targets / self.num_bytes if recipe.objective.kind == "causal" else None
        self._turns = mixture_schedule(weights) if split == "train" else None
        self.first, self._begins = 0, [0] * len(self.streams)
        if after is not None:
            before, self.first = after
            reached = zip(self.streams, before.streams, before._reached(self.first), strict=True)
            self._begins = [mine.order.continue_index(other.order, index) for mine, other, index in reached]
            self.fingerprint = _digest(before.fingerprint, self.first, self.fingerprint)
        self._ends = np.cumsum([stream.order.num_rows for stream in self.streams])

    def row(self, i: int) -> Row:
        """Row i of the run, not before `first`; held-out rows end at `num_rows`."""
        return self.rows([i])[0]

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        """Several rows, for less than one by one: numpy's calls are made once for all that stay in the cache
        together.
        """
        at_once = max(1, POSITIONS_AT_ONCE // self.capacity.tokens)
        return [row for i in range(0, len(numbers), at_once) for row in self._made(numbers[i : i + at_once])]

    def _made(self, numbers: Sequence[int]) -> list[Row]:
        found = [self.streams[stream].row(index) for stream, index in map(self._place, numbers)]
        places, part_of, pieces = zip(*found, strict=True)
        counts = [len(row) for row in pieces]
        source, epoch, place = np.array(places, np.uint64).T
        keys = np.repeat(keyed_random.nth_random(keyed_random.nth_random(source, epoch), place), counts)
        keys = keyed_random.nth_random(keys, np.concatenate([np.arange(count) for count in counts]))
        groups = self.objective.segments(
            np.concatenate(part_of), [piece for row in pieces for piece in row], keys
        )
        return arrange_rows(groups, counts, self.capacity, self.pad, bool(self.member_names))

    def empty_row(self) -> Row:
        """A row of padding, to fill up a micro: no targets."""
        return arrange_rows([], [0], self.capacity, self.pad, bool(self.member_names))[0]

    def _place(self, i: int) -> tuple[int, int]:
        """The stream of a row, and which of the stream's rows it is."""
        if self._turns is None:
            stream = int(np.searchsorted(self._ends, i, side="right"))
            assert stream < len(self.streams), f"held-out row {i} of {self.num_rows}"
            return stream, i - int(self._ends[stream]) + self.streams[stream].order.num_rows
        streams, before, counts = self._turns
        period, turn = divmod(i - self.first, len(streams))
        stream = int(streams[turn])
        return stream, self._begins[stream] + period * int(counts[stream]) + int(before[turn])

    def _reached(self, i: int) -> list[int]:
        """The next row of each stream, once all rows before i were read."""
        assert self._turns is not None
        streams, _, counts = self._turns
        period, turn = divmod(i - self.first, len(streams))
        had = period * counts + np.bincount(streams[:turn], minlength=len(counts))
        return [begin + int(more) for begin, more in zip(self._begins, had, strict=True)]


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps([FORMAT, *parts]).encode(), digest_size=16).hexdigest()
