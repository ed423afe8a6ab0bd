"""Scores, by the field's own tools: sacrebleu (BLEU, chrF), rouge-score, seqeval's entities, and the official
SQuAD rules. Predictions and references come in, statistics go out, and scores of their sums.

Every score is a function of numbers that add up over examples (statistics), so a bootstrap interval costs a
matrix product and no second scoring. All scores are percentages.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from trifold.finetune.tasks.languages import ScoreWords, bleu_tokenization
from trifold.modeling.errors import UserError


class SacreBleu:
    """A metric of sacrebleu, corpus level; `signature` names its settings and its tokenizer."""

    def __init__(self, name: str, tokenize: str | None = None, language: str | None = None) -> None:
        """`name` is BLEU or CHRF. `tokenize` is one of sacrebleu's tokenizers for BLEU; without it the
        language of the references decides, and without that their first `statistics`.

        Raises UserError where a tool of the tokenizer is not installed.
        """
        self.name, self.tokenize, self.language = name, tokenize, language
        self.notes: list[str] = []
        self._metric: Any = None
        if tokenize is not None or language is not None or name == "CHRF":
            self.prepare([])

    def prepare(self, references: Sequence[Sequence[str]]) -> None:
        """Choose the tokenizer by these references, once."""
        if self._metric is not None:
            return
        metric = getattr(_library("sacrebleu.metrics"), self.name)
        if self.name == "CHRF":
            self._metric = metric()
            return
        texts = [text for wordings in references for text in wordings]
        tokenize, note = bleu_tokenization(self.tokenize, self.language, texts)
        self.notes += [note] if note else []
        self._metric = metric(tokenize=tokenize, force=True)  # force: tokenized text is no warning for each

    @property
    def signature(self) -> str:
        """After `statistics`."""
        return str(self._metric.get_signature())

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """(examples, K) counts. Examples may have unequally many references."""
        self.prepare(references)
        most = max(map(len, references))
        streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
        # what sacrebleu's own bootstrap resamples
        counts = self._metric._extract_corpus_statistics(list(predictions), streams)
        return np.array(counts, np.float64)

    def score(self, total: np.ndarray) -> float:
        return float(self._metric._compute_score_from_stats(total.astype(np.int64).tolist()).score)


class Rouge:
    """ROUGE-1, 2 and L (Lin 2004) by rouge-score, the mean over examples; of several references the best one
    counts.

    Its own tokenizer drops all but a-z and 0-9. Ours gives the same words for such text; it also keeps words
    of every other script, and takes graphemes as words where a script is written without spaces.
    """

    names = ("rouge1", "rouge2", "rougeL")

    def __init__(self, language: str | None = None) -> None:
        self.words = ScoreWords(language, _library("nltk.stem.porter").PorterStemmer())
        scorer = _library("rouge_score.rouge_scorer").RougeScorer
        self.scorer = scorer(self.names, use_stemmer=True, tokenizer=self.words)

    @property
    def signature(self) -> str:
        return (
            f"rouge-score {version('rouge-score')}, F-measure, {self.words.signature}, the best of several"
            " references"
        )

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """(examples, 4): 1, then ROUGE-1, ROUGE-2 and ROUGE-L."""
        rows = []
        for prediction, texts in zip(predictions, references, strict=True):
            scores = self.scorer.score_multi(texts, prediction)
            rows.append([1.0, *(scores[name].fmeasure for name in self.names)])
        return np.array(rows)

    def score(self, total: np.ndarray) -> dict[str, float]:
        return {name: float(100 * total[i] / total[0]) for i, name in enumerate(self.names, 1)}


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, last word) of each entity, as seqeval finds them (conlleval's rules)."""
    return set(_library("seqeval.metrics.sequence_labeling").get_entities(list(tags)))


def entity_statistics(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], types: Sequence[str]
) -> np.ndarray:
    """(examples, 3 * types): for each type the number of entities that are correct, predicted, and in the
    reference.
    """
    counts = []
    for predicted_tags, true_tags in zip(predictions, references, strict=True):
        predicted, true = entities(predicted_tags), entities(true_tags)
        groups = (predicted & true, predicted, true)
        counts.append([_count_type(group, kind) for kind in types for group in groups])
    return np.array(counts, np.float64)


