"""The table of events and the code that emits them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from tests.paths import ROOT
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.monitor.events import EVENTS, EventName, describe
from trifold.pretrain.monitor.metrics import Recorder
from trifold.pretrain.storage.jsonl import read_lines

EMITTERS = {
    "event": 0,
    "on_event": 0,
    "on_retry": 0,
    "log_event": 1,
}  # function: position of the event's name


def emissions() -> Iterator[tuple[str, set[str], str]]:
    """(event, keywords of the call, FILE:LINE) of each call that emits an event."""
    for package in ("pretrain", "finetune", "launch"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                function = node.func
                called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
                if called == "partial" and getattr(node.args[0], "id", "") == "log_event":
                    called, arguments = "log_event", node.args[1:]
                else:
                    arguments = node.args
                if called not in EMITTERS or len(arguments) <= EMITTERS[called]:
                    continue
                keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
                for constant in ast.walk(arguments[EMITTERS[called]]):
                    if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                        yield constant.value, keywords, f"{file.relative_to(ROOT)}:{node.lineno}"


def test_every_event_that_is_emitted_is_in_the_table_with_its_facts() -> None:
    wrong = []
    for event, keywords, line in emissions():
        known = set(EVENTS[event].facts.split()) if event in EVENTS else set()
        if event not in EVENTS or not keywords <= known | {"generation"}:
            wrong.append(f"{line}: {event} with {keywords - known or 'no entry in the table'}")
    assert not wrong, "\n".join(wrong)


def test_every_event_of_the_table_is_emitted_somewhere() -> None:
    emitted = {event for event, _, _ in emissions()}
    assert EVENTS.keys() - emitted == set()
    assert set(get_args(EventName)) == EVENTS.keys()


def test_every_text_uses_facts_that_its_event_carries() -> None:
    for event, kind in EVENTS.items():
        assert set(re.findall(r"{(\w+)}", kind.text or "")) <= set(kind.facts.split()), event


def test_a_missing_fact_and_an_unknown_event_do_not_end_whoever_watches() -> None:
    assert describe("resumed", {}) == "continuing from ?"
    assert describe("of another version", {"step": 1}) is None
    assert describe("stepping", {"step": 1}) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_other_ranks_report_only_what_concerns_each_of_them(tmp_path: Path, rank: int) -> None:
    recorder = Recorder(tmp_path, RankInfo(rank, 2, 0, "cpu", None, 1), generation=3)
    recorder.event("stepping", step=1)
    recorder.event("save_failed", step=1, rank=rank, reason="the disk is full")
    recorder.event("terminated", rank=rank, step=1)
    recorder.close()
    events = read_lines(tmp_path / "events.jsonl")
    expected = ["stepping", "save_failed", "terminated"] if rank == 0 else ["save_failed", "terminated"]
    assert [event["event"] for event in events] == expected
    assert {event["generation"] for event in events} == {3}
