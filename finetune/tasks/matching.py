"""Matching: which tokens of a context stand in its question too, scored by F1. Trivial: all of them.

Nobody needs the answer: it is the first lesson of a model that is to find answers. A span head gives two
targets an example, and from random weights a small model learns from them what answers look like and never to
look a question up. Here every token of the context is a target, and looking up is all there is to learn.
Fine-tune the published folder on questions next.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trifold.finetune import config
from trifold.finetune.examples.cloze import cloze
from trifold.finetune.examples.squad import Question, read_questions
from trifold.finetune.tasks.qa import Pointer, Window
from trifold.finetune.tasks.task import Model, label_logits
from trifold.modeling.batch import IGNORE
from trifold.modeling.config import Family, Generation, ModelConfig
from trifold.pretrain.data.objectives import Segment
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer

LABELS = ("O", "B-shared")


class Matching:
    best = "f1"

    def __init__(
        self, dials: config.MatchingConfig, tokenizer: Tokenizer, family: Family, row_length: int
    ) -> None:
        self.train, self.dev = (
            [q for place in places for q in read_questions(place)] for places in (dials.train, dials.dev)
        )
        self.train += cloze(self.train, dials.cloze)
        self.tokenizer, self.row_length = tokenizer, row_length
        self.pointer = Pointer(tokenizer, family, row_length, dials.stride)

    def with_head(self, config: ModelConfig) -> ModelConfig:
        """Of an encoder-decoder the encoder alone."""
        family = "decoder" if config.family == "decoder" else "encoder"
        return config.model_copy(
            update={"family": family, "alignment": "none", "labels": LABELS, "crf": False, "spans": False}
        )

    def segments(self, examples: Sequence[Question]) -> list[Segment]:
        """The windows that a question is answered from."""
        return self._segments(self.pointer.windows(examples))

    def predict(
        self, model: Model, examples: Sequence[Question], how: Generation, tokens: int
    ) -> list[np.ndarray]:
        """For each question, which of its tokens are shared, in all its windows."""
        windows = self.pointer.windows(examples)
        segments = self._segments(windows)
        found: list[list[np.ndarray]] = [[] for _ in examples]
        read = label_logits(model, segments, self.row_length, self.tokenizer.pad, tokens)
        for (i, _), segment, logits in zip(windows, segments, read, strict=True):
            found[i].append(logits.argmax(-1)[segment.targets != IGNORE])
        return [np.concatenate(parts) for parts in found]

    def statistics(self, predictions: Sequence[np.ndarray], examples: Sequence[Question]) -> np.ndarray:
        """(examples, 3): tokens that are said to be shared, that are, and both."""
        true = [self._shared(question) for question in examples]
        return np.array(
            [
                (said.sum(), are.sum(), (said & are).sum())
                for said, are in zip(predictions, true, strict=True)
            ],
            np.float64,
        )

    def scores(self, total: np.ndarray) -> dict[str, float]:
        said, are, both = total
        return {
            "f1": 200 * both / max(said + are, 1),
            "precision": 100 * both / max(said, 1),
            "recall": 100 * both / max(are, 1),
        }

    def signatures(self) -> dict[str, str]:
        return {"f1": "tokens of the context, micro-averaged"}

    def baseline(self) -> tuple[str, list[np.ndarray]]:
        return "every token", [np.ones_like(self._shared(question)) for question in self.dev]

    def record(self, example: Question, prediction: np.ndarray) -> dict[str, Any]:
        return {
            "id": example.id,
            "question": example.question,
            "prediction": prediction.tolist(),
            "references": self._shared(example).tolist(),
        }

    def _shared(self, question: Question) -> np.ndarray:
        return np.concatenate(
            [segment.targets[segment.targets != IGNORE] for segment in self.segments([question])]
        )

    def _segments(self, windows: Sequence[tuple[int, Window]]) -> list[Segment]:
        return [Segment(window.tokens, self._targets(window), types=window.types) for _, window in windows]

    def _targets(self, window: Window) -> np.ndarray:
        targets = np.full(len(window.tokens), IGNORE)
        context = slice(window.first, window.first + len(window.spans))
        targets[context] = np.isin(window.tokens[context], window.tokens[1 : window.first - 1])
        return targets
