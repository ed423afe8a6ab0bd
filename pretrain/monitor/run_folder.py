"""What is read from and written to a run folder by anybody but the ranks: events, the last metrics, scores
that wait for rank 0.

The files are read backwards, as far as is needed. A line without the key that every line of its file has is
passed over, as other damage is.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trifold.pretrain.monitor.events import EventName
from trifold.pretrain.storage.atomic import replace_file
from trifold.pretrain.storage.jsonl import Record, append_line, read_backwards

_OUTCOMES = ("finished", "stopped", "scored")


def log_event(run: Path, event: EventName, **facts: Any) -> None:
    """One line of events.jsonl."""
    append_line(run / "events.jsonl", {"time": round(time.time(), 3), "event": event, **facts})


def events_backwards(run: Path, event: EventName | None = None) -> Iterator[Record]:
    """The events of a run, or those of one kind, the last one first."""
    for record in read_backwards(run / "events.jsonl", f'"{event}"' if event else ""):
        name = record.get("event")
        if isinstance(name, str) and event in (None, name):
            yield record


def metrics_backwards(run: Path, key: str | None = None) -> Iterator[Record]:
    """The lines of metrics.jsonl, or those that have a key, the last one first."""
    for record in read_backwards(run / "metrics.jsonl", f'"{key}"' if key else ""):
        if isinstance(record.get("step"), int) and (key is None or key in record):
            yield record


def last_step(run: Path) -> int:
    """The step of the last line of metrics.jsonl; 0 before there is one."""
    return next((int(record["step"]) for record in metrics_backwards(run)), 0)


def last_outcome(run: Path) -> str:
    """How a run's last attempt ended: finished, stopped, or scored (a task, at its end); failed where it came
    to no end.
    """
    for record in events_backwards(run):
        if record["event"] in (*_OUTCOMES, "started", "failed"):
            return record["event"] if record["event"] in _OUTCOMES else "failed"
    return "failed"


def queue_scores(run: Path, scores: dict[str, Any]) -> None:
    """Leave the scores of a checkpoint ("step", "checkpoint", numbers) for whoever writes the metrics."""
    (run / "scoring").mkdir(exist_ok=True)
    replace_file(run / "scoring" / f"{scores['checkpoint']}.json", json.dumps(scores))


def queued_scores(run: Path) -> list[Path]:
    """The scores that are not in the metrics yet: a file for each checkpoint, named after it."""
    return sorted((run / "scoring").glob("*.json"))


def scored_checkpoints(run: Path) -> set[str]:
    """The names of the checkpoints that have scores."""
    recorded = {str(record["checkpoint"]) for record in metrics_backwards(run, "checkpoint")}
    return recorded | {file.stem for file in queued_scores(run)}
