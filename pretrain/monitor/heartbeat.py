"""What each rank is doing, in files that outlive it, for the report of why a run ended.

    RUN/workers/rank-00001.json    who it is (rank, host, pid, log) and where (step, rows, micro, phase), with
                                   a count of its phases, and of the buffers that its saves have written
    RUN/workers/rank-00001.stack   the Python stacks of its threads, once it made no progress for `patience`
                                   seconds

All ranks go through the same phases, so the rank with the lowest count is behind. `Heartbeat` is the Reporter
(pretrain/distributed.py) of a rank that the launcher started; `read` and `read_stack` are for the launcher.
Cost of `set_phase`: 5 us, one unsynced write that the kernel keeps when the process is killed.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trifold.modeling.errors import UserError

SIZE = 1024  # bytes of a heartbeat: always as many, so that no write leaves the end of a longer one
TICK = 1.0  # seconds between two looks of the watching thread


@dataclass(frozen=True)
class RankStatus:
    """Where a rank was last seen."""

    rank: int
    host: str
    node: str  # the launcher's name of that host
    pid: int
    log: str  # the file, on its host, of what it prints
    thread: str  # the one that trains, as stacks name it
    beats: int = 0  # phases so far
    step: int = 0  # the one in progress; 0: none has begun
    rows: list[int] | None = None  # of that step, first and last
    micro: int | None = None  # this rank's, of that step
    phase: str = "starting"
    written: int = 0  # buffers of checkpoints so far: a rank that waits for a slow save does not hang


class Heartbeat:
    """The Reporter of this process, made in the thread that trains. A second thread writes the stacks when
    there is no progress, and looks whether the process should end; a hanging rank cannot do so itself.
    """

    def __init__(self, run: Path, rank: int, host: str, node: str, log: str, patience: float) -> None:
        self._identity = {
            "rank": rank,
            "host": host,
            "node": node,
            "pid": os.getpid(),
            "log": log[: SIZE // 2],
            "thread": f"0x{threading.get_ident():016x}",
        }
        self._position: dict[str, Any] = {
            "beats": 0,
            "step": 0,
            "rows": None,
            "micro": None,
            "phase": "starting",
            "written": 0,
        }
        self._lock = threading.Lock()  # between the thread that trains and the one that saves
        self._patience = patience
        self._check: Callable[[], str | None] | None = None
        self._every = TICK

        workers = run / "workers"
        workers.mkdir(parents=True, exist_ok=True)
        self._file = os.open(workers / f"rank-{rank:05d}.json", os.O_WRONLY | os.O_CREAT, 0o666)
        self._stack = (workers / f"rank-{rank:05d}.stack").open("w")  # faulthandler needs it to the end
        self.set_phase("starting")
        threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def set_phase(self, phase: str, **position: Any) -> None:
        self._write({"micro": None, **position, "phase": phase}, "beats")

    def count_written(self) -> None:
        self._write({}, "written")

    def exit_when(self, check: Callable[[], str | None], every: float = TICK) -> None:
        self._check, self._every = check, every

    def _write(self, position: dict[str, Any], counter: str) -> None:
        with self._lock:
            self._position |= {**position, counter: self._position[counter] + 1}
            record = json.dumps(self._identity | self._position)
            os.pwrite(self._file, record.ljust(SIZE).encode(), 0)

    def _watch(self) -> None:
        seen, next_check = 0, 0.0
        while True:
            progress = self._position["beats"] + self._position["written"]
            if progress != seen:
                # C's own timer also runs while a call holds Python's lock
                faulthandler.dump_traceback_later(self._patience, file=self._stack)
                seen = progress
            time.sleep(TICK)
            if self._check is not None and time.monotonic() >= next_check:
                next_check = time.monotonic() + self._every
                self._exit_if_due(self._check)

    def _exit_if_due(self, check: Callable[[], str | None]) -> None:
        try:
            reason = check()
        except (OSError, UserError):  # the storage does not answer: nothing is known
            return
        if reason is not None:
            print(reason, file=sys.stderr, flush=True)
            os._exit(1)


def read(run: Path) -> dict[int, RankStatus]:
    """The last heartbeat of every rank."""
    statuses = {}
    for file in (run / "workers").glob("rank-*.json"):
        try:
            status = RankStatus(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):  # removed meanwhile, being written, or of another version
            continue
        statuses[status.rank] = status
    return statuses


def read_stack(run: Path, status: RankStatus) -> list[str]:
    """The stack of a rank's training thread, innermost call first; empty where it did not hang."""
    file = run / "workers" / f"rank-{status.rank:05d}.stack"
    text = file.read_text(errors="replace") if file.exists() else ""
    _, _, tail = text.rpartition(f"hread {status.thread} ")
    frames = tail.partition("\n\n")[0].splitlines()[1:]
    return [frame.strip() for frame in frames if frame.startswith("  File")]
