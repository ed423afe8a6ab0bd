"""One driver per run folder, with real processes and with what another machine would have written."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launch.command_line import trifold, write_tiny
from trifold.launch.commands.claim import ClaimTiming, claimed
from trifold.modeling.errors import UserError

QUICK = ClaimTiming(renew=0.05, silent=0.6, poll=0.05)
HOLDS = """
import sys, time
from pathlib import Path
from trifold.launch.commands.claim import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the claim of a folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def write_foreign(folder: Path, renewed: float = 0.0) -> None:
    """The claim of a driver on another machine."""
    record = {"host": "elsewhere", "boot": "b", "pid": 7, "started": "1", "since": "noon", "renewed": renewed}
    (folder / "driver.json").write_text(json.dumps(record))


def test_a_second_driver_is_told_who_holds_the_run_and_ends(tmp_path):
    folder = write_tiny(tmp_path)
    with holder(folder / "run") as process:
        result = trifold(folder, "pretrain", "tiny.yaml")
        assert result.code == 1 and f"run is driven by process {process.pid} on " in result.err
        assert " since 20" in result.err and not (folder / "run" / "config.yaml").exists()


def test_after_kill_9_the_next_driver_takes_over_at_once(tmp_path):
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
        start = time.monotonic()
        with claimed(tmp_path):
            assert time.monotonic() - start < 1
    assert not (tmp_path / "driver.json").exists()


def test_a_driver_on_another_machine_holds_the_run_while_it_renews(tmp_path):
    write_foreign(tmp_path)
    done = threading.Event()

    def renew() -> None:
        while not done.wait(0.1):
            write_foreign(tmp_path, time.time())

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with (
            pytest.raises(UserError, match="driven by process 7 on elsewhere since noon"),
            claimed(tmp_path, QUICK),
        ):
            pass
    finally:
        done.set()
        thread.join()
    start = time.monotonic()
    with claimed(tmp_path, QUICK):  # silent since
        assert time.monotonic() - start >= QUICK.silent


def test_a_driver_that_was_taken_over_from_learns_of_it_and_leaves_the_claim(tmp_path):
    with claimed(tmp_path, QUICK) as claim:
        claim.check()
        time.sleep(0.2)
        claim.check()
        write_foreign(tmp_path)
        time.sleep(0.2)
        with pytest.raises(UserError, match="was taken over by process 7 on elsewhere at noon"):
            claim.check()
    assert json.loads((tmp_path / "driver.json").read_text())["host"] == "elsewhere"


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"{}", b"[" * 100_000])
def test_a_damaged_claim_is_replaced(tmp_path, content):
    (tmp_path / "driver.json").write_bytes(content)
    with claimed(tmp_path, QUICK) as claim:
        claim.check()
