"""A run on a cluster, or on this machine's own: attempts of a size that fits, one after another, until the
run is done or cannot go on.

In: a recipe and a plain `train(recipe, place)`. Out: a finished (or, when asked, stopped) run, or UserError
with the verdict. Training continues by itself from the newest verified checkpoint on disk. events.jsonl tells
what came when: failed, restarting, placed, stepping; waiting, resizing, regrouping, hanging.
"""

import itertools
import logging
import math
import os
import re
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trifold.launch.cluster import capacity
from trifold.launch.cluster.attempt import Failure, Train, attempt
from trifold.launch.cluster.failure_report import Cause, Watchdog, last_lines, render
from trifold.launch.cluster.scoring_actor import BackgroundScorer
from trifold.launch.recipe.schema import AnyRecipe
from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.saving import PERMANENT_ERRORS
from trifold.pretrain.monitor import heartbeat
from trifold.pretrain.monitor.heartbeat import RankStatus
from trifold.pretrain.monitor.run_folder import events_backwards, last_outcome, log_event

EVERY = 2.0  # seconds between looks at all ranks and hosts


def join(address: str | None = None, cpus: float = 0) -> None:
    """Join the cluster at `address` (HOST:PORT), or start one of at least `cpus` on this machine's loopback
    (5 s; ports that are free).
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    heard = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": False,
    }
    try:
        if address is not None:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            _probe_head(host, int(port))
            ray.init(address=address, ignore_reinit_error=True, **quiet)
        elif not ray.is_initialized():
            ray._private.ray_constants.ENABLE_RAY_CLUSTER = (
                False  # Ray's own switch for "loopback only", which Linux has on
            )
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            num_cpus = max(os.cpu_count() or 1, math.ceil(cpus))
            ray.init(
                "local", num_cpus=num_cpus, include_dashboard=False, object_store_memory=100 * 2**20, **quiet
            )
    except Exception as error:  # Ray raises whatever it likes, the plain class too
        where = (
            f"no Ray cluster answers at {address} (HOST:PORT)"
            if address
            else "Ray could not start on this machine"
        )
        raise UserError(f"{where}: {_why(error)}.") from error
    if callable(heard):  # Ray has taken it, and would exit without a save
        signal.signal(signal.SIGTERM, heard)


def _probe_head(host: str, port: int) -> None:
    """Whether a head is there that takes our token, of which Ray itself would make sure for 20 s to
    minutes.
    """
    with socket.create_connection((host, port), timeout=5) as there, suppress(TimeoutError):
        there.settimeout(1)
        there.sendall(b"GET / HTTP/1.0\r\n\r\n")
        if there.recv(5) == b"HTTP/":
            raise ValueError(
                "that is a web server, such as the one for jobs (trifold submit); a head listens at port"
                " 6379 unless told"
            )
    with _silence():
        ray._raylet.GcsClient(address=f"{host}:{port}")


@contextmanager
def _silence() -> Iterator[None]:
    """While inside, nothing reaches stderr, where Ray's own C++ writes warnings under any setting."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def run(
    config: AnyRecipe,
    train: Train,
    address: str | None = None,
    asked: Callable[[], bool] = lambda: False,
    beside: BackgroundScorer | None = None,
) -> None:
    """Train on as many of `cluster.workers` ranks as fit, at least `min_workers`, until done, through up to
    `max_restarts` failures in a row: a checkpoint between two of them begins the count anew.

    Hosts that come are taken in: the group saves and ends, and a larger one goes on. After `asked()` no other
    is started. `beside` scores checkpoints in the room that a group leaves.
    """
    join(
        address,
        config.cluster.workers * config.cluster.cpus_per_worker
        + (beside.config.scoring.cpus if beside else 0),
    )
    folder, cluster, sharing, restarts = Path(config.run), config.cluster, config.engine.sequence_parallel, 0
    saves = _saves(folder)
    workers = capacity.wait_for_workers(
        cluster, sharing, cluster.wait_at_start, partial(log_event, folder, "waiting"), asked
    )
    for number in itertools.count():
        watch = _Monitor(config, workers, beside)
        with tempfile.TemporaryDirectory(prefix="trifold-") as here:
            failure = attempt(
                config, train, workers, number, None if address else f"file://{here}/meet", watch.look
            )
        watch.regroup.unlink(missing_ok=True)
        if failure is None and (asked() or last_outcome(folder) != "stopped"):
            return
        if beside is not None:
            beside.stop()
        if failure is None:
            workers = capacity.wait_for_workers(
                cluster, sharing, cluster.wait_after_loss, partial(log_event, folder, "waiting"), asked
            )
            log_event(folder, "regrouping", workers=workers)
            continue
        if isinstance(failure.error, UserError):
            raise failure.error
        if (now := _saves(folder)) > saves:
            restarts, saves = 0, now
        end = watch.hung or Cause(failure.rank, _end(config, failure))
        log_event(folder, "failed", rank=end.rank, error=end.why, workers=workers)
        verdict = render(config, workers, end, restarts, _tail)
        with (folder / "failures.log").open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {verdict}\n\n")
        if (
            asked()
            or restarts == cluster.max_restarts
            or (isinstance(failure.error, OSError) and failure.error.errno in PERMANENT_ERRORS)
        ):
            raise UserError(verdict) from failure.error
        restarts += 1
        try:
            workers = capacity.wait_for_workers(
                cluster, sharing, cluster.wait_after_loss, partial(log_event, folder, "waiting"), asked
            )
        except UserError as refusal:
            raise UserError(f"{refusal}\n{verdict}") from None
        log_event(folder, "restarting", attempt=restarts, workers=workers)


