"""Tokenizers of published folders, used as they are: training reads the ids that the stock class gives, and
saving changes none.
"""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.pretrain.data.tokenizer.stock_tokenizers import HARD, KINDS, LINES, stock_folder
from trifold.modeling.errors import UserError
from trifold.pretrain.config.objectives import (
    CausalConfig,
    FimConfig,
    InfillingConfig,
    MaskedConfig,
    SpansConfig,
)
from trifold.pretrain.data.objectives import ObjectiveMixture
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
LINES_TO_COMPARE = [
    *HARD,
    "[CLS] [MASK] and <|endoftext|> or en_XX written out",
    "a\u0308 b\u0308",
    *LINES[:50],
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: stock_folder(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@EVERY_KIND
def test_training_reads_the_ids_of_the_stock_class_on_hard_lines_too(
    kind: str, folders: dict[str, Path]
) -> None:
    ours, stock = Tokenizer.open(folders[kind]), AutoTokenizer.from_pretrained(folders[kind])
    for text, ids in zip(LINES_TO_COMPARE, ours.encode_batch(LINES_TO_COMPARE), strict=True):
        assert ids.tolist() == stock(text, add_special_tokens=False)["input_ids"], text
        assert [*ours.before, *ids.tolist(), *ours.after] == stock(text)["input_ids"], text
        assert ours.decode(ids) == stock.decode(ids), text


@EVERY_KIND
def test_a_saved_copy_is_the_same_tokenizer_to_us_and_to_the_stock_class(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    ours = Tokenizer.open(folders[kind])
    ours.save(tmp_path, "encoder-decoder")
    again, stock, copied = (
        Tokenizer.open(tmp_path),
        *(AutoTokenizer.from_pretrained(f) for f in (folders[kind], tmp_path)),
    )
    assert again.fingerprint == ours.fingerprint and again.start == ours.start
    assert type(copied) is type(stock) and copied.special_tokens_map == stock.special_tokens_map
    for text in LINES_TO_COMPARE:
        assert copied(text)["input_ids"] == stock(text)["input_ids"], text
        assert copied(text, "and another")["input_ids"] == stock(text, "and another")["input_ids"], text


MARKS = {  # pad, bos, eos, mask, what starts a decoder; what stands before and after a text
    "bert": (["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[CLS]"], ["[CLS]"], ["[SEP]"]),
    "gpt2": (["<|endoftext|>"] * 3 + [None, "<|endoftext|>"], [], []),
    "roberta": (["<pad>", "<s>", "</s>", "<mask>", "<s>"], ["<s>"], ["</s>"]),
    "bart": (["<pad>", "<s>", "</s>", "<mask>", "</s>"], ["<s>"], ["</s>"]),
    "t5": (["<pad>", "</s>", "</s>", None, "<pad>"], [], ["</s>"]),
    "mbart": (["<pad>", "<s>", "</s>", "<mask>", "de_DE"], [], ["</s>", "de_DE"]),
    "nllb": (["<pad>", "<s>", "</s>", "<mask>", "</s>"], ["deu_Latn"], ["</s>"]),
}


@EVERY_KIND
def test_each_mark_is_played_by_the_token_of_its_kind(kind: str, folders: dict[str, Path]) -> None:
    ours, stock = Tokenizer.open(folders[kind]), AutoTokenizer.from_pretrained(folders[kind])
    roles, before, after = MARKS[kind]
    found = [ours.pad, ours.bos, ours.eos, ours.mask, ours.start]
    assert [None if i is None else stock.convert_ids_to_tokens(i) for i in found] == roles
    assert (
        stock.convert_ids_to_tokens(ours.before) == before
        and stock.convert_ids_to_tokens(ours.after) == after
    )
    assert len(ours.sentinels) == (100 if kind == "t5" else 0)
    assert set(stock.all_special_ids) <= set(ours.special)
    assert ours.text([ours.start, *ours.decoder_target([40, 41])]) == ours.decode([40, 41])


@EVERY_KIND
def test_offsets_are_the_stock_class_s_and_name_the_characters_of_each_piece(
    kind: str, folders: dict[str, Path]
) -> None:
    ours, stock = Tokenizer.open(folders[kind]), AutoTokenizer.from_pretrained(folders[kind])
    for text in LINES_TO_COMPARE:
        ids, spans = ours.offsets(text)
        expected = stock(text, add_special_tokens=False, return_offsets_mapping=True)
        assert (ids, spans) == (
            expected["input_ids"],
            [tuple(span) for span in expected["offset_mapping"]],
        ), text
    line = "hijab cabbage, feed."
    ids, spans = ours.offsets(line)
    for word in ("hijab", "cabbage", "feed"):  # the pieces whose spans end in a word spell it
        at = line.index(word)
        inside = [i for i, (_, end) in zip(ids, spans, strict=True) if at < end <= at + len(word)]
        assert ours.decode(inside).strip() == word


@EVERY_KIND
def test_words_begin_where_the_text_has_spaces_or_punctuation(kind: str, folders: dict[str, Path]) -> None:
    ours = Tokenizer.open(folders[kind])
    text = "abcdefghij jihgfedcba, abc"
    ids, spans = ours.offsets(text)
    begun = {begin for i, (begin, _) in zip(ids, spans, strict=True) if ours.word_starts[i]}
    words = {text.index("jih"), text.index(","), text.rindex("abc")}
    assert {b + (text[b] == " ") for b in begun} - {0} == words
    assert all(ours.word_starts[i] for i in ours.special)
    [ends] = ours.encode_batch(["end. why? abc"])
    stops = [ours.decode([i]).strip()[-1:] for i in ends if ours.sentence_ends[i]]
    assert stops == [".", "?"]


def test_an_objective_whose_mark_is_missing_is_refused_by_name(folders: dict[str, Path]) -> None:
    for kind, dials, message in (
        ("gpt2", MaskedConfig(), "the masked objective needs a tokenizer with a mask token"),
        ("t5", InfillingConfig(), "the infilling objective needs a tokenizer with a mask token"),
        ("bert", SpansConfig(), "the spans objective needs a tokenizer with 4 sentinels or more .* has 0"),
        ("gpt2", FimConfig(), "the fim objective needs a tokenizer with 3 sentinels or more .* has 0"),
    ):
        with pytest.raises(UserError, match=message):
            ObjectiveMixture(dials, Tokenizer.open(folders[kind]), 64)
    ObjectiveMixture(CausalConfig(), Tokenizer.open(folders["gpt2"]), 64)


def test_marks_that_a_folder_does_not_name_are_known_by_their_usual_names(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for kind in ("bert", "gpt2"):  # as the oldest folders are
        (tmp_path / "tokenizer.json").write_bytes((folders[kind] / "tokenizer.json").read_bytes())
        (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 512}')
        named, unnamed = Tokenizer.open(folders[kind]), Tokenizer.open(tmp_path)
        assert [getattr(unnamed, role) for role in ("pad", "bos", "eos", "mask")] == [
            getattr(named, role) for role in ("pad", "bos", "eos", "mask")
        ]
