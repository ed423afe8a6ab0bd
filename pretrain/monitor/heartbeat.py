"""Where a rank is, in files that outlive it, for whoever has to say why a run ended.

    RUN/workers/rank-00001.json    who it is (rank, host, pid, log) and where (step, rows, micro, phase), with a count of its phases: all
                                   ranks go through the same ones, so whose count is lowest is behind; and of what its saves have written
    RUN/workers/rank-00001.stack   the Python stacks of its threads, when it came no further for `patience` seconds

In: `at(...)` wherever the work of a rank changes. A process is one rank, so its heartbeat belongs to the
process; before `begin` (tests, a run without Ray) `at` does nothing. Cost of `at`: 5 us, one unsynced write
that the kernel keeps when the process is killed.
"""

import faulthandler
import itertools
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.lease import Lease, Superseded

SIZE = 1024  # bytes of a heartbeat: always as many, so that no write leaves the end of a longer one


@dataclass(frozen=True)
class RankStatus:
    """Where a rank was last seen."""

    rank: int
    host: str
    node: str  # the launcher's name of that host
    pid: int
    log: str  # what it prints goes here, on its host
    thread: str  # the one that trains, as stacks name it
    beats: int = 0  # phases so far
    step: int = 0  # that it works on; 0: it has not begun one
    rows: list[int] | None = None  # of that step, first and last
    micro: int | None = None  # which one, of this rank's
    phase: str = "starting"
    # pieces of checkpoints so far, by the thread that saves: who waits for a save that comes forward does not
    # hang
    written: int = 0


class Heartbeat:
    """This process's own, with a thread that keeps two watches (each second; a hanging rank cannot keep its
    own).
    """

    def __init__(self, run: Path, rank: int, host: str, node: str, log: str, patience: float) -> None:
        self._facts = {"rank": rank, "host": host, "node": node, "pid": os.getpid(), "log": log[: SIZE // 2]}
        self._facts["thread"] = f"0x{threading.get_ident():016x}"
        self._where: dict[str, Any] = {
            "beats": 0,
            "step": 0,
            "rows": None,
            "micro": None,
            "phase": "starting",
            "written": 0,
        }
        self._lock = threading.Lock()  # between the thread that trains and the one that saves
        self._patience = patience
        self.lease: Lease | None = None
        (run / "workers").mkdir(parents=True, exist_ok=True)
        self._file = os.open(run / "workers" / f"rank-{rank:05d}.json", os.O_WRONLY | os.O_CREAT)
        self._stack = open(run / "workers" / f"rank-{rank:05d}.stack", "w")  # noqa: SIM115 (faulthandler needs it for good)
        self.at("starting")
        threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def at(self, phase: str, **where: Any) -> None:
        self._tell({"micro": None, **where, "phase": phase}, "beats")

    def wrote(self) -> None:
        self._tell({}, "written")

    def _tell(self, where: dict[str, Any], counted: str) -> None:
        with self._lock:
            self._where |= {**where, counted: self._where[counted] + 1}
            os.pwrite(self._file, json.dumps(self._facts | self._where).ljust(SIZE).encode(), 0)

    def _watch(self) -> None:
        seen, ticks = 0, itertools.count()
        while True:
            if (now := self._where["beats"] + self._where["written"]) != seen:
                seen = now  # C's own timer also runs where a call holds Python's lock for ever
                faulthandler.dump_traceback_later(self._patience, file=self._stack)
            time.sleep(1)
            if (
                self.lease is not None and next(ticks) % (1 if isinstance(self.lease.run, Path) else 15) == 0
            ):  # there a look is a request
                self._end_if_superseded(self.lease)

    def _end_if_superseded(self, lease: Lease) -> None:
        """A group whose host was cut off may wait for its peers for ever, and should not hold memory and
        devices meanwhile.
        """
        try:
            lease.check()
        except Superseded as superseded:
            print(superseded, file=sys.stderr, flush=True)
            os._exit(1)
        except (OSError, UserError):  # its storage is away: it cannot know
            return


_mine: Heartbeat | None = None


def start(run: Path, rank: int, host: str, node: str, log: str, patience: float) -> None:
    """This process is that rank from now on; called in the thread that trains."""
    global _mine
    _mine = Heartbeat(run, rank, host, node, log, patience)


def set_phase(phase: str, **where: Any) -> None:
    """This rank begins a phase: `step` and `rows` hold until they are given anew, `micro` for this phase."""
    if _mine is not None:
        _mine.at(phase, **where)


def count_written() -> None:
    """A piece of this rank's part of a checkpoint is written."""
    if _mine is not None:
        _mine.wrote()


def exit_when_superseded(lease: Lease) -> None:
    """End this process, whatever it waits for, once a later generation of the run has begun."""
    if _mine is not None:
        _mine.lease = lease


def read(run: Path) -> dict[int, RankStatus]:
    """Every rank's last heartbeat."""
    beats = {}
    for file in (run / "workers").glob("rank-*.json"):
        try:
            beat = RankStatus(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):  # removed meanwhile, being written, or of another Trifold
            continue
        beats[beat.rank] = beat
    return beats


def read_stack(run: Path, beat: RankStatus) -> list[str]:
    """The stack of a rank's training thread, innermost call first, where it hung; empty where it did not."""
    file = run / "workers" / f"rank-{beat.rank:05d}.stack"
    said = file.read_text(errors="replace") if file.exists() else ""
    _, _, after = said.rpartition(f"hread {beat.thread} ")
    frames = after.partition("\n\n")[0].splitlines()[1:]
    return [frame.strip() for frame in frames if frame.startswith("  File")]
