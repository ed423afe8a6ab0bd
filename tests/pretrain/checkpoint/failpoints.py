"""Kill or pause a real process right before its n-th file operation (pretrain.storage.operation), for the
tests of saving and leases.

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
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from trifold.pretrain.storage import storage

_context = multiprocessing.get_context(
    "forkserver"
)  # its children start in milliseconds: torch is imported once
_context.set_forkserver_preload(["trifold.pretrain.checkpoint.saving", "safetensors.torch"])


def started(
    work: Callable[..., Any], *args: Any, at: int | None = None, pause: Path | None = None
) -> BaseProcess:
    """Start `work(*args)` in a process that is killed before its operation number `at`, or waits there while
    `pause` exists.
    """
    process = _context.Process(target=_main, args=(work, args, at, pause, dict(os.environ)))
    process.start()
    return process


def killed(work: Callable[..., Any], *args: Any, at: int) -> bool:
    """Run it to its end or its death; whether it was killed (False: it has no operation of that number)."""
    process = started(work, *args, at=at)
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL), f"operation {at}: exit code {process.exitcode}"
    return process.exitcode != 0


def until_paused(process: BaseProcess, pause: Path) -> bool:
    """Wait until the process stands at its failpoint; False when it ended before."""
    while not pause.exists():
        if not process.is_alive():
            return pause.exists()
        time.sleep(0.002)
    return True


def _main(
    work: Callable[..., Any],
    args: tuple[Any, ...],
    at: int | None,
    pause: Path | None,
    environment: dict[str, str],
) -> None:
    os.environ.update(
        environment
    )  # the server that forks was started earlier, perhaps before an S3 server was
    numbers = itertools.count()
    unsafe: set[Path] = set()
    storage.CHUNK = 128  # many writes per file: torn files at many places

    def operation(name: str, path: Path) -> None:
        here = next(numbers) == at
        if here and pause is not None:
            pause.touch()
            while pause.exists():
                time.sleep(0.002)
        elif here:
            for file in unsafe:
                os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "open":
            unsafe.add(path)
        elif name == "fsync":
            unsafe.discard(path)

    storage.before_write_hook = operation
    work(*args)


def note(path: Path, kind: str, facts: dict[str, Any]) -> None:
    """Append an event to a file that the parent reads."""
    with open(path, "a") as file:
        file.write(json.dumps({"kind": kind} | facts) + "\n")


def notes(path: Path) -> list[dict[str, Any]]:
    """The events of `note`."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
