"""Matching: which tokens of a context stand in its question too, scored by F1. Baseline: all of them.

Nobody needs the answer: it is the first lesson of a model that is to find answers. A span head gives two
targets an example, and from random weights a small model learns from them what answers look like and never to
look a question up. Here every token of the context is a target, and looking up is all there is to learn.
Fine-tune the published folder on questions next.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trifold.finetune.config import MatchingConfig
from trifold.finetune.examples.cloze import cloze
from trifold.finetune.examples.squad import Question
from trifold.finetune.tasks.qa import Pointer, Window, read_all
from trifold.finetune.tasks.task import Model, TaskDefaults, label_logits
from trifold.modeling.batch import IGNORE
from trifold.modeling.config import Family, ModelConfig
from trifold.modeling.generation.config import Generation
from trifold.pretrain.data.objectives import Segment
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer

LABELS = ("O", "B-shared")


class Matching(TaskDefaults):
    """A label for each token of a context: shared with the question, or not."""

    best = "f1"

    def __init__(self, config: MatchingConfig, tokenizer: Tokenizer, family: Family, row_length: int) -> None:
        self.notes: list[str] = []
        self.train, self.dev, self.test = (
            read_all(files) for files in (config.train, config.dev, config.test)
        )
        self.train += cloze(self.train, config.cloze)
        self.tokenizer, self.row_length = tokenizer, row_length
        self.pointer = Pointer(tokenizer, family, row_length, config.stride)

    def with_head(self, config: ModelConfig) -> ModelConfig:
        """Of an encoder-decoder the encoder alone."""
        family = "decoder" if config.family == "decoder" else "encoder"
        head = {"labels": LABELS, "crf": False, "spans": False}
        return config.model_copy(update={"family": family, "alignment": "none", **head})

    def segments(self, examples: Sequence[Question]) -> list[Segment]:
        """The windows that a question is answered from."""
        return _segments(self.pointer.windows(examples))

    def predict(
        self, model: Model, examples: Sequence[Question], generation: Generation, tokens: int
    ) -> list[np.ndarray]:
        """For each question, which of its tokens are shared, in all its windows."""
        windows = self.pointer.windows(examples)
        segments = _segments(windows)
        all_logits = label_logits(model, segments, self.row_length, self.tokenizer.pad, tokens)
        labels: list[list[np.ndarray]] = [[] for _ in examples]
        for (i, _), segment, logits in zip(windows, segments, all_logits, strict=True):
            labels[i].append(logits.argmax(-1)[segment.targets != IGNORE])
        return [np.concatenate(of_windows) for of_windows in labels]

    def statistics(self, predictions: Sequence[np.ndarray], examples: Sequence[Question]) -> np.ndarray:
        """(examples, 3): tokens that are predicted to be shared, that are, and both."""
        rows = []
        for predicted, question in zip(predictions, examples, strict=True):
            true = self._shared(question)
            rows.append((predicted.sum(), true.sum(), (predicted & true).sum()))
        return np.array(rows, np.float64)

    def scores(self, total: np.ndarray) -> dict[str, float]:
        predicted, true, both = total
        return {
            "f1": 200 * both / max(predicted + true, 1),
            "precision": 100 * both / max(predicted, 1),
            "recall": 100 * both / max(true, 1),
        }

    def signatures(self) -> dict[str, str]:
        return {"f1": "tokens of the context, micro-averaged"}

    def baseline(self, examples: Sequence[Question]) -> tuple[str, list[np.ndarray]]:
        return "every token", [np.ones_like(self._shared(question)) for question in examples]

    def record(self, example: Question, prediction: np.ndarray) -> dict[str, Any]:
        return {
            "id": example.id,
            "question": example.question,
            "prediction": prediction.tolist(),
            "references": self._shared(example).tolist(),
        }

    def _shared(self, question: Question) -> np.ndarray:
        """0 or 1 for each token of the context, window by window."""
        targets = [segment.targets for segment in self.segments([question])]
        return np.concatenate([of_window[of_window != IGNORE] for of_window in targets])


def _segments(windows: Sequence[tuple[int, Window]]) -> list[Segment]:
    return [Segment(window.tokens, _targets(window), types=window.types) for _, window in windows]


def _targets(window: Window) -> np.ndarray:
    targets = np.full(len(window.tokens), IGNORE)
    context = slice(window.first, window.first + len(window.spans))
    question = window.tokens[1 : window.first - 1]
    targets[context] = np.isin(window.tokens[context], question)
    return targets
