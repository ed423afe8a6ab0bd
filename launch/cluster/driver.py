"""A run on a cluster, or on this machine: attempts of a size that fits, one after another, until the run is
finished or cannot continue.

    wait for workers -> attempt -> finished, or stopped on request: return
         ^                 |
         |                 +-> stopped to change its size: regroup
         |                 +-> UserError of a rank, or superseded by another driver: raise it
         +-----------------+-> failed: report; raise it after `max_restarts` failures without a save

A resolved recipe and a plain `train(config, rank_info)` come in. Each attempt resumes from the newest
verified checkpoint. events.jsonl records failed, restarting, placed, stepping, waiting, resizing, regrouping,
hanging.
"""

import itertools
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trifold.launch.cluster import capacity
from trifold.launch.cluster.attempt import Failure, Train, attempt
from trifold.launch.cluster.capacity import Reclaimable
from trifold.launch.cluster.connection import first_line, join
from trifold.launch.cluster.failure_report import Cause, Watchdog, last_lines, render
from trifold.launch.cluster.scoring_actor import BackgroundScorer
from trifold.launch.cluster.timing import Timing
from trifold.launch.recipe.schema import AnyRecipe
from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.saving import PERMANENT_ERRORS
from trifold.pretrain.monitor import heartbeat
from trifold.pretrain.monitor.heartbeat import RankStatus
from trifold.pretrain.monitor.run_folder import events_backwards, last_outcome, log_event


def run(
    config: AnyRecipe,
    train: Train,
    address: str | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    background: BackgroundScorer | None = None,
    check_claim: Callable[[], None] = lambda: None,
    timing: Timing = Timing(),  # noqa: B008 (frozen)
) -> None:
    """Train on as many of `cluster.workers` ranks as fit, at least `min_workers`, until the run is finished.

    Up to `max_restarts` failures in a row are survived; a checkpoint between two of them resets the count.
    When hosts arrive, the group saves and ends, and a larger one resumes. After `stop_requested()` no attempt
    is started. `background` scores checkpoints with the resources that a group leaves. `check_claim()` raises
    UserError once another driver has taken the run over: then nothing is restarted. Raises UserError with the
    failure report when the run cannot continue.
    """
    scorer_cpus = background.config.scoring.cpus if background else 0
    join(address, config.cluster.workers * config.cluster.cpus_per_worker + scorer_cpus)
    _Driver(config, train, address is None, stop_requested, background, check_claim, timing).run()


class _Driver:
    """The state of `run` over its attempts."""

    def __init__(
        self,
        config: AnyRecipe,
        train: Train,
        on_this_machine: bool,
        stop_requested: Callable[[], bool],
        background: BackgroundScorer | None,
        check_claim: Callable[[], None],
        timing: Timing,
    ) -> None:
        self.config, self.train, self.folder = config, train, Path(config.run)
        self.on_this_machine = on_this_machine
        self.stop_requested = stop_requested
        self.background = background
        self.check_claim = check_claim
        self.timing = timing
        self.restarts = 0  # since the last checkpoint
        self.saves = _num_saves(self.folder)

    def run(self) -> None:
        workers = self._wait_for_workers(self.config.cluster.wait_at_start)
        for number in itertools.count():
            failure, hung = self._attempt(workers, number)
            if failure is None and (self.stop_requested() or last_outcome(self.folder) != "stopped"):
                return
            if self.background is not None:
                self.background.stop()

            if failure is None:
                workers = self._wait_for_workers(self.config.cluster.wait_after_loss)
                log_event(self.folder, "regrouping", workers=workers)
            else:
                workers = self._restart(failure, hung, workers)

    def _attempt(self, workers: int, number: int) -> tuple[Failure | None, Cause | None]:
        """One attempt: its failure, and the rank that hung."""
        monitor = _Monitor(self.config, workers, self.background, self.timing)
        with tempfile.TemporaryDirectory(prefix="trifold-") as folder:
            rendezvous = f"file://{folder}/meet" if self.on_this_machine else None
            failure = attempt(self.config, self.train, workers, number, rendezvous, monitor.poll, self.timing)
        monitor.regroup.unlink(missing_ok=True)
        return failure, monitor.hung

    def _restart(self, failure: Failure, hung: Cause | None, workers: int) -> int:
        """Report a failure and return the size of the next group. Raises UserError where there is none."""
        if isinstance(failure.error, UserError):  # also Superseded: the run belongs to another driver now
            raise failure.error
        if (saves := _num_saves(self.folder)) > self.saves:
            self.restarts, self.saves = 0, saves

        cause = hung or Cause(failure.rank, _reason(self.config, failure, self.timing))
        log_event(self.folder, "failed", rank=cause.rank, error=cause.reason, workers=workers)
        report = render(self.config, workers, cause, self.restarts, self._log_of)
        with (self.folder / "failures.log").open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {report}\n\n")

        permanent = isinstance(failure.error, OSError) and failure.error.errno in PERMANENT_ERRORS
        if self.stop_requested() or self.restarts == self.config.cluster.max_restarts or permanent:
            raise UserError(report) from failure.error
        self.restarts += 1
        try:
            workers = self._wait_for_workers(self.config.cluster.wait_after_loss)
        except UserError as error:
            raise UserError(f"{error}\n{report}") from None
        log_event(self.folder, "restarting", attempt=self.restarts, workers=workers)
        return workers

    def _wait_for_workers(self, seconds: float) -> int:
        """The size of the next group. Raises UserError where there is none, or the run is another driver's
        now.
        """
        self.check_claim()

        def on_wait(**fields: Any) -> None:
            log_event(self.folder, "waiting", **fields)

        group_size = self.config.engine.sequence_parallel
        return capacity.wait_for_workers(
            self.config.cluster, group_size, seconds, on_wait, self.stop_requested, self.timing
        )

    def _log_of(self, status: RankStatus) -> list[str]:
        """The last lines of a rank's log, from its host; none where that is gone."""
        with suppress(OSError):
            return last_lines(status.log)
        if _is_available(status.node, self.timing):
            with suppress(OSError, ray.exceptions.RayError):
                return list(_call_on_host(status, last_lines, status.log))
        return []


