"""One attempt at a run: a fixed-size group of Ray workers, from its placing to its end, without retries of
its own.

In: a recipe, a plain `train(recipe, place)`, a number of workers. Out: nothing when all returned, else which
rank failed and how.
"""

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from trifold.launch.cluster.capacity import needs
from trifold.launch.cluster.worker import RendezvousConfig, is_peer_failure, work
from trifold.launch.recipe.schema import AnyRecipe
from trifold.modeling.errors import UserError
from trifold.pretrain.distributed import RankInfo

Train = Callable[[Any, RankInfo], None]


@dataclass(frozen=True)
class Failure:
    """What ended an attempt."""

    rank: int | None  # None: nobody, the workers could not be placed
    error: BaseException
    died: bool  # its process ended without an exception of its own


def attempt(
    config: AnyRecipe, train: Train, workers: int, number: int, meet: str | None, look: Callable[[], None]
) -> Failure | None:
    """Train on a group of `workers`, which meet through the file `meet`, or at an address; `look()` is called
    twice a second meanwhile.
    """
    cluster = config.cluster
    shutil.rmtree(Path(config.run) / "workers", ignore_errors=True)  # of the attempt before
    shipped = ray.cloudpickle.dumps((config, train))
    trainer = _Trainer(
        partial(work, os.getcwd(), config.run, cluster.step_timeout, meet, shipped),
        backend_config=RendezvousConfig(meet),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=cluster.gpus_per_worker > 0, resources_per_worker=needs(cluster)
        ),
        run_config=ray.train.RunConfig(
            name=f"attempt-{number}", storage_path=str(Path(config.run).resolve() / "ray")
        ),
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
    shutil.rmtree(
        Path(config.run) / "ray", ignore_errors=True
    )  # Ray Train's own bookkeeping, of no use without its checkpoints
    return failures[0] if failures else None


class _Trainer(DataParallelTrainer):
    """What TorchTrainer adds is a process group, made before the workers' heartbeats begin: one that hangs
    would have no stacks.
    """

    def _create_default_callbacks(
        self,
    ) -> list[Any]:  # private: one process less on this host, and Ray Data not imported by the workers
        """Without the keeper of Ray's datasets, which nobody reads here."""
        return [
            callback
            for callback in super()._create_default_callbacks()
            if not isinstance(callback, DatasetsCallback)
        ]


def _first(failures: dict[int, Exception]) -> Failure:
    """The failure that caused the others: a refusal, else a dead process, else whatever is not a lost
    connection.
    """

    def order(item: tuple[int, BaseException]) -> tuple[bool, bool, bool, int]:
        rank, error = item
        return not isinstance(error, UserError), not _dead_rank(error), is_peer_failure(error), rank

    rank, error = min(failures.items(), key=order)
    return Failure(rank, error, _dead_rank(error))


def _dead_rank(error: BaseException) -> bool:
    return type(error).__name__.startswith("WorkerHealthCheck") or isinstance(
        error, ray.exceptions.RayActorError
    )
