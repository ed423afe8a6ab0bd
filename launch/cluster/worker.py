"""One worker of an attempt: a process that Ray started on some host becomes a rank that trains.

`attempt` ships a resolved recipe and a training function; the function leaves its results in the run folder.
Ray's controller imports this file, and so does a worker before it reports that it is up: torch and DeepSpeed,
6 s of CPU, are imported after that.
"""

import os
import socket
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig

from trifold.modeling.errors import UserError
from trifold.pretrain.monitor.heartbeat import Heartbeat
from trifold.pretrain.monitor.stop_request import StopRequest

if TYPE_CHECKING:
    from trifold.launch.recipe.schema import AnyRecipe
    from trifold.pretrain.distributed import RankInfo


class PeerLost(RuntimeError):
    """This rank ended because another rank did."""


@dataclass
class RendezvousConfig(BackendConfig):
    """Where ranks meet: through a file of this machine, or, without one, at a free port of the address by
    which the cluster knows rank 0's host. (torch's own rendezvous listens on every network of the machine.)
    """

    file: str | None

    @property
    def backend_cls(self) -> type[Backend]:
        return _RendezvousBackend


class _RendezvousBackend(Backend):
    """Ray's hook before training. The process group ends with the processes: a goodbye to a dead peer would
    take 30 s.
    """

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Install the signal handlers in each worker's main thread, and tell all ranks where they meet."""
        worker_group.execute(StopRequest.hear)
        if backend_config.file is None:
            worker_group.execute(Rendezvous.set_address, worker_group.execute_single(0, Rendezvous.listen))


class Rendezvous:
    """This process's end of the meeting of all ranks. Ray calls it before the training thread starts."""

    listener: ClassVar[socket.socket | None] = None  # of rank 0
    address: ClassVar[tuple[str, int] | None] = None

    @classmethod
    def listen(cls) -> tuple[str, int]:
        """Listen on rank 0's host, on a free port."""
        cls.listener = socket.create_server((ray.util.get_node_ip_address(), 0), backlog=4096)
        host, port = cls.listener.getsockname()
        return host, port

    @classmethod
    def set_address(cls, address: tuple[str, int]) -> None:
        cls.address = address

    @classmethod
    def join(cls, rank: int, world: int, backend: str) -> None:
        """Make the process group of ranks on several hosts."""
        import torch.distributed as dist

        assert cls.address is not None
        timeout = timedelta(minutes=10)
        fd = cls.listener.detach() if cls.listener is not None else None
        store = dist.TCPStore(*cls.address, world, rank == 0, timeout, master_listen_fd=fd)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def work(
    folder: str, run: str, step_timeout: float, peer_delay: float, file: str | None, shipped: bytes
) -> None:
    """What Ray calls on every worker: collect the rank's facts, then call the training function, which does
    not know Ray.

    `folder` is the driver's working directory, `shipped` a config and a training function, pickled. Raises
    PeerLost, `peer_delay` seconds late, where a lost peer ended this rank.
    """
    if os.path.isdir(folder):  # otherwise the recipe's paths must be absolute
        os.chdir(folder)
    rank, log = ray.train.get_context().get_world_rank(), os.path.realpath("/proc/self/fd/2")
    node = ray.get_runtime_context().get_node_id()
    heartbeat = Heartbeat(Path(run), rank, socket.gethostname(), node, log, step_timeout)
    try:
        config, train = ray.cloudpickle.loads(shipped)
        train(config, _rank_info(config, file, heartbeat))
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()  # the failure report shows the last lines of this log
        if not is_peer_failure(error):
            raise
        time.sleep(peer_delay)
        raise PeerLost(f"{type(error).__name__}: {error}") from error


def is_peer_failure(error: BaseException) -> bool:
    """Whether a rank ended because of a peer: a store or NCCL reports it by its type. gloo raises a plain
    RuntimeError, so for that one it is the place that counts: inside a collective of torch.distributed.
    """
    import torch.distributed as dist

    if isinstance(error, PeerLost | ConnectionError | dist.DistError):
        return True
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    module = innermost.tb_frame.f_globals.get("__name__", "") if innermost is not None else ""
    return isinstance(error, RuntimeError) and module.startswith("torch.distributed")


def _rank_info(config: "AnyRecipe", file: str | None, heartbeat: Heartbeat) -> "RankInfo":
    from trifold.pretrain.distributed import RankInfo

    context, gpus = ray.train.get_context(), config.cluster.gpus_per_worker > 0
    if file is None:
        Rendezvous.join(context.get_world_rank(), context.get_world_size(), "nccl" if gpus else "gloo")
    return RankInfo(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        local_rank=context.get_local_rank(),
        device="cuda" if gpus else "cpu",
        init_method=file,  # the training function makes the process group
        threads=config.cluster.threads(context.get_local_world_size()),
        reporter=heartbeat,
    )
