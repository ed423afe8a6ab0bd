"""A corpus and a vocabulary in memory, for tests of rows.

Honest stand-ins: they have the attributes of Shards and Tokenizer that rows are made from, and nothing else.
Every text token of a corpus is a number of its own, so a token that is lost, doubled or moved to another
document cannot hide.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trifold.modeling.config import ModelConfig
from trifold.pretrain.config import pretraining, training
from trifold.pretrain.config.objectives import AnyObjective, family_of

FIRST = 105  # the first ordinary token


class SmallVocabulary:
    pad: int
    bos: int
    eos: int
    unk: int
    mask: int | None
    pad, bos, eos, unk, mask = range(5)

    def __init__(self, vocab_size: int = 100_000, fingerprint: str = "vocabulary") -> None:
        self.sentinels: Sequence[int] = list(range(5, FIRST))
        self.special: Sequence[int] = list(range(FIRST))
        self.before, self.after, self.start = [self.bos], [self.eos], self.bos
        self.vocab_size, self.fingerprint = vocab_size, fingerprint
        self.word_starts = np.random.default_rng(7).random(vocab_size) < 0.5
        self.sentence_ends = np.random.default_rng(8).random(vocab_size) < 0.1


class SmallCorpus:
    def __init__(
        self, lengths: Sequence[int] | np.ndarray, first: int = FIRST, fingerprint: str = "corpus"
    ) -> None:
        self.lengths, self.fingerprint = np.array(lengths, np.int64), fingerprint
        self.ends = np.cumsum(self.lengths)
        self.num_documents, self.num_tokens = len(lengths), int(self.lengths.sum())
        self.num_bytes = 4 * self.num_tokens
        self.tokens = np.arange(first, first + self.num_tokens, dtype=np.uint32)

    def document(self, i: int) -> np.ndarray:
        return self.tokens[self.ends[i] - self.lengths[i] : self.ends[i]]


def recipe(
    objective: AnyObjective,
    row_length: int = 32,
    seed: int = 0,
    weights: Sequence[float] = (1.0,),
    **data: Any,
) -> pretraining.PretrainConfig:
    model = ModelConfig(
        family=family_of(objective),
        vocab_size=100_000,
        dim=32,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=32,
        mlp_dim=32,
        max_positions=row_length,
    )
    sources = tuple(
        pretraining.SourceConfig(path=f"{number}", weight=weight) for number, weight in enumerate(weights)
    )
    return pretraining.PretrainConfig(
        run="run",
        seed=seed,
        model=model,
        data=pretraining.DataConfig(sources=sources, heldout_fraction=0.1, row_length=row_length, **data),
        objective=objective,
        optimizer=training.OptimizerConfig(lr=1e-3),
        steps=1,
        step_rows=8,
        micro_rows=4,
    )
