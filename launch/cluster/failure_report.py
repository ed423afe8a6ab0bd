"""Why an attempt ended, as one page: who, where, doing what, its last lines or its stack, where the others
were, what is saved, what to do.

In: how Ray saw it end, and the heartbeats that the ranks left (pretrain/monitor/heartbeat.py). Out: text.
`Watchdog` finds groups that do not end.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trifold.launch.recipe.schema import AnyRecipe, resume_command
from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.lease import valid_folders
from trifold.pretrain.monitor import heartbeat
from trifold.pretrain.monitor.heartbeat import RankStatus
from trifold.pretrain.storage.storage import checkpoint_root

LINES = 12  # of a log or a stack
RANKS = 16  # whose places are listed
LATE = 3.0  # seconds by which the stacks of hanging ranks, each written by its own clock, may be late


@dataclass(frozen=True)
class Cause:
    """How an attempt ended."""

    rank: int | None  # whose fault it was; None: nobody's, the workers could not be placed
    why: str  # one line


class Watchdog:
    """Looks whether ranks come forward. One that does not holds up all; when none has for `step_timeout`, the
    one that is behind is named.

    A setting, not a multiple of the run's own steps: compiling, evaluating and generating take as long as
    they take.
    """

    def __init__(self, config: AnyRecipe) -> None:
        self.run, self.timeout = Path(config.run), config.cluster.step_timeout
        self._seen, self._since = -1, time.monotonic()

    def hanging(self) -> RankStatus | None:
        """The rank that holds up the others, where nobody has come forward for too long."""
        beats = heartbeat.read(self.run)
        if (seen := sum(beat.beats + beat.written for beat in beats.values())) != self._seen:
            self._seen, self._since = seen, time.monotonic()
        if not beats or time.monotonic() - self._since < self.timeout + LATE:
            return None
        self._since = time.monotonic()  # ending it takes time
        return min(
            beats.values(),
            key=lambda beat: (beat.beats, _waits(heartbeat.read_stack(self.run, beat)), beat.rank),
        )


def render(
    config: AnyRecipe, workers: int, end: Cause, restarts: int, tail: Callable[[RankStatus], list[str]]
) -> str:
    """The verdict; `tail(beat)` fetches what a rank wrote last."""
    run, beats = Path(config.run), heartbeat.read(Path(config.run))
    used = f"{restarts} restarts of {config.cluster.max_restarts} were used: {end.why}."
    beat = beats.get(end.rank) if end.rank is not None else None
    if beat is None:
        who = (
            "the workers could not be placed" if end.rank is None else f"rank {end.rank} of {workers} failed"
        )
        lines = [f"{who}, {used}"]
    else:
        lines = [
            f"rank {end.rank} of {workers} failed on {beat.host} (process {beat.pid}), {used}",
            f"  It was {_place(beat)}.",
        ]
        if stack := heartbeat.read_stack(run, beat):
            lines += [
                "  Its stack, innermost call first (all of them: workers/rank-*.stack):",
                *(f"    {frame}" for frame in stack[:LINES]),
            ]
        if last := tail(beat):
            lines += ["  It said last:", *(f"    {line[:300]}" for line in last[-LINES:])]
        lines += [
            f"  rank {rank} on {other.host}: {_place(other)}"
            for rank, other in sorted(beats.items())[:RANKS]
            if rank != end.rank
        ]
    return "\n".join([*lines, _saved(config) + f" Continue with: {resume_command(config)}"])


def last_lines(log: str) -> list[str]:
    """What a rank wrote last, without Ray's own marks. OSError on another host than the rank's."""
    return [
        line for line in Path(log).read_text(errors="replace").splitlines() if line.strip() and line[0] != ":"
    ][-LINES:]


def _place(beat: RankStatus) -> str:
    rows = f", rows {beat.rows[0]} to {beat.rows[1]}" if beat.rows else ""
    micro = f", micro {beat.micro} of its own" if beat.micro is not None else ""
    return (
        f"at {beat.phase}{micro}, in step {beat.step}{rows}"
        if beat.step
        else f"at {beat.phase}, before its first step"
    )


def _waits(stack: list[str]) -> bool:
    """Whether a rank hangs because it waits for another."""
    return bool(stack) and "torch/distributed" in stack[0]


def _saved(config: AnyRecipe) -> str:
    try:
        saved = valid_folders(checkpoint_root(Path(config.run), config.checkpoints.storage))
    except UserError as refusal:
        return f"What was saved cannot be read: {refusal}."
    return f"Saved: {saved[-1]}." if saved else "No checkpoint was saved yet."
