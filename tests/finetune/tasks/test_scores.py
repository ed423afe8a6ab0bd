"""Scores against the tools of the field on what is hard for them, and against rules written down
elsewhere.
"""

import random

import numpy as np
import pytest

from trifold.finetune.tasks.languages import find_language, moses_note
from trifold.finetune.tasks.scores import (
    Rouge,
    SacreBleu,
    answer_scores,
    answer_statistics,
    best_threshold,
    bootstrap_intervals,
    entity_scores,
    entity_statistics,
)
from trifold.modeling.errors import UserError

PREDICTIONS = [
    "the cat sat on the mat",
    "",
    "Größe über alles , ja !",
    "猫が好きです。",
    "a",
    "exactly the same sentence here",
]
REFERENCES = [
    *[
        ("there is a cat", "the cat is on the mat"),
        ("something",),
        ("Größe über allem, ja!",),
        ("猫が大好きです。",),
    ],
    *[("a",), ("exactly the same sentence here",)],
]


ASCII = [i for i, text in enumerate(PREDICTIONS) if text.isascii()]
ASCII_PREDICTIONS = [PREDICTIONS[i] for i in ASCII]
ASCII_REFERENCES = [REFERENCES[i] for i in ASCII]


def test_bleu_and_chrf_are_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    streams = [
        [texts[0] for texts in REFERENCES],
        [texts[1] if len(texts) > 1 else None for texts in REFERENCES],
    ]
    for name, corpus in (("BLEU", sacrebleu.corpus_bleu), ("CHRF", sacrebleu.corpus_chrf)):
        metric = SacreBleu(name)
        assert metric.score(metric.statistics(PREDICTIONS, REFERENCES).sum(axis=0)) == pytest.approx(
            corpus(PREDICTIONS, streams).score
        )
    assert metric.signature.startswith("nrefs:var|case:mixed")


def test_rouge_of_ascii_text_is_the_mean_of_rouge_scores_best_reference() -> None:
    """By rouge-score's own tokenizer."""
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge2"], use_stemmer=True)
    predictions = [*ASCII_PREDICTIONS, "running_fast: it's 3,000 runners' houses"]
    references = [*ASCII_REFERENCES, ("run fast, it is 3000 runner house",)]
    best = []
    for prediction, texts in zip(predictions, references, strict=True):
        best.append(max(scorer.score(text, prediction)["rouge2"].fmeasure for text in texts))
    rouge = Rouge()
    total = rouge.statistics(predictions, references).sum(axis=0)
    assert rouge.score(total)["rouge2"] == pytest.approx(100 * np.mean(best))


def test_entity_f1_is_seqevals_over_all_and_by_type() -> None:
    seqeval = pytest.importorskip("seqeval.metrics")
    draw = np.random.default_rng(0)
    tags = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    true, prediction = ([[tags[i] for i in draw.integers(5, size=12)] for _ in range(40)] for _ in range(2))
    true[0] = prediction[0] = ["O"] * 12
    scores = entity_scores(entity_statistics(prediction, true, ["LOC", "PER"]).sum(axis=0), ["LOC", "PER"])
    assert scores["f1"] == pytest.approx(100 * seqeval.f1_score(true, prediction))
    assert scores["recall"] == pytest.approx(100 * seqeval.recall_score(true, prediction))
    by_type = seqeval.classification_report(true, prediction, output_dict=True)
    assert scores["f1/LOC"] == pytest.approx(100 * by_type["LOC"]["f1-score"])


@pytest.mark.parametrize(
    ("prediction", "true", "exact", "f1"),
    [
        ("The Cat!", ("cat",), 1, 1),
        ("a big cat", ("the cat", "big dog cat"), 0, 0.8),
        ("", (), 1, 1),
        ("cat", (), 0, 0),
        ("", ("cat",), 0, 0),
        ("the", ("a",), 1, 1),  # nothing is left of either
        ("cat cat", ("cat",), 0, 2 / 3),
        ("cat cat dog", ("cat cat",), 0, 0.8),
        ("東京都", ("東京",), 0, 0.8),
    ],
)
def test_answers_are_judged_by_squads_rules(
    prediction: str, true: tuple[str, ...], exact: float, f1: float
) -> None:
    scores = answer_scores(answer_statistics([prediction], [true]).sum(axis=0))
    assert scores == {"exact_match": pytest.approx(100 * exact), "f1": pytest.approx(100 * f1)}


def test_intervals_hold_the_score_and_shrink_with_more_examples() -> None:
    draw = np.random.default_rng(0)
    wide, narrow = (
        bootstrap_intervals(
            np.stack([np.ones(n), hits := draw.random(n) < 0.7, hits], axis=1),
            lambda total: {"f1": 100 * total[2] / total[0]},
        )["f1"]
        for n in (50, 5000)
    )
    assert wide[0] == pytest.approx(70 - 196 * (0.21 / 50) ** 0.5, abs=6)
    assert (
        wide[0] < 70 < wide[1]
        and narrow[0] < 70 < narrow[1]
        and narrow[1] - narrow[0] < (wide[1] - wide[0]) / 5
    )


SCRIPTS = {
    "Russian": "Привет, мир! Как дела?",
    "Japanese": "猫が大好きです。カタカナも。",
    "Arabic": "مرحبا بالعالم، كيف حالك",
    "Greek": "Γειά σου Κόσμε, τι κάνεις",
    "Hindi": "दिल्ली में वर्षा हुई",
    "Thai": "ที่นี่กรุงเทพมหานคร",
    "Chinese": "我们今天去北京看朋友",
    "Korean": "안녕하세요 여러분",
}


