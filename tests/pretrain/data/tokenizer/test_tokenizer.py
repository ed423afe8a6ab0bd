import json
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.pretrain.data.tokenizer.stock_tokenizers import HARD
from trifold.modeling.errors import UserError
from trifold.pretrain.config.pretraining import RESERVED_TOKENS, TokenizerConfig
from trifold.pretrain.data.tokenizer import tokenizer as module
from trifold.pretrain.data.tokenizer import word_cache
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer, train


def sentences(count: int) -> list[str]:
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 8))) for _ in range(300)] + [
        "日本語",
        "tokyo,",
        "Été",
    ]
    return [" ".join(draw.choices(words, k=12)) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("tokenizer")
    train(["\n".join(sentences(1000))], TokenizerConfig(), 700, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.open(folder)


def test_ids_of_special_tokens_are_in_their_places(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.unk, tokenizer.mask) == (0, 1, 2, 3, 4)
    assert tokenizer.sentinels == list(range(5, 105))
    assert tokenizer.vocab_size == 700 and tokenizer.dtype == np.uint16


@pytest.mark.parametrize("text", HARD)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    [ids] = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"))))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_and_has_the_ids_of_tokenizer_json(
    tokenizer: Tokenizer, texts: list[str]
) -> None:
    plain = tokenizers.Tokenizer.from_str(json.dumps(tokenizer._spec))
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert ids.tolist() == plain.encode(text, add_special_tokens=False).ids


@given(
    st.lists(
        st.lists(
            st.sampled_from(
                [" ", "\n", "▁", "a", "bcd", "é", "🙂", "\r", "<mask>", "<s>", "<0x0A>", "<0x41>"]
            )
        ).map("".join)
    )
)
@settings(max_examples=300, deadline=None)
def test_words_remembered_are_cut_where_tokenizer_json_cuts(tokenizer: Tokenizer, texts: list[str]) -> None:
    tokenizer._words.forget()
    for _ in range(2):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert ids.tolist() == tokenizer._fast.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder-decoder"])
def test_the_published_folder_encodes_alike_in_the_stock_class(
    tokenizer: Tokenizer, tmp_path: Path, family: Any
) -> None:
    tokenizer.save(tmp_path, family)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        stock.pad_token_id,
        stock.bos_token_id,
        stock.eos_token_id,
        stock.unk_token_id,
        stock.mask_token_id,
    ) == (0, 1, 2, 3, 4)
    end = [] if family == "decoder" else [tokenizer.eos]
    for text, ids in zip(HARD, tokenizer.encode_batch(HARD), strict=True):
        assert stock(text)["input_ids"] == [tokenizer.bos, *ids, *end]
        assert stock.decode(ids) == text
        assert stock.decode([tokenizer.bos, *ids, *end], skip_special_tokens=True) == stock.decode(
            ids, skip_special_tokens=True
        )
    assert Tokenizer.open(tmp_path).fingerprint == tokenizer.fingerprint


def test_language_codes_are_special_tokens_of_their_own(tmp_path: Path) -> None:
    made = train(["\n".join(sentences(300))], TokenizerConfig(languages=("en_XX", "de_DE")), 600, tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        made.vocab_size == 600 and made.special == list(range(107)) and made.sentinels == list(range(5, 105))
    )
    assert (
        made.encode_batch(["en_XXabc de_DE"])[0].tolist()
        == stock("en_XXabc de_DE", add_special_tokens=False)["input_ids"]
    )
    assert stock.convert_tokens_to_ids(["en_XX", "de_DE"]) == [105, 106] and set(
        stock.all_special_ids
    ) == set(range(107))
    assert made.word_starts[[105, 106]].all()


@pytest.mark.parametrize("code", ["en XX", "en\nXX", "", "en▁XX", "\0", "\ud800"])
def test_a_language_code_in_which_text_would_be_cut_is_refused(code: str) -> None:
    with pytest.raises(
        ValueError, match=f"the code {re.escape(repr(code))} must not be empty or contain a space"
    ):
        TokenizerConfig(languages=(code,))


@pytest.mark.parametrize(
    "codes", [("<0x41>",), ("</s>",), ("<mask>",), ("<extra_id_99>",), ("en_XX", "de_DE", "en_XX")]
)
def test_a_language_code_that_is_another_token_already_is_refused(codes: tuple[str, ...]) -> None:
    with pytest.raises(
        ValueError,
        match=f"{re.escape(repr(codes[0]))} is a token of every tokenizer, or occurs twice in this list",
    ):
        TokenizerConfig(languages=codes)


def test_every_token_that_a_tokenizer_has_in_any_case_is_known_as_taken(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.decode([i]) for i in range(105)] + [f"<0x{byte:02X}>" for byte in range(256)]
    assert all(RESERVED_TOKENS.fullmatch(piece) for piece in pieces)


def test_spaces_come_back_from_a_tokenizer_of_texts_without_spaces(tmp_path: Path) -> None:
    draw = random.Random(0)
    japanese = train(
        ["".join(draw.choices("手塚治虫日本漫画家生東京大学部", k=30)) for _ in range(400)],
        TokenizerConfig(),
        400,
        tmp_path / "t",
    )
    for text in ("A plain sentence", "  東京 大学"):
        assert japanese.decode(japanese.encode_batch([text])[0]) == text


