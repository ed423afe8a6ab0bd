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
from trifold.pretrain.storage.disk import DiskPath

START = """
import ctypes, sys, time
from pathlib import Path
from trifold.pretrain.checkpoint.format import unseal
from trifold.pretrain.checkpoint.lease import Lease
from trifold.pretrain.monitor.heartbeat import Heartbeat
from trifold.pretrain.storage.disk import DiskPath
run = Path(sys.argv[1])
heartbeat = Heartbeat(run, 3, "a-host", "its-name", "its.log", 3.0)
heartbeat.set_phase("agreeing on a step", step=7, rows=(36, 41))
heartbeat.set_phase("backward", micro=1)
"""
# The sleep lets the watching thread arm its timer, of 3 s, before the lock is held.
HANGS = START + "time.sleep(1.5)\nctypes.PyDLL(None).sleep(100)\n"  # C's sleep, with Python's lock held
SUPERSEDED = (
    START
    + """
claim = unseal((run / "lease" / "000001").read_bytes())
heartbeat.exit_when(Lease(DiskPath(run), 1, claim).superseded_by)
time.sleep(100)
"""
)


def start(run: Path, code: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", code, str(run)], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: 3 in heartbeat.read(run) and heartbeat.read(run)[3].beats == 3)
    return process


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_rank_leaves_where_it_was_and_one_that_holds_pythons_lock_its_stack(tmp_path: Path) -> None:
    process = start(tmp_path, HANGS)
    try:
        wait_until(lambda: heartbeat.read_stack(tmp_path, heartbeat.read(tmp_path)[3]))
    finally:
        process.kill()
        process.wait()
    status = heartbeat.read(tmp_path)[3]
    assert (status.rank, status.host, status.node) == (3, "a-host", "its-name")
    assert (status.pid, status.log) == (process.pid, "its.log")
    assert (status.step, status.rows, status.micro, status.phase) == (7, [36, 41], 1, "backward")
    assert heartbeat.read_stack(tmp_path, status) == ['File "<string>", line 13 in <module>']


def test_a_rank_exits_by_itself_whatever_it_waits_for_once_a_later_generation_has_begun(
    tmp_path: Path,
) -> None:
    take_generation(DiskPath(tmp_path))
    process = start(tmp_path, SUPERSEDED)
    assert process.poll() is None
    take_generation(DiskPath(tmp_path))
    assert process.wait(60) == 1
    assert process.stderr is not None
    assert "generation 1 may not commit any more" in process.stderr.read()
