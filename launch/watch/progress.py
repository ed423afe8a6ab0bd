"""How a run looks to the person who started it: a bar with step, loss, tokens/s, MFU and time left, and a
line for each event worth one.

In: the growing metrics.jsonl and events.jsonl of a run folder, wherever its ranks write them. Out: one live
bar on a terminal, elsewhere (a log file, CI) a plain line every ten seconds. Reads what was appended since it
began, so an old run's lines are not told again. `standing` says the same of a run that others look after,
once.
"""

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
from trifold.launch.terminal import Terminal
from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.checkpoint import newest_verified
from trifold.pretrain.checkpoint.lease import valid_folders
from trifold.pretrain.monitor.events import EVENTS, describe
from trifold.pretrain.monitor.run_folder import events_backwards, metrics_backwards
from trifold.pretrain.storage.jsonl import read_from


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

    def __init__(self, folder: Path, steps: int, console: Terminal, every: float = 10.0) -> None:
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
            if text := describe(event.get("event", ""), event):
                style = "yellow" if EVENTS[event["event"]].bad else "dim"
                self.console.print(escape(text), style=style, highlight=False, soft_wrap=True)
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


def appended(file: Path) -> Iterator[list[dict[str, Any]]]:
    """Each `next` gives the whole records appended since the one before (the first: since now)."""
    place = file.stat().st_size if file.exists() else 0
    while True:
        records, place = read_from(file, place)
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
