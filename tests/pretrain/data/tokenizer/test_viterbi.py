import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from trifold.pretrain.data.tokenizer.viterbi import MAX_CHARACTERS, Viterbi

SCORES = st.sampled_from([-0.1, -0.3, -1.0, -2.0, -3.0])  # of which many sums are equal, or nearly
PIECES = st.dictionaries(st.text("▁ab東", min_size=2, max_size=4), SCORES, max_size=20)
SINGLE = [("<unk>", 0.0), ("<s>", 0.0), ("▁", -2.0), ("a", -2.0), ("b", -3.0), ("c", -1.0), ("東", -1.5)]


def encode(viterbi: Viterbi, words: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return viterbi.encode(
        np.frombuffer("".join(words).encode("utf-32-le"), "<u4"), np.array([len(word) for word in words])
    )


@given(PIECES, st.lists(st.text("▁abc東", min_size=1, max_size=MAX_CHARACTERS), min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_the_best_pieces_are_those_of_tokenizers_and_ties_fall_alike(
    pieces: dict[str, float], words: list[str]
) -> None:
    vocab = [*SINGLE, *pieces.items()]
    which, ids, sizes = encode(Viterbi(vocab, set()), words)
    assert sorted(which) == list(range(len(words)))
    plain = models.Unigram(vocab, unk_id=0, byte_fallback=False)
    for word, found in zip(which, np.split(ids, sizes.cumsum()[:-1]), strict=True):
        assert found.tolist() == [token.id for token in plain.tokenize(words[word])]


def test_words_that_are_long_or_hold_other_characters_are_left_alone() -> None:
    words = ["▁a", "é", "a" * (MAX_CHARACTERS + 1), "a" * MAX_CHARACTERS, "▁", "ab", "🙂", "\na", "<s>"]
    which, ids, sizes = encode(Viterbi(SINGLE, {"b"}), words)
    assert which.tolist() == [3, 0, 4] and sizes.tolist() == [MAX_CHARACTERS, 2, 1]
    assert ids.tolist() == [*[3] * MAX_CHARACTERS, 2, 3, 2]
    which, ids, sizes = encode(Viterbi(SINGLE, {"b"}), ["é"])
    assert len(which) == len(ids) == len(sizes) == 0
