"""Questions about a context: SQuAD files come in, an answer goes out, scored by the official rules. Baseline:
the sentence most like the question.

A span head points at the answer's first and last token; a long context is read in windows that overlap. "No
answer" is a position of its own: BOS for a model that sees both ways, the last EOS for one that sees
backwards only. Where some training questions have no answer, dev chooses the score below which there is none.
An encoder-decoder writes the answer instead, and a decoder too where it is prompted.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Any

import numpy as np

from trifold.finetune.config import QaConfig
from trifold.finetune.examples.cloze import cloze
from trifold.finetune.examples.pairs import Pair
from trifold.finetune.examples.squad import Question, read_questions
from trifold.finetune.examples.words import extend_to_graphemes
from trifold.finetune.tasks.scores import answer_scores, answer_statistics, best_threshold, words
from trifold.finetune.tasks.task import Model, Task, TaskDefaults, TextToText, label_logits
from trifold.modeling.batch import IGNORE
from trifold.modeling.config import Family, ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.pretrain.data.objectives import Segment
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer

NO_ANSWER = "no answer"  # what a model writes where there is none
_SENTENCE = re.compile(r"[^.!?。！？\n]+[.!?。！？]*")


@dataclass(frozen=True)
class Answer:
    """The likeliest span: its text (empty: the context has none), where it begins in the context, and its
    log-odds against there being no answer.
    """

    text: str
    start: int = 0
    score: float = 0.0

    @property
    def finite_score(self) -> float | None:
        """The score as JSON has it: None for a context without a token."""
        return self.score if isfinite(self.score) else None


def open_qa(config: QaConfig, tokenizer: Tokenizer, family: Family, row_length: int) -> Task:
    writes = family == "encoder-decoder" or (family == "decoder" and config.prompted)
    if writes:
        return WrittenQa(config, tokenizer, family, row_length)
    return Qa(config, tokenizer, family, row_length)


class _Questions(TaskDefaults):
    """What both ways of answering share: the examples, the scores and the baseline."""

    best = "f1"

    def __init__(self, config: QaConfig) -> None:
        self.notes: list[str] = []
        self.train, self.dev, self.test = (
            read_all(files) for files in (config.train, config.dev, config.test)
        )

    def statistics(self, predictions: Sequence[Any], examples: Sequence[Question]) -> np.ndarray:
        texts = [self.answer_text(prediction) for prediction in predictions]
        return answer_statistics(texts, [example.texts for example in examples])

    def scores(self, total: np.ndarray) -> dict[str, float]:
        return answer_scores(total)

    def signatures(self) -> dict[str, str]:
        return {
            "f1": "SQuAD 2.0's evaluation, Chinese and Japanese characters as words",
            "exact_match": "SQuAD 2.0's evaluation",
        }

    def baseline(self, examples: Sequence[Question]) -> tuple[str, list[Any]]:
        return "sentence most like the question", [_most_similar(question) for question in examples]

    def record(self, example: Question, prediction: Any) -> dict[str, Any]:
        line: dict[str, Any] = {
            "id": example.id,
            "question": example.question,
            "prediction": self.answer_text(prediction),
        }
        if isinstance(prediction, Answer):
            line |= {"start": prediction.start, "score": prediction.finite_score}
        return line | {"references": list(example.texts)}

    def answer_text(self, prediction: Any) -> str:
        """The answer that a prediction stands for; empty: there is none."""
        return prediction.text if isinstance(prediction, Answer) else str(prediction)


@dataclass(frozen=True)
class Window:
    """A range of a context behind its question, and what its tokens stand for."""

    tokens: np.ndarray
    types: np.ndarray | None  # 0 before the context, 1 from there on, where the stock tokenizer gives types
    first: int  # position of the context's first token among these
    begin: int  # index of that token in the context
    spans: np.ndarray  # (tokens of the context, 2) characters of the context


class Qa(_Questions):
    """A span head points at answers."""

    def __init__(self, config: QaConfig, tokenizer: Tokenizer, family: Family, row_length: int) -> None:
        super().__init__(config)
        self.may_refuse = any(not question.answers for question in self.train)
        self.threshold: float | None = None  # the score below which there is no answer; None: 0
        self.train += cloze(self.train, config.cloze)
        self.pointer = Pointer(tokenizer, family, row_length, config.stride, config.longest)

    def with_head(self, config: ModelConfig) -> ModelConfig:
        return config.model_copy(update={"labels": (), "crf": False, "spans": True})

    def settings(self) -> dict[str, Any]:
        return {"threshold": (self.threshold or 0.0) if self.may_refuse else None}

    def restore(self, settings: dict[str, Any]) -> None:
        self.threshold = settings.get("threshold", self.threshold)

    def segments(self, examples: Sequence[Question]) -> list[Segment]:
        windows = self.pointer.windows(examples)
        self._note_long_answers(examples)
        return [
            Segment(window.tokens, self.pointer.targets(window, examples[i]), types=window.types)
            for i, window in windows
        ]

    def predict(
        self, model: Model, examples: Sequence[Question], generation: Generation, tokens: int
    ) -> list[Answer]:
        return self.pointer.answers(model, examples, tokens)

    def calibrate(self, predictions: Sequence[Answer], examples: Sequence[Question]) -> None:
        """Choose the threshold with the highest F1, as SQuAD 2.0's evaluation does (best_f1_thresh)."""
        if not self.may_refuse:
            return
        references = [example.texts for example in examples]
        answered = answer_statistics([answer.text for answer in predictions], references)
        refused = answer_statistics([""] * len(predictions), references)
        scores = np.array([answer.score for answer in predictions])
        self.threshold = best_threshold(scores, answered[:, 2], refused[:, 2])

    def answer_text(self, prediction: Any) -> str:
        refused = self.may_refuse and isinstance(prediction, Answer) and self._is_refused(prediction)
        return "" if refused else super().answer_text(prediction)

    def _is_refused(self, answer: Answer) -> bool:
        return answer.score < (self.threshold or 0.0)

    def _note_long_answers(self, examples: Sequence[Question]) -> None:
        limit = self.pointer.max_answer_tokens
        lengths = [self.pointer.answer_tokens(question) for question in examples if question.answers]
        too_long = [length for length in lengths if length > limit]
        note = (
            f"{len(too_long):,} of {len(lengths):,} answers have more than task.longest ({limit}) tokens, at"
            f" most {max(too_long, default=0)}: they are never predicted. Raise task.longest."
        )
        if too_long and note not in self.notes:
            self.notes.append(note)


