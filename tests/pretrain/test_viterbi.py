import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from pretrain.viterbi import LONGEST, Viterbi

SCORES = st.sampled_from([-0.1, -0.3, -1.0, -2.0, -3.0])  # of which many sums are equal, or nearly
PIECES = st.dictionaries(st.text("abc", min_size=2, max_size=4).flatmap(lambda p: st.sampled_from([p, "▁" + p[1:]])), SCORES, max_size=20)
SINGLE = [("<unk>", 0.0), ("<s>", 0.0), ("▁", -2.0), ("a", -2.0), ("b", -3.0), ("c", -1.0)]


@given(PIECES, st.lists(st.text("abc", max_size=LONGEST - 1), min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_the_best_pieces_are_those_of_tokenizers_and_ties_fall_alike(pieces: dict[str, float], words: list[str]) -> None:
    vocab = [*SINGLE, *pieces.items()]
    which, ids, sizes = Viterbi(vocab, set()).encode(words)
    assert sorted(which) == list(range(len(words)))
    plain = models.Unigram(vocab, unk_id=0, byte_fallback=False)
    for word, found in zip(which, np.split(ids, sizes.cumsum()[:-1]), strict=True):
        assert found.tolist() == [token.id for token in plain.tokenize("▁" + words[word])]


def test_words_that_are_long_or_hold_other_characters_are_left_alone() -> None:
    words = ["a", "é", "a" * LONGEST, "a" * (LONGEST - 1), "", "ab", "🙂", "\na", "<s>"]
    which, ids, sizes = Viterbi(SINGLE, {"b"}).encode(words)
    assert which.tolist() == [3, 0, 4] and sizes.tolist() == [LONGEST, 2, 1]
    assert ids.tolist() == [2, *[3] * (LONGEST - 1), 2, 3, 2]
    which, ids, sizes = Viterbi(SINGLE, {"b"}).encode(["é"])
    assert len(which) == len(ids) == len(sizes) == 0
