"""JSON lines that grow while they are read, and that were damaged."""

import json
from pathlib import Path

import pytest

from trifold.pretrain.storage import jsonl
from trifold.pretrain.storage.jsonl import append_line, read_backwards, read_from, read_lines

DAMAGED_LINES = [b"{}", b"[1]", b"7", b'{"step": ', b"\xff\xfe", b"", b"\0\0\0", b"null", b"[" * 100_000]


def test_a_line_that_a_killed_writer_left_half_done_is_ended_first(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "lines.jsonl"
    append_line(file, {"step": 1})
    with file.open("ab") as torn:
        torn.write(b'{"step": 2, "los')
    append_line(file, {"step": 3})
    assert read_lines(file) == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("damage", DAMAGED_LINES)
def test_damaged_lines_are_passed_over_in_both_directions(tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n' + damage)
    steps = [record["step"] for record in read_lines(file) if record]
    assert steps == [1, 2]
    assert [record["step"] for record in read_backwards(file) if record] == [2, 1]


def test_reading_backwards_is_reading_forwards_reversed_at_any_chunk_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lines.jsonl"
    for step in range(50):
        append_line(file, {"step": step, "text": "x" * (step * 7 % 31)})
    expected = read_lines(file)[::-1]
    for chunk_bytes in (1, 2, 7, 31, 64, 10_000):
        monkeypatch.setattr(jsonl, "CHUNK_BYTES", chunk_bytes)
        assert list(read_backwards(file)) == expected


def test_only_lines_that_hold_a_text_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lines.jsonl"
    for step in range(10):
        append_line(file, {"step": step, **({"loss": 1.0} if step % 4 == 0 else {})})
    parsed, loads = [], json.loads

    def counting_loads(line: bytes) -> object:
        parsed.append(line)
        return loads(line)

    monkeypatch.setattr(json, "loads", counting_loads)
    assert [record["step"] for record in read_backwards(file, '"loss"')] == [8, 4, 0]
    assert len(parsed) == 3


def test_reading_on_gives_each_record_once_and_waits_for_a_line_that_is_being_written(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    assert read_from(file, 0) == ([], 0)
    append_line(file, {"step": 1})
    records, offset = read_from(file, 0)
    assert records == [{"step": 1}]
    with file.open("ab") as half:
        half.write(b'{"step"')
    assert read_from(file, offset) == ([], offset)
    with file.open("ab") as half:
        half.write(b": 2}\n")
    records, offset = read_from(file, offset)
    assert records == [{"step": 2}]
    assert read_from(file, offset) == ([], offset)


def test_no_file_has_no_records(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "none") == list(read_backwards(tmp_path / "none")) == []
