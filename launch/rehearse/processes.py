"""Ranks as plain processes of this machine, without Ray, for rehearsals that start many short groups.

A config and its training function come in; processes that can be killed, and their exit codes, come out. One
server process imports torch and DeepSpeed and forks the ranks, so that a group is up in a second or two,
where Ray's workers take five or more. The training function is the same one (promise 7).
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from trifold.launch.recipe.schema import AnyRecipe
from trifold.pretrain.distributed import RankInfo

Train = Callable[[Any, RankInfo], None]  # of a recipe and a place among the ranks

_context = multiprocessing.get_context("forkserver")
PRELOAD = [
    "torch._inductor.compile_fx",
    "trifold.pretrain.run",
    "trifold.finetune.run",
]  # imported once, before the fork: 6 s of CPU less for each rank


class Ranks:
    """A group of `world` ranks. What they print goes to `log`, one file for all."""

    def __init__(self, config: AnyRecipe, train: Train, world: int, log: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="trifold-")
        meet = f"file://{self._folder.name}/meet" if world > 1 else None
        threads = config.cluster.threads(world)
        cuda = config.cluster.gpus_per_worker > 0
        if not cuda:  # its accelerator named, DeepSpeed touches no device when it is imported
            os.environ["DS_ACCELERATOR"] = "cpu"
        _context.set_forkserver_preload(PRELOAD if cuda else [*PRELOAD, "deepspeed"])
        places = [
            RankInfo(rank, world, rank, "cuda" if cuda else "cpu", meet, threads) for rank in range(world)
        ]
        self.processes = [
            _context.Process(target=_rank, args=(config, train, rank_info, log), daemon=True)
            for rank_info in places
        ]

    def __enter__(self) -> "Ranks":
        for process in self.processes:
            process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    @property
    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def kill(self, rank: int) -> bool:
        """kill -9; False where the rank had ended."""
        self.processes[rank].kill()
        self.processes[rank].join()
        return self.processes[rank].exitcode == -signal.SIGKILL

    def wait(self, seconds: float | None = None) -> list[int | None]:
        """The ranks' exit codes; None for those that still run after so many seconds each."""
        for process in self.processes:
            process.join(seconds)
        return [process.exitcode for process in self.processes]


def _rank(config: AnyRecipe, train: Train, rank_info: RankInfo, log: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        train(config, rank_info)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # no interpreter shutdown: with process groups alive it now and then aborts
