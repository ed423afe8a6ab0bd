"""Scores, by the field's own tools: sacrebleu (BLEU, chrF), rouge-score, seqeval's entities, and the official
SQuAD rules.

Every score is a function of numbers that add up over examples (statistics), so a bootstrap interval costs a
matrix product and no second scoring. All scores are percentages.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trifold.modeling.errors import UserError


class SacreBleu:
    """A metric of sacrebleu, corpus level, with its default settings; `signature` says which."""

    def __init__(self, name: str) -> None:
        self.metric: Any = getattr(_library("sacrebleu.metrics"), name)(
            **({"force": True} if name == "BLEU" else {})
        )

    @property
    def signature(self) -> str:
        return str(self.metric.get_signature())

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """(examples, K) counts. Examples may have unequally many references."""
        most = max(map(len, references))
        streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
        return np.array(
            self.metric._extract_corpus_statistics(list(predictions), streams), np.float64
        )  # what its own bootstrap resamples

    def score(self, total: np.ndarray) -> float:
        return float(self.metric._compute_score_from_stats(total.astype(np.int64).tolist()).score)


class Rouge:
    """ROUGE-1, 2 and L (Lin 2004) by rouge-score with stemming, the mean over examples; of several references
    the best one counts.
    """

    names = ("rouge1", "rouge2", "rougeL")

    def __init__(self) -> None:
        self.scorer = _library("rouge_score.rouge_scorer").RougeScorer(self.names, use_stemmer=True)

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        found = [
            self.scorer.score_multi(texts, said) for said, texts in zip(predictions, references, strict=True)
        ]
        return np.array([[1.0, *(scores[name].fmeasure for name in self.names)] for scores in found])

    def score(self, total: np.ndarray) -> dict[str, float]:
        return {name: float(100 * total[i] / total[0]) for i, name in enumerate(self.names, 1)}


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, last word) of each entity, as seqeval finds them (conlleval's rules)."""
    return set(_library("seqeval.metrics.sequence_labeling").get_entities(list(tags)))


def entity_statistics(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], types: Sequence[str]
) -> np.ndarray:
    """(examples, 3 * types): of each type the entities that are right, predicted, and there."""
    counts = []
    for said, true in zip(map(entities, predictions), map(entities, references), strict=True):
        counts.append(
            [
                sum(entity[0] == kind for entity in group)
                for kind in types
                for group in (said & true, said, true)
            ]
        )
    return np.array(counts, np.float64)


def entity_scores(total: np.ndarray, types: Sequence[str]) -> dict[str, float]:
    """F1 over all entities (micro), its precision and recall, and F1 of each type."""
    by_type = total.reshape(len(types), 3)
    right, said, true = by_type.sum(axis=0)
    overall = {
        "f1": _f1(right, said, true),
        "precision": float(100 * right / max(said, 1)),
        "recall": float(100 * right / max(true, 1)),
    }
    return overall | {f"f1/{kind}": _f1(*counts) for kind, counts in zip(types, by_type, strict=True)}


def answer_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(examples, 3): 1, exact match and F1 of the official SQuAD script; no reference at all means that there
    is no answer.
    """
    rows = []
    for said, texts in zip(predictions, references, strict=True):
        golds = [text for text in texts if normalize_answer(text)] or [""]
        rows.append(
            [
                1.0,
                max(float(normalize_answer(said) == normalize_answer(gold)) for gold in golds),
                max(_overlap(said, gold) for gold in golds),
            ]
        )
    return np.array(rows)


def answer_scores(total: np.ndarray) -> dict[str, float]:
    return {"f1": float(100 * total[2] / total[0]), "exact_match": float(100 * total[1] / total[0])}


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def words(text: str) -> list[str]:
    """What F1 compares: normalised words; each Chinese or Japanese character is one, as in MLQA (Lewis et al.
    2020).
    """
    return re.sub(
        "([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])", r" \1 ", normalize_answer(text)
    ).split()


def bootstrap_intervals(
    statistics: np.ndarray, scores: Callable[[np.ndarray], dict[str, float]], resamples: int = 1000
) -> dict[str, tuple[float, float]]:
    """The middle 95 % of each score over examples drawn anew with replacement (Efron 1979)."""
    draws = np.random.default_rng(0).multinomial(
        len(statistics), np.full(len(statistics), 1 / len(statistics)), size=resamples
    )
    found = [scores(total) for total in draws @ statistics]
    return {name: tuple(np.percentile([f[name] for f in found], [2.5, 97.5]).tolist()) for name in found[0]}


def _f1(right: float, said: float, true: float) -> float:
    return float(200 * right / (said + true)) if right else 0.0


def _overlap(said: str, gold: str) -> float:
    """F1 of two answers' words; 1 where neither has any."""
    a, b = words(said), words(gold)
    if not a and not b:
        return 1.0
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b))


def _library(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise UserError(f"scores need {name.split('.')[0]}: pip install 'trifold[score]'.") from None
