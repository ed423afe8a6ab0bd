"""The ranks of a run: who this process is among them, how they form a process group, and what they exchange
beside tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist

from trifold.modeling.errors import UserError

T = TypeVar("T")


class Reporter(Protocol):
    """What a rank tells about itself while it works (monitor/heartbeat.py)."""

    def set_phase(self, phase: str, **position: Any) -> None:
        """The rank begins a phase. `step` and `rows` hold until they are given again, `micro` for this
        phase.
        """

    def count_written(self) -> None:
        """A buffer of this rank's share of a checkpoint is written."""

    def exit_when(self, check: Callable[[], str | None], every: float) -> None:
        """End this process, whatever it waits for, once `check`, called each `every` seconds, returns why."""


class Silent:
    """A Reporter that reports to nobody: tests, and runs in one process."""

    def set_phase(self, phase: str, **position: Any) -> None: ...

    def count_written(self) -> None: ...

    def exit_when(self, check: Callable[[], str | None], every: float) -> None: ...


@dataclass(frozen=True)
class RankInfo:
    """Which of the ranks this process is, and on what it computes."""

    rank: int
    world: int
    local_rank: int  # among the ranks of this machine
    device: Literal["cpu", "cuda"]
    init_method: str | None  # as torch.distributed takes it; None: the process group exists, or world is 1
    threads: int
    reporter: Reporter = field(default=Silent(), compare=False, repr=False)

    @classmethod
    def single(cls, device: Literal["cpu", "cuda"] = "cpu", threads: int = 1) -> "RankInfo":
        """The only rank of a run."""
        return cls(0, 1, 0, device, None, threads)


def join_process_group(rank_info: RankInfo) -> None:
    """Make torch's default process group of all ranks, unless it exists. Waits for the other ranks."""
    if rank_info.device == "cuda":
        torch.cuda.set_device(rank_info.local_rank)
    if dist.is_initialized():
        return

    backend = "nccl" if rank_info.device == "cuda" else "gloo"
    if rank_info.init_method is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(
            backend,
            rank_info.init_method,
            rank=rank_info.rank,
            world_size=rank_info.world,
            timeout=timedelta(minutes=10),
        )


def all_gather(value: T) -> list[T]:
    """Every rank's `value`, in the order of ranks. Values are pickled."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_rank0(call: Callable[[], T]) -> T:
    """The result of `call` on rank 0, on every rank. A UserError that it raises there is raised on every
    rank.
    """
    result: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            result[0] = call()
        except UserError as error:
            result[1] = error
    dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise result[1]
    return result[0]