class Pointer:
    """Points at answers of at most `max_answer_tokens`; two windows share `stride` tokens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        family: Family,
        row_length: int,
        stride: int = 64,
        max_answer_tokens: int = 30,
    ) -> None:
        self.tokenizer, self.family, self.row_length = tokenizer, family, row_length
        self.stride, self.max_answer_tokens = stride, max_answer_tokens
        self.encoded = lru_cache(8)(tokenizer.offsets)  # one context has many questions

    def windows(self, questions: Sequence[Question]) -> list[tuple[int, Window]]:
        """BOS question EOS context EOS, as an encoder's stock tokenizer encodes the two; each with the index
        of its question.
        """
        windows = []
        before, between, after = self.tokenizer.pair_special_tokens()
        encoded_questions = self.tokenizer.encode_batch([question.question for question in questions])
        for number, (question, question_ids) in enumerate(zip(questions, encoded_questions, strict=True)):
            ids, spans = self.encoded(question.context)
            head = [*before, *question_ids.tolist(), *between]
            capacity = self.row_length - len(head) - len(after)
            if capacity <= self.stride:
                raise UserError(
                    f"{question.where}: the question has {len(question_ids)} tokens; row_length"
                    f" ({self.row_length}) leaves {capacity} for a window of its context, and windows share"
                    f" task.stride ({self.stride}): raise row_length, or lower the stride."
                )
            for begin in range(0, max(len(ids) - self.stride, 1), capacity - self.stride):
                tokens = np.array([*head, *ids[begin : begin + capacity], *after], np.int64)
                types = None
                if self.tokenizer.gives_token_types:
                    types = (np.arange(len(tokens)) >= len(head)).astype(np.int64)
                characters = np.array(spans[begin : begin + capacity], np.int64).reshape(-1, 2)
                windows.append((number, Window(tokens, types, len(head), begin, characters)))
        return windows

    def answers(self, model: Model, examples: Sequence[Question], tokens: int) -> list[Answer]:
        """The best answer over all windows of each question, whatever its score."""
        windows = self.windows(examples)
        segments = [
            Segment(window.tokens, np.full(len(window.tokens), IGNORE), types=window.types)
            for _, window in windows
        ]
        all_logits = label_logits(model, segments, self.row_length, self.tokenizer.pad, tokens)
        best = [Answer("", score=-np.inf)] * len(examples)
        for (i, window), logits in zip(windows, all_logits, strict=True):
            answer = self._best(window, logits, examples[i].context)
            best[i] = max(best[i], answer, key=lambda answer: answer.score)
        return best

    def targets(self, window: Window, question: Question) -> np.ndarray:
        """Positions of the first answer's first and last token, if all of it is in this window, else that of
        no answer, twice; IGNORE behind them.
        """
        targets = np.full(len(window.tokens), IGNORE)
        targets[:2] = self._no_answer_position(window)
        inside = self._answer_indices(question) - window.begin
        if len(inside) and inside[0] >= 0 and inside[-1] < len(window.spans):
            targets[:2] = window.first + inside[0], window.first + inside[-1]
        return targets

    def answer_tokens(self, question: Question) -> int:
        """The number of tokens of the first answer."""
        return len(self._answer_indices(question))

    def _answer_indices(self, question: Question) -> np.ndarray:
        """Indices of the context's tokens that the first answer covers."""
        if not question.answers:
            return np.array([], np.int64)
        start, text = question.answers[0]
        spans = np.array(self.encoded(question.context)[1], np.int64).reshape(-1, 2)
        return np.flatnonzero((spans[:, 1] > start) & (spans[:, 0] < start + len(text)))

    def _no_answer_position(self, window: Window) -> int:
        return len(window.tokens) - 1 if self.family == "decoder" else 0

    def _best(self, window: Window, logits: np.ndarray, context: str) -> Answer:
        """The likeliest span of at most `max_answer_tokens`, in whole graphemes."""
        size, no_answer = len(window.spans), self._no_answer_position(window)
        if not size:
            return Answer("", score=-np.inf)
        begins, ends = logits[window.first : window.first + size].T
        sums = begins[:, None] + ends[None, :]
        allowed = np.tri(size, size, self.max_answer_tokens - 1, dtype=bool)
        allowed &= ~np.tri(size, size, -1, dtype=bool)
        sums[~allowed] = -np.inf
        first, last = np.unravel_index(int(sums.argmax()), sums.shape)
        score = float(sums[first, last] - logits[no_answer].sum())

        start, stop = int(window.spans[first, 0]), int(window.spans[last, 1])
        start += len(context[start:stop]) - len(context[start:stop].lstrip())
        start, stop = extend_to_graphemes(context, start, stop)
        return Answer(context[start:stop].rstrip(), start, score)


