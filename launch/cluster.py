"""The only home of Ray: places a run's ranks on one machine or many, starts them again when one dies, and else says what happened.

In: a recipe and a plain `train(recipe, place)`. Out: a finished (or, when asked, stopped) run, or Refused with the verdict. Each attempt is
one TorchTrainer of fixed size without retries of its own; this driver chooses the next attempt, and training continues by itself from the
newest verified checkpoint on disk.
"""

import itertools
import json
import logging
import math
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.config import AnyRecipe
from modeling.config import Refused
from pretrain.engine import Place
from pretrain.metrics import append_line

# Read by Ray when it is imported. Its own defaults: a health check every 2 s, a changed working directory, prints through its logger.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ |= {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # no line of Ray's own between ours: this driver tells of a dead worker in one sentence
}
import ray
import ray.train
import ray.train.torch
from ray.train.backend import Backend
from ray.train.torch.config import _TorchBackend

Train = Callable[[Any, Place], None]


def join(address: str | None = None, cpus: float = 0) -> None:
    """Join the cluster at `address` (HOST:PORT), or start one of at least `cpus` on this machine's loopback (5 s; ports that are free)."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    try:
        if address is not None:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=5).close()  # Ray itself would try for minutes
            ray.init(address=address, ignore_reinit_error=True, **quiet)
        elif not ray.is_initialized():
            ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # Ray's own switch for "loopback only", which Linux has on
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            num_cpus = max(os.cpu_count() or 1, math.ceil(cpus))
            ray.init("local", num_cpus=num_cpus, include_dashboard=False, object_store_memory=100 * 2**20, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        where = f"no Ray cluster answers at {address} (HOST:PORT)" if address else "Ray could not start on this machine"
        raise Refused(f"{where}: {_why(error)}.") from error


def connect(recipe: AnyRecipe, address: str | None = None) -> None:
    """Join a cluster, or start one, that has room for the recipe's workers."""
    cluster = recipe.cluster
    wanted = {"CPU": cluster.workers * cluster.cpus_per_worker, "GPU": cluster.workers * cluster.gpus_per_worker}
    join(address, wanted["CPU"])
    there = ray.cluster_resources()
    if missing := [f"{amount:g} {name}s ({there.get(name, 0):g} there)" for name, amount in wanted.items() if amount > there.get(name, 0)]:
        raise Refused(f"{cluster.workers} workers need {' and '.join(missing)}. Lower cluster.workers or what each worker asks for.")


def run(recipe: AnyRecipe, train: Train, address: str | None = None, asked: Callable[[], bool] = lambda: False) -> None:
    """Train on `recipe.cluster.workers` ranks until done, through up to `max_restarts` failures. After `asked()` none is restarted."""
    connect(recipe, address)
    folder = Path(recipe.run).resolve()
    for attempt in itertools.count():
        with tempfile.TemporaryDirectory(prefix="trifold-") as here:
            failure = _attempt(recipe, train, attempt, None if address else f"file://{here}/meet")
        if failure is None:
            return
        if isinstance(failure[1], Refused):
            raise failure[1]
        rank, said = failure[0], _said(folder, *failure)
        append_line(folder / "events.jsonl", {"time": round(time.time(), 3), "event": "failed", "rank": rank, "error": said})
        if asked() or attempt == recipe.cluster.max_restarts:
            raise Refused(_verdict(recipe, rank, said, attempt)) from failure[1]
        append_line(folder / "events.jsonl", {"time": round(time.time(), 3), "event": "restarting", "attempt": attempt + 1})


class _MeetByFile(ray.train.torch.TorchConfig):
    """Ranks of one machine, which meet through a file: torch's own meeting point listens on every network this machine is in."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _NoMeeting


class _NoMeeting(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Nothing: the training function makes the process group."""


