"""How a run looks to the person who started it: a bar with step, loss, tokens/s, MFU and time left, and a
line for each event worth one.

In: the growing metrics.jsonl and events.jsonl of a run folder, wherever its ranks write them. Out: one live
bar on a terminal, elsewhere (a log file, CI) a plain line every ten seconds. Reads what was appended since it
began, so an old run's lines are not told again. `standing` says the same of a run that others look after,
once.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from trifold.launch.recipe.reader import checkpoint_root_of_run
from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.checkpoint import newest_verified
from trifold.pretrain.checkpoint.lease import valid_folders
from trifold.pretrain.storage.jsonl import read_lines

EVENTS = {
    "started": "{world} worker(s) started at ZeRO {zero_stage}",
    "resumed": "continuing from {checkpoint}",
    "checkpoint_rejected": "{checkpoint} was passed over: {file}: {reason}",
    "save_failed": "a save failed: {reason}",
    "request_failed": "{place}: {reason}; trying again in {seconds} s (try {tries} failed)",
    "save_committed": "saved {checkpoint}",
    "bad_step": "step {step} (rows {rows}) was applied by no rank: {reason} ({in_a_row} in a row; policy:"
    " {policy})",
    "failed": "rank {rank} failed: {error}",
    "restarting": "starting {workers} workers again (restart {attempt})",
    "waiting": "{fit} workers fit, {least} are needed: waiting up to {seconds} s for hosts",
    "resizing": "{fit} workers fit now: the {workers} save, and {fit} go on",
    "regrouping": "going on with {workers} workers",
    "hanging": "rank {rank} on {host} hangs at {phase} in step {step}: this attempt is ended",
    "scoring_failed": "{checkpoint} has no scores: {reason}",
    "scoring_waits": "the scorer waits for {wants} that no worker holds: scores come when there is room, or"
    " at the end. With less in"
    " scoring.cpus (0: it shares the workers') it begins earlier",
    "scoring_last": "waiting up to {seconds} s for the scores of {checkpoint}",
    "terminated": "rank {rank} is told to end (SIGTERM): saving",
    "stopped": "stopped at step {step}",
    "finished": "finished: all {step} steps are done",
}
BAD = ("failed", "hanging", "save_failed", "bad_step", "checkpoint_rejected", "scoring_failed")


def run_status(run: Path, thorough: bool) -> dict[str, str]:
    """How a run stands by its folder. `thorough`: its last checkpoint is read in full and verified."""
    events, metrics = read_lines(run / "events.jsonl"), read_lines(run / "metrics.jsonl")
    last = next((record for record in reversed(metrics) if "loss" in record), None)
    try:
        found = (
            newest_verified(checkpoint_root_of_run(run), lambda event, **facts: None) if thorough else None
        )
        checkpoint = (
            found.folder.name
            if found
            else next(
                (f.name for f in reversed(valid_folders(checkpoint_root_of_run(run))) if not thorough), "none"
            )
        )
    except UserError:
        checkpoint = "none that verifies"
    return {
        "step": str(last["step"]) if last else "",
        "loss": f"{last['loss']:.3f}" if last else "",
        "tokens/s": _short(last["tokens_per_s"]) if last else "",
        "workers": next(
            (str(event["world"]) for event in reversed(events) if event["event"] == "started"), ""
        ),
        "restarts": str(sum(event["event"] == "restarting" for event in events)),
        "verified checkpoint" if thorough else "checkpoint": checkpoint,
        "scores": next((headline(record) for record in reversed(metrics) if "checkpoint" in record), ""),
    }


def headline(record: dict[str, Any]) -> str:
    """The first score of each text and task that was scored beside training."""
    first: dict[str, str] = {}
    for name, value in record.items():
        if "/" in name:
            first.setdefault(name.partition("/")[0], f"{name} {value:.3f}")
    return f"step {record['step']}: {', '.join(first.values())}"


class ProgressWatcher:
    """Shows a run while inside: `with Watch(folder, steps, console) as watch: ...`; `watch.prepared` hears
    how far `prepare` is.
    """

    def __init__(self, folder: Path, steps: int, console: Console, every: float = 10.0) -> None:
        self.folder, self.steps, self.console, self.every = folder, steps, console, every
        self._seconds: deque[float] = deque(maxlen=50)  # of the last steps, for the time left
        self._evaluation = self._scores = ""
        self._last: dict[str, Any] = {}
        self._told = -float("inf")
        self._done = threading.Event()
        self._sources = [appended(folder / name) for name in ("events.jsonl", "metrics.jsonl")]
        for source in self._sources:
            next(source)  # an old run's lines
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(20), TextColumn("{task.fields[line]}"))
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=steps, line="preparing")
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "ProgressWatcher":
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._look()
        self._bar.stop()
        if self._last:
            self.console.print(self._said(), highlight=False, soft_wrap=True)

    def prepared(self, what: str, done: int) -> None:
        """How far the preparation of data is."""
        self._tell(f"{what}: {done:,}" if done else what, None)

    def _follow(self) -> None:
        while not self._done.wait(0.3):
            self._look()

    def _look(self) -> None:
        """Read and show everything new, once."""
        events, metrics = ([record for record in next(source)] for source in self._sources)
        for event in events:
            if text := EVENTS.get(event.get("event", "")):
                style = "yellow" if event["event"] in BAD else "dim"
                self.console.print(
                    escape(text.format_map(_Facts(event))), style=style, highlight=False, soft_wrap=True
                )
        for record in metrics:
            if "heldout_loss" in record:
                bits = f" ({record['bits_per_byte']:.3f} bits/byte)" if "bits_per_byte" in record else ""
                self._evaluation = f" · held out {record['heldout_loss']:.3f}{bits}"
            if "checkpoint" in record:
                self._scores = f" · {headline(record)}"
            if "loss" in record:
                self._seconds.append(record["seconds"])
                self._last = record
                self._tell(self._said(), record["step"])

    def _said(self) -> str:
        record = self._last
        left = (self.steps - record["step"]) * sum(self._seconds) / len(self._seconds)
        return (
            f"step {record['step']}/{self.steps} · loss {record['loss']:.3f} ·"
            f" {_short(record['tokens_per_s'])} tokens/s"
            f" · MFU {100 * record['mfu']:.0f} % · {_clock(left)} left{self._evaluation}{self._scores}"
        )

    def _tell(self, line: str, step: int | None) -> None:
        if self.console.is_terminal:
            self._bar.update(
                self._task, completed=step, line=line.partition(" · ")[2] if step is not None else line
            )
        elif time.monotonic() - self._told >= self.every:
            self._told = time.monotonic()
            self.console.print(line, highlight=False, soft_wrap=True)


class _Facts(dict[str, Any]):
    """A record whose missing facts read as a question mark: a line about a run must not end the run."""

    def __missing__(self, key: str) -> str:
        return "?"


def appended(file: Path) -> Iterator[list[dict[str, Any]]]:
    """Each `next` gives the whole records appended since the one before (the first: since now)."""
    place = file.stat().st_size if file.exists() else 0
    while True:
        records, place = since(file, place)
        yield records


def since(file: Path, place: int) -> tuple[list[dict[str, Any]], int]:
    """The whole records from byte `place` of a file on, and the byte after them."""
    records: list[dict[str, Any]] = []
    if file.exists():
        with file.open("rb") as lines:
            lines.seek(place)
            whole, newline, _ = lines.read().rpartition(b"\n")
        place += len(whole) + len(newline)
        for line in whole.split(b"\n"):
            try:
                records.append(json.loads(line))
            except ValueError:  # half a line of a killed writer
                continue
    return records, place


def _short(number: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
