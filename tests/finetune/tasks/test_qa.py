"""Answers at their places: windows over long contexts, languages without spaces, questions without an
answer.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.finetune.small_tasks import CONTEXT, OraclePointer, question_vocabulary, wordpiece, write_squad
from tests.published import tokenizer
from trifold.finetune.config import QaConfig
from trifold.finetune.examples.squad import read_questions
from trifold.finetune.tasks.qa import Answer, Qa, open_qa
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation


@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_what_the_targets_mark_is_the_answer_letter_for_letter(family: Any, tmp_path: Path) -> None:
    answers = ["Ada", "town number 7", "Éva", "東京", "東", "京", "train", "Éva came to 東京 by train"]
    questions = [(f"what is {i}?", [(CONTEXT.index(text), text)]) for i, text in enumerate(answers)]
    path = write_squad(tmp_path / "train.json", CONTEXT, *questions, ("and nothing?", []))
    qa = Qa(QaConfig(train=(path,), dev=(path,), stride=30), question_vocabulary(tmp_path), family, 80)
    segments = qa.segments(qa.train)
    assert len(segments) >= 3 * len(qa.train) and max(len(s.tokens) for s in segments) <= 80
    marks = qa.pointer.tokenizer
    for length in range(60, 100, 4):  # windows that end before, in and after the answers
        cut = Qa(QaConfig(train=(path,), dev=(path,), stride=30), marks, family, length)
        spelled = {
            marks.decode(s.tokens[s.targets[0] : s.targets[1] + 1]).strip() for s in cut.segments(cut.train)
        }
        assert spelled == {*answers, "</s>" if family == "decoder" else "<s>"}  # never a part of an answer
    predictions = qa.predict(OraclePointer(segments), qa.train, Generation(), 240)
    assert any(b - a > 2 and CONTEXT[a] == " " for a, b in qa.pointer.encoded(CONTEXT)[1])
    assert [qa.answer_text(answer) for answer in predictions] == [*answers, ""]
    assert [answer.start for answer in predictions[:-1]] == [at for _, [(at, _)] in questions]
    assert qa.scores(qa.statistics(predictions, qa.train).sum(axis=0)) == {
        name: 100 for name in ("f1", "exact_match", "has_answer_f1", "has_answer_exact_match", "no_answer_f1")
    }


def test_windows_cover_the_context_and_share_the_stride(tmp_path: Path) -> None:
    path = write_squad(tmp_path / "train.json", CONTEXT, ("who?", [(0, "Ada")]))
    qa = Qa(QaConfig(train=(path,), dev=(path,), stride=7), tokenizer(), "encoder", 40)
    windows = [window for _, window in qa.pointer.windows(qa.train[:1])]
    ids = tokenizer().encode_batch([CONTEXT])[0].tolist()
    parts = [window.tokens[window.first : -1].tolist() for window in windows]
    assert all(before[-7:] == after[:7] for before, after in pairwise(parts))
    assert [i for n, part in enumerate(parts) for i in (part[7:] if n else part)] == ids
    with pytest.raises(UserError, match=r"question 0: the question has \d+ tokens; row_length \(12\)"):
        Qa(QaConfig(train=(path,), dev=(path,), stride=7), tokenizer(), "encoder", 12).segments(qa.train)


def test_an_answer_that_is_not_at_its_offset_and_a_file_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"a\.json, question 0: its answer 'Bob' is not at character 3 of the context, where ' an'"
        r" stands",
    ):
        list(read_questions(write_squad(tmp_path / "a.json", CONTEXT, ("who?", [(3, "Bob")]))))
    with pytest.raises(UserError, match=r"question 0: .* each answer_start a whole number from 0 on"):
        list(read_questions(write_squad(tmp_path / "a.json", CONTEXT, ("who?", [(-6, CONTEXT[-6:-3])]))))
    with pytest.raises(UserError, match=r"question 0: character 3 .* half of a surrogate pair"):
        list(read_questions(write_squad(tmp_path / "a.json", CONTEXT, ("who\ud83d?", []))))
    (tmp_path / "b.json").write_text('{"data": [{"paragraphs": [{"context": "c", "qas": ["who?"]}]}]}')
    with pytest.raises(UserError, match="is no SQuAD file"):
        list(read_questions(str(tmp_path / "b.json")))
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(UserError, match="is no SQuAD file"):
        list(read_questions(str(tmp_path / "b.json")))


def test_an_encoder_decoder_writes_and_the_trivial_system_picks_a_sentence(tmp_path: Path) -> None:
    path = write_squad(
        tmp_path / "train.json",
        CONTEXT,
        ("Who came to 東京?", [(CONTEXT.index("Éva"), "Éva")]),
        ("and nothing?", []),
    )
    qa = open_qa(QaConfig(train=(path,), dev=(path,)), tokenizer(), "encoder-decoder", 300)
    segments = qa.segments(qa.train)
    assert [tokenizer().decode(s.targets[:-1]) for s in segments] == ["Éva", "no answer"]
    assert qa.baseline(qa.dev)[1][0].text == "Then Éva came to 東京 by train."


def test_a_hub_set_of_questions_reads_as_the_file_does(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = write_squad(
        tmp_path / "file.json", "Ada met Bob.", ("Who?", [(8, "Bob"), (0, "Ada")]), ("Why?", [])
    )
    rows = [
        {
            "id": "0",
            "question": "Who?",
            "context": "Ada met Bob.",
            "answers": {"text": ["Bob", "Ada"], "answer_start": [8, 0]},
        },
        {
            "id": "1",
            "question": "Why?",
            "context": "Ada met Bob.",
            "answers": {"text": [], "answer_start": []},
        },
    ]
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "hub" / "train.parquet")
    questions = [
        (q.id, q.question, q.context, q.answers) for q in read_questions(f"hub:{tmp_path}/hub:train")
    ]
    assert questions == [(q.id, q.question, q.context, q.answers) for q in read_questions(path)]
    assert questions[1][3] == ()


@pytest.mark.parametrize("answer", ["1973 में", "दिल्ली", "Éva"])
def test_an_answer_keeps_marks_that_the_tokenizer_strips(answer: str, tmp_path: Path) -> None:
    context = "Éva दिल्ली 1973 में x"
    bert = wordpiece(tmp_path / "bert", ["eva", "1973", "x", "who", *"दलमहन"], uncased=True)
    path = write_squad(tmp_path / "train.json", context, ("who", [(context.index(answer), answer)]))
    qa = open_qa(QaConfig(train=(path,), dev=(path,), stride=4), bert, "encoder", 40)
    oracle = OraclePointer(qa.segments(qa.train))
    [prediction] = qa.predict(oracle, qa.train, Generation(), 240)
    assert prediction.text == answer and prediction.start == context.index(answer)


def test_dev_chooses_below_which_score_there_is_no_answer(tmp_path: Path) -> None:
    path = write_squad(tmp_path / "q.json", CONTEXT, ("who?", [(0, "Ada")]), ("why?", []), ("how?", []))
    qa = open_qa(QaConfig(train=(path,), dev=(path,)), tokenizer(), "encoder", 300)
    predictions = [Answer("Ada", 0, 3.0), Answer("Bob", 8, 1.0), Answer("river", 1, 2.0)]
    before = qa.scores(qa.statistics(predictions, qa.dev).sum(axis=0))
    qa.calibrate(predictions, qa.dev)
    after = qa.scores(qa.statistics(predictions, qa.dev).sum(axis=0))
    assert before["no_answer_f1"] == 0 and after["no_answer_f1"] == after["has_answer_f1"] == 100
    assert qa.settings() == {"threshold": 2.5}
    assert [qa.record(*pair)["prediction"] for pair in zip(qa.dev, predictions, strict=True)] == [
        "Ada",
        "",
        "",
    ]


def test_a_context_without_a_token_has_no_score_in_json(tmp_path: Path) -> None:
    path = write_squad(tmp_path / "q.json", "", ("who?", []))
    train = write_squad(tmp_path / "t.json", CONTEXT, ("who?", [(0, "Ada")]))
    qa = open_qa(QaConfig(train=(train,), dev=(path,)), tokenizer(), "encoder", 100)
    predictions = qa.predict(OraclePointer(qa.segments(qa.dev)), qa.dev, Generation(), 100)
    line = json.dumps(qa.record(qa.dev[0], predictions[0]), allow_nan=False)
    assert json.loads(line)["score"] is None


def test_answers_longer_than_the_limit_are_counted(tmp_path: Path) -> None:
    long = CONTEXT[:120].rstrip()
    path = write_squad(tmp_path / "q.json", CONTEXT, ("who?", [(0, "Ada")]), ("what?", [(0, long)]))
    qa = open_qa(QaConfig(train=(path,), dev=(path,), longest=12), tokenizer(), "encoder", 300)
    qa.segments(qa.train)
    assert qa.notes[0].startswith("1 of 2 answers have more than task.longest (12) tokens, at most")
