"""Questions about contexts with their answers: SQuAD files and hub sets in, checked questions out."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trifold.finetune.examples.pairs import existing, hub_rows, read_json
from trifold.modeling.errors import UserError
from trifold.pretrain.data.corpus import check_unicode


@dataclass(frozen=True)
class Question:
    where: str
    id: str
    question: str
    context: str
    answers: tuple[tuple[int, str], ...]  # where each begins, in characters; none: it cannot be answered

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(text for _, text in self.answers)


def read_questions(place: str) -> Iterator[Question]:
    """The questions of a SQuAD 1.1 or 2.0 file, or of a hub set in that form (id, question, context,
    answers).

    Raises UserError for what is not one, and for an answer that is not at its offset.
    """
    found = False
    for where, asked, context, answers in (
        _hub_questions(place) if place.startswith("hub:") else _file_questions(existing(place))
    ):
        texts = (asked.get("question"), context, *(text for _, text in answers))
        if not all(isinstance(text, str) for text in texts) or not all(
            type(start) is int and start >= 0 for start, _ in answers
        ):
            raise UserError(
                f"{where}: its question, context and answers must be text, and each answer_start a whole"
                " number from 0 on."
            )
        check_unicode("".join(map(str, texts)), where, "its question, context and answers")
        for start, text in answers:
            if not text.strip():
                raise UserError(f"{where}: it has an empty answer; mark it is_impossible, or remove it.")
            if (there := context[start : start + len(text)]) != text:
                raise UserError(
                    f"{where}: its answer {text!r} is not at character {start} of the context, where"
                    f" {there!r} stands."
                )
        found = True
        yield Question(where, str(asked["id"]), asked["question"], context, tuple(answers))
    if not found:
        raise UserError(f"{place} holds no question.")


_Asked = tuple[
    str, dict[str, Any], str, list[tuple[int, str]]
]  # where it stands, the question, its context, its answers


def _file_questions(path: Path) -> Iterator[_Asked]:
    whole = read_json(path)
    try:
        for paragraph in (paragraph for article in whole["data"] for paragraph in article["paragraphs"]):
            for asked in paragraph["qas"]:
                answers = (
                    []
                    if asked.get("is_impossible")
                    else [(a["answer_start"], a["text"]) for a in asked["answers"]]
                )
                yield f"{path}, question {asked['id']}", asked, paragraph["context"], answers
    except (KeyError, TypeError, AttributeError) as missing:
        raise UserError(
            f"{path} is no SQuAD file with data, paragraphs, qas and answers: {type(missing).__name__}"
            f" {missing}."
        ) from None


def _hub_questions(place: str) -> Iterator[_Asked]:
    try:
        for where, row in hub_rows(place):
            answers = row["answers"]
            yield where, row, row["context"], list(zip(answers["answer_start"], answers["text"], strict=True))
    except (KeyError, TypeError) as missing:
        raise UserError(
            f"{place} has no columns id, question, context and answers as SQuAD has:"
            f" {type(missing).__name__} {missing}."
        ) from None
