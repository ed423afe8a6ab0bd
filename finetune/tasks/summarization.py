"""Summaries: documents come in, a summary goes out, scored by ROUGE. Baseline: the first three sentences.

A decoder or an encoder-decoder writes the summary. An encoder picks sentences: a sentence's first token is
labelled by whether it is one of those that together are most like the summary, found greedily (Nallapati et
al. 2017); it picks as many as that takes on average.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from trifold.finetune.config import SummarizationConfig
from trifold.finetune.examples.pairs import Pair
from trifold.finetune.examples.sentences import split_sentences
from trifold.finetune.tasks.scores import Rouge, words
from trifold.finetune.tasks.tagging import first_tokens
from trifold.finetune.tasks.task import Model, Task, TaskDefaults, TextToText, label_logits
from trifold.finetune.tasks.translation import read_split
from trifold.modeling.batch import IGNORE
from trifold.modeling.config import Family, ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.pretrain.data.objectives import Segment
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer

MAX_SENTENCES = 5  # sentences of a summary


def open_summarization(
    config: SummarizationConfig, tokenizer: Tokenizer, family: Family, row_length: int
) -> Task:
    if family == "encoder":
        return Extraction(config, tokenizer, family, row_length)
    return Summarization(config, tokenizer, family, row_length)


class _Summaries(TaskDefaults):
    """What both ways of summarizing share."""

    best = "rouge1"

    def __init__(self, config: SummarizationConfig) -> None:
        self.notes: list[str] = []
        self.train = read_split(config, "train", self.notes)
        self.dev = read_split(config, "dev", self.notes)
        self.test = read_split(config, "test", self.notes)
        self.rouge = Rouge(config.language)

    def statistics(self, predictions: Sequence[str], examples: Sequence[Pair]) -> np.ndarray:
        return self.rouge.statistics(predictions, [pair.targets for pair in examples])

    def scores(self, total: np.ndarray) -> dict[str, float]:
        return self.rouge.score(total)

    def signatures(self) -> dict[str, str]:
        return {"rouge": self.rouge.signature}

    def baseline(self, examples: Sequence[Pair]) -> tuple[str, list[str]]:
        return "lead-3", [_first_sentences(pair.source, 3) for pair in examples]

    def record(self, example: Pair, prediction: str) -> dict[str, Any]:
        return {"where": example.where, "prediction": prediction, "references": list(example.targets)}


class Summarization(_Summaries, TextToText):
    """A model writes the summary."""

    decoder_prompt = "{source}\nSummary:\n"

    def __init__(
        self, config: SummarizationConfig, tokenizer: Tokenizer, family: Family, row_length: int
    ) -> None:
        TextToText.__init__(self, tokenizer, family, row_length, config.prompt, config.truncate)
        _Summaries.__init__(self, config)


class Extraction(_Summaries):
    """An encoder picks the sentences of the summary."""

    def __init__(
        self, config: SummarizationConfig, tokenizer: Tokenizer, family: Family, row_length: int
    ) -> None:
        super().__init__(config)
        self.tokenizer, self.family, self.row_length = tokenizer, family, row_length
        self.truncate = config.truncate
        picks = [len(most_similar(pair)) for pair in self.train]
        self.number = max(1, round(sum(picks) / len(picks)))

    def with_head(self, config: ModelConfig) -> ModelConfig:
        return config.model_copy(update={"labels": ("leave", "pick"), "crf": False, "spans": False})

    def settings(self) -> dict[str, Any]:
        return {"picks": self.number}

    def segments(self, examples: Sequence[Pair]) -> list[Segment]:
        segments = []
        for pair in examples:
            tokens, positions = self._positions(pair)
            targets = np.full(len(tokens), IGNORE)
            picked = most_similar(pair)
            for sentence, position in positions.items():
                targets[position] = sentence in picked
            segments.append(Segment(tokens, targets))
        return segments

    def predict(
        self, model: Model, examples: Sequence[Pair], generation: Generation, tokens: int
    ) -> list[str]:
        logits = label_logits(model, self.segments(examples), self.row_length, self.tokenizer.pad, tokens)
        summaries = []
        for pair, pair_logits in zip(examples, logits, strict=True):
            _, positions = self._positions(pair)
            summaries.append(pick_sentences(pair.source, pair_logits, positions, self.number))
        return summaries

    def _positions(self, pair: Pair) -> tuple[np.ndarray, dict[int, int]]:
        """A document's tokens, and the position of the first token of every sentence that begins in them."""
        tokens, positions = sentence_positions(self.tokenizer, self.family, pair.source)
        if len(tokens) > self.row_length:
            if not self.truncate:
                raise UserError(
                    f"{pair.where}: the document has {len(tokens)} tokens, and row_length is"
                    f" {self.row_length}: set task.truncate."
                )
            tokens = np.append(tokens[: self.row_length - 1], self.tokenizer.eos)
        last = len(tokens) - 1
        return tokens, {sentence: position for sentence, position in positions.items() if position < last}


def sentence_positions(tokenizer: Tokenizer, family: Family, text: str) -> tuple[np.ndarray, dict[int, int]]:
    """A text's tokens, and by sentence the position of its first token; a sentence without one is missing."""
    tokens, positions = first_tokens(tokenizer, family, text, split_sentences(text))
    return tokens, {sentence: position for sentence, position in enumerate(positions) if position >= 0}


def pick_sentences(text: str, logits: np.ndarray, positions: dict[int, int], number: int) -> str:
    """The `number` sentences with the highest odds of being picked, in the text's order; logits (T, 2) of the
    text's tokens.
    """
    spans = split_sentences(text)
    sentences = list(positions)
    scores = logits[list(positions.values())]
    best = np.argsort(scores[:, 0] - scores[:, 1])[:number]
    return " ".join(text[slice(*spans[sentences[i]])] for i in sorted(best))


def most_similar(pair: Pair) -> set[int]:
    """The sentences that together share most words and pairs of words with the summary, found one by one
    while the overlap grows.
    """
    summary = _counts(pair.targets[0])
    sentences = [_counts(pair.source[begin:end]) for begin, end in split_sentences(pair.source)]
    chosen: set[int] = set()
    total: Counter[Any] = Counter()
    best = 0.0
    while len(chosen) < min(MAX_SENTENCES, len(sentences)):
        left = [i for i in range(len(sentences)) if i not in chosen]
        score, negative = max((_f1(total + sentences[i], summary), -i) for i in left)
        if score <= best:
            break
        best, total = score, total + sentences[-negative]
        chosen.add(-negative)
    return chosen


def _first_sentences(text: str, number: int) -> str:
    return " ".join(text[begin:end] for begin, end in split_sentences(text)[:number])


def _counts(text: str) -> Counter[Any]:
    tokens = words(text)
    return Counter(tokens) + Counter(pairwise(tokens))


def _f1(a: Counter[Any], b: Counter[Any]) -> float:
    return 2 * (a & b).total() / max(a.total() + b.total(), 1)
