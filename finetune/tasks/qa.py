"""Questions about a context: SQuAD files in, an answer out, scored by the official rules. Trivial: the
sentence most like the question.

A span head points at the answer's first and last piece; a long context is read in windows that overlap. "No
answer" is a place of its own: BOS for a model that sees both ways, the last EOS for one that sees backwards
only. An encoder-decoder writes the answer instead, and a decoder too where it is prompted.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from trifold.finetune import config
from trifold.finetune.examples.cloze import cloze
from trifold.finetune.examples.pairs import Pair
from trifold.finetune.examples.squad import Question, read_questions
from trifold.finetune.tasks.scores import answer_scores, answer_statistics, words
from trifold.finetune.tasks.task import Model, Task, TextToText, label_logits
from trifold.modeling.batch import IGNORE
from trifold.modeling.config import Family, Generation, ModelConfig
from trifold.modeling.errors import UserError
from trifold.pretrain.data.objectives import Segment
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer

_SENTENCE = re.compile(r"[^.!?。！？\n]+[.!?。！？]*")


@dataclass(frozen=True)
class Answer:
    """The text (empty: there is none), where it begins in the context, and its score: log-odds against there
    being none.
    """

    text: str
    start: int = 0
    score: float = 0.0


def open_qa(dials: config.QaConfig, tokenizer: Tokenizer, family: Family, row_length: int) -> Task:
    writes = family == "encoder-decoder" or (family == "decoder" and dials.prompted)
    return (WrittenQa if writes else Qa)(dials, tokenizer, family, row_length)


class _Questions:
    """What both ways of answering share: the examples, the scores and the trivial system."""

    best = "f1"
    dev: Sequence[Question]

    def statistics(self, predictions: Sequence[Any], examples: Sequence[Question]) -> np.ndarray:
        return answer_statistics(
            [_text(prediction) for prediction in predictions], [example.texts for example in examples]
        )

    def scores(self, total: np.ndarray) -> dict[str, float]:
        return answer_scores(total)

    def signatures(self) -> dict[str, str]:
        return {
            "f1": "SQuAD 2.0's evaluation, Chinese and Japanese characters as words",
            "exact_match": "SQuAD 2.0's evaluation",
        }

    def baseline(self) -> tuple[str, list[Any]]:
        return "sentence most like the question", [_most_similar(question) for question in self.dev]

    def record(self, example: Question, prediction: Any) -> dict[str, Any]:
        place = (
            {"start": prediction.start, "score": prediction.score} if isinstance(prediction, Answer) else {}
        )
        said = {"id": example.id, "question": example.question, "prediction": _text(prediction), **place}
        return {**said, "references": list(example.texts)}


@dataclass(frozen=True)
class Window:
    """A part of a context behind its question, and what its pieces stand for."""

    tokens: np.ndarray
    types: np.ndarray | None  # 0 up to the context, 1 from there on, where the stock tokenizer gives types
    first: int  # where the context's pieces begin among the tokens
    begin: int  # which of the context's pieces is the first here
    spans: np.ndarray  # (pieces, 2) characters of the context


class Qa(_Questions):
    def __init__(self, dials: config.QaConfig, tokenizer: Tokenizer, family: Family, row_length: int) -> None:
        self.train, self.dev = (
            [q for place in places for q in read_questions(place)] for places in (dials.train, dials.dev)
        )
        may_refuse = any(not question.answers for question in self.train)
        self.train += cloze(self.train, dials.cloze)
        self.pointer = Pointer(tokenizer, family, row_length, dials.stride, dials.longest, may_refuse)

    def with_head(self, config: ModelConfig) -> ModelConfig:
        return config.model_copy(update={"labels": (), "crf": False, "spans": True})

    def segments(self, examples: Sequence[Question]) -> list[Segment]:
        return [
            Segment(w.tokens, self.pointer.targets(w, examples[i]), types=w.types)
            for i, w in self.pointer.windows(examples)
        ]

    def predict(
        self, model: Model, examples: Sequence[Question], how: Generation, tokens: int
    ) -> list[Answer]:
        return self.pointer.answers(model, examples, tokens)


class Pointer:
    """Points at answers: `stride` tokens are shared by two windows, an answer has `longest` at most, and may
    be refused.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        family: Family,
        row_length: int,
        stride: int = 64,
        longest: int = 30,
        may_refuse: bool = False,
    ) -> None:
        self.tokenizer, self.family, self.row_length = tokenizer, family, row_length
        self.stride, self.longest, self.may_refuse = stride, longest, may_refuse
        self.encoded = lru_cache(8)(tokenizer.offsets)  # one context has many questions

    def windows(self, questions: Sequence[Question]) -> list[tuple[int, Window]]:
        """BOS question EOS context EOS, as an encoder's stock tokenizer encodes the two; each with the number
        of its question.
        """
        made = []
        before, between, after = self.tokenizer.pair_special_tokens()
        with_types = self.tokenizer.gives_token_types
        for number, asked in enumerate(
            self.tokenizer.encode_batch([question.question for question in questions])
        ):
            question = questions[number]
            ids, spans = self.encoded(question.context)
            head = [*before, *asked.tolist(), *between]
            room = self.row_length - len(head) - len(after)
            if room <= self.stride:
                raise UserError(
                    f"{question.where}: the question has {len(asked)} tokens; row_length ({self.row_length})"
                    f" leaves {room} for a window of"
                    f" its context, and windows share task.stride ({self.stride}): raise row_length, or"
                    " lower the stride."
                )
            for begin in range(0, max(len(ids) - self.stride, 1), room - self.stride):
                tokens = np.array([*head, *ids[begin : begin + room], *after], np.int64)
                types = (np.arange(len(tokens)) >= len(head)).astype(np.int64) if with_types else None
                characters = np.array(spans[begin : begin + room], np.int64).reshape(-1, 2)
                made.append((number, Window(tokens, types, len(head), begin, characters)))
        return made

    def answers(self, model: Model, examples: Sequence[Question], tokens: int) -> list[Answer]:
        """The best answer over all windows of each question."""
        windows = self.windows(examples)
        segments = [
            Segment(window.tokens, np.full(len(window.tokens), IGNORE), types=window.types)
            for _, window in windows
        ]
        best = [Answer("", score=-np.inf)] * len(examples)
        for (i, window), logits in zip(
            windows, label_logits(model, segments, self.row_length, self.tokenizer.pad, tokens), strict=True
        ):
            found = self._best(window, logits, examples[i].context)
            best[i] = max(best[i], found, key=lambda answer: answer.score)
        return [
            Answer("", 0, answer.score) if self.may_refuse and answer.score < 0 else answer for answer in best
        ]

    def targets(self, window: Window, question: Question) -> np.ndarray:
        """Where the first answer stands, if all of it is in this window."""
        targets = np.full(len(window.tokens), IGNORE)
        targets[:2] = self._nowhere(window)
        spans = np.array(self.encoded(question.context)[1], np.int64).reshape(-1, 2)
        for start, text in question.answers[:1]:
            inside = np.flatnonzero((spans[:, 1] > start) & (spans[:, 0] < start + len(text))) - window.begin
            if len(inside) and inside[0] >= 0 and inside[-1] < len(window.spans):
                targets[:2] = window.first + inside[0], window.first + inside[-1]
        return targets

    def _nowhere(self, window: Window) -> int:
        return len(window.tokens) - 1 if self.family == "decoder" else 0

    def _best(self, window: Window, logits: np.ndarray, context: str) -> Answer:
        """The likeliest span of at most `longest` tokens."""
        size, nowhere = len(window.spans), self._nowhere(window)
        if not size:
            return Answer("", score=-np.inf)
        begins, ends = logits[window.first : window.first + size].T
        both = begins[:, None] + ends[None, :]
        both[~np.tri(size, size, self.longest - 1, dtype=bool) | np.tri(size, size, -1, dtype=bool)] = -np.inf
        first, last = np.unravel_index(int(both.argmax()), both.shape)
        start, stop = int(window.spans[first, 0]), int(window.spans[last, 1])
        start += len(context[start:stop]) - len(context[start:stop].lstrip())
        return Answer(context[start:stop].rstrip(), start, float(both[first, last] - logits[nowhere].sum()))


