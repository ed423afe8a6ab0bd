"""Pairs of a source text and its targets: files and hub sets come in, pairs go out.

A pair without text on one side is an error that says how many there are and where the first ones stand, or is
left out on request.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trifold.finetune.examples.records import records
from trifold.modeling.errors import UserError
from trifold.pretrain.data.corpus import check_unicode

_SHOWN = 5  # places that a message about many examples names


@dataclass(frozen=True)
class Pair:
    """A source text and what should come out, in one or several wordings."""

    where: str  # "FILE, line N"
    source: str
    targets: tuple[str, ...]


def read_pairs(
    sources: Sequence[str],
    source: str,
    target: str | Sequence[str],
    skip_empty: Callable[[str], None] | None = None,
) -> list[Pair]:
    """All pairs of these files and hub sets, by the names of their columns.

    A target column holds a text or a list of texts; several columns are several wordings. `skip_empty` is
    called with a sentence that says how many pairs without text were left out, and where; without it they are
    a UserError. Raises UserError for a value that is no text.
    """
    targets = (target,) if isinstance(target, str) else tuple(target)
    pairs: list[Pair] = []
    empty: list[str] = []
    for path in sources:
        for where, record in records(path, (source, *targets)):
            pair = Pair(where, _text(record[source], source, where), _wordings(record, targets, where))
            if side := _empty_side(pair):
                empty.append(f"{where}: {side} is empty")
            else:
                pairs.append(pair)
    if empty:
        message = f"{len(empty):,} of {len(empty) + len(pairs):,} pairs lack text: {_first(empty)}"
        if skip_empty is None or not pairs:
            raise UserError(f"{message}. Remove them, or set task.skip_empty to leave them out.")
        skip_empty(f"{message}. They are left out.")
    return pairs


def _wordings(record: dict[str, Any], columns: Sequence[str], where: str) -> tuple[str, ...]:
    wordings: list[str] = []
    for column in columns:
        value = record[column]
        texts = value if isinstance(value, list) and value else [value]
        wordings += (_text(text, column, where) for text in texts)
    return tuple(wordings)


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: the column {column!r} holds a {type(value).__name__}, not text.")
    return check_unicode(value, where, f"the column {column!r}")


def _empty_side(pair: Pair) -> str:
    if not pair.source.strip():
        return "source"
    return "" if all(target.strip() for target in pair.targets) else "target"


def _first(messages: Sequence[str]) -> str:
    more = f"; and {len(messages) - _SHOWN:,} more" if len(messages) > _SHOWN else ""
    return "; ".join(messages[:_SHOWN]) + more