@pytest.mark.parametrize("language", SCRIPTS)
def test_a_text_against_itself_scores_100_in_every_script(language: str) -> None:
    text = SCRIPTS[language]
    rouge, bleu, chrf = Rouge(), SacreBleu("BLEU"), SacreBleu("CHRF")
    scores = rouge.score(rouge.statistics([text], [(text,)]).sum(axis=0))
    assert scores["rouge1"] == scores["rougeL"] == pytest.approx(100)
    for metric in (bleu, chrf):
        several = [text] * 4
        assert metric.score(metric.statistics(several, [[text]] * 4).sum(axis=0)) == pytest.approx(100), (
            metric.name
        )


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("Größe", "Grösse", 0),
        ("für", "fr", 0),
        ("Jose\u0301", "José", 100),
        ("दिल्ल", "दिल्ली", 0),
        ("東京", "東京都", 80),  # 2 graphemes of 2 and of 3
    ],
)
def test_rouge_compares_whole_words(prediction: str, reference: str, score: float) -> None:
    rouge = Rouge()
    total = rouge.statistics([prediction], [(reference,)]).sum(axis=0)
    assert rouge.score(total)["rouge1"] == pytest.approx(score)


def test_rouge_stems_english_alone_where_the_language_is_given() -> None:
    for language, score in ((None, 100), ("en-GB", 100), ("de", 0)):
        rouge = Rouge(language)
        total = rouge.statistics(["running"], [("runs",)]).sum(axis=0)
        assert rouge.score(total)["rouge1"] == pytest.approx(score)
        assert ("no stemming" in rouge.signature) == (language == "de")


def test_chinese_without_one_character_in_each_line_is_scored_by_sacrebleus_zh() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    draw = random.Random(0)
    references = ["".join(draw.choices("我们今天去北京看朋友老师说话很高兴认识", k=20)) for _ in range(50)]
    predictions = [text[:9] + text[10:] for text in references]
    metric = SacreBleu("BLEU")
    score = metric.score(metric.statistics(predictions, [[text] for text in references]).sum(axis=0))
    assert score == pytest.approx(sacrebleu.corpus_bleu(predictions, [references], tokenize="zh").score)
    assert 80 < score < 90 and "tok:zh" in metric.signature and "Chinese" in metric.notes[0]


def tokenizer_of(metric: SacreBleu) -> str:
    """As the signature has it, which sacrebleu gives after it has seen references."""
    metric.statistics(["a"], [["a"]])
    return metric.signature.partition("tok:")[2].partition("|")[0]


def test_a_language_chooses_the_tokenizer() -> None:
    assert tokenizer_of(SacreBleu("BLEU", language="th")) == "char"
    assert tokenizer_of(SacreBleu("BLEU", language="de")) == "13a"
    assert tokenizer_of(SacreBleu("BLEU", language="zh-TW")) == "zh"
    assert tokenizer_of(SacreBleu("BLEU", tokenize="intl", language="zh")) == "intl"


def test_a_tokenizer_that_is_missing_names_what_to_install() -> None:
    with pytest.raises(UserError, match="flores200: put its SentencePiece model at"):
        SacreBleu("BLEU", tokenize="flores200")
    found_from_text = SacreBleu("BLEU")
    found_from_text.prepare([[SCRIPTS["Japanese"]]])
    try:
        assert tokenizer_of(SacreBleu("BLEU", language="ja")).startswith("ja-mecab")
        assert tokenizer_of(found_from_text).startswith("ja-mecab")
    except UserError as error:
        assert str(error).endswith("ja-mecab: pip install 'sacrebleu[ja]'.")
        assert tokenizer_of(found_from_text) == "char" and "sacrebleu[ja]" in found_from_text.notes[0]


def test_the_language_follows_from_most_letters() -> None:
    codes = {"Japanese": "ja", "Thai": "th", "Chinese": "zh", "Korean": "ko"}
    for language, text in SCRIPTS.items():
        assert find_language([text, "OK"]) == codes.get(language)
    assert find_language(["", "123"]) is None


def test_escapes_of_moses_are_noted() -> None:
    assert moses_note(["it 's &apos;so&apos;", "fine & good"], "task.dev").startswith(
        "1 of 2 texts of task.dev hold"
    )
    assert moses_note(["AT&T; a & b"], "task.dev") == ""


def test_answers_with_and_without_an_answer_are_scored_apart() -> None:
    references = [("cat",), ("dog",), (), ()]
    scores = answer_scores(answer_statistics(["cat", "", "", "cow"], references).sum(axis=0))
    assert scores == {
        "f1": 50,
        "exact_match": 50,
        "has_answer_f1": 50,
        "has_answer_exact_match": 50,
        "no_answer_f1": 50,
    }


def test_the_threshold_is_the_best_of_all_possible_ones() -> None:
    draw = np.random.default_rng(0)
    for size in (1, 2, 7, 30):
        scores = draw.normal(size=size).round(1)
        answered, refused = draw.random(size), draw.integers(2, size=size).astype(float)
        best = best_threshold(scores, answered, refused)
        total = np.where(scores >= best, answered, refused).sum()
        thresholds = np.array([*scores, scores.max() + 1])[:, None]
        assert total == pytest.approx(np.where(scores >= thresholds, answered, refused).sum(axis=1).max())
    assert best_threshold(np.array([-np.inf]), np.array([0.0]), np.array([1.0])) == 0.0
