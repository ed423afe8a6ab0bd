"""Reads files and hub sets: a path comes in, records (columns by name) go out, each with where it was found.

Parallel line files, JSONL and TSV are read here, because an error must name the file and the line; Parquet
and hub sets through `datasets`. Every file may be gzipped.
"""

import json
from collections.abc import Iterator
from glob import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

from trifold.modeling.errors import UserError
from trifold.pretrain.data.corpus import lines
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.json_files import parse_json

Record = tuple[str, dict[str, Any]]  # "FILE, line N", and its columns


def records(source: str, columns: tuple[str, ...]) -> Iterator[Record]:
    """The records of `source`: one file, several parallel line files joined by commas (a column each, in
    order), or a hub set (`hub_rows`).

    Raises UserError for a file that is missing or broken, unequal line counts, a missing column, and a set
    without any record.
    """
    empty = True
    for where, record in _read(source, columns):
        missing = [column for column in columns if column not in record]
        if missing:
            raise UserError(
                f"{where} has no column {missing[0]!r}: it has {', '.join(map(str, record))}. Name the"
                " columns in task.columns."
            )
        empty = False
        yield where, record
    if empty:
        raise UserError(f"{source} holds no example.")


def existing(path: str) -> Path:
    """The file of a path. Raises UserError where there is none."""
    if not Path(path).expanduser().is_file():
        raise UserError(f"there is no file {path} (looked from {Path.cwd()}).")
    return Path(path).expanduser()


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("FILE, line N", the line without its end).

    Raises UserError for a file whose lines end in carriage returns alone: it would be read as one line.
    """
    line_feeds = carriage_returns = 0
    for number, line in enumerate(lines(DiskPath(path)), 1):
        text = line.removesuffix("\n").removesuffix("\r")
        line_feeds += line.endswith("\n")
        carriage_returns += line.count("\r") - line.endswith("\r\n")
        yield f"{path}, line {number}", text
    if carriage_returns > line_feeds:
        raise UserError(
            f"{path} has {carriage_returns:,} carriage returns without a line feed, and {line_feeds:,} line"
            r" feeds: its lines end in carriage returns. Convert it: tr '\r' '\n' < FILE > NEW."
        )


def read_json(path: Path) -> Any:
    """The JSON value of a file, which may be gzipped. Raises UserError where it is not complete."""
    return parse_json("".join(lines(DiskPath(path))), path)


def hub_rows(source: str) -> Iterator[Record]:
    """The rows of hub:NAME, hub:NAME:SPLIT or hub:NAME:SPLIT:CONFIG. Raises UserError where the set cannot be
    read, offline among others.
    """
    name, split, config = [*source.removeprefix("hub:").split(":"), "", ""][:3]
    return _table(source, name, config or None, split=split or "train")


def _read(source: str, columns: tuple[str, ...]) -> Iterator[Record]:
    if source.startswith("hub:"):
        return hub_rows(source)
    if "," in source:
        return _parallel([existing(path.strip()) for path in source.split(",")], columns)
    path = existing(source)
    match Path(path.name.removesuffix(".gz")).suffix:
        case ".jsonl":
            return _json_lines(path)
        case ".tsv":
            return _tab_separated(path)
        case ".parquet":  # `datasets` reads a name as a pattern
            return _table(source, "parquet", data_files=escape(str(path)), split="train")
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
            counts = ", ".join(f"{path} has {sum(1 for _ in text_lines(path))}" for path in paths)
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
    """The first line names the columns; a value cannot hold a tab or a line end."""
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


def _table(source: str, *args: Any, **kwargs: Any) -> Iterator[Record]:
    """The rows of a set that `datasets` reads; numbers that stand for named classes become the names."""
    import datasets

    try:
        rows = datasets.load_dataset(*args, **kwargs, streaming=True)
        features = {name: getattr(value, "feature", value) for name, value in (rows.features or {}).items()}
        classes = {name: value for name, value in features.items() if isinstance(value, datasets.ClassLabel)}
        for number, row in enumerate(rows):
            named = {column: value.int2str(row[column]) for column, value in classes.items()}
            yield f"{source}, row {number}", row | named
    except (OSError, ValueError) as error:  # its own errors and Arrow's are all of these
        raise UserError(f"{source} cannot be read: {str(error).splitlines()[0]}.") from None
