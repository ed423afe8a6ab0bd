"""Questions made of contexts, and the first lesson: which tokens of a context stand in its question."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.finetune.small_tasks import OracleModel, question_vocabulary, write_squad
from trifold.finetune.config import MatchingConfig, QaConfig
from trifold.finetune.examples.cloze import cloze
from trifold.finetune.examples.squad import Question
from trifold.finetune.tasks.matching import Matching
from trifold.finetune.tasks.qa import Qa
from trifold.modeling.batch import IGNORE, Batch
from trifold.modeling.generation.config import Generation

ENGLISH = (
    "The river Aldern rises near Hollin and flows past seven mills. In 1843 the engineer Ada Brook built a"
    " bridge at Corvane. "
    "Its nine arches carried the first trains to the northern mines until the great flood. Bob Lester wrote"
    " songs about it."
)
JAPANESE = (
    "手塚治虫は1928年に豊中町で生まれた。その後ストーリー漫画の開拓者として東京で活躍した。"
    "1989年に亡くなった。"
)


def asked(context: str, *questions: tuple[str, str]) -> list[Question]:
    return [
        Question("here", str(i), q, context, ((context.index(a), a),)) for i, (q, a) in enumerate(questions)
    ]


ENGLISH_ASKED = asked(
    ENGLISH, ("When did Ada Brook build the bridge?", "1843"), ("Who wrote songs about it?", "Bob Lester")
)
JAPANESE_ASKED = asked(JAPANESE, ("手塚治虫は何年に生まれましたか?", "1928年"), ("どこで活躍した?", "東京"))


@pytest.mark.parametrize("questions", [ENGLISH_ASKED, JAPANESE_ASKED])
def test_a_made_answer_stands_at_its_offset_and_is_missing_from_the_end_of_its_question(
    questions: list[Question],
) -> None:
    made = cloze(questions, 60)
    assert len(made) == 60
    for question in made:
        [(start, text)] = question.answers
        assert (
            question.context[start : start + len(text)] == text and question.context in questions[0].context
        )
        assert len(question.question) > 3


def test_what_is_hidden_looks_like_an_asked_answer_and_is_asked_for_like_it() -> None:
    made = cloze(ENGLISH_ASKED, 60)
    years = [question for question in made if question.question.startswith("When did")]
    assert years and {question.texts[0] for question in years} == {"1843"}
    names = [question for question in made if question.question.startswith("Who ")]
    assert {"Ada Brook", "Bob Lester"} <= {question.texts[0] for question in names}
    assert all(len(name.split()) == 2 and name.istitle() for question in names for name in question.texts)


def test_what_a_question_asks_with_comes_from_around_its_answer() -> None:
    for question in cloze(ENGLISH_ASKED, 60):
        sentence = next(part for part in ENGLISH.split(". ") if question.texts[0] in part)
        body = (
            question.question.removeprefix("When did ")
            .removeprefix("Who ")
            .rstrip("?")
            .replace(".", "")
            .split()
        )
        assert set(body) <= set(sentence.replace(".", "").split()), question


def test_the_same_questions_make_the_same_ones() -> None:
    assert cloze(ENGLISH_ASKED, 20) == cloze(ENGLISH_ASKED, 20) == cloze(ENGLISH_ASKED, 40)[:20]
    assert cloze([], 5) == []


def test_made_questions_are_learned_along_with_the_asked_ones(tmp_path: Path) -> None:
    path = write_squad(
        tmp_path / "q.json",
        ENGLISH,
        ("When did Ada Brook build the bridge?", [(ENGLISH.index("1843"), "1843")]),
    )
    qa = Qa(QaConfig(train=(path,), dev=(path,), cloze=7), question_vocabulary(tmp_path), "encoder", 120)
    assert [question.id for question in qa.train] == ["0", *(f"cloze-{i}" for i in range(7))]
    assert len(qa.dev) == 1


class Reading(OracleModel):
    """A model that says of a token that it is shared where it stands before its segment's first end mark
    too.
    """

    def __init__(self, eos: int) -> None:
        super().__init__([], 2)
        self.eos = eos

    def logits(self, batch: Batch) -> torch.Tensor:
        out = torch.zeros(*batch.tokens.shape, 2)
        assert batch.segments is not None
        for row, (tokens, segments) in enumerate(
            zip(batch.tokens.tolist(), batch.segments.tolist(), strict=True)
        ):
            for number in range(1, max(segments) + 1):
                at = [path for path, segment in enumerate(segments) if segment == number]
                marks = [path for path in at if tokens[path] == self.eos]
                question = {tokens[path] for path in at[1 : at.index(marks[0])]}
                for path in at:
                    out[row, path, int(tokens[path] in question)] = 1
        return out


def test_matching_asks_of_each_token_of_a_context_whether_it_is_in_the_question(tmp_path: Path) -> None:
    path = write_squad(
        tmp_path / "q.json", ENGLISH, ("the mills 1843 zebra", [(ENGLISH.index("1843"), "1843")])
    )
    words = question_vocabulary(tmp_path)
    task = Matching(MatchingConfig(train=(path,), dev=(path,), stride=20), words, "encoder", 80)
    segments = task.segments(task.dev)
    assert len(segments) > 1  # windows
    for segment in segments:
        first = segment.tokens.tolist().index(words.eos) + 1
        question, context = segment.tokens[1 : first - 1].tolist(), segment.tokens[first:-1].tolist()
        assert segment.targets[first:-1].tolist() == [int(token in question) for token in context]
        assert (segment.targets[:first] == IGNORE).all() and segment.targets[-1] == IGNORE
    predictions = task.predict(Reading(words.eos), task.dev, Generation(), 160)
    assert task.scores(task.statistics(predictions, task.dev).sum(0)) == {
        "f1": 100,
        "precision": 100,
        "recall": 100,
    }
    name, everything = task.baseline(task.dev)
    scores = task.scores(task.statistics(everything, task.dev).sum(0))
    share = np.concatenate([segment.targets[segment.targets != IGNORE] for segment in segments]).mean()
    assert (
        name == "every token"
        and scores["recall"] == 100
        and scores["precision"] == pytest.approx(100 * share)
    )
