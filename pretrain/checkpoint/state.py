"""What a checkpoint records of a run beside its tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class TaskState:
    """Of a fine-tuning run: its task, and the evaluations so far."""

    kind: str
    prompt: str | None
    picks: int | None  # how many entries a summary picks
    best: str  # the score that chooses a checkpoint
    history: list[tuple[int, float]]  # (step, that score) of every evaluation


@dataclass(frozen=True)
class CheckpointState:
    """All of it is JSON."""

    step: int  # optimizer steps done, skipped ones included
    cursor: int  # the next row
    optimizer_step: int  # the optimizer's own count, without the skipped steps
    skips: list[tuple[int, int]]  # rows that are never read, from first to last
    fingerprint: str  # of the rows
    config: dict[str, Any]  # the resolved recipe
    model: dict[str, Any]  # the model's config

    tokens: int = 0  # read so far, padding left out
    skipped_in_a_row: int = 0  # steps, at the end, that no rank applied
    recent: list[tuple[float, float]] = field(default_factory=list)  # (loss, gradient norm) of applied steps
    scores: dict[str, Any] = field(default_factory=dict)  # of this step, where it was evaluated
    heldout_loss: float | None = None
    selection_loss: float | None = None  # the best checkpoint has the lowest; None: the held-out loss is used
    start: str | None = None  # fingerprint of the weights that the run started from; None: new weights
    lora_scale: float | None = None  # by which adapters are merged; None: the weights themselves are trained
    task: TaskState | None = None  # None: a pretraining run

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> CheckpointState:
        """The inverse of `to_json`: JSON has lists for tuples."""
        task = fields["task"]
        if task is not None:
            history = [(step, score) for step, score in task["history"]]
            task = TaskState(**task | {"history": history})
        skips = [(first, last) for first, last in fields["skips"]]
        recent = [(loss, norm) for loss, norm in fields["recent"]]
        return cls(**fields | {"skips": skips, "recent": recent, "task": task})
