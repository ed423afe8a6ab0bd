import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trifold.modeling.errors import UserError
from trifold.pretrain.config.pretraining import SourceConfig
from trifold.pretrain.data.corpus import corpus_fingerprint, documents, is_heldout


def read(path: Path | str, **settings: str) -> list[str]:
    return list(documents(SourceConfig(path=str(path), **settings)))  # type: ignore[arg-type]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["books.txt", "books.txt.gz"])
def test_a_document_ends_at_an_empty_line_and_keeps_its_lines(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, b"one\ntwo\n\nthree\n\n\n\nfour")
    assert read(path) == ["one\ntwo", "three", "four"]
    assert read(path, documents="line") == ["one", "two", "three", "four"]


TRICKY = [
    ("windows line ends\r\ninside stay", 2),
    (
        "form\ffeed, \x0b vertical tab, \x85 next line, \u2028 line, \u2029 paragraph, lone \r return, \x1c"
        " separator",
        1,
    ),
    (" \n  spaces lead \t and trail \n ", 3),
    ("\ufeff is text but at the start of a file", 1),
]


@pytest.mark.parametrize(("text", "lines"), TRICKY)
def test_a_document_comes_out_byte_for_byte(tmp_path: Path, text: str, lines: int) -> None:
    path = written(tmp_path / "tricky.txt", f"first\n\n{text}\n\nlast\n".encode())
    assert read(path) == ["first", text, "last"]
    assert len(read(path, documents="line")) == 2 + lines


def test_windows_files_are_cut_at_their_empty_lines(tmp_path: Path) -> None:
    assert read(written(tmp_path / "dos.txt", b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r\n")) == [
        "one\r\ntwo",
        "three",
    ]


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n\r"), min_size=1), min_size=1
    )
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_paragraphs_survive_both_rules(tmp_path: Path, paragraphs: list[str]) -> None:
    text = "\n\n".join(paragraphs)
    path = written(tmp_path / "any.txt", text.encode())
    expected = [paragraphs[0].removeprefix("\ufeff"), *paragraphs[1:]]
    expected = [text for text in expected if text]
    if expected:
        assert read(path) == read(path, documents="line") == expected


ROWS = ["a\r\nb\u2028c", "", "2020-01-01", "1", "日本"]


def test_json_lines_and_parquet_rows_are_documents_unchanged(tmp_path: Path) -> None:
    jsonl = written(
        tmp_path / "a.jsonl.gz", "\n".join(json.dumps({"body": row, "n": 1}) for row in ROWS).encode()
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"n": range(len(ROWS)), "body": ROWS}), tmp_path / "b[1].parquet"
    )
    assert read(jsonl, text_column="body") == ROWS
    assert read(tmp_path / "b[1].parquet", text_column="body") == ROWS


def test_folders_and_globs_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in (
        ("b.txt", "two\n\nthree"),
        ("a.txt", "one"),
        ("sub/c.jsonl", '{"text": "four"}\n\n'),
        ("notes.md", "not read"),
    ):
        written(tmp_path / name, text.encode())
    assert read(tmp_path) == ["one", "two", "three", "four"]
    assert read(f"{tmp_path}/*.txt") == ["one", "two", "three"]
    assert read(f"{tmp_path}/**/*.jsonl") == ["four"]


