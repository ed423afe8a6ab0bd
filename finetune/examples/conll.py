"""Sentences of tagged words: CoNLL files and hub sets come in, words with tags in IOB2 go out, whatever
scheme the tags came in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from trifold.finetune.examples.records import existing, hub_rows, text_lines
from trifold.modeling.errors import UserError

# Prefixes of IOB1, IOB2, IOE1, IOE2, BIOES and BILOU
_CONTINUING = "IEML"
_OPEN = "BIM"  # after these an entity may continue; E, L, S and U end one
_ALLOWED = "BIESLUM"
_CONSTANT_LINES = 20  # a first column that is the same in more lines than this holds no words


@dataclass(frozen=True)
class Sentence:
    """Words and their tags in IOB2."""

    where: str  # "FILE, line N"
    words: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def read_tagged_sentences(
    source: str, word_column: int | str | None = None, tag_column: int | str | None = None
) -> Iterator[Sentence]:
    """The sentences of a CoNLL file, or of a hub set.

    Columns of a file are numbers: 1 is the first and -1 the last one; by default words are in the first and
    tags in the last. Columns of a hub set are names, by default tokens and ner_tags. Raises UserError for a
    bad line, and for a source without a sentence.
    """
    empty = True
    if source.startswith("hub:"):
        sentences = _hub_sentences(source, str(word_column or "tokens"), str(tag_column or "ner_tags"))
    else:
        sentences = read_conll(source, _number(word_column, 1), _number(tag_column, -1))
    for sentence in sentences:
        empty = False
        yield sentence
    if empty:
        raise UserError(f"{source} holds no sentence.")


def read_conll(source: str, word_column: int = 1, tag_column: int = -1) -> Iterator[Sentence]:
    """The sentences of a CoNLL file: a word a line, an empty line after each sentence; -DOCSTART- is no word.

    Columns are separated by tabs where the file has any, else by spaces. A word may be empty or hold a space.
    Where the words are not in the first column, lines that begin with # are comments. Raises UserError for a
    line without these columns, for a tag that no scheme (IOB, IOE, BIOES, BILOU) allows, and for a first
    column that numbers the words or is the same in every line, unless `word_column` names another.
    """
    path = existing(source)
    lines = [(where, line.removeprefix("\ufeff")) for where, line in text_lines(path)]
    separator = "\t" if any("\t" in line for _, line in lines) else " "
    sentences = []
    for blank, group in groupby(lines, key=lambda item: not item[1].strip()):
        if blank:
            continue
        rows = [(where, line.split(separator)) for where, line in group]
        rows = [row for row in rows if row[1][0] != "-DOCSTART-"]
        if word_column != 1:
            rows = [row for row in rows if not row[1][0].startswith("#")]
        if rows:
            words = [_column(columns, word_column, where, separator) for where, columns in rows]
            tags = [_tag(_column(columns, tag_column, where, separator), where) for where, columns in rows]
            sentences.append(Sentence(rows[0][0], tuple(words), tuple(iob2(tags))))
    if word_column == 1:
        _check_words(sentences, source)
    yield from sentences


def iob2(tags: Sequence[str]) -> Iterator[str]:
    """The same entities in IOB2, whatever scheme they came in, by the rules of conlleval and seqeval.

    An entity begins with B, S or U, where its type changes, and after a tag that ends one (E, L, S, U). So
    "B-X E-X I-X" is two entities: B-X I-X, B-X.
    """
    before = "O"
    for tag in tags:
        same_type = tag != "O" and before[2:] == tag[2:]
        continues = same_type and tag[0] in _CONTINUING and before[0] in _OPEN
        yield tag if tag == "O" else f"{'I' if continues else 'B'}-{tag[2:]}"
        before = tag


def word_spans(words: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The span of each word in the text that spaces join."""
    begin = 0
    for word in words:
        yield begin, begin + len(word)
        begin += len(word) + 1


def _number(column: int | str | None, default: int) -> int:
    if column is None:
        return default
    if not isinstance(column, int) or column == 0:
        raise UserError(
            f"task.columns: {column!r} is no column of a CoNLL file: give its number, 1 for the first and -1"
            " for the last."
        )
    return column


def _column(columns: Sequence[str], number: int, where: str, separator: str) -> str:
    needed = max(abs(number), 2)
    if len(columns) < needed:
        name = "tab" if separator == "\t" else "space"
        count = f"{len(columns)} column{'s' if len(columns) > 1 else ''}"
        missing = "a word and its tag are" if needed == 2 else f"column {number} is"
        raise UserError(
            f"{where}, has {count}, {separator.join(columns)!r}: {missing} needed, separated by a {name}."
        )
    return columns[number - 1 if number > 0 else number]


def _check_words(sentences: Sequence[Sentence], source: str) -> None:
    """Raises UserError where the first column holds no words."""
    words = [word for sentence in sentences for word in sentence.words]
    if any(len(sentence.words) > 1 for sentence in sentences) and all(map(_is_numbered, sentences)):
        content = "numbers the words of all"
    elif len(words) > _CONSTANT_LINES and len(set(words)) == 1:
        content = f"is {words[0]!r} in every line of"
    else:
        return
    raise UserError(
        f"{source}: the first column {content} {len(sentences):,} sentences: name the column of the words,"
        " such as task.columns.word=2."
    )


def _is_numbered(sentence: Sentence) -> bool:
    size = len(sentence.words)
    return any(sentence.words == tuple(map(str, range(first, first + size))) for first in (0, 1))


def _hub_sentences(source: str, word_column: str, tag_column: str) -> Iterator[Sentence]:
    for where, row in hub_rows(source):
        words, tags = row.get(word_column), row.get(tag_column)
        if not (isinstance(words, list) and isinstance(tags, list) and len(words) == len(tags)):
            raise UserError(
                f"{where}: the columns {word_column} and {tag_column} must be lists of equal length; there"
                f" are {', '.join(row)}."
            )
        yield Sentence(where, tuple(words), tuple(iob2([_tag(str(tag), where) for tag in tags])))


def _tag(text: str, where: str) -> str:
    tag = text.strip()
    prefix, dash, kind = tag.partition("-")
    known = len(prefix) == 1 and prefix in _ALLOWED and dash and kind.split() == [kind]
    if tag != "O" and not known:
        raise UserError(
            f"{where}, has the tag {tag!r}, which no scheme allows: O, or B- I- E- S- L- U- M- and a type."
        )
    return tag
