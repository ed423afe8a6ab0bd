"""Following a run on the console: a bar with step, loss, tokens/s, MFU and time left, and a line for each
event that matters.

Reads what the ranks append to metrics.jsonl and events.jsonl of a run folder, from the moment it starts, so
an earlier run's lines are not repeated. `run_status` gives the state of any run once.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from trifold.launch.recipe.reader import checkpoint_root_of_run
from trifold.launch.terminal import Terminal, visible
from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.checkpoint import newest_verified
from trifold.pretrain.checkpoint.lease import valid_folders
from trifold.pretrain.monitor.events import EVENTS, describe
from trifold.pretrain.monitor.run_folder import events_backwards, metrics_backwards
from trifold.pretrain.storage.jsonl import read_from

POLL = 0.3  # seconds between two looks at the files


def run_status(run: Path, thorough: bool) -> dict[str, str]:
    """The state of a run by its folder. `thorough`: its last checkpoint is read to the end and verified."""
    last = next(metrics_backwards(run, "loss"), None)
    started = next(events_backwards(run, "started"), None)
    scored = next(metrics_backwards(run, "checkpoint"), None)
    return {
        "step": str(last["step"]) if last else "",
        "loss": f"{last['loss']:.3f}" if last else "",
        "tokens/s": _short(last["tokens_per_s"]) if last else "",
        "workers": str(started["world"]) if started else "",
        "restarts": str(sum(1 for _ in events_backwards(run, "restarting"))),
        "verified checkpoint" if thorough else "checkpoint": _newest_checkpoint(run, thorough),
        "scores": headline(scored) if scored else "",
    }


def _newest_checkpoint(run: Path, thorough: bool) -> str:
    try:
        root = checkpoint_root_of_run(run)
        if not thorough:
            return next((folder.name for folder in reversed(valid_folders(root))), "none")
        checkpoint = newest_verified(root, lambda event, **facts: None)
        return checkpoint.folder.name if checkpoint else "none"
    except UserError:
        return "none that verifies"


def headline(record: dict[str, Any]) -> str:
    """The first score of each text and task that was scored in the background."""
    first: dict[str, str] = {}
    for name, value in record.items():
        if "/" in name:
            first.setdefault(name.partition("/")[0], f"{name} {value:.3f}")
    return f"step {record['step']}: {', '.join(first.values())}"


class ProgressWatcher:
    """Shows a run: `with ProgressWatcher(folder, steps, console) as watcher: ...`. `watcher.prepared` reports
    the preparation of data. On a terminal there is one live bar, elsewhere a line every `interval` seconds.
    """

    def __init__(self, folder: Path, steps: int, console: Terminal, interval: float = 10.0) -> None:
        self.folder, self.steps, self.console, self.interval = folder, steps, console, interval
        self._seconds: deque[float] = deque(maxlen=50)  # of the last steps, for the time left
        self._evaluation = self._scores = ""
        self._last: dict[str, Any] = {}
        self._printed = -math.inf  # when the last line was printed
        self._done = threading.Event()
        self._sources = [appended(folder / name) for name in ("events.jsonl", "metrics.jsonl")]
        for source in self._sources:
            next(source)  # skips what an earlier run wrote
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
        self._show_new()
        self._bar.stop()
        if self._last:
            self.console.print(self._step_line(), highlight=False, soft_wrap=True)

    def prepared(self, what: str, done: int) -> None:
        """Report that `done` items of the preparation are done; 0: it starts."""
        self._show_line(f"{what}: {done:,}" if done else what, None)

    def _follow(self) -> None:
        while not self._done.wait(POLL):
            self._show_new()

    def _show_new(self) -> None:
        """Read and show what was appended since the last call."""
        events, metrics = [next(source) for source in self._sources]
        for event in events:
            name = event.get("event", "")
            if isinstance(name, str) and (text := describe(name, event)):
                style = "yellow" if EVENTS[event["event"]].bad else "dim"
                self.console.print(escape(text), style=style, highlight=False, soft_wrap=True)
        for record in metrics:
            if isinstance(record.get("step"), int):
                self._show_metrics(record)

    def _show_metrics(self, record: dict[str, Any]) -> None:
        if "heldout_loss" in record:
            bits = f" ({record['bits_per_byte']:.3f} bits/byte)" if "bits_per_byte" in record else ""
            self._evaluation = f" · held out {record['heldout_loss']:.3f}{bits}"
        if "checkpoint" in record:
            self._scores = f" · {headline(record)}"
        if "loss" in record and "seconds" in record:
            self._seconds.append(record["seconds"])
            self._last = record
            self._show_line(self._step_line(), record["step"])

    def _step_line(self) -> str:
        record = self._last
        left = (self.steps - record["step"]) * sum(self._seconds) / len(self._seconds)
        return (
            f"step {record['step']}/{self.steps} · loss {record['loss']:.3f} ·"
            f" {_short(record['tokens_per_s'])} tokens/s"
            f" · MFU {100 * record['mfu']:.0f} % · {_clock(left)} left{self._evaluation}{self._scores}"
        )

    def _show_line(self, line: str, step: int | None) -> None:
        if self.console.is_terminal:
            rest = line if step is None else line.partition(" · ")[2]
            self._bar.update(self._task, completed=step, line=escape(visible(rest)))
        elif time.monotonic() - self._printed >= self.interval:
            self._printed = time.monotonic()
            self.console.print(escape(line), highlight=False, soft_wrap=True)


def appended(file: Path) -> Iterator[list[dict[str, Any]]]:
    """Each `next` gives the complete records appended since the previous one; the first gives none."""
    offset = file.stat().st_size if file.exists() else 0
    while True:
        records, offset = read_from(file, offset)
        yield records


def _short(number: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
