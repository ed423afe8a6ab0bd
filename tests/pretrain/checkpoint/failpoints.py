"""Kill or pause a real process right before its n-th operation on the storage, for the tests of saving and
leases.

A kill is SIGKILL; before it every file that was written and not yet fsynced loses its second half, as in a
power cut.
"""

import itertools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from trifold.pretrain.checkpoint.lease import Lease
from trifold.pretrain.storage.storage_path import StorageOptions, StoragePath

# children of a fork server start in milliseconds: torch is imported once
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["trifold.pretrain.checkpoint.saving", "safetensors.torch"])

CHUNK_BYTES = 128  # many writes per file: torn files at many positions


def start_process(
    work: Callable[..., Any], *args: Any, at: int | None = None, pause: Path | None = None
) -> BaseProcess:
    """Start `work(*args)` in a process that is killed before operation number `at` of the paths and leases
    among its arguments, or waits there while `pause` exists.
    """
    process = _context.Process(target=_main, args=(work, args, at, pause, dict(os.environ)))
    process.start()
    return process


def is_killed(work: Callable[..., Any], *args: Any, at: int) -> bool:
    """Run it to its end or its death; whether it was killed (False: it has no operation of that number)."""
    process = start_process(work, *args, at=at)
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL), f"operation {at}: exit code {process.exitcode}"
    return process.exitcode != 0


def wait_until_paused(process: BaseProcess, pause: Path) -> bool:
    """Wait until the process stands at its failpoint; False when it ended before."""
    while not pause.exists():
        if not process.is_alive():
            return pause.exists()
        time.sleep(0.002)
    return True


def with_hook(path: StoragePath, before_write: Callable[[str, Path], object]) -> StoragePath:
    """The same path, whose operations call `before_write`."""
    return path.with_options(replace(path.options, before_write=before_write))


def _main(
    work: Callable[..., Any],
    args: tuple[Any, ...],
    at: int | None,
    pause: Path | None,
    environment: dict[str, str],
) -> None:
    # the server that forks was started earlier, perhaps before an S3 server was
    os.environ.update(environment)
    numbers = itertools.count()
    unsafe: set[Path] = set()

    def before_write(operation: str, path: Path) -> None:
        reached = next(numbers) == at
        if reached and pause is not None:
            pause.touch()
            while pause.exists():
                time.sleep(0.002)
        elif reached:
            for file in unsafe:
                os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if operation == "open":
            unsafe.add(path)
        elif operation == "fsync":
            unsafe.discard(path)

    options = StorageOptions(before_write=before_write, chunk_bytes=CHUNK_BYTES)
    work(*(_with_options(arg, options) for arg in args))


def _with_options(arg: Any, options: StorageOptions) -> Any:
    if isinstance(arg, Lease):
        return replace(arg, run=arg.run.with_options(options))
    return arg.with_options(options) if hasattr(arg, "with_options") else arg


def append_note(path: Path, kind: str, facts: dict[str, Any]) -> None:
    """Append an event to a file that the parent reads."""
    with path.open("a") as file:
        file.write(json.dumps({"kind": kind} | facts) + "\n")


def read_notes(path: Path) -> list[dict[str, Any]]:
    """The events of `append_note`."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
