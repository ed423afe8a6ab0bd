"""Baselines against independent arithmetic."""

import math

import numpy as np
import pytest

from tests.pretrain.data.small_corpus import FIRST, SmallCorpus, SmallVocabulary, recipe
from trifold.pretrain.config import pretraining as dials
from trifold.pretrain.data.rows import Rows
from trifold.pretrain.evaluate import unigram_loss


def test_the_unigram_baseline_is_the_cross_entropy_of_smoothed_token_shares() -> None:
    vocabulary = SmallVocabulary(vocab_size=400)
    corpora = [SmallCorpus([3, 5, 2]), SmallCorpus([4, 1])]
    config = recipe(dials.CausalConfig(), row_length=16)
    rows = Rows.for_training(config, vocabulary, corpora[:1])
    heldout = Rows.heldout(config, vocabulary, corpora[1:])
    epoch = rows.num_rows
    seen = {token: 2 for token in range(FIRST, FIRST + 10)} | {
        vocabulary.eos: 4
    }  # each text token once, EOS once a document; add one
    total = sum(seen.values()) + 400 - len(seen)
    asked = [*range(FIRST, FIRST + 5), vocabulary.eos, vocabulary.eos]
    expected = -np.mean([math.log(seen[token] / total) for token in asked])
    assert unigram_loss(rows, heldout, 400, sample=epoch) == pytest.approx(expected)
