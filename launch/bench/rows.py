"""Synthetic rows of a recipe's shape, as training would make them.

A config and the number of documents per row come in. Corpus and vocabulary are synthetic; objective, packing,
order and collation are the product's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from trifold.modeling.batch import IGNORE, Batch
from trifold.pretrain.config.pretraining import PretrainConfig
from trifold.pretrain.data.collate import stack
from trifold.pretrain.data.objectives import ObjectiveMixture
from trifold.pretrain.data.rows import Rows


class Words:
    """A vocabulary of numbers: five marks, the sentinels, ordinary tokens."""

    pad, bos, eos, unk = range(4)
    mask: int | None = 4
    fingerprint = "words"
    sentinels: Sequence[int]
    special: Sequence[int]

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.first = vocab_size, min(105, vocab_size // 2)
        self.sentinels, self.special = range(5, self.first), range(self.first)
        self.before, self.after, self.start = [self.bos], [self.eos], self.bos
        draw = np.random.default_rng(0)
        self.word_starts, self.sentence_ends = draw.random(vocab_size) < 0.6, draw.random(vocab_size) < 0.05


class Documents:
    """A corpus of random tokens, documents of `lengths`."""

    def __init__(self, lengths: np.ndarray, words: Words) -> None:
        self.lengths, self.ends = lengths, np.cumsum(lengths)
        self.num_documents, self.num_tokens = len(lengths), int(self.ends[-1])
        self.num_bytes, self.fingerprint = 4 * self.num_tokens, f"documents {self.num_tokens}"
        self.tokens = np.random.default_rng(1).integers(
            words.first, words.vocab_size, self.num_tokens, dtype=np.uint32
        )

    def document(self, i: int) -> np.ndarray:
        return self.tokens[self.ends[i] - self.lengths[i] : self.ends[i]]


@dataclass(frozen=True)
class Micro:
    """A micro batch, what of it counts, and the documents in it."""

    batch: Batch
    targets: int  # that are predicted
    tokens: int  # positions that are no padding, of both sides


def synthetic(config: PretrainConfig, vocab_size: int, documents: int, rows: int) -> Rows:
    """At least `rows` rows of about `documents` documents each (lengths exponential, as real ones nearly
    are); 0: each row is one whole document.
    """
    words = Words(vocab_size)
    goal = ObjectiveMixture(config.objective, words, config.data.row_length)
    whole = goal.max_chunk_length - goal.members[0].specials.count
    lengths = np.full(rows, whole)
    if documents:
        drawn = np.random.default_rng(2).exponential(config.data.row_length / documents, 2 * rows * documents)
        lengths = np.clip(drawn, 8, whole).astype(np.int64)
    return Rows.for_training(config, words, [Documents(lengths, words)])


def micros(config: PretrainConfig, vocab_size: int, documents: int, number: int, device: str) -> list[Micro]:
    """`number` micro batches. Rows that are one whole document come without segments: then every family has
    its plain kernels.
    """
    source = synthetic(config, vocab_size, documents, number * config.micro_rows)
    made = []
    for i in range(number):
        rows = source.rows(range(i * config.micro_rows, (i + 1) * config.micro_rows))
        batch = stack(rows, pin=device == "cuda")
        batch = batch if documents else replace(batch, segments=None, source_segments=None)
        made.append(Micro(batch, sum(row.num_targets for row in rows), sum(row.num_tokens for row in rows)))
    return made


def one_by_one(batch: Batch, pad: int = Words.pad) -> Batch:
    """The documents of a packed batch a row each, padded to the longest: what a stock collator makes of the
    same text. Padding is segment 0; `picked` is left out: stock classes compute all positions.
    """
    assert batch.segments is not None
    at = [(b, n) for b, row in enumerate(batch.segments) for n in range(1, int(row.max()) + 1)]

    def unpacked(x: torch.Tensor, segments: torch.Tensor, fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [x[b][segments[b] == n] for b, n in at], batch_first=True, padding_value=fill
        )

    own, source, its = batch.segments, batch.source, batch.source_segments
    both = (
        (None, None)
        if source is None or its is None
        else (unpacked(source, its, pad), unpacked(its, its, 0).clamp(max=1))
    )
    return Batch(
        unpacked(batch.tokens, own, pad),
        unpacked(own, own, 0).clamp(max=1),
        unpacked(batch.targets, own, IGNORE),
        *both,
    )


def parts(batch: Batch, rows: int) -> list[Batch]:
    """The same in batches of at most so many rows."""

    def cut(x: Any, start: int) -> Any:
        return None if x is None else x[start : start + rows]

    starts = range(0, len(batch.tokens), rows)
    return [
        Batch(**{field.name: cut(getattr(batch, field.name), start) for field in fields(batch)})
        for start in starts
    ]
