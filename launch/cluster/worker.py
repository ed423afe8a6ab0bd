"""One worker of an attempt: from a process that Ray started on some host to a rank that trains.

In: what `attempt` ships. Out: what the training function leaves in the run folder. Ray's controller imports
this file, and so does a worker before it says that it stands: torch and DeepSpeed, 6 s of CPU, come after
that.
"""

import os
import socket
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig

from trifold.modeling.errors import UserError
from trifold.pretrain.monitor.heartbeat import Heartbeat
from trifold.pretrain.monitor.stop_request import StopRequest

if TYPE_CHECKING:
    from trifold.launch.recipe.schema import AnyRecipe
    from trifold.pretrain.distributed import RankInfo

PEER_FAILURE_DELAY = (
    10.0  # seconds for which a rank that lost a peer keeps it to itself, so that Ray says first who died
)
_listener: socket.socket | None = None
_point: tuple[str, int] | None = None


@dataclass
class RendezvousConfig(BackendConfig):
    """Where ranks meet: through a file of this machine, or without one at a free port of the address by which
    the cluster knows rank 0's host. torch's own meeting point listens on every network that the machine is
    in.
    """

    file: str | None

    @property
    def backend_cls(self) -> type[Backend]:
        return _Meeting


class _Meeting(Backend):
    """The process group ends with the processes: a goodbye to a dead peer would take 30 s."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Let each worker's main thread hear SIGTERM (its host is to go away: the run is saved first), and
        say where they meet.
        """
        worker_group.execute(StopRequest.hear)
        if backend_config.file is None:
            worker_group.execute(_meet_at, worker_group.execute_single(0, _listen))


def work(here: str, run: str, patience: float, file: str | None, shipped: bytes) -> None:
    """What Ray calls on every worker: rank facts made plain, then the training function, which knows no Ray.

    `shipped`: a recipe and a training function, pickled.
    """
    if os.path.isdir(here):  # else the recipe's paths are absolute
        os.chdir(here)
    rank, log = ray.train.get_context().get_world_rank(), os.path.realpath("/proc/self/fd/2")
    node = ray.get_runtime_context().get_node_id()
    heartbeat = Heartbeat(Path(run), rank, socket.gethostname(), node, log, patience)
    try:
        config, train = ray.cloudpickle.loads(shipped)
        train(config, _rank_info(config, file, heartbeat))
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()  # the verdict shows the last lines of its log
        if is_peer_failure(error):
            time.sleep(PEER_FAILURE_DELAY)
        raise


def is_peer_failure(error: BaseException) -> bool:
    """Whether a peer's end is what ended this rank."""
    return "onnection" in str(error)  # gloo and NCCL name the peer's lost connection


def _rank_info(config: "AnyRecipe", file: str | None, heartbeat: Heartbeat) -> "RankInfo":
    from trifold.pretrain.distributed import RankInfo

    context, gpus = ray.train.get_context(), config.cluster.gpus_per_worker > 0
    if file is None:
        _join(context.get_world_rank(), context.get_world_size(), "nccl" if gpus else "gloo")
    return RankInfo(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        local_rank=context.get_local_rank(),
        device="cuda" if gpus else "cpu",
        init_method=file,  # the training function makes the process group
        threads=config.cluster.threads(context.get_local_world_size()),
        reporter=heartbeat,
    )


def _listen() -> tuple[str, int]:
    """On rank 0's host."""
    global _listener
    _listener = socket.create_server((ray.util.get_node_ip_address(), 0), backlog=4096)
    host, port = _listener.getsockname()
    return host, port


def _meet_at(point: tuple[str, int]) -> None:
    global _point
    _point = point


def _join(rank: int, world: int, backend: str) -> None:
    """Make the process group of ranks on several hosts."""
    import torch.distributed as dist

    assert _point is not None
    timeout = timedelta(minutes=10)
    listening = _listener.detach() if _listener is not None else None
    store = dist.TCPStore(*_point, world, rank == 0, timeout, master_listen_fd=listening)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
