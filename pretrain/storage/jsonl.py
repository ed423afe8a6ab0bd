"""JSON lines that several processes append to and that may be read while they grow.

A line is one JSON object. Lines that are no object (half a line of a killed writer, bytes that are not UTF-8,
other JSON) are passed over. A run of 1e6 steps has files of 200 MB: `read_backwards` and `read_from` read
them in chunks, and parse only the lines that hold `containing`. Cost: see LOG.md.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
CHUNK_BYTES = 1 << 20


def append_line(path: Path, record: Record) -> None:
    """Append one line with a single write. Half a line that a killed writer left is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        size = file.seek(0, 2)
        torn = False
        if size > 0:
            file.seek(-1, 2)
            torn = file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(record).encode() + b"\n")


def read_lines(path: Path) -> list[Record]:
    """All records of a file, in order; none where there is no file."""
    return read_from(path, 0)[0]


def read_from(path: Path, offset: int) -> tuple[list[Record], int]:
    """The records of the complete lines from byte `offset` on, and the offset after them."""
    records: list[Record] = []
    if not path.exists():
        return records, offset
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            record = _parse(line)
            if record is None and not line.endswith(b"\n"):
                break  # it is being written
            offset += len(line)
            if record is not None:
                records.append(record)
    return records, offset


def read_backwards(path: Path, containing: str = "") -> Iterator[Record]:
    """The records of a file, the last one first; with `containing`, those whose line holds this text."""
    needle = containing.encode()
    for line in _lines_backwards(path, needle):
        if needle in line and (record := _parse(line)) is not None:
            yield record


def _lines_backwards(path: Path, needle: bytes) -> Iterator[bytes]:
    """The lines of a file, the last one first; a chunk that does not hold `needle` is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        end = file.seek(0, 2)
        rest = b""  # the first line of what was read so far, whose start is still missing
        while end > 0:
            start = max(0, end - CHUNK_BYTES)
            file.seek(start)
            chunk = file.read(end - start) + rest
            end = start
            if needle in chunk:
                lines = chunk.split(b"\n")
                rest = lines[0]
                yield from reversed(lines[1:])
            else:
                rest = chunk.partition(b"\n")[0]
        yield rest


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
