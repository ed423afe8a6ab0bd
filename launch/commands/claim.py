"""One driver per run folder: RUN/driver.json names the process that drives the run.

    {"host": ..., "boot": ..., "pid": ..., "started": ..., "since": ..., "renewed": ...}

The holder renews it every few seconds. A second driver is told who holds the run and ends. A claim is taken
over when its process is gone (same machine), or when it was silent for 30 s (another machine); so a restart
after kill -9 or a lost host needs no hand. A driver that was taken over from learns of it and does not
restart its ranks.
"""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trifold.modeling.errors import UserError
from trifold.pretrain.storage.atomic import replace_file


@dataclass(frozen=True)
class ClaimTiming:
    renew: float = 5.0  # seconds between two renewals
    silent: float = 30.0  # without one for so long, another driver takes over
    poll: float = 0.5


class Claim:
    """This process's claim on a run folder, while it is held."""

    def __init__(self, folder: Path, timing: ClaimTiming) -> None:
        self.folder, self.file, self.timing = folder, folder / "driver.json", timing
        self._identity = {
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pid": os.getpid(),
            "started": _start_time(os.getpid()),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        self._released = threading.Event()

    def acquire(self) -> None:
        """Raises UserError where another driver holds the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + self.timing.silent
        first = None
        while True:
            with _locked(self.folder):
                holder = _read(self.file)
                if holder is None or _is_dead(holder):
                    return self._write()
                first = first or holder
                renewed = holder.get("renewed") != first.get("renewed") or _is_here(holder)
                if not renewed and time.monotonic() >= deadline:
                    return self._write()
            if renewed:
                raise UserError(
                    f"{self.folder} is driven by process {holder.get('pid')} on {holder.get('host')} since"
                    f" {holder.get('since')}: wait until it ends, or stop it (Ctrl-C, or `touch"
                    f" {self.folder}/stop`), and rerun the same command."
                )
            time.sleep(self.timing.poll)

    def check(self) -> None:
        """Raises UserError once another driver has taken the run over."""
        holder = _read(self.file)
        if holder is not None and not self._is_mine(holder):
            raise UserError(
                f"{self.folder} was taken over by process {holder.get('pid')} on {holder.get('host')} at"
                f" {holder.get('since')}, because this driver had been silent for {self.timing.silent:g} s:"
                " that one continues the run, and this one ends."
            )

    def keep(self) -> None:
        """Renew until released or taken over."""
        while not self._released.wait(self.timing.renew):
            with (
                suppress(OSError),
                _locked(self.folder),
            ):  # a full disk: the others wait 30 s for the next one
                holder = _read(self.file)
                if holder is not None and not self._is_mine(holder):
                    return
                self._write()

    def release(self) -> None:
        self._released.set()
        with suppress(OSError), _locked(self.folder):
            holder = _read(self.file)
            if holder is not None and self._is_mine(holder):
                self.file.unlink()

    def _write(self) -> None:
        replace_file(self.file, json.dumps({**self._identity, "renewed": time.time()}))

    def _is_mine(self, holder: dict[str, Any]) -> bool:
        return all(holder.get(key) == value for key, value in self._identity.items())


@contextmanager
def claimed(folder: Path, timing: ClaimTiming = ClaimTiming()) -> Iterator[Claim]:
    """Hold the claim of a run folder. Raises UserError where another driver holds it."""
    claim = Claim(folder, timing)
    claim.acquire()
    thread = threading.Thread(target=claim.keep, name="claim", daemon=True)
    thread.start()
    try:
        yield claim
    finally:
        claim.release()
        thread.join()


def _read(file: Path) -> dict[str, Any] | None:
    """The holder; None where there is none, or the file is damaged."""
    try:
        holder = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return holder if isinstance(holder, dict) else None


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether the holder is a process of this machine, which can be asked."""
    return holder.get("host") == socket.gethostname() and holder.get("boot") == _boot_id()


def _is_dead(holder: dict[str, Any]) -> bool:
    if not _is_here(holder):
        return False  # unknown: its silence decides
    pid = holder.get("pid")
    return not isinstance(pid, int) or _start_time(pid) != holder.get("started")


def _boot_id() -> str:
    """Identifies this boot of this machine, and the pid namespace (a container has its own)."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _start_time(pid: int) -> str | None:
    """When a process started, in ticks since boot; None where there is no such process, or only its exit
    code.
    """
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Between processes that read and write the claim."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        with suppress(
            OSError
        ):  # a file system without locks: two drivers that start within a second may both pass
            fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):  # not only closed: a process that was forked meanwhile has it open too
            fcntl.flock(directory, fcntl.LOCK_UN)
        os.close(directory)