def test_ids_are_those_of_sentencepiece(tokenizer: Tokenizer, folder: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    lines = [text for text in HARD if "literal" not in text] + sentences(300)
    assert [ids.tolist() for ids in tokenizer.encode_batch(lines)] == reference.encode(lines)


def test_the_same_text_gives_the_same_tokenizer(tmp_path: Path) -> None:
    for name, texts in (("a", sentences(400)), ("b", sentences(400)), ("c", sentences(800)[400:])):
        train(texts, TokenizerConfig(sample_bytes=10_000), 600, tmp_path / name)
    a, b, c = ((tmp_path / name / "tokenizer.json").read_bytes() for name in "abc")
    assert a == b != c


def test_the_sample_is_spread_over_the_text_and_within_its_bytes() -> None:
    lines = [f"{i:05d}" for i in range(10_000)]
    sample = module._sample(["\n".join(lines[:5000]), "\n".join(lines[5000:])], 5_000)
    assert len(sample) == 1000 and sample == sorted(sample)
    assert 400 < sum(line < "05000" for line in sample) < 600
    endless = (f"line {i}" for i in iter(int, 1))
    assert sum(map(len, module._sample(endless, 1000))) <= 1000


def test_a_long_line_that_occurs_twice_costs_twice_as_much_to_train_on(tmp_path: Path) -> None:
    line = " ".join(sentences(2000))[:100_000]
    seconds = []
    for name, texts in (("once", [line]), ("twice", [line, line]), ("inside", [line[:50_000] * 2])):
        began = time.process_time()
        train(texts, TokenizerConfig(), 600, tmp_path / name)
        seconds.append(time.process_time() - began)
    assert max(seconds) < 3 * seconds[0] + 1


def test_training_cuts_long_lines_before_spaces_and_loses_nothing() -> None:
    line = " ".join(sentences(100))
    for text in (line, "x" * 5000, "short", line[:1990] + "日本語" * 1000):
        cut = list(module._cut_lines([text]))
        assert "".join(cut) == text and max(map(len, cut)) <= module._MAX_LINE
    assert all(part.startswith(" ") for part in list(module._cut_lines([line]))[1:])
    assert list(module._cut_lines(["one", "two"])) == ["one", "two"]


def test_a_rule_that_makes_tokenizers_panic_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    rule = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"pre_tokenizer": rule}))
    (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.open(tmp_path)
    text = "a" * 40 + "b"
    for use in (lambda: tokenizer.encode_batch([text]), lambda: tokenizer.offsets(text)):
        with pytest.raises(UserError, match=r"tokenizer\.json fails on this text .*another tokenizer"):
            use()


def test_words_forgotten_are_encoded_again_alike(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_cache, "MAX_CACHED", 50)
    forgetful = Tokenizer.open(folder)
    most = 0
    for line, ids in zip(HARD + sentences(50), tokenizer.encode_batch(HARD + sentences(50)), strict=True):
        assert forgetful.encode_batch([line])[0].tolist() == ids.tolist()
        most = max(most, forgetful._words.characters)
    assert 0 < most <= 50


def test_words_begin_at_spaces_punctuation_and_wide_characters(tokenizer: Tokenizer) -> None:
    def begins(text: str) -> list[bool]:
        return [bool(tokenizer.word_starts[i]) for i in tokenizer.encode_batch([text])[0]]

    assert begins("(") == begins("\n") == begins("\t") == begins(" a") == begins("<mask>") == [True]
    assert begins("q") == begins("9") == [False]
    assert begins("🙂") == [True, False, False, False]
    assert tokenizer.word_starts[tokenizer._fast.token_to_id("日")]


def test_a_vocabulary_that_the_text_cannot_fill_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"40 lines of training text support at most \d+ pieces, not 8192"):
        train(sentences(40), TokenizerConfig(), 8192, tmp_path)
    with pytest.raises(UserError, match=r"alone need \d{3} pieces, not 300"):
        train(sentences(40), TokenizerConfig(), 300, tmp_path)
    with pytest.raises(UserError, match="0 lines"):
        train(["", "\n"], TokenizerConfig(), 600, tmp_path)


def test_broken_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*tokenizer\.json"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:1000])
    with pytest.raises(UserError, match="not complete JSON"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list"):
        Tokenizer.open(tmp_path)
    whole = json.loads((folder / "tokenizer.json").read_text())
    for other in ("{}", '{"added_tokens": 3}', json.dumps(whole | {"model": 3})):
        (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer.json").write_text(other)
        with pytest.raises(UserError, match=r"tokenizer\.json is JSON, but no tokenizer"):
            Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"mask_token": "<hidden>"}))
    with pytest.raises(UserError, match="gives '<hidden>' as mask_token, which is no added token"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    with pytest.raises(UserError, match="names no token that ends a text"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"mask_token": None}))
    assert Tokenizer.open(tmp_path).mask is None  # for the objective that needs it to refuse


def test_fingerprint_follows_everything_that_decides_ids(tokenizer: Tokenizer) -> None:
    spec, settings = tokenizer._spec, tokenizer._settings
    vocab = [*spec["model"]["vocab"][:-1], [spec["model"]["vocab"][-1][0], -1.0]]
    changed = [
        (spec | {"model": spec["model"] | {"vocab": vocab}}, settings),
        (spec | {"normalizer": {"type": "NFC"}}, settings),
        (spec | {"pre_tokenizer": None}, settings),
        (spec | {"added_tokens": spec["added_tokens"][:-1]}, settings),
        (spec, settings | {"mask_token": "<extra_id_0>"}),
    ]
    prints = {Tokenizer(*parts, None).fingerprint for parts in changed}
    assert len(prints) == 5 and tokenizer.fingerprint not in prints
    assert Tokenizer(spec | {"post_processor": None}, settings, None).fingerprint == tokenizer.fingerprint