class _Monitor:
    """What the driver does while a group runs: say that it was placed, take in hosts, end it when it
    hangs.
    """

    def __init__(self, config: AnyRecipe, workers: int, beside: BackgroundScorer | None) -> None:
        self.config, self.workers, self.folder, self.beside = config, workers, Path(config.run), beside
        self.regroup = self.folder / "regroup"  # asks the group to save and end (pretrain/train.py)
        self.hung: Cause | None = None
        self._placed, self._next = False, 0.0
        self._growth, self._watchdog = (
            capacity.ResizePolicy(config.cluster, config.engine.sequence_parallel, workers),
            Watchdog(config),
        )

    def look(self) -> None:
        beats = heartbeat.read(self.folder)
        if not self._placed and len(beats) == self.workers:
            self._placed = True
            log_event(self.folder, "placed", workers=self.workers)
        if (now := time.monotonic()) < self._next:
            return
        self._next = now + EVERY
        mine, lent = Counter(beat.node for beat in beats.values()), {}
        if self._placed and self.beside is not None:
            self.beside.poll()
            lent = self.beside.reclaimable()
        if (
            self._placed
            and not self.regroup.exists()
            and (fit := self._growth.wanted(mine, lent)) is not None
        ):
            log_event(self.folder, "resizing", workers=self.workers, fit=fit)
            self.regroup.touch()
        if (beat := self._watchdog.hanging()) is not None:
            self.hung = Cause(
                beat.rank,
                f"no rank came forward for {self.config.cluster.step_timeout:g} s, and this one is behind",
            )
            log_event(
                self.folder, "hanging", rank=beat.rank, host=beat.host, step=beat.step, phase=beat.phase
            )
            with suppress(
                ray.exceptions.RayError
            ):  # its host does not answer: Ray ends the attempt, or the next look does
                _on_host(beat, lambda pid: os.kill(pid, signal.SIGKILL), beat.pid)


def _end(config: AnyRecipe, failure: Failure) -> str:
    """One line: how a rank, or the placing of all, ended."""
    if not failure.died:
        return f"{type(failure.error).__name__}: {_first_line(failure.error)}"
    beat = heartbeat.read(Path(config.run)).get(failure.rank) if failure.rank is not None else None
    if beat is not None and beat.node not in (host["NodeID"] for host in capacity.hosts()):
        return f"its host {beat.host} is dead or cut off"
    if "low on memory" in str(failure.error):
        return "its process was ended by Ray because its host ran out of memory"
    return "its process was killed (by hand, or by the kernel for want of memory) or crashed"


def _tail(beat: RankStatus) -> list[str]:
    """The last lines of a rank's log, from its host; none where that is gone."""
    with suppress(OSError):
        return last_lines(beat.log)
    if beat.node in (host["NodeID"] for host in capacity.hosts()):
        with suppress(OSError, ray.exceptions.RayError):
            return list(_on_host(beat, last_lines, beat.log))
    return []


def _on_host(beat: RankStatus, function: Callable[..., Any], *given: Any) -> Any:
    """Call a function on the host of a rank. Raises RayError where nobody answers within seconds."""
    there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=there)
    return ray.get(task.remote(*given), timeout=10)


def _saves(folder: Path) -> int:
    """How many checkpoints the run has committed so far."""
    return sum(1 for _ in events_backwards(folder, "save_committed"))


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _why(error: BaseException) -> str:
    """What Ray means where it says it in several lines, or not at all."""
    text = str(error)
    if text.startswith("Version mismatch"):
        there, here = (
            " and Python ".join(found) for found in re.findall(r"Ray: (\S+)\s+Python: (\S+)", text)
        )
        return f"it runs Ray {there}, and here are Ray {here}: install the same releases on both sides"
    if isinstance(error, ray.exceptions.AuthenticationError):
        return "it does not accept this token (~/.ray/auth_token, or the file in RAY_AUTH_TOKEN_PATH)"
    if isinstance(error, ray.exceptions.RpcError):  # though the port was open
        return "what listens there is no Ray head"
    return getattr(error, "strerror", None) or _first_line(error).partition(". ")[0].removesuffix(".")