TRUNCATED = gzip.compress(b"some text\n" * 1000, mtime=0)[:40]
REFUSALS = [
    ("empty.txt", b"", "0 documents"),
    ("blank.txt", b"\n\n\r\n", "0 documents"),
    ("null.jsonl", b'{"text": null}\n', "0 documents"),
    ("model.txt", b"some text\nPK\x03\x04\0\0", "byte 14 is zero"),
    ("latin.txt", b"fine\ncaf\xe9 noir\n", "byte 8 is 0xe9"),
    ("cut.txt.gz", TRUNCATED, "not a whole gzip file"),
    ("plain.txt.gz", b"not compressed", "not a whole gzip file"),
    ("bad.jsonl", b'{"text": "fine"}\n{"text": \n', "line 2, is not JSON"),
    ("deep.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "line 1, is not JSON"),
    ("deep.json", b'{"data": ' + b"[" * 100_000, "no SQuAD file"),
    ("list.jsonl", b"[1, 2]\n", "line 1 has no column .* is a list"),
    (
        "column.jsonl",
        b'{"body": "x", "id": 1}\n',
        "line 1 has no column 'text': it has the columns body, id",
    ),
    ("number.jsonl", b'{"text": 7}\n', "line 1: the column 'text' holds a int"),
    ("half.jsonl", b'{"text": "\\ud83d"}\n', "line 1: character 0 .* surrogate"),
    ("cut.parquet", b"PAR1....", "cut.parquet cannot be read"),
    ("packed.parquet.gz", b"", "unpack it first"),
]


@pytest.mark.parametrize(("name", "content", "says"), REFUSALS)
def test_unreadable_text_is_refused_by_file_and_place(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as refused:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)


def test_missing_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file or folder .*missing\.txt"):
        read(tmp_path / "missing.txt")
    with pytest.raises(UserError, match="no file matches"):
        read(tmp_path / "*.txt")
    with pytest.raises(UserError, match="has no file that ends in"):
        read(tmp_path)


def test_a_missing_parquet_column_is_refused_with_those_there_are(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'text': it has the columns body, n"):
        read(tmp_path)


def test_an_unreachable_hub_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"the hub's data set no-one/nothing \(default .*download it and set `path`"
    ):
        list(documents(SourceConfig(hub="no-one/nothing")))


def test_heldout_documents_are_a_fixed_share_whatever_stands_around_them() -> None:
    texts = [f"document {i}" for i in range(20_000)]
    held = {text for text in texts if is_heldout(text, 0.05)}
    assert 900 < len(held) < 1100
    assert held < {text for text in texts if is_heldout(text, 0.1)}
    assert not any(is_heldout(text, 0.0) for text in texts)


def test_fingerprint_follows_the_text_and_how_it_is_read_not_the_weight(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", b"one\n\ntwo\n")
    first = corpus_fingerprint(SourceConfig(path=str(path)))
    assert corpus_fingerprint(SourceConfig(path=str(path), weight=3.0)) == first
    assert corpus_fingerprint(SourceConfig(path=str(path), documents="line")) != first
    assert corpus_fingerprint(SourceConfig(path=str(written(path, b"one\n\nTWO\n")))) != first


def test_a_squad_file_is_read_as_questions_before_their_contexts(tmp_path: Path) -> None:
    file = tmp_path / "squad.json"
    asked = [{"question": "Who?", "answers": []}, {"question": "Why?", "answers": []}]
    file.write_text(json.dumps({"data": [{"paragraphs": [{"context": "Ada met Bob.", "qas": asked}]}]}))
    assert list(documents(SourceConfig(path=str(file)))) == ["Who?\nAda met Bob.", "Why?\nAda met Bob."]
    file.write_text('{"rows": []}')
    with pytest.raises(UserError, match="is no SQuAD file"):
        list(documents(SourceConfig(path=str(file))))


def test_folders_are_read_through_links_once_and_without_hidden_files(tmp_path: Path) -> None:
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (corpus / ".ipynb_checkpoints", corpus / "sub", elsewhere):
        folder.mkdir(parents=True)
    written(corpus / "a.txt", b"one")
    written(corpus / ".a.txt.swp.txt", b"hidden")
    written(corpus / ".ipynb_checkpoints" / "a-checkpoint.txt", b"one")
    written(elsewhere / "b.txt", b"two")
    (corpus / "linked").symlink_to("../elsewhere")
    (corpus / "sub" / "loop").symlink_to("..")
    (corpus / "dangling.txt").symlink_to("nowhere")
    assert read(corpus) == read(f"{corpus}/**/*.txt") == ["one", "two"]


def test_devices_and_pipes_are_rejected_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name, kind in (("pipe.txt", "a FIFO"), ("zero.txt", "a device")):
        for use in (read, lambda path: corpus_fingerprint(SourceConfig(path=str(path)))):
            with pytest.raises(UserError, match=rf"{name} is {kind}.*, not a file"):
                use(tmp_path / name)
    with pytest.raises(UserError, match=r"zero.txt is a device|pipe.txt is a FIFO"):
        read(tmp_path)


def test_a_parquet_file_without_rows_adds_no_documents(tmp_path: Path) -> None:
    for number, rows in enumerate((["one"], [], ["two", None])):
        table = pyarrow.table({"text": pyarrow.array(rows, pyarrow.string()), "n": range(len(rows))})
        pyarrow.parquet.write_table(table, tmp_path / f"part-{number}.parquet")
    assert read(tmp_path) == ["one", "two", ""]


def peak_memory(path: Path, use: str) -> tuple[int, str]:
    """Bytes by which the peak memory of a process grows while `use` runs with `source`, and its output."""
    code = (
        "import pyarrow.parquet\n"
        "from trifold.pretrain.config.pretraining import SourceConfig\n"
        "from trifold.pretrain.data.corpus import *\n"
        f"source = SourceConfig(path={str(path)!r})\n"
        # not ru_maxrss, which is that of the process that started this one where that is larger
        "status = lambda: open('/proc/self/status').read().split('VmHWM:')[1].split()[0]\n"
        "peak = lambda: int(status()) * 1024\n"
        "before = peak()\n"
        f"try: {use}\n"
        "except UserError as error: print(error)\n"
        "print(peak() - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *output, grown = result.stdout.splitlines()
    return int(grown), "\n".join(output)


@pytest.mark.parametrize("name", ["long.txt", "long.jsonl"])
def test_a_line_costs_less_than_four_bytes_of_memory_a_byte(tmp_path: Path, name: str) -> None:
    size = 40_000_000
    line = b"word " * (size // 5)
    written(tmp_path / name, b'{"text": "' + line + b'"}' if name == "long.jsonl" else line)
    grown, output = peak_memory(tmp_path / name, "print(sum(map(len, documents(source))))")
    assert output == str(size) and grown < 4 * size


def test_a_gzip_bomb_is_rejected_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = written(tmp_path / "bomb.txt.gz", b"a" * 200_000_000)
    assert path.stat().st_size < 300_000
    grown, output = peak_memory(path, "list(documents(source))")
    assert "expands to more than 200 times its size in one line" in output and grown < 100_000_000
