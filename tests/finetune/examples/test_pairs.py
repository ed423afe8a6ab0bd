"""Real formats, and bad input told by file and line."""

import gzip
import json
from pathlib import Path

import pytest

from tests.published import tokenizer
from trifold.finetune.config import TranslationConfig
from trifold.finetune.examples.pairs import read_pairs
from trifold.finetune.tasks.translation import Translation
from trifold.modeling.batch import IGNORE
from trifold.modeling.errors import UserError


def test_the_same_pairs_from_every_format(tmp_path: Path) -> None:
    pairs = [("a house", "ein Haus"), ("a tree", "ein Baum")]
    (tmp_path / "en.gz").write_bytes(gzip.compress("".join(f"{s}\n" for s, _ in pairs).encode()))
    (tmp_path / "de").write_text("".join(f"{t}\r\n" for _, t in pairs))
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"source": s, "target": [t, t + "!"]}) + "\n\n" for s, t in pairs)
    )
    (tmp_path / "p.tsv").write_text("source\ttarget\n" + "".join(f"{s}\t{t}\n" for s, t in pairs))
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({"source": [s for s, _ in pairs], "target": [t for _, t in pairs]}),
        tmp_path / "p.parquet",
    )
    for path in (
        f"{tmp_path}/en.gz,{tmp_path}/de",
        f"{tmp_path}/p.jsonl",
        f"{tmp_path}/p.tsv",
        f"{tmp_path}/p.parquet",
    ):
        assert [(pair.source, pair.targets[0]) for pair in read_pairs([path], "source", "target")] == pairs
    assert read_pairs([f"{tmp_path}/p.jsonl"], "source", "target")[1].targets == ("ein Baum", "ein Baum!")
    assert read_pairs([f"{tmp_path}/p.jsonl"], "source", "target")[1].where.endswith("p.jsonl, line 3")


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        (
            {"a": "1\n2\n", "b": "1\n"},
            "a,b",
            r"equally many lines: .*a has 2, .*b has 1\. Line 2 has no partner",
        ),
        ({"a": "1\n \n", "b": "1\n2\n"}, "a,b", "a, line 2: source is empty"),
        ({"a": "1\n2\n", "b": "1\n\n"}, "a,b", "a, line 2: target is empty"),
        (
            {"p.jsonl": '{"source": "1"}\n'},
            "p.jsonl",
            r"line 1 has no column 'target': it has source\. Name the columns",
        ),
        ({"p.jsonl": '{"source": "1", "target": "2"}\n{"sou'}, "p.jsonl", "line 2, is not JSON"),
        ({"p.jsonl": '{"source": ' + "[" * 100_000 + "\n"}, "p.jsonl", "line 1, is not JSON"),
        ({"p.jsonl": '{"source": "1", "target": 2}\n'}, "p.jsonl", "line 1: the column 'target' holds a int"),
        (
            {"p.tsv": "source\ttarget\n1\t2\t3\n"},
            "p.tsv",
            "line 2, has 3 columns, and the first line names 2",
        ),
        (
            {"p.jsonl": '{"source": "1\\ud83d", "target": "2"}\n'},
            "p.jsonl",
            "line 1: character 1 of the column 'source' is half of a surrogate",
        ),
        (
            {"p.jsonl": '{"source": "1", "target": ["2", "\\udc00"]}\n'},
            "p.jsonl",
            "line 1: character 0 of the column 'target' is half",
        ),
        ({"p.jsonl": "\n"}, "p.jsonl", "holds no example"),
        ({"p.txt": "1\n"}, "p.txt", "ends in .txt; pairs are read from"),
        ({}, "p.jsonl", "there is no file"),
    ],
)
def test_bad_pairs_are_refused_by_file_and_line(
    files: dict[str, str], path: str, message: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_pairs([",".join(f"{tmp_path}/{part}" for part in path.split(","))], "source", "target")


def test_a_decoder_is_asked_for_the_target_alone_and_long_pairs_are_refused_or_cut(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"source": "Ada met Bob", "target": "by the river"}) + "\n")
    path = (f"{tmp_path}/p.jsonl",)
    marks = tokenizer()
    task = Translation(TranslationConfig(train=path, dev=path), marks, "decoder", 64)
    [segment] = task.segments(task.train)
    assert marks.decode(segment.tokens) == "<s>Ada met Bob\n=>\nby the river"
    assert marks.decode(segment.targets[segment.targets != IGNORE]) == "by the river</s>"
    assert segment.tokens.tolist()[: len(task.prompts(task.dev)[0])] == task.prompts(task.dev)[0]
    task = Translation(TranslationConfig(train=path, dev=path), marks, "encoder-decoder", 64)
    [segment] = task.segments(task.train)
    assert segment.source is not None and marks.decode(segment.source) == "<s>Ada met Bob</s>"
    assert (marks.decode(segment.tokens), marks.decode(segment.targets)) == (
        "<s>by the river",
        "by the river</s>",
    )
    with pytest.raises(
        UserError, match=r"p\.jsonl, line 1: source and target need \d+ tokens, and row_length is 6"
    ):
        short = Translation(TranslationConfig(train=path, dev=path), marks, "encoder-decoder", 6)
        short.segments(short.train)
    cut = Translation(TranslationConfig(train=path, dev=path, truncate=True), marks, "encoder-decoder", 6)
    [segment] = cut.segments(cut.train)
    assert (
        segment.source is not None
        and len(segment.source) == 6
        and segment.source[-1] == marks.eos
        and len(segment.tokens) == 6
    )


def test_empty_lines_are_counted_and_left_out_on_request(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1\n\n3\n4\n")
    (tmp_path / "b").write_text("1\n2\n \n4\n")
    source = f"{tmp_path}/a,{tmp_path}/b"
    with pytest.raises(
        UserError,
        match=r"2 of 4 pairs lack text: .*line 2: source is empty; .*line 3: target is empty\. Remove",
    ):
        read_pairs([source], "source", "target")
    notes: list[str] = []
    assert [pair.source for pair in read_pairs([source], "source", "target", notes.append)] == ["1", "4"]
    assert len(notes) == 1 and notes[0].endswith("They are left out.")
    config = TranslationConfig(train=(source,), dev=(source,), skip_empty=True)
    task = Translation(config, tokenizer(), "decoder", 64)
    assert len(task.train) == 2 and "2 of 4 pairs" in task.notes[0]


def test_each_split_may_name_its_own_columns_and_several_references(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"document": "d", "summary": "s"}) + "\n")
    (tmp_path / "d.jsonl").write_text(json.dumps({"document": "d", "references": ["r", "s", "t"]}) + "\n")
    for name in "xyz":
        (tmp_path / name).write_text(f"{name}\n")
    config = TranslationConfig.model_validate_json(
        json.dumps(
            {
                "train": [f"{tmp_path}/t.jsonl"],
                "dev": [f"{tmp_path}/d.jsonl"],
                "test": [f"{tmp_path}/x,{tmp_path}/y,{tmp_path}/z"],
                "columns": {
                    "source": "document",
                    "target": "summary",
                    "dev": {"target": "references"},
                    "test": {"target": ["first", "second"]},
                },
            }
        )
    )
    task = Translation(config, tokenizer(), "decoder", 64)
    assert [split[0].targets for split in (task.train, task.dev, task.test)] == [
        ("s",),
        ("r", "s", "t"),
        ("y", "z"),
    ]
    statistics = task.statistics(["s"], task.dev)
    assert task.scores(statistics.sum(axis=0))["chrf"] == pytest.approx(100)
