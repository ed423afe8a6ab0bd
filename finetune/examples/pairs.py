"""Where examples are read: files and hub sets in, records out, each with the place it came from for whoever
must refuse it.

Parallel line files, JSONL and TSV are read here, because a mistake must be named by file and line; Parquet
and hub sets through `datasets`. Every file may be gzipped.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from trifold.modeling.errors import UserError
from trifold.pretrain.data.corpus import check_unicode, lines
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.json_files import parse_json

Record = tuple[str, dict[str, Any]]  # "FILE, line N", and its columns


@dataclass(frozen=True)
class Pair:
    """A source text and what should come out, in one or several wordings."""

    where: str
    source: str
    targets: tuple[str, ...]


def read_pairs(places: Sequence[str], source: str, target: str) -> list[Pair]:
    """All pairs of these places, by the names of their columns; a target is one text or a list of wordings.

    Raises UserError for a pair that lacks text on either side.
    """
    pairs = []
    for place in places:
        for where, record in records(place, (source, target)):
            said, wordings = record[source], record[target]
            wordings = tuple(wordings) if isinstance(wordings, list) and wordings else (wordings,)
            for column, text in ((source, said), *((target, wording) for wording in wordings)):
                if not isinstance(text, str):
                    raise UserError(
                        f"{where}: the column {column!r} holds a {type(text).__name__}, not text."
                    )
                if not check_unicode(text, where, f"the column {column!r}").strip():
                    raise UserError(f"{where}: {column} is empty; remove the example, or give it a text.")
            pairs.append(Pair(where, said, wordings))
    return pairs


def records(place: str, columns: tuple[str, ...]) -> Iterator[Record]:
    """The records of `place`: one file, several parallel line files joined by commas (a column each, in
    order), or a hub set (`hub_rows`).

    Raises UserError for a file that is missing or broken, unequal line counts, a missing column, and a set
    without any record.
    """
    found = False
    for where, record in _read(place, columns):
        missing = [column for column in columns if column not in record]
        if missing:
            raise UserError(
                f"{where} has no column {missing[0]!r}: it has {', '.join(map(str, record))}. Name the"
                " columns in task.columns."
            )
        found = True
        yield where, record
    if not found:
        raise UserError(f"{place} holds no example.")


def existing(path: str) -> Path:
    """The file of a path. Raises UserError where there is none."""
    if not Path(path).expanduser().is_file():
        raise UserError(f"there is no file {path} (looked from {Path.cwd()}).")
    return Path(path).expanduser()


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("FILE, line N", the line without its end)."""
    for number, line in enumerate(lines(DiskPath(path)), 1):
        yield f"{path}, line {number}", line.removesuffix("\n").removesuffix("\r")


def read_json(path: Path) -> Any:
    """The JSON value of a file, which may be gzipped. Raises UserError where it is not complete."""
    return parse_json("".join(lines(DiskPath(path))), path)


def hub_rows(place: str) -> Iterator[Record]:
    """The rows of hub:NAME, hub:NAME:SPLIT or hub:NAME:SPLIT:CONFIG. Raises UserError where the set cannot be
    read, offline among others.
    """
    name, split, config = [*place.removeprefix("hub:").split(":"), "", ""][:3]
    return _table(place, name, config or None, split=split or "train")


def _read(place: str, columns: tuple[str, ...]) -> Iterator[Record]:
    if place.startswith("hub:"):
        return hub_rows(place)
    if "," in place:
        return _parallel([existing(path.strip()) for path in place.split(",")], columns)
    path = existing(place)
    match Path(path.name.removesuffix(".gz")).suffix:
        case ".jsonl":
            return _json_lines(path)
        case ".tsv":
            return _tab_separated(path)
        case ".parquet":
            return _table(place, "parquet", data_files=str(path), split="train")
        case other:
            raise UserError(
                f"{path} ends in {other or 'nothing'}; pairs are read from .jsonl, .tsv and .parquet, or"
                " from parallel line files A,B."
            )


def _parallel(paths: list[Path], columns: tuple[str, ...]) -> Iterator[Record]:
    if len(paths) != len(columns):
        raise UserError(
            f"{', '.join(map(str, paths))} are {len(paths)} parallel files, and {len(columns)} are needed:"
            f" {', '.join(columns)}."
        )
    for number, row in enumerate(zip_longest(*map(text_lines, paths)), 1):
        if None in row:
            counts = ", ".join(f"{path} has {sum(1 for _ in lines(DiskPath(path)))}" for path in paths)
            raise UserError(
                f"parallel files must have equally many lines: {counts}. Line {number} has no partner."
            )
        yield f"{paths[0]}, line {number}", dict(zip(columns, (line for _, line in row), strict=True))


def _json_lines(path: Path) -> Iterator[Record]:
    for where, line in text_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where}, is not JSON ({error}): each line must hold one whole object."
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{where}, holds a {type(row).__name__}: each line must hold one object.")
        yield where, row


def _tab_separated(path: Path) -> Iterator[Record]:
    """The first line names the columns; a tab or a line end cannot stand in a value."""
    rows = text_lines(path)
    _, head = next(rows, ("", ""))
    names = head.split("\t")
    for where, line in rows:
        values = line.split("\t")
        if len(values) != len(names):
            raise UserError(
                f"{where}, has {len(values)} columns, and the first line names {len(names)}:"
                f" {', '.join(names)}."
            )
        yield where, dict(zip(names, values, strict=True))


def _table(where: str, *args: Any, **kwargs: Any) -> Iterator[Record]:
    """The rows of a set that `datasets` reads; numbers that stand for named classes become the names."""
    import datasets

    try:
        rows = datasets.load_dataset(*args, **kwargs, streaming=True)
        kinds = {
            column: getattr(feature, "feature", feature) for column, feature in (rows.features or {}).items()
        }
        classes = {column: kind for column, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}
        for number, row in enumerate(rows):
            yield (
                f"{where}, row {number}",
                row | {column: kind.int2str(row[column]) for column, kind in classes.items()},
            )
    except (OSError, ValueError) as error:  # its own errors and Arrow's are all of these
        raise UserError(f"{where} cannot be read: {str(error).splitlines()[0]}.") from None
