"""One attempt at a run: a fixed-size group of Ray workers, from its placing to its end, without retries of its own.

In: a recipe, a plain `train(recipe, place)`, a number of workers. Out: nothing when all returned, else which rank failed and how.
"""

import os
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train.backend import Backend
from ray.train.torch.config import _TorchBackend

from launch.capacity import needs
from launch.config import AnyRecipe
from modeling.config import Refused
from pretrain import heartbeat
from pretrain.engine import Place
from pretrain.train import StopRequest

Train = Callable[[Any, Place], None]
LOST = 10.0  # seconds for which a rank that lost a peer keeps it to itself, so that Ray says first who died


@dataclass(frozen=True)
class Failure:
    """What ended an attempt."""

    rank: int | None  # None: nobody, the workers could not be placed
    error: BaseException
    died: bool  # its process ended without an exception of its own


def attempt(recipe: AnyRecipe, train: Train, workers: int, number: int, meet: str | None, look: Callable[[], None]) -> Failure | None:
    """Train on a group of `workers`, which meet through the file `meet`, or where Ray says; `look()` is called twice a second meanwhile."""
    cluster = recipe.cluster
    shutil.rmtree(Path(recipe.run) / "workers", ignore_errors=True)  # of the attempt before
    trainer = ray.train.torch.TorchTrainer(
        _on_worker,
        train_loop_config={"recipe": recipe, "train": train, "here": os.getcwd(), "meet": meet},
        torch_config=(_MeetByFile if meet else _Meet)(backend="nccl" if cluster.gpus_per_worker else "gloo", timeout_s=600),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=cluster.gpus_per_worker > 0, resources_per_worker=needs(cluster)
        ),
        run_config=ray.train.RunConfig(name=f"attempt-{number}", storage_path=str(Path(recipe.run).resolve() / "ray")),
    )
    failures: list[Failure] = []

    def fit() -> None:
        try:
            trainer.fit()
        except ray.train.WorkerGroupError as error:
            failures.append(_first(error.worker_failures))
        except Exception as error:  # told to the person as the attempt's verdict
            failures.append(Failure(None, error, died=False))

    # Not in the main thread, where fit would take Ctrl-C for itself and abort without a save.
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    thread.join(0.5)
    while thread.is_alive():
        look()
        thread.join(0.5)
    shutil.rmtree(Path(recipe.run) / "ray", ignore_errors=True)  # Ray Train's own bookkeeping, of no use without its checkpoints
    return failures[0] if failures else None


class _Meet(ray.train.torch.TorchConfig):
    """Ranks of several machines, which meet where rank 0's host has a free port."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Meeting


class _MeetByFile(ray.train.torch.TorchConfig):
    """Ranks of one machine, which meet through a file: torch's own meeting point listens on every network this machine is in."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _NoMeeting


class _Meeting(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Make the process group, and let each worker's main thread hear SIGTERM: its host is to go away, and the run is saved first."""
        worker_group.execute(StopRequest.hear)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Nothing: the processes end, and a goodbye to a dead peer would take 30 s."""


class _NoMeeting(_Meeting):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """The same without the process group: the training function makes it."""
        worker_group.execute(StopRequest.hear)


def _on_worker(given: dict[str, Any]) -> None:
    """What Ray calls on every worker: rank facts made plain, then the training function, which knows no Ray."""
    if os.path.isdir(given["here"]):  # else the recipe's paths are absolute
        os.chdir(given["here"])
    recipe, context = given["recipe"], ray.train.get_context()
    rank, beside = context.get_world_rank(), context.get_local_world_size()
    log = os.path.realpath("/proc/self/fd/2")
    heartbeat.begin(Path(recipe.run), rank, socket.gethostname(), ray.get_runtime_context().get_node_id(), log, recipe.cluster.step_timeout)
    place = Place(
        rank=rank,
        world=context.get_world_size(),
        local_rank=context.get_local_rank(),
        device="cuda" if recipe.cluster.gpus_per_worker else "cpu",
        init_method=given["meet"],  # None: Ray Train has made the process group
        threads=recipe.cluster.threads_per_worker or max(1, (os.cpu_count() or 1) // beside),
    )
    try:
        given["train"](recipe, place)
    except Exception as error:
        if not isinstance(error, Refused):
            traceback.print_exc()  # the verdict shows the last lines of its log
        if _lost(error):
            time.sleep(LOST)
        raise


def _first(failures: dict[int, Exception]) -> Failure:
    """The failure that caused the others: a refusal, else a dead process, else whatever is not a lost connection."""

    def order(item: tuple[int, BaseException]) -> tuple[bool, bool, bool, int]:
        rank, error = item
        return not isinstance(error, Refused), not _died(error), _lost(error), rank

    rank, error = min(failures.items(), key=order)
    return Failure(rank, error, _died(error))


def _died(error: BaseException) -> bool:
    return type(error).__name__.startswith("WorkerHealthCheck") or isinstance(error, ray.exceptions.RayActorError)


def _lost(error: BaseException) -> bool:
    return "onnection" in str(error)  # gloo and NCCL name the peer's lost connection
