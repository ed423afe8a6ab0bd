"""Scores against the tools of the field on what is hard for them, and against rules written down
elsewhere.
"""

import numpy as np
import pytest

from trifold.finetune.tasks.scores import (
    Rouge,
    SacreBleu,
    answer_scores,
    answer_statistics,
    bootstrap_intervals,
    entity_scores,
    entity_statistics,
)

SAID = [
    "the cat sat on the mat",
    "",
    "Größe über alles , ja !",
    "猫が好きです。",
    "a",
    "exactly the same sentence here",
]
TRUE = [
    *[
        ("there is a cat", "the cat is on the mat"),
        ("something",),
        ("Größe über allem, ja!",),
        ("猫が大好きです。",),
    ],
    *[("a",), ("exactly the same sentence here",)],
]


def test_bleu_and_chrf_are_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    streams = [[texts[0] for texts in TRUE], [texts[1] if len(texts) > 1 else None for texts in TRUE]]
    for name, corpus in (("BLEU", sacrebleu.corpus_bleu), ("CHRF", sacrebleu.corpus_chrf)):
        metric = SacreBleu(name)
        assert metric.score(metric.statistics(SAID, TRUE).sum(axis=0)) == pytest.approx(
            corpus(SAID, streams).score
        )
    assert metric.signature.startswith("nrefs:var|case:mixed")


def test_rouge_is_the_mean_of_rouge_scores_best_reference() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge2"], use_stemmer=True)
    each = [
        max(scorer.score(true, said)["rouge2"].fmeasure for true in texts)
        for said, texts in zip(SAID, TRUE, strict=True)
    ]
    rouge = Rouge()
    assert rouge.score(rouge.statistics(SAID, TRUE).sum(axis=0))["rouge2"] == pytest.approx(
        100 * np.mean(each)
    )


def test_entity_f1_is_seqevals_over_all_and_by_type() -> None:
    seqeval = pytest.importorskip("seqeval.metrics")
    draw = np.random.default_rng(0)
    tags = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    true, said = ([[tags[i] for i in draw.integers(5, size=12)] for _ in range(40)] for _ in range(2))
    true[0] = said[0] = ["O"] * 12
    found = entity_scores(entity_statistics(said, true, ["LOC", "PER"]).sum(axis=0), ["LOC", "PER"])
    assert found["f1"] == pytest.approx(100 * seqeval.f1_score(true, said))
    assert found["recall"] == pytest.approx(100 * seqeval.recall_score(true, said))
    by_type = seqeval.classification_report(true, said, output_dict=True)
    assert found["f1/LOC"] == pytest.approx(100 * by_type["LOC"]["f1-score"])


@pytest.mark.parametrize(
    ("said", "true", "exact", "f1"),
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
    said: str, true: tuple[str, ...], exact: float, f1: float
) -> None:
    found = answer_scores(answer_statistics([said], [true]).sum(axis=0))
    assert found == {"exact_match": pytest.approx(100 * exact), "f1": pytest.approx(100 * f1)}


def test_intervals_hold_the_score_and_shrink_with_more_examples() -> None:
    draw = np.random.default_rng(0)
    wide, narrow = (
        bootstrap_intervals(
            np.stack([np.ones(n), hits := draw.random(n) < 0.7, hits], axis=1), answer_scores
        )["f1"]
        for n in (50, 5000)
    )
    assert wide[0] == pytest.approx(70 - 196 * (0.21 / 50) ** 0.5, abs=6)
    assert (
        wide[0] < 70 < wide[1]
        and narrow[0] < 70 < narrow[1]
        and narrow[1] - narrow[0] < (wide[1] - wide[0]) / 5
    )
