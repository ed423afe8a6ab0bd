"""One driver for a run: the process that starts attempts holds a claim, which it renews while it lives.

    RUN/lease/driver-000003    the third driver's claim: host, process, since when, and a count of renewals

A second driver watches the newest claim. One that is renewed meanwhile is alive: the second one is told who
it is, and ends. One that was released, whose process is gone from this host, or that is silent for
SILENT_SECONDS is taken over by creating the next number, which succeeds for one process only. No clocks are
compared. A driver that was taken over, because its host hung, finds the later claim when it renews its own.
On a disk and in an object store alike; cost: one tiny write each RENEW_SECONDS.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.format import seal, unseal
from trifold.pretrain.storage.storage_path import StoragePath, ignore

RENEW_SECONDS = 5.0
SILENT_SECONDS = 30.0
_PREFIX = "driver-"


class RunIsDriven(UserError):
    """Another process drives this run."""


class DriverClaim:
    """`with DriverClaim(run) as claim: ...` holds a run. Entering raises RunIsDriven where another driver is
    alive; `on_wait` is told, in a sentence, when it must be waited for whether one is.
    """

    def __init__(
        self,
        run: StoragePath,
        on_wait: Callable[[str], object] = ignore,
        renew_seconds: float = RENEW_SECONDS,
        silent_seconds: float = SILENT_SECONDS,
    ) -> None:
        self.run, self.on_wait = run, on_wait
        self.renew_seconds, self.silent_seconds = renew_seconds, silent_seconds
        self._number = 0
        self._claim: dict[str, Any] = {}
        self._lost: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="driver-claim", daemon=True)

    def __enter__(self) -> DriverClaim:
        (self.run / "lease").make_folder()
        self._take()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if self._lost is None:
            with suppress(OSError, UserError):  # then the next driver waits until this claim is silent
                self._write(released=True)

    @property
    def lost(self) -> str | None:
        """Who took the run over, in a sentence; None while it is ours."""
        return self._lost

    def check(self) -> None:
        """Raise RunIsDriven where another driver took the run over."""
        if self._lost is not None:
            raise RunIsDriven(self._lost)

    def _take(self) -> None:
        seen, since = None, 0.0
        while True:
            number, content = self._newest()
            holder = unseal(content) or {}
            if number == 0 or holder.get("released") or _is_gone(holder):
                if self._create(number + 1):
                    return
            elif seen is None:
                seen, since = (number, content), time.monotonic()
                self.on_wait(
                    f"{self.run} is held by {_describe(holder)}: waiting up to {self.silent_seconds:g} s"
                    " to see whether it is alive"
                )
            elif (number, content) != seen:
                raise RunIsDriven(
                    f"{self.run} is driven by {_describe(holder)}, which is alive: wait for its end, stop it"
                    " (a file named `stop` in the run folder), or name another run folder"
                )
            elif time.monotonic() - since >= self.silent_seconds and self._create(number + 1):
                return
            time.sleep(min(1.0, self.renew_seconds / 5))

    def _newest(self) -> tuple[int, bytes]:
        numbers = [_parse_name(entry.name) for entry in (self.run / "lease").entries()]
        number = max(numbers, default=0)
        try:
            return number, self._file(number).read_bytes() if number else b""
        except FileNotFoundError:  # removed meanwhile
            return 0, b""

    def _create(self, number: int) -> bool:
        claim = {"claim_id": os.urandom(8).hex(), **_identity(), "renewals": 0, "released": False}
        if not self._file(number).create(seal(claim)):
            return False
        self._number, self._claim = number, claim
        for earlier in range(max(1, number - 2), number):
            self._file(earlier).remove()  # it is of no use any more
        return True

    def _renew(self) -> None:
        while self._lost is None and not self._ended.wait(self.renew_seconds):
            with suppress(OSError, UserError):  # the storage is away: the next renewal tries again
                self.renew()

    def renew(self) -> None:
        """Show that this driver is alive, and look for a later claim. The thread calls this."""
        number, content = self._newest()
        holder = unseal(content) or {}
        # the same number twice: the folder was removed, and another driver began with its first number
        is_ours = number < self._number or holder.get("claim_id") in (None, self._claim["claim_id"])
        if number > self._number or not is_ours:
            self._lost = (
                f"{self.run} was taken over by {_describe(holder)}, because this process was"
                f" silent for {self.silent_seconds:g} s: it ends here, and that one continues"
            )
            return
        (self.run / "lease").make_folder()
        self._write(renewals=self._claim["renewals"] + 1)

    def _write(self, **changes: Any) -> None:
        self._claim |= changes
        self._file(self._number).replace(seal(self._claim))

    def _file(self, number: int) -> StoragePath:
        return self.run / "lease" / f"{_PREFIX}{number:06d}"


def _parse_name(name: str) -> int:
    digits = name.removeprefix(_PREFIX)
    valid = name.startswith(_PREFIX) and digits.isascii() and digits.isdecimal() and len(digits) <= 12
    return int(digits) if valid else 0


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": _machine(),
        "started": _start_time(pid),
    }


def _describe(holder: dict[str, Any]) -> str:
    if "host" not in holder:
        return "a driver whose claim is damaged"
    return f"a driver on {holder['host']} (process {holder['pid']}, since {holder['since']})"


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether a holder was a process of this machine that does not exist any more."""
    if not holder or holder.get("machine") != _machine() or not holder["machine"]:
        return False
    return bool(_start_time(holder["pid"]) != holder["started"])


def _machine() -> str:
    """Which boot of which machine, and which of its containers: processes of the same one see each other."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return ""


def _start_time(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty where there is none, or only its exit code.
    Numbers of processes are reused.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""