class WrittenQa(_Questions, TextToText):  # type: ignore[misc]  # questions in place of pairs
    """The answer as text, "no answer" where there is none; of a context that is too long the end is cut
    off.
    """

    decoder_prompt = "{source}\nAnswer:\n"

    def __init__(self, config: QaConfig, tokenizer: Tokenizer, family: Family, row_length: int) -> None:
        TextToText.__init__(self, tokenizer, family, row_length, config.prompt, truncate=True)
        _Questions.__init__(self, config)

    def segments(self, examples: Sequence[Question]) -> list[Segment]:  # type: ignore[override]
        return super().segments([_pair(question) for question in examples])

    def predict(  # type: ignore[override]
        self, model: Model, examples: Sequence[Question], generation: Generation, tokens: int
    ) -> list[str]:
        outputs = super().predict(model, [_pair(question) for question in examples], generation, tokens)
        return ["" if text == NO_ANSWER else text for text in outputs]


def read_all(files: Sequence[str]) -> list[Question]:
    """The questions of several files and hub sets."""
    return [question for file in files for question in read_questions(file)]


def _pair(question: Question) -> Pair:
    source = f"{question.question}\n{question.context}"
    return Pair(question.where, source, question.texts[:1] or (NO_ANSWER,))


def _most_similar(question: Question) -> Answer:
    """The sentence that shares most words with the question."""
    asked = set(words(question.question))
    sentences = [match for match in _SENTENCE.finditer(question.context) if match[0].strip()]
    if not sentences:
        return Answer("")
    best = max(sentences, key=lambda match: len(asked & set(words(match[0]))))
    return Answer(best[0].strip(), best.start(), np.inf)  # never refused
