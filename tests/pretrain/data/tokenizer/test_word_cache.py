import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from tests.paths import DATA
from trifold.pretrain.config.pretraining import SourceConfig, TokenizerConfig
from trifold.pretrain.data.corpus import documents
from trifold.pretrain.data.tokenizer import word_cache
from trifold.pretrain.data.tokenizer.tokenizer import _CUT, _SPACES, Tokenizer, train
from trifold.pretrain.data.tokenizer.word_cache import WordCache

MARKS = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
BYTES = [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
SINGLE = [("▁", -2.0), ("a", -2.0), ("b", -3.0), ("東", -1.0), ("🙂", -2.5)]
SCORES = st.sampled_from([-0.25, -0.5, -1.0, -2.0, -3.5])  # of which many sums are equal
JOINED = st.text("ab東🙂é", min_size=2, max_size=4).flatmap(
    lambda piece: st.sampled_from([piece, "▁" + piece[1:]])
)
PIECES = st.dictionaries(JOINED, SCORES, max_size=20)
TEXTS = st.lists(
    st.lists(st.sampled_from([*"ab東🙂é▁ \nx<", "<mask>", "<0x41>", "\r\n"])).map("".join), max_size=8
)


def opened(pieces: dict[str, float], **model: Any) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """A tokenizer of these pieces beside single characters, and the plain one of `tokenizers`."""
    vocab = [*((mark, 0.0) for mark in MARKS), *BYTES, *SINGLE, *pieces.items()]
    fast = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=3, byte_fallback=True))
    fast.add_special_tokens(MARKS)
    spec = json.loads(fast.to_str()) | {"normalizer": _SPACES, "pre_tokenizer": _CUT}
    spec["model"] |= model
    marks = {
        f"{role}_token": mark for role, mark in zip(("pad", "bos", "eos", "unk", "mask"), MARKS, strict=True)
    }
    return Tokenizer(spec, marks, None), tokenizers.Tokenizer.from_str(json.dumps(spec))


def same(tokenizer: Tokenizer, plain: tokenizers.Tokenizer, texts: list[str]) -> bool:
    return [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [
        plain.encode(text, add_special_tokens=False).ids for text in texts
    ]


@given(PIECES, TEXTS, st.integers(2, 6))
@settings(max_examples=100, deadline=None)
def test_long_texts_have_the_same_ids_in_stretches(
    pieces: dict[str, float], texts: list[str], characters: int
) -> None:
    tokenizer, plain = opened(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(word_cache, "AT_ONCE", characters)
        assert same(tokenizer, plain, texts)


@given(PIECES, TEXTS, TEXTS)
@settings(max_examples=100, deadline=None)
def test_words_cut_between_pieces_have_the_ids_of_the_whole_text(
    pieces: dict[str, float], texts: list[str], more: list[str]
) -> None:
    tokenizer, plain = opened(pieces)
    assert tokenizer._words is not None
    assert same(tokenizer, plain, texts) and same(tokenizer, plain, more) and same(tokenizer, plain, texts)


def test_texts_are_cut_at_spaces_and_line_ends_and_wherever_no_piece_goes_on() -> None:
    tokenizer, _ = opened({"ab": -1.0, "▁b": -1.0, "b東": -1.0})
    assert tokenizer._words is not None
    words, counts = tokenizer._words._split(["abba b東🙂\n\nab", "", "▁ xy"])
    found = [word.decode("utf-32-le") for word in words.to_pylist()]
    assert found == [
        "ab",
        "b",
        "a",
        "▁b東",
        "🙂",
        "\n",
        "\n",
        "ab",
        "▁",
        "▁",
        "x",
        "y",
    ] and counts.tolist() == [8, 0, 4]


@pytest.mark.parametrize(
    ("pieces", "model", "text"),
    [
        ({"a▁b": -0.25}, {}, "a b"),
        ({"a\nb": -0.25}, {}, "a\nb"),
        ({}, {"byte_fallback": False}, "éé"),
        ({"ab": -0.1}, {}, "ab"),
    ],
)
def test_where_words_have_no_ids_of_their_own_texts_are_encoded_whole(
    pieces: dict[str, float], model: dict[str, Any], text: str
) -> None:
    tokenizer, plain = opened(pieces, **model)
    assert tokenizer._words is None and same(tokenizer, plain, [text])


def test_a_text_that_cannot_be_encoded_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, plain = opened({"ab": -1.0})
    texts = ["ab é", "b 🙂"]
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        tokenizer.encode_batch([*texts, "a \ud83d"])
    assert same(tokenizer, plain, texts)

    def broken(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        assert tokenizer._words is not None
        patch.setattr(tokenizer._words.viterbi, "encode", broken)
        with pytest.raises(MemoryError):
            tokenizer.encode_batch(["ab ba", "aab"])
    assert same(tokenizer, plain, ["aab", *texts, "ab ba"])


@pytest.mark.skipif(not DATA.exists(), reason=f"the real corpora are not at {DATA} (set TRIFOLD_DATA)")
@pytest.mark.parametrize("name", ["corpora/classic-books-en/dev.txt.gz", "qa/jaquad-ja/dev.json.gz"])
def test_ids_of_real_text_are_those_of_tokenizer_json(name: str, tmp_path: Path) -> None:
    texts = sorted(
        {line for text in documents(SourceConfig(path=str(DATA / name))) for line in text.split("\n")}
    )
    tokenizer = train(texts, TokenizerConfig(sample_bytes=200_000), 3000, tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert isinstance(tokenizer._words, WordCache) and same(tokenizer, plain, texts)
