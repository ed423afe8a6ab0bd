"""CoNLL in all its kinds, labels on the right pieces, and words that no tokenizer likes."""

from pathlib import Path

import numpy as np
import pytest

from tests.finetune.small_tasks import OracleTagger, write_lines
from tests.published import tokenizer
from trifold.finetune.config import NerConfig
from trifold.finetune.examples.conll import iob2, read_conll, read_tagged_sentences
from trifold.finetune.tasks.ner import Ner, WrittenNer, parse_entities
from trifold.modeling.batch import IGNORE
from trifold.modeling.config import Family
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation

SCHEMES = {  # three entities, two of one type side by side
    "IOB1": "I-PER I-PER B-PER O I-LOC",
    "IOB2": "B-PER I-PER B-PER O B-LOC",
    "BIOES": "B-PER E-PER S-PER O S-LOC",
    "BILOU": "B-PER L-PER U-PER O U-LOC",
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_means_the_same_entities(scheme: str) -> None:
    assert list(iob2(SCHEMES[scheme].split())) == SCHEMES["IOB2"].split()


def test_files_of_two_and_four_columns_read_alike(tmp_path: Path) -> None:
    two = write_lines(tmp_path / "two", "Ada\tB-PER\n😀 \tO\n\tO\n\t\nin\tO\nUlm\tB-LOC\n")
    four = write_lines(
        tmp_path / "four", "-DOCSTART- -X- -X- O\n\nAda NNP B-NP I-PER\n\nin IN - O\nUlm NNP - I-LOC"
    )
    first, second = read_conll(two)
    assert (
        first.words == ("Ada", "😀 ", "")
        and first.tags == ("B-PER", "O", "O")
        and second.words == ("in", "Ulm")
    )
    assert [s.tags for s in read_conll(four)] == [("B-PER",), ("O", "B-LOC")]
    assert [s.where.rpartition(" ")[2] for s in read_conll(four)] == ["3", "5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Ada\tB-PER\nBob\tX-PER\n", "line 2, has the tag 'X-PER', which no scheme allows"),
        ("Ada\tB-PER\nBob\tPER\n", "line 2, has the tag 'PER'"),
        ("Ada B-PER\nBob\n", "line 2, has 1 column"),
    ],
)
def test_bad_lines_are_refused_by_file_and_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        list(read_conll(write_lines(tmp_path / "bad", text)))


def test_a_file_without_a_sentence_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none holds no sentence"):
        list(read_tagged_sentences(write_lines(tmp_path / "none", "-DOCSTART- O\n\n\n")))


@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_a_sentence_of_empty_words_is_tagged_outside(family: Family, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "empty", "Ada\tB-PER\n\n\tO\n\n\tO\n\tO\n")
    ner = Ner(NerConfig(train=(path,), dev=(path,)), tokenizer(), family, 32)
    assert all((segment.targets != IGNORE).any() for segment in ner.segments(ner.train))


def test_a_type_that_training_never_saw_is_refused(tmp_path: Path) -> None:
    train, dev = (
        write_lines(tmp_path / "train", "Ada\tB-PER\n"),
        write_lines(tmp_path / "dev", "Bob\tO\n\nUlm\tB-LOC\n"),
    )
    with pytest.raises(
        UserError, match="dev, line 3: the type LOC was never seen in the training files, which have PER"
    ):
        Ner(NerConfig(train=(train,), dev=(dev,)), tokenizer(), "encoder", 32)


def test_a_words_first_token_carries_its_label_and_nothing_else_does(tmp_path: Path) -> None:
    words = ["", "Zebediah", "日本", " ", "met", "Éva"]  # long, in bytes, empty, a space
    tags = ["O", "B-PER", "B-LOC", "O", "O", "B-PER"]
    path = write_lines(
        tmp_path / "train",
        "".join(f"{w}\t{t}\n" for w, t in zip(words, tags, strict=True)) + "\nUlm\tB-LOC\nmet\tO\n",
    )
    for family in ("encoder", "decoder"):
        ner = Ner(NerConfig(train=(path,), dev=(path,)), tokenizer(), family, 128)
        segment, other = ner.segments(ner.train)
        labelled = {
            int(i): ner.labels[int(segment.targets[i])] for i in np.flatnonzero(segment.targets != IGNORE)
        }
        texts = [
            tokenizer().decode(segment.tokens[i : i + 1]) for i, label in labelled.items() if label != "O"
        ]
        assert [label for label in labelled.values() if label != "O"] == ["B-PER", "B-LOC", "B-PER"]
        assert "Zebediah".startswith(texts[0].strip()) and len(segment.tokens) > len(words)
        assert tokenizer().decode(segment.tokens[1 : None if family == "decoder" else -1]) == " ".join(words)

        assert ner.predict(
            OracleTagger([segment, other], len(ner.labels), ner.labels.index("I-LOC")),
            ner.train,
            Generation(),
            128,
        ) == [
            tuple(tags),
            ("B-LOC", "O"),
        ]


def test_the_usual_tag_is_the_trivial_system(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train", "May\tB-PER\n\nMay\tB-PER\n\nMay\tO\nnew\tO\n")
    ner = Ner(NerConfig(train=(path,), dev=(path,)), tokenizer(), "encoder", 64)
    name, guesses = ner.baseline(ner.dev)
    assert name == "usual tag" and guesses == [("B-PER",), ("B-PER",), ("B-PER", "O")]
    assert ner.scores(ner.statistics(guesses, ner.dev).sum(axis=0))["f1"] == pytest.approx(80)


def test_entities_are_written_and_parse_entities_as_the_same_tags(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "train", "Ada\tB-PER\nmet\tO\nNew\tB-LOC\nYork\tI-LOC\nAda\tB-PER\n\nnobody\tO\n"
    )
    written = WrittenNer(
        NerConfig(train=(path,), dev=(path,), written=True), tokenizer(), "encoder-decoder", 64
    )
    first, second = written.segments(written.train)
    assert (
        tokenizer().decode(first.tokens[1:]) == "Ada (PER) | New York (LOC) | Ada (PER)"
        and first.source is not None
    )
    assert tokenizer().decode(second.tokens[1:]) == "none"
    for sentence, segment in zip(written.train, (first, second), strict=True):
        assert parse_entities(tokenizer().decode(segment.tokens[1:]), sentence.words) == sentence.tags
    assert parse_entities("Bob (PER) | York (LOC) | Ada (PER) | broken", ("Ada", "met", "New", "York")) == (
        "B-PER",
        "O",
        "O",
        "B-LOC",
    )


def test_a_hub_sets_tags_are_read_by_their_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = ["O", "B-PER", "I-PER"]
    features = datasets.Features(
        {"tokens": [datasets.Value("string")], "ner_tags": [datasets.ClassLabel(names=names)]}
    )
    datasets.Dataset.from_dict(
        {"tokens": [["Ada", "Eve", "met"]], "ner_tags": [[1, 2, 0]]}, features=features
    ).to_parquet(tmp_path / "train.parquet")
    [sentence] = read_tagged_sentences(f"hub:{tmp_path}:train")
    assert sentence.words == ("Ada", "Eve", "met") and sentence.tags == ("B-PER", "I-PER", "O")
    with pytest.raises(UserError, match="cannot be read"):
        list(read_tagged_sentences(f"hub:{tmp_path}/nothing:train"))
