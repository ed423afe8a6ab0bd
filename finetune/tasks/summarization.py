"""Summaries: documents in, a summary out, scored by ROUGE. Trivial: the first three sentences.

A decoder or an encoder-decoder writes the summary. An encoder picks sentences: a sentence's first piece is
labelled by whether it is one of those that together are most like the summary, found greedily (Nallapati et
al. 2017); it picks as many as that takes on average.
"""

from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np

from trifold.finetune import config
from trifold.finetune.examples.pairs import Pair, read_pairs
from trifold.finetune.examples.sentences import split_sentences
from trifold.finetune.tasks.scores import Rouge, words
from trifold.finetune.tasks.task import Model, Task, TextToText, align_to_tokens, label_logits
from trifold.modeling.batch import IGNORE
from trifold.modeling.config import Family, ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.pretrain.data.objectives import Segment
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer

MAX_SENTENCES = 5  # sentences of a summary


def open_summarization(
    dials: config.SummarizationConfig, tokenizer: Tokenizer, family: Family, row_length: int
) -> Task:
    return (Extraction if family == "encoder" else Summarization)(dials, tokenizer, family, row_length)


class _Summaries:
    """What both ways of summarizing share."""

    best = "rouge1"

    def __init__(self, dials: config.SummarizationConfig) -> None:
        self.train, self.dev = (
            read_pairs(places, dials.columns.source, dials.columns.target)
            for places in (dials.train, dials.dev)
        )
        self.rouge = Rouge()

    def statistics(self, predictions: Sequence[str], examples: Sequence[Pair]) -> np.ndarray:
        return self.rouge.statistics(predictions, [pair.targets for pair in examples])

    def scores(self, total: np.ndarray) -> dict[str, float]:
        return self.rouge.score(total)

    def signatures(self) -> dict[str, str]:
        return {
            "rouge": f"rouge-score {version('rouge-score')}, F-measure, Porter stemming, the best of several"
            " references"
        }

    def baseline(self) -> tuple[str, list[str]]:
        return "lead-3", [
            " ".join(pair.source[a:b] for a, b in split_sentences(pair.source)[:3]) for pair in self.dev
        ]

    def record(self, example: Pair, prediction: str) -> dict[str, Any]:
        return {"where": example.where, "prediction": prediction, "references": list(example.targets)}


class Summarization(_Summaries, TextToText):
    decoder_prompt = "{source}\nSummary:\n"

    def __init__(
        self, dials: config.SummarizationConfig, tokenizer: Tokenizer, family: Family, row_length: int
    ) -> None:
        TextToText.__init__(self, tokenizer, family, row_length, dials.prompt, dials.truncate)
        _Summaries.__init__(self, dials)


class Extraction(_Summaries):
    def __init__(
        self, dials: config.SummarizationConfig, tokenizer: Tokenizer, family: Family, row_length: int
    ) -> None:
        super().__init__(dials)
        self.tokenizer, self.family, self.row_length, self.truncate = (
            tokenizer,
            family,
            row_length,
            dials.truncate,
        )
        picks = [len(most_similar(pair)) for pair in self.train]
        self.number = max(1, round(sum(picks) / len(picks)))

    def with_head(self, config: ModelConfig) -> ModelConfig:
        return config.model_copy(update={"labels": ("leave", "pick"), "crf": False, "spans": False})

    def segments(self, examples: Sequence[Pair]) -> list[Segment]:
        made = []
        for pair in examples:
            tokens, places = self._placed(pair)
            targets = np.full(len(tokens), IGNORE)
            picked = most_similar(pair)
            for number, place in enumerate(places):
                targets[place] = number in picked
            made.append(Segment(tokens, targets))
        return made

    def predict(self, model: Model, examples: Sequence[Pair], how: Generation, tokens: int) -> list[str]:
        logits = label_logits(model, self.segments(examples), self.row_length, self.tokenizer.pad, tokens)
        summaries = []
        for pair, scores in zip(examples, logits, strict=True):
            _, places = self._placed(pair)
            summaries.append(pick_sentences(pair.source, scores[places], self.number))
        return summaries

    def _placed(self, pair: Pair) -> tuple[np.ndarray, list[int]]:
        """A document's tokens, and the place of the first piece of every sentence that begins in them."""
        tokens, places = align_to_tokens(
            self.tokenizer, self.family, pair.source, [begin for begin, _ in split_sentences(pair.source)]
        )
        if len(tokens) > self.row_length:
            if not self.truncate:
                raise UserError(
                    f"{pair.where}: the document has {len(tokens)} tokens, and row_length is"
                    f" {self.row_length}: set task.truncate."
                )
            tokens = np.append(tokens[: self.row_length - 1], self.tokenizer.eos)
        return tokens, [place for place in places if place < len(tokens) - 1]


def pick_sentences(text: str, logits: np.ndarray, number: int) -> str:
    """The `number` sentences that are rather to be picked than left, in the text's order; logits (sentences,
    2).
    """
    spans = split_sentences(text)
    return " ".join(text[slice(*spans[i])] for i in sorted(np.argsort(logits[:, 0] - logits[:, 1])[:number]))


def most_similar(pair: Pair) -> set[int]:
    """The sentences that together share most words and pairs of words with the summary, found one by one
    while the overlap grows.
    """
    wanted = _counts(pair.targets[0])
    parts = [_counts(pair.source[begin:end]) for begin, end in split_sentences(pair.source)]
    chosen: set[int] = set()
    have: Counter[Any] = Counter()
    best = 0.0
    while len(chosen) < min(MAX_SENTENCES, len(parts)):
        score, i = max((_f1(have + part, wanted), -i) for i, part in enumerate(parts) if i not in chosen)
        if score <= best:
            break
        best, have = score, have + parts[-i]
        chosen.add(-i)
    return chosen


def _counts(text: str) -> Counter[Any]:
    said = words(text)
    return Counter(said) + Counter(pairwise(said))


def _f1(a: Counter[Any], b: Counter[Any]) -> float:
    return 2 * (a & b).total() / max(a.total() + b.total(), 1)
