"""Run a function in several real processes that form one gloo group, and return what each returned.

The function must be importable (defined at the top of a test file). A child's exception fails the test with
the child's own traceback. Children are forked from a server that has imported torch and DeepSpeed, so that one
starts in a fraction of a second instead of 4.4 s of CPU.
"""

import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from trifold.pretrain.distributed import RankInfo

PRELOAD = ["torch._inductor.compile_fx", "trifold.pretrain.run", "trifold.finetune.run", "deepspeed"]


def run_processes(world: int, function: Callable[..., Any], *args: Any, timeout: float = 150.0) -> list[Any]:
    """`function(place, *args)` in `world` processes at once; the results in rank order. The first failure
    ends the others.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed then touches no device when it is imported
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        pipes, children = [], []
        for rank in range(world):
            receive, send = context.Pipe(duplex=False)
            place = RankInfo(rank, world, rank, "cpu", f"file://{Path(folder) / 'meet'}", threads=1)
            child = context.Process(
                target=_child, args=(send, function, place, dict(os.environ), pickle.dumps(args)), daemon=True
            )
            child.start()
            send.close()
            pipes.append(receive)
            children.append(child)
        try:
            return _collect(pipes, timeout)
        finally:
            for child in children:
                child.kill()
                child.join()


def _child(
    send: Connection, function: Callable[..., Any], place: RankInfo, environment: dict[str, str], args: bytes
) -> None:
    os.environ.clear()  # the server has the environment in which it was started
    os.environ.update(environment, GLOO_SOCKET_IFNAME="lo")
    try:
        answer = pickle.dumps((True, function(place, *pickle.loads(args))))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    send.send_bytes(answer)  # bytes, because tensors sent as such live in the sender's memory
    os._exit(0)  # no interpreter shutdown: with process groups alive it now and then aborts


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], timeout)
        if not ready:
            raise TimeoutError(
                f"ranks {sorted(set(range(len(pipes))) - results.keys())} gave no result within {timeout:g} s"
            )
        for rank, pipe in enumerate(pipes):
            if pipe in ready:
                try:
                    fine, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    fine, value = False, "the process ended without a result"
                if not fine:
                    raise AssertionError(f"rank {rank} failed:\n{value}")
                results[rank] = value
    return [results[rank] for rank in range(len(pipes))]
