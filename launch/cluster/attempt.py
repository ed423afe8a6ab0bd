"""One attempt at a run: a group of Ray workers of fixed size, from its placement to its end, without retries.

A resolved recipe, a plain `train(config, rank_info)` and a number of workers come in. Out comes None when all
workers returned, otherwise which rank failed and how.
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
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from trifold.launch.cluster.capacity import resources_per_worker
from trifold.launch.cluster.timing import Timing
from trifold.launch.cluster.worker import PeerLost, RendezvousConfig, work
from trifold.launch.recipe.schema import AnyRecipe
from trifold.modeling.errors import UserError
from trifold.pretrain.distributed import RankInfo

Train = Callable[[Any, RankInfo], None]
POLL = 0.5  # seconds between two calls of `monitor`


@dataclass(frozen=True)
class Failure:
    """What ended an attempt."""

    rank: int | None  # None: no rank failed, the workers could not be placed or Ray itself failed
    error: BaseException
    died: bool  # the rank's process ended without an exception


def attempt(
    config: AnyRecipe,
    train: Train,
    workers: int,
    number: int,
    rendezvous: str | None,
    monitor: Callable[[], None],
    timing: Timing,
) -> Failure | None:
    """Train on a group of `workers`, which meet through the file `rendezvous`, or at an address.

    `monitor()` is called twice a second meanwhile.
    """
    run, cluster = Path(config.run), config.cluster
    shutil.rmtree(run / "workers", ignore_errors=True)  # heartbeats of the previous attempt
    shipped = ray.cloudpickle.dumps((config, train))
    trainer = _Trainer(
        partial(
            work, os.getcwd(), config.run, cluster.step_timeout, timing.peer_failure, rendezvous, shipped
        ),
        backend_config=RendezvousConfig(rendezvous),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=resources_per_worker(cluster),
        ),
        run_config=ray.train.RunConfig(name=f"attempt-{number}", storage_path=str(run.resolve() / "ray")),
    )
    failures: list[Failure] = []

    def fit() -> None:
        try:
            trainer.fit()
        except ray.train.WorkerGroupError as error:
            failures.append(_root_cause(error.worker_failures))
        except Exception as error:  # becomes the attempt's failure report
            failures.append(Failure(None, error, died=False))

    # not in the main thread, where fit would take Ctrl-C for itself and abort without a save
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    thread.join(POLL)
    while thread.is_alive():
        monitor()
        thread.join(POLL)

    # Ray Train's own bookkeeping, which is useless without its checkpoints
    shutil.rmtree(run / "ray", ignore_errors=True)
    if failures:
        _remove_placement_groups()
    return failures[0] if failures else None


class _Trainer(DataParallelTrainer):
    """TorchTrainer would add a process group, made before the workers' heartbeats begin: one that hangs would
    leave no stacks.
    """

    # private: saves a process on this host, and the workers do not import Ray Data
    def _create_default_callbacks(self) -> list[Any]:
        """Without the actor that keeps Ray's datasets, which nobody reads here."""
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, DatasetsCallback)]


def _root_cause(failures: dict[int, Exception]) -> Failure:
    """The failure that caused the others: a UserError, else a dead process, else any but a lost peer."""

    def order(item: tuple[int, BaseException]) -> tuple[bool, bool, bool, int]:
        rank, error = item
        return not isinstance(error, UserError), not _process_died(error), isinstance(error, PeerLost), rank

    rank, error = min(failures.items(), key=order)
    return Failure(rank, error, _process_died(error))


def _process_died(error: BaseException) -> bool:
    health_check = type(error).__name__.startswith("WorkerHealthCheck")
    return health_check or isinstance(error, ray.exceptions.RayActorError)


def _remove_placement_groups() -> None:
    """Free what this driver's attempt reserved: a killed controller leaves its placement group behind, and
    its workers would hold their CPUs until the driver ends.
    """
    job = ray.get_runtime_context().get_job_id()
    # private: the public table does not name the job
    accessor = ray._private.state.state._connect_and_get_accessor()
    for data in accessor.get_placement_group_table():
        group = PlacementGroupTableData.FromString(data)
        if group.creator_job_id.hex() == job and group.state != PlacementGroupTableData.REMOVED:
            identifier = ray.PlacementGroupID(group.placement_group_id)
            ray.util.remove_placement_group(ray.util.placement_group.PlacementGroup(identifier))