def entity_scores(total: np.ndarray, types: Sequence[str]) -> dict[str, float]:
    """F1 over all entities (micro), its precision and recall, and F1 of each type."""
    by_type = total.reshape(len(types), 3)
    correct, predicted, true = by_type.sum(axis=0)
    overall = {
        "f1": _f1(correct, predicted, true),
        "precision": float(100 * correct / max(predicted, 1)),
        "recall": float(100 * correct / max(true, 1)),
    }
    return overall | {f"f1/{kind}": _f1(*counts) for kind, counts in zip(types, by_type, strict=True)}


def answer_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(examples, 6): 1, exact match and F1 of the official SQuAD script, and the same where there is an
    answer, else 0. No reference at all means that there is no answer.
    """
    rows = []
    for prediction, texts in zip(predictions, references, strict=True):
        golds = [text for text in texts if normalize_answer(text)] or [""]
        exact_match = max(float(normalize_answer(prediction) == normalize_answer(gold)) for gold in golds)
        scores = np.array([1.0, exact_match, max(_overlap(prediction, gold) for gold in golds)])
        rows.append([*scores, *(scores * bool(texts))])
    return np.array(rows)


def answer_scores(total: np.ndarray) -> dict[str, float]:
    """F1 and exact match of summed statistics; where there are questions with and without an answer, those of
    each kind too (HasAns and NoAns of SQuAD 2.0).
    """
    everything, answerable = total[:3], total[3:]
    scores = _mean_scores(everything)
    if 0 < answerable[0] < everything[0]:
        scores |= {f"has_answer_{name}": score for name, score in _mean_scores(answerable).items()}
        scores["no_answer_f1"] = _mean_scores(everything - answerable)["f1"]  # the exact match is the same
    return scores


def best_threshold(scores: np.ndarray, answered: np.ndarray, refused: np.ndarray) -> float:
    """The threshold that gives the highest sum, where an example at or above it counts `answered` and one
    below it `refused`; of equals the one nearest to 0.
    """
    finite = np.unique(scores[np.isfinite(scores)])
    if not len(finite):
        return 0.0
    candidates = np.array([finite[0] - 1, *((finite[:-1] + finite[1:]) / 2), finite[-1] + 1, 0.0])
    order = np.argsort(scores)
    gains = np.concatenate([[0.0], np.cumsum((refused - answered)[order])])  # of refusing the lowest n
    gain = gains[np.searchsorted(scores[order], candidates)]
    best = candidates[gain > gain.max() - 1e-9]
    return float(best[np.abs(best).argmin()])


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def words(text: str) -> list[str]:
    """What F1 compares: normalised words; each Chinese or Japanese character is one, as in MLQA (Lewis et al.
    2020).
    """
    cjk = "([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])"
    return re.sub(cjk, r" \1 ", normalize_answer(text)).split()


def bootstrap_intervals(
    statistics: np.ndarray, scores: Callable[[np.ndarray], dict[str, float]], resamples: int = 1000
) -> dict[str, tuple[float, float]]:
    """The middle 95 % of each score over examples drawn anew with replacement (Efron 1979)."""
    number = len(statistics)
    draws = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=resamples)
    resampled = [scores(total) for total in draws @ statistics]
    intervals = {}
    for name in scores(statistics.sum(axis=0)):
        low, high = np.percentile([each[name] for each in resampled if name in each], [2.5, 97.5])
        intervals[name] = (float(low), float(high))
    return intervals


def _mean_scores(total: np.ndarray) -> dict[str, float]:
    return {"f1": float(100 * total[2] / total[0]), "exact_match": float(100 * total[1] / total[0])}


def _count_type(group: set[tuple[str, int, int]], kind: str) -> int:
    return sum(entity[0] == kind for entity in group)


def _f1(correct: float, predicted: float, true: float) -> float:
    return float(200 * correct / (predicted + true)) if correct else 0.0


def _overlap(prediction: str, gold: str) -> float:
    """F1 of two answers' words; 1 where neither has any."""
    a, b = words(prediction), words(gold)
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
