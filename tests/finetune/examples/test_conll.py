"""CoNLL files of every make: line ends, columns, schemes of tags."""

from pathlib import Path

import pytest

from tests.finetune.small_tasks import write_lines
from trifold.finetune.examples.conll import iob2, read_conll, read_tagged_sentences
from trifold.modeling.errors import UserError


def test_lines_that_end_in_carriage_returns_alone_are_rejected_with_their_number(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "cr", "Ada B-PER\rmet O\r\rOslo B-LOC\r")
    with pytest.raises(UserError, match=r"cr has 4 carriage returns without a line feed, and 0 line feeds"):
        list(read_conll(path))
    [sentence] = read_conll(write_lines(tmp_path / "crlf", "Ada B-PER\r\nmet O\r\n"))
    assert sentence.words == ("Ada", "met") and sentence.tags == ("B-PER", "O")
    with pytest.raises(UserError, match=r"line 2, has the tag"):
        list(read_conll(write_lines(tmp_path / "one", "Ada\tB-PER\nmet\tB-PER\rO\nBob\tO\n")))


def test_byte_order_marks_belong_to_no_word(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "bom", "\ufeffAda O\n\n\ufeffOslo B-LOC\n")
    assert [sentence.words for sentence in read_conll(path)] == [("Ada",), ("Oslo",)]


NUMBERED = "# a comment\n1\tMara\tB-PER\tO\n2\tging\tO\tB-LOC\n\n1\tOslo\tB-LOC\tO\n"


def test_numbers_of_words_are_no_words_and_columns_can_be_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "numbers", NUMBERED.split("\n", 1)[1])
    with pytest.raises(UserError, match=r"the first column numbers the words of all 2 sentences: .*word=2"):
        list(read_conll(path))
    path = write_lines(tmp_path / "numbers", NUMBERED)
    sentences = list(read_tagged_sentences(path, word_column=2, tag_column=3))
    assert [sentence.words for sentence in sentences] == [("Mara", "ging"), ("Oslo",)]
    assert [sentence.tags for sentence in sentences] == [("B-PER", "O"), ("B-LOC",)]
    assert [s.tags for s in read_tagged_sentences(path, 2)] == [("O", "B-LOC"), ("O",)]
    with pytest.raises(UserError, match=r"line 2, has 4 columns, .*: column 7 is needed"):
        list(read_tagged_sentences(path, 7))
    with pytest.raises(UserError, match="'text' is no column of a CoNLL file"):
        list(read_tagged_sentences(path, "text"))


def test_numbers_can_be_words(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "years", "1843 O\n1844 O\n\n1 O\n")
    assert [sentence.words for sentence in read_conll(path)] == [("1843", "1844"), ("1",)]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("I-PER E-PER E-PER O E-LOC", "B-PER I-PER B-PER O B-LOC"),  # IOE2
        ("I-PER E-PER I-PER O I-LOC", "B-PER I-PER B-PER O B-LOC"),  # IOE1
        ("B-X E-X I-X E-X", "B-X I-X B-X I-X"),
        ("S-X I-X", "B-X B-X"),
        ("B-X L-X L-X", "B-X I-X B-X"),
        ("B-X I-Y", "B-X B-Y"),
    ],
)
def test_an_entity_ends_where_conlleval_ends_it(tags: str, expected: str) -> None:
    assert list(iob2(tags.split())) == expected.split()
    seqeval = pytest.importorskip("seqeval.metrics.sequence_labeling")
    if not {tag[0] for tag in tags.split()} & set("LUM"):  # which its rules do not know
        assert seqeval.get_entities(tags.split()) == seqeval.get_entities(expected.split())
