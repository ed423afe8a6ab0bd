"""Heartbeats of real processes that are killed, that hang holding Python's lock, and whose group was
superseded.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from trifold.pretrain.checkpoint.lease import take_generation
from trifold.pretrain.monitor import heartbeat

BEGIN = """
import ctypes, sys, time
from pathlib import Path
from pretrain import heartbeat
from trifold.pretrain.checkpoint.lease import Lease
run = Path(sys.argv[1])
heartbeat.begin(run, 3, "a-host", "its-name", "its.log", 3.0)
heartbeat.at("agreeing on a step", step=7, rows=(36, 41))
heartbeat.at("backward", micro=1)
"""
# The sleep lets the watch arm its timer, of 3 s, before the lock is held.
HANGS = BEGIN + "time.sleep(1.5)\nctypes.PyDLL(None).sleep(100)\n"  # C's sleep, with Python's lock held
SUPERSEDED = BEGIN + "heartbeat.end_when_superseded(Lease(run, 1))\ntime.sleep(100)\n"


def begun(run: Path, code: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", code, str(run)], stderr=subprocess.PIPE, text=True)
    until(lambda: 3 in heartbeat.read(run) and heartbeat.read(run)[3].beats == 3)
    return process


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_rank_leaves_where_it_was_and_one_that_holds_pythons_lock_its_stack(tmp_path: Path) -> None:
    process = begun(tmp_path, HANGS)
    try:
        until(lambda: heartbeat.read_stack(tmp_path, heartbeat.read(tmp_path)[3]))
    finally:
        process.kill()
        process.wait()
    beat = heartbeat.read(tmp_path)[3]
    assert (beat.rank, beat.host, beat.node, beat.pid, beat.log) == (
        3,
        "a-host",
        "its-name",
        process.pid,
        "its.log",
    )
    assert (beat.step, beat.rows, beat.micro, beat.phase) == (7, [36, 41], 1, "backward")
    assert heartbeat.read_stack(tmp_path, beat) == ['File "<string>", line 11 in <module>']


def test_a_rank_ends_by_itself_whatever_it_waits_for_once_a_later_generation_has_begun(
    tmp_path: Path,
) -> None:
    take_generation(tmp_path)
    process = begun(tmp_path, SUPERSEDED)
    assert process.poll() is None
    take_generation(tmp_path)
    assert process.wait(60) == 1
    assert process.stderr is not None and "generation 1 may not commit any more" in process.stderr.read()


def test_without_a_heartbeat_begun_phases_cost_nothing_and_leave_nothing(tmp_path: Path) -> None:
    heartbeat.set_phase("backward", micro=1)
    assert heartbeat.read(tmp_path) == {}
