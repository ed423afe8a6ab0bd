"""Sentences of tagged words: CoNLL files and hub sets in, words with tags in IOB2 out, whatever scheme the
tags came in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from trifold.finetune.examples.pairs import existing, hub_rows, text_lines
from trifold.modeling.errors import UserError

_INSIDE, _BEGINS = "IEML", "BSU"  # prefixes of IOB1, IOB2, BIOES and BILOU


@dataclass(frozen=True)
class Sentence:
    """Words and their tags in IOB2."""

    where: str
    words: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def read_tagged_sentences(place: str) -> Iterator[Sentence]:
    """The sentences of a CoNLL file, or of a hub set with the columns tokens and ner_tags. Raises UserError for
    a bad line, and none.
    """
    found = False
    for sentence in _hub_sentences(place) if place.startswith("hub:") else read_conll(place):
        found = True
        yield sentence
    if not found:
        raise UserError(f"{place} holds no sentence.")


def read_conll(place: str) -> Iterator[Sentence]:
    """The sentences of a CoNLL file: a word a line, its tag in the last column, an empty line after each
    sentence; -DOCSTART- is no word.

    Columns stand apart by tabs where the file has any, else by spaces. A word may be empty or hold a space.
    Raises UserError for a line without a tag, and for a tag that no scheme (IOB1, IOB2, BIOES, BILOU) allows.
    """
    path = existing(place)
    lines = list(text_lines(path))
    tabs = any("\t" in line for _, line in lines)
    for blank, group in groupby(lines, key=lambda item: not item[1].strip()):
        rows = [] if blank else list(group)
        words, tags = [], []
        for where, line in rows:
            columns = line.split("\t") if tabs else line.split(" ")
            if columns[0] == "-DOCSTART-":
                continue
            if len(columns) < 2:
                raise UserError(
                    f"{where}, has 1 column, {line!r}: a word and its tag are needed, apart by a"
                    f" {'tab' if tabs else 'space'}."
                )
            words.append(columns[0])
            tags.append(_allowed(columns[-1].strip(), where))
        if words:
            yield Sentence(rows[0][0], tuple(words), tuple(iob2(tags)))


def iob2(tags: Sequence[str]) -> Iterator[str]:
    """The same entities in IOB2, whatever scheme they came in: an entity begins with B, or where nothing of
    its type goes on.
    """
    before = "O"
    for tag in tags:
        goes_on = tag[:1] in _INSIDE and tag != "O" and before[2:] == tag[2:]
        yield tag if tag == "O" else f"{'I' if goes_on else 'B'}-{tag[2:]}"
        before = tag


def starts(words: Sequence[str]) -> Iterator[int]:
    """Where each word begins in the text that spaces join."""
    at = 0
    for word in words:
        yield at
        at += len(word) + 1


def _hub_sentences(place: str) -> Iterator[Sentence]:
    for where, row in hub_rows(place):
        words, tags = row.get("tokens"), row.get("ner_tags")
        if not (isinstance(words, list) and isinstance(tags, list) and len(words) == len(tags)):
            raise UserError(
                f"{where}: the columns tokens and ner_tags must be lists of equal length; there are"
                f" {', '.join(row)}."
            )
        yield Sentence(where, tuple(words), tuple(iob2([_allowed(str(tag), where) for tag in tags])))


def _allowed(tag: str, where: str) -> str:
    prefix, dash, kind = tag.partition("-")
    if tag != "O" and not (len(prefix) == 1 and prefix in _INSIDE + _BEGINS and dash and kind):
        raise UserError(
            f"{where}, has the tag {tag!r}, which no scheme allows: O, or B- I- E- S- L- U- M- and a type."
        )
    return tag