class WrittenQa(_Questions, TextToText):  # type: ignore[misc]  # questions in place of pairs
    """The answer as text, "no answer" where there is none; of a context that is too long the end is cut
    off.
    """

    decoder_prompt = "{source}\nAnswer:\n"

    def __init__(self, dials: config.QaConfig, tokenizer: Tokenizer, family: Family, row_length: int) -> None:
        TextToText.__init__(self, tokenizer, family, row_length, dials.prompt, truncate=True)
        self.train, self.dev = (
            [q for place in places for q in read_questions(place)] for places in (dials.train, dials.dev)
        )

    def segments(self, examples: Sequence[Question]) -> list[Segment]:  # type: ignore[override]
        return super().segments([_pair(question) for question in examples])

    def predict(self, model: Model, examples: Sequence[Question], how: Generation, tokens: int) -> list[str]:  # type: ignore[override]
        said = super().predict(model, [_pair(question) for question in examples], how, tokens)
        return ["" if text == NO_ANSWER else text for text in said]


NO_ANSWER = "no answer"


def _pair(question: Question) -> Pair:
    return Pair(
        question.where, f"{question.question}\n{question.context}", question.texts[:1] or (NO_ANSWER,)
    )


def _text(prediction: Any) -> str:
    return prediction.text if isinstance(prediction, Answer) else str(prediction)


def _most_similar(question: Question) -> Answer:
    """The sentence that shares most words with the question."""
    asked = set(words(question.question))
    sentences = [match for match in _SENTENCE.finditer(question.context) if match[0].strip()]
    if not sentences:
        return Answer("")
    best = max(sentences, key=lambda match: len(asked & set(words(match[0]))))
    return Answer(best[0].strip(), best.start())
