"""Questions about contexts with their answers: SQuAD files and hub sets come in, checked questions go out."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trifold.finetune.examples.records import existing, hub_rows, read_json
from trifold.modeling.errors import UserError
from trifold.pretrain.data.corpus import check_unicode

_Raw = tuple[str, dict[str, Any], str, list[tuple[int, str]]]  # where, the question, its context, its answers


@dataclass(frozen=True)
class Question:
    """A question about a context."""

    where: str  # "FILE, question ID"
    id: str
    question: str
    context: str
    answers: tuple[tuple[int, str], ...]  # where each begins, in characters; none: it cannot be answered

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(text for _, text in self.answers)


def read_questions(source: str) -> Iterator[Question]:
    """The questions of a SQuAD 1.1 or 2.0 file, or of a hub set in that form (id, question, context,
    answers).

    Raises UserError for what is not one, and for an answer that is not at its offset.
    """
    empty = True
    raw = _hub_questions(source) if source.startswith("hub:") else _file_questions(existing(source))
    for where, question, context, answers in raw:
        _check_types(where, question, context, answers)
        for start, text in answers:
            _check_answer(where, context, start, text)
        empty = False
        yield Question(where, str(question["id"]), question["question"], context, tuple(answers))
    if empty:
        raise UserError(f"{source} holds no question.")


def _file_questions(path: Path) -> Iterator[_Raw]:
    content = read_json(path)
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    answers = [] if question.get("is_impossible") else question["answers"]
                    spans = [(answer["answer_start"], answer["text"]) for answer in answers]
                    yield f"{path}, question {question['id']}", question, paragraph["context"], spans
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no SQuAD file with data, paragraphs, qas and answers: {type(error).__name__} {error}."
        ) from None


def _hub_questions(source: str) -> Iterator[_Raw]:
    try:
        for where, row in hub_rows(source):
            answers = row["answers"]
            yield where, row, row["context"], list(zip(answers["answer_start"], answers["text"], strict=True))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{source} has no columns id, question, context and answers as SQuAD has:"
            f" {type(error).__name__} {error}."
        ) from None


def _check_types(where: str, question: dict[str, Any], context: Any, answers: list[tuple[Any, Any]]) -> None:
    texts = [question.get("question"), context, *(text for _, text in answers)]
    starts_are_numbers = all(type(start) is int and start >= 0 for start, _ in answers)
    if not all(isinstance(text, str) for text in texts) or not starts_are_numbers:
        raise UserError(
            f"{where}: its question, context and answers must be text, and each answer_start a whole number"
            " from 0 on."
        )
    check_unicode("".join(map(str, texts)), where, "its question, context and answers")


def _check_answer(where: str, context: str, start: int, text: str) -> None:
    if not text.strip():
        raise UserError(f"{where}: it has an empty answer; mark it is_impossible, or remove it.")
    actual = context[start : start + len(text)]
    if actual != text:
        raise UserError(
            f"{where}: its answer {text!r} is not at character {start} of the context, where {actual!r}"
            " stands."
        )
