"""The report of a failed attempt, on one page: which rank, on which host, in which phase, its last log lines
and stack, where the other ranks were, what is saved, and what to do.

It is made of the error that Ray reported and of the heartbeats that the ranks left
(pretrain/monitor/heartbeat.py). `Watchdog` finds groups that hang.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trifold.launch.cluster.timing import Timing
from trifold.launch.recipe.schema import AnyRecipe, resume_command
from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.lease import valid_folders
from trifold.pretrain.monitor import heartbeat
from trifold.pretrain.monitor.heartbeat import RankStatus
from trifold.pretrain.storage.storage import checkpoint_root

MAX_LINES = 12  # of a log or a stack
MAX_RANKS = 16  # whose positions are listed


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended."""

    rank: int | None  # the rank that failed; None: no rank, the workers could not be placed or Ray failed
    reason: str  # one line


class Watchdog:
    """Finds the rank that holds up the others once no rank has made progress for `cluster.step_timeout`.

    The timeout is a setting, not a multiple of the run's own step time: compiling, evaluating and generating
    take as long as they take.
    """

    def __init__(self, config: AnyRecipe, timing: Timing) -> None:
        self.run, self.timeout = Path(config.run), config.cluster.step_timeout + timing.stack
        self._progress, self._since = -1, time.monotonic()

    def hanging_rank(self) -> RankStatus | None:
        """The rank that is furthest behind, where no rank has made progress for too long."""
        statuses = heartbeat.read(self.run)
        progress = sum(status.beats + status.written for status in statuses.values())
        if progress != self._progress:
            self._progress, self._since = progress, time.monotonic()
        if not statuses or time.monotonic() - self._since < self.timeout:
            return None

        self._since = time.monotonic()  # ending it takes time

        def order(status: RankStatus) -> tuple[int, bool, int]:
            waits = _waits_for_peer(heartbeat.read_stack(self.run, status))
            return status.beats, waits, status.rank

        return min(statuses.values(), key=order)


def render(
    config: AnyRecipe,
    workers: int,
    cause: Cause,
    restarts: int | None,
    log_of: Callable[[RankStatus], list[str]],
) -> str:
    """The report as text. `restarts` is how many were used, if that is known; `log_of(status)` fetches the
    last log lines of a rank.
    """
    run = Path(config.run)
    statuses = heartbeat.read(run)
    status = statuses.get(cause.rank) if cause.rank is not None else None
    used = f"{cause.reason}."
    if restarts is not None:
        used = f"{restarts} of {config.cluster.max_restarts} restarts used: {used}"
    if cause.rank is None:
        lines = [f"the run failed without a failed rank, {used}"]
    elif status is None:
        lines = [f"rank {cause.rank} of {workers} failed, {used}"]
    else:
        lines = [
            f"rank {cause.rank} of {workers} failed on {status.host} (process {status.pid}), {used}",
            f"  It was {_position(status)}.",
            *_stack_lines(run, status),
            *_log_lines(log_of(status)),
        ]
    for rank, other in sorted(statuses.items())[:MAX_RANKS]:
        if rank != cause.rank:
            lines.append(f"  rank {rank} on {other.host}: {_position(other)}")
    return "\n".join([*lines, f"{_saved(config)} Continue with: {resume_command(config)}"])


def last_lines(log: str) -> list[str]:
    """The last lines of a rank's log, without Ray's own marks. Raises OSError on another host than the
    rank's.
    """
    lines = Path(log).read_text(errors="replace").splitlines()
    return [line for line in lines if line.strip() and line[0] != ":"][-MAX_LINES:]


def _stack_lines(run: Path, status: RankStatus) -> list[str]:
    stack = heartbeat.read_stack(run, status)
    if not stack:
        return []
    heading = "  Its stack, innermost call first (all stacks: workers/rank-*.stack):"
    return [heading, *(f"    {frame}" for frame in stack[:MAX_LINES])]


def _log_lines(log: list[str]) -> list[str]:
    if not log:
        return []
    return ["  Last log lines:", *(f"    {line[:300]}" for line in log[-MAX_LINES:])]


def _position(status: RankStatus) -> str:
    if not status.step:
        return f"at {status.phase}, before its first step"
    rows = f", rows {status.rows[0]} to {status.rows[1]}" if status.rows else ""
    micro = f", its micro-batch {status.micro}" if status.micro is not None else ""
    return f"at {status.phase}{micro}, in step {status.step}{rows}"


def _waits_for_peer(stack: list[str]) -> bool:
    """Whether a rank hangs because it waits for another."""
    return bool(stack) and "torch/distributed" in stack[0]


def _saved(config: AnyRecipe) -> str:
    try:
        folders = valid_folders(checkpoint_root(Path(config.run), config.checkpoints.storage))
    except UserError as error:
        return f"The checkpoints cannot be read: {error}."
    return f"Saved: {folders[-1]}." if folders else "No checkpoint was saved yet."
