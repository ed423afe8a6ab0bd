"""The command line as a person meets it: what it prints, and how it exits."""

import codecs
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.command_line import start, trifold, until, write_tiny
from trifold.launch.cli import _argument_as_utf8, _lines_of_stdin
from trifold.launch.terminal import Terminal, visible
from trifold.pretrain.storage.jsonl import read_lines


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_tiny(tmp_path)


def test_a_storage_that_holds_another_run_of_this_name_is_rejected_and_a_renamed_run_is_noticed(folder):
    def pretrain(*arguments: str) -> tuple[int, str]:
        storage = f"checkpoints.storage={folder / 'store'}"
        result = trifold(folder, "pretrain", "tiny.yaml", "steps=2", storage, *arguments)
        return result.code, " ".join(result.err.split())

    assert pretrain("run=a/base")[0] == 0
    code, message = pretrain("run=b/base", "seed=7")
    assert code == 1 and "store/base is a run of another recipe" in message
    assert "seed: 0 there, 7 here" in message
    (folder / "a/base").rename(folder / "a/other")
    code, message = pretrain("run=a/other")
    assert code == 1 and "has trained 2 steps" in message and "Give the folder back its name" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["pretrain", "tiny.yaml", "optimizer.lrr=1"],
            "there is no key `optimizer.lrr`; did you mean `optimizer.lr`?",
        ),
        (["pretrain", "none.yaml"], "there is no recipe none.yaml"),
        (
            ["pretrain", "tiny.yaml", "--address", "127.0.0.1:1", "cluster.workers=1"],
            "no Ray cluster answers at 127.0.0.1:1",
        ),
        (["pretrain", "tiny.yaml", "data.sources.0.path=nowhere.txt"], "nowhere.txt"),
        (["pretrain", "tiny.yaml", "run=tiny.yaml"], "Not a directory (tiny.yaml"),
        (["publish", "nowhere", "--out", "out"], "nowhere"),
        (["verify", "nowhere"], "nowhere"),
        (["generate", "nowhere", "text"], "nowhere"),
    ],
)
def test_a_mistake_is_one_message_and_exit_1_without_a_traceback(folder, arguments, message):
    result = trifold(folder, *arguments)
    assert result.code == 1
    assert message in result.err and "Traceback" not in result.err + result.out
    assert result.err.startswith("trifold: ")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_exits_with_its_number_and_the_run_resumes_there(folder, number, code):
    process = start(folder, "pretrain", "tiny.yaml")
    until(lambda: any(r["step"] > 2 for r in read_lines(folder / "run" / "metrics.jsonl")), process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "Continue with: trifold pretrain run/config.yaml" in out
    stopped = read_lines(folder / "run" / "events.jsonl")[-1]
    assert stopped["event"] == "stopped"

    if number != signal.SIGINT:
        return  # resuming is the same after all of them
    steps = f"steps={stopped['step']}"
    result = trifold(folder, "pretrain", "run/config.yaml", "checkpoints.keep_last=1", steps)
    assert result.code == 0, result.err
    resumed = [event for event in read_lines(folder / "run" / "events.jsonl") if event["event"] == "resumed"]
    assert resumed[0]["step"] == stopped["step"]


def test_a_control_character_of_a_file_name_reaches_the_terminal_as_its_escape(folder):
    (folder / "evil\x1b[2J.yaml").write_text("- a list\n")
    result = trifold(folder, "pretrain", "evil\x1b[2J.yaml")
    assert result.code == 1 and "\x1b" not in result.err and r"evil\x1b[2J.yaml holds" in result.err

    result = trifold(folder, "pretrain", "tiny.yaml", "data.sources.0.path=a\u009b31m\u202e.txt")
    assert r"a\x9b31m\u202e.txt" in result.err and "\u202e" not in result.err


def test_a_console_shows_control_characters_as_escapes_wherever_they_stand():
    console = Terminal(record=True, width=200, force_terminal=False)
    console.print_line("a\x1b[31mb\rc\ttab\nnext")
    console.print("[bold]markup[/] \x07")
    console.rule("t\x1bitle")
    text = console.export_text()
    assert r"a\x1b[31mb\rc" in text and "next" in text and r"markup \x07" in text and r"t\x1bitle" in text
    assert visible("Größe 東京 👩‍🔬 नमस्ते") == "Größe 東京 👩‍🔬 नमस्ते"  # the joiner inside the emoji stays


def test_output_is_utf_8_in_a_locale_that_cannot_say_it(tmp_path):
    code = "from trifold.launch.cli import main; main(['plan', 'Größe-東京.yaml'])"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, cwd=tmp_path)
    assert ended.returncode == 1 and b"Traceback" not in ended.stderr
    assert "there is no recipe Größe-東京.yaml" in ended.stderr.decode("utf-8")


def test_an_argument_is_utf_8_where_the_locale_decodes_it_as_ascii():
    assert _argument_as_utf8("東京".encode().decode("ascii", "surrogateescape")) == "東京"
    assert _argument_as_utf8("\udcff") == "\udcff" and _argument_as_utf8("Größe") == "Größe"


def test_the_byte_order_mark_of_stdin_is_no_part_of_the_first_text(monkeypatch):
    content = codecs.BOM_UTF8 + "Mara\r\nGröße\n\n\ufeffkept\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert list(_lines_of_stdin()) == ["Mara", "Größe", "", "\ufeffkept"]