class _Monitor:
    """The driver while a group runs: records its placement, takes in hosts, ends it if it hangs."""

    def __init__(
        self, config: AnyRecipe, workers: int, background: BackgroundScorer | None, timing: Timing
    ) -> None:
        self.config, self.workers, self.folder = config, workers, Path(config.run)
        self.background, self.timing = background, timing
        self.regroup = self.folder / "regroup"  # asks the group to save and end (pretrain/train.py)
        self.hung: Cause | None = None
        self._placed, self._next = False, 0.0
        self._resize = capacity.ResizePolicy(config.cluster, config.engine.sequence_parallel, workers, timing)
        self._watchdog = Watchdog(config, timing)

    def poll(self) -> None:
        statuses = heartbeat.read(self.folder)
        if not self._placed and len(statuses) == self.workers:
            self._placed = True
            log_event(self.folder, "placed", workers=self.workers)
        if time.monotonic() < self._next:
            return

        self._next = time.monotonic() + self.timing.monitor
        if self._placed:
            self._consider_resizing(statuses)
        if (status := self._watchdog.hanging_rank()) is not None:
            self._end_hanging(status)

    def _consider_resizing(self, statuses: dict[int, RankStatus]) -> None:
        reclaimable: Reclaimable = {}
        if self.background is not None:
            self.background.poll()
            reclaimable = self.background.reclaimable()
        if self.regroup.exists():
            return
        running = Counter(status.node for status in statuses.values())
        if (size := self._resize.new_size(running, reclaimable)) is not None:
            log_event(self.folder, "resizing", workers=self.workers, fit=size)
            self.regroup.touch()

    def _end_hanging(self, status: RankStatus) -> None:
        timeout = self.config.cluster.step_timeout
        self.hung = Cause(
            status.rank, f"no rank made progress for {timeout:g} s; this one is furthest behind"
        )
        log_event(
            self.folder,
            "hanging",
            rank=status.rank,
            host=status.host,
            step=status.step,
            phase=status.phase,
        )
        # where its host does not answer, Ray ends the attempt, or the next poll does
        with suppress(ray.exceptions.RayError):
            _call_on_host(status, lambda pid: os.kill(pid, signal.SIGKILL), status.pid)


def _reason(config: AnyRecipe, failure: Failure, timing: Timing) -> str:
    """Why a rank ended, or why Ray did, in one line."""
    if not failure.died:
        return f"{type(failure.error).__name__}: {first_line(failure.error)}"
    status = heartbeat.read(Path(config.run)).get(failure.rank) if failure.rank is not None else None
    if status is not None and not _is_available(status.node, timing):
        return f"its host {status.host} is dead or cut off"
    if "low on memory" in str(failure.error):
        return "its process was ended by Ray because its host ran out of memory"
    return "its process was killed (by hand, or by the kernel for lack of memory) or crashed"


def _is_available(node: str, timing: Timing) -> bool:
    return node in [host["NodeID"] for host in capacity.hosts(timing)]


def _call_on_host(status: RankStatus, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on the host of a rank. Raises RayError where it does not answer within seconds."""
    strategy = NodeAffinitySchedulingStrategy(status.node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=strategy)
    return ray.get(task.remote(*arguments), timeout=10)


def _num_saves(folder: Path) -> int:
    """How many checkpoints the run has committed so far."""
    return sum(1 for _ in events_backwards(folder, "save_committed"))
