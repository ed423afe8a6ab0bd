"""All events of events.jsonl: their names, the facts that each carries, and how a person reads them.

A line is {"time", "event", "generation" where a rank wrote it, facts}. `Recorder.event` (ranks) and
`log_event` (the driver) write them; launch/watch shows those that have a text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

EventName = Literal[
    # an attempt
    "started",
    "data",
    "resumed",
    "stepping",
    "bad_step",
    "terminated",
    "stopped",
    "finished",
    "scored",
    "note",
    # checkpoints
    "save_started",
    "save_written",
    "save_committed",
    "save_failed",
    "checkpoint_rejected",
    "checkpoint_deleted",
    "lease_damaged",
    "checkpoint_swept",
    "retention_failed",
    "request_failed",
    # the driver
    "placed",
    "failed",
    "restarting",
    "waiting",
    "resizing",
    "regrouping",
    "hanging",
    # scoring beside training
    "scoring_failed",
    "scoring_waits",
    "scoring_last",
]


class OnEvent(Protocol):
    """Who is told of events; saving tells from its own thread."""

    def __call__(self, event: EventName, **facts: Any) -> None: ...


@dataclass(frozen=True)
class EventKind:
    """`facts`: the keys that an event may carry, separated by spaces. `text`: a line with facts in braces;
    None: recorded only. `bad`: worth a warning. `every_rank`: not only rank 0 reports it.
    """

    facts: str
    text: str | None = None
    bad: bool = False
    every_rank: bool = False


EVENTS: dict[EventName, EventKind] = {
    "started": EventKind(
        "world zero_stage precision recompute pid", "{world} worker(s) started at ZeRO {zero_stage}"
    ),
    "data": EventKind(
        "stage step_rows row_length micro_rows first_step first_row first_micro steps rows_per_epoch waste"
        " fingerprint heldout_fingerprint heldout_rows earlier_stages start"
    ),
    "resumed": EventKind("step checkpoint", "continuing from {checkpoint}"),
    "stepping": EventKind("step"),
    "bad_step": EventKind(
        "step rows reason policy in_a_row",
        "step {step} (rows {rows}) was skipped on all ranks: {reason}"
        " ({in_a_row} in a row; policy: {policy})",
        bad=True,
    ),
    "terminated": EventKind("rank step", "rank {rank} received SIGTERM: saving", every_rank=True),
    "stopped": EventKind("step", "stopped at step {step}"),
    "finished": EventKind("step", "finished: all {step} steps are done"),
    "scored": EventKind("step *scores"),
    "note": EventKind("text", "{text}", bad=True),
    "save_started": EventKind("step bytes waited"),
    "save_written": EventKind("step rank bytes seconds"),
    "save_committed": EventKind("step checkpoint bytes seconds", "saved {checkpoint}"),
    "save_failed": EventKind("step rank reason", "a save failed: {reason}", bad=True, every_rank=True),
    "checkpoint_rejected": EventKind(
        "checkpoint file reason", "{checkpoint} was passed over: {file}: {reason}", bad=True
    ),
    "lease_damaged": EventKind(
        "file reason", "lease/{file} was passed over and is written again: {reason}", bad=True
    ),
    "checkpoint_deleted": EventKind("checkpoint"),
    "checkpoint_swept": EventKind("checkpoint"),
    "retention_failed": EventKind("step rank reason", every_rank=True),
    "request_failed": EventKind(
        "place tries seconds reason",
        "{place}: {reason}; trying again in {seconds} s (try {tries} failed)",
        every_rank=True,
    ),
    "placed": EventKind("workers"),
    "failed": EventKind("rank error workers", "rank {rank} failed: {error}", bad=True),
    "restarting": EventKind("attempt workers", "starting {workers} workers again (restart {attempt})"),
    "waiting": EventKind(
        "fit least seconds", "{fit} workers fit, {least} are needed: waiting up to {seconds} s for hosts"
    ),
    "resizing": EventKind(
        "workers fit", "{fit} workers fit now: the {workers} save, and {fit} workers continue"
    ),
    "regrouping": EventKind("workers", "continuing with {workers} workers"),
    "hanging": EventKind(
        "rank host step phase",
        "rank {rank} on {host} hangs at {phase} in step {step}: this attempt is ended",
        bad=True,
    ),
    "scoring_failed": EventKind(
        "checkpoint reason", "{checkpoint} has no scores: {reason}", bad=True, every_rank=True
    ),
    "scoring_waits": EventKind(
        "wants",
        "scoring is waiting for {wants} that no worker uses: scores arrive later, or after training. Set"
        " scoring.cpus=0 to share the workers' CPUs",
    ),
    "scoring_last": EventKind(
        "checkpoint seconds", "waiting up to {seconds} s for the scores of {checkpoint}"
    ),
}


def describe(event: str, facts: Mapping[str, Any]) -> str | None:
    """An event as a line for a person; None for one that has none, or that this version does not know."""
    kind = EVENTS.get(event)  # type: ignore[call-overload]
    if kind is None or kind.text is None:
        return None
    return str(kind.text.format_map(_Facts(facts)))


class _Facts(dict[str, Any]):
    """A missing fact reads as a question mark: a line about a run must not end the run."""

    def __missing__(self, key: str) -> str:
        return "?"
