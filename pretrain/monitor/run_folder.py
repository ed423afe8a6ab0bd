"""TODO"""

import json
import time
from pathlib import Path
from typing import Any

from trifold.pretrain.storage.atomic import replace_file
from trifold.pretrain.storage.jsonl import append_line, read_lines


def log_event(run: Path, event: str, **facts: Any) -> None:
    """One line of events.jsonl, from whoever looks after the run."""
    append_line(run / "events.jsonl", {"time": round(time.time(), 3), "event": event, **facts})


def last_outcome(run: Path) -> str:
    """How a run's last attempt ended: finished, stopped, or scored (a task, at its end); failed where it came
    to no end.
    """
    ends = ("finished", "stopped", "scored")
    last = [
        event["event"]
        for event in read_lines(run / "events.jsonl")
        if event["event"] in (*ends, "started", "failed")
    ][-1:]
    return last[0] if last and last[0] in ends else "failed"


def queue_scores(run: Path, scores: dict[str, Any]) -> None:
    """Leave the scores of a checkpoint ("step", "checkpoint", numbers) for whoever writes the metrics."""
    (run / "scoring").mkdir(exist_ok=True)
    replace_file(run / "scoring" / f"{scores['checkpoint']}.json", json.dumps(scores))


def queued_scores(run: Path) -> list[Path]:
    """The scores that were handed over and are not in the metrics yet: a file for each checkpoint, named
    after it.
    """
    return sorted((run / "scoring").glob("*.json"))


def scored_checkpoints(run: Path) -> set[str]:
    """The checkpoints that have scores."""
    return {file.stem for file in queued_scores(run)} | {
        record["checkpoint"] for record in read_lines(run / "metrics.jsonl") if "checkpoint" in record
    }