def _attempt(recipe: AnyRecipe, train: Train, attempt: int, meet: str | None) -> tuple[int | None, BaseException] | None:
    """One fixed-size group of workers, which meet at `meet`, or where Ray says. None when all returned, else who failed first and how."""
    cluster = recipe.cluster
    torch_config = _MeetByFile if meet else ray.train.torch.TorchConfig
    trainer = ray.train.torch.TorchTrainer(
        _on_worker,
        train_loop_config={"recipe": recipe, "train": train, "here": os.getcwd(), "meet": meet},
        torch_config=torch_config(backend="nccl" if cluster.gpus_per_worker else "gloo", timeout_s=600),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}),
        ),
        run_config=ray.train.RunConfig(name=f"attempt-{attempt}", storage_path=str(Path(recipe.run).resolve() / "ray")),
    )
    failures: list[tuple[int | None, BaseException]] = []

    def fit() -> None:
        try:
            trainer.fit()
        except ray.train.WorkerGroupError as error:
            failures.append(_first(error.worker_failures))
        except Exception as error:  # told to the person as the attempt's verdict
            failures.append((None, error))

    # Not in the main thread, where fit would take Ctrl-C for itself and abort without a save.
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    shutil.rmtree(Path(recipe.run) / "ray", ignore_errors=True)  # Ray Train's own bookkeeping, of no use without its checkpoints
    return failures[0] if failures else None


def _on_worker(given: dict[str, Any]) -> None:
    """What Ray calls on every worker: rank facts made plain, then the training function, which knows no Ray."""
    if os.path.isdir(given["here"]):  # else the recipe's paths are absolute
        os.chdir(given["here"])
    recipe, context = given["recipe"], ray.train.get_context()
    rank, beside = context.get_world_rank(), context.get_local_world_size()
    file = Path(recipe.run) / "workers" / f"rank-{rank:05d}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        json.dumps({"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "log": os.path.realpath("/proc/self/fd/2")})
    )
    given["train"](
        recipe,
        Place(
            rank=rank,
            world=context.get_world_size(),
            local_rank=context.get_local_rank(),
            device="cuda" if recipe.cluster.gpus_per_worker else "cpu",
            init_method=given["meet"],  # None: Ray Train has made the process group
            threads=recipe.cluster.threads_per_worker or max(1, (os.cpu_count() or 1) // beside),
        ),
    )


def _first(failures: dict[int, Exception]) -> tuple[int, BaseException]:
    """The failure that caused the others: a refusal, else a dead process, else whatever is not a lost connection."""

    def order(item: tuple[int, BaseException]) -> tuple[bool, bool, bool, int]:
        rank, error = item
        lost = "onnection" in str(error)  # gloo and NCCL name the peer's lost connection
        return not isinstance(error, Refused), not _died(error), lost, rank

    return min(failures.items(), key=order)


def _died(error: BaseException) -> bool:
    return type(error).__name__ == "WorkerHealthCheckFailedError" or isinstance(error, ray.exceptions.RayActorError)


def _said(folder: Path, rank: int | None, error: BaseException) -> str:
    """One line: how a rank ended, and the last line it wrote where its log can be read from here."""
    if rank is None or not _died(error):
        return f"{type(error).__name__}: {_first_line(error)}"
    try:
        facts = json.loads((folder / "workers" / f"rank-{rank:05d}.json").read_text())
        lines = [line for line in Path(facts["log"]).read_text(errors="replace").splitlines() if line.strip(" ") and line[0] != ":"]
    except (OSError, ValueError):
        return "its process ended without a word"
    return f"its process {facts['pid']} on {facts['host']} was killed or crashed" + (f"; it said last: {lines[-1][:300]}" if lines else "")


def _verdict(recipe: AnyRecipe, rank: int | None, said: str, attempt: int) -> str:
    who = "the workers could not be placed" if rank is None else f"rank {rank} of {recipe.cluster.workers} failed"
    return (
        f"{who}, {attempt} restarts of {recipe.cluster.max_restarts} were used: {said}.\n{_saved(recipe)}"
        f" Continue with: trifold {recipe.command} {recipe.run}/config.yaml"
    )


def _saved(recipe: AnyRecipe) -> str:
    committed = sorted(file.parent.name for file in Path(recipe.run).glob("checkpoints/*/commit.json"))
    return f"Saved: {recipe.run}/checkpoints/{committed[-1]}." if committed else "No checkpoint was saved yet."


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _why(error: BaseException) -> str:
    """What Ray means where it says it in several lines, or not at all."""
    text = str(error)
    if text.startswith("Version mismatch"):
        there, here = (" and Python ".join(found) for found in re.findall(r"Ray: (\S+)\s+Python: (\S+)", text))
        return f"it runs Ray {there}, and here are Ray {here}: install the same releases on both sides"
    if text.startswith("Failed to connect to Ray cluster"):  # though the port was open
        return "what listens there is no Ray head, or does not accept this token (~/.ray/auth_token, or the file in RAY_AUTH_TOKEN_PATH)"
    return _first_line(error)
