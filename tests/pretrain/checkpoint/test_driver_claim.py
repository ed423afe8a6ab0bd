"""One driver for a run: told apart, renewed, taken over."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from trifold.pretrain.checkpoint.driver_claim import DriverClaim, RunIsDriven
from trifold.pretrain.checkpoint.format import seal, unseal
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.storage_path import ignore

DAMAGES = {
    "flip": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "zeros": lambda content: bytes(len(content)),
    "truncated": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + b" ",
    "empty": lambda content: b"",
    "garbage": lambda content: b"\xff\xfe{]",
}


@pytest.fixture
def run(tmp_path: Path) -> DiskPath:
    return DiskPath(tmp_path / "run")


def fast_claim(run: DiskPath, on_wait: Callable[[str], object] = ignore) -> DriverClaim:
    return DriverClaim(run, on_wait, renew_seconds=0.05, silent_seconds=0.6)


def hold(folder: Path, ready: Path) -> None:
    """A driver of its own process."""
    with fast_claim(DiskPath(folder)):
        ready.touch()
        time.sleep(60)


def start_driver(run: DiskPath, tmp_path: Path) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=hold, args=(run.path, tmp_path / "ready"))
    process.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def forget_machine(run: DiskPath, number: int = 1) -> None:
    """Make a claim one of another host, whose processes cannot be seen from here."""
    file = run / "lease" / f"driver-{number:06d}"
    claim = unseal(file.read_bytes())
    assert claim is not None
    file.replace(seal(claim | {"machine": "another boot", "host": "elsewhere"}))


def test_the_second_driver_is_told_who_holds_the_run(run: DiskPath) -> None:
    heard: list[str] = []
    with fast_claim(run) as first:
        message = rf"driven by a driver on .* \(process {os.getpid()}, since \d{{4}}-.*\), which is alive"
        with pytest.raises(RunIsDriven, match=message), fast_claim(run, heard.append):
            pass
        assert first.lost is None
    assert len(heard) == 1 and "waiting up to 0.6 s" in heard[0]


def test_a_run_that_was_released_is_taken_at_once(run: DiskPath) -> None:
    for _ in range(3):
        began = time.monotonic()
        with fast_claim(run):
            assert time.monotonic() - began < 0.5
    assert len([entry for entry in (run / "lease").entries() if entry.name.startswith("driver-")]) <= 2


def test_after_a_kill_the_next_driver_of_this_host_takes_over_at_once(run: DiskPath, tmp_path: Path) -> None:
    process = start_driver(run, tmp_path)
    process.kill()
    process.join()
    began = time.monotonic()
    with DriverClaim(run, renew_seconds=5, silent_seconds=30):
        assert time.monotonic() - began < 2


def test_a_silent_claim_of_another_host_is_taken_over_and_its_holder_is_told(run: DiskPath) -> None:
    silent = DriverClaim(run, renew_seconds=1000, silent_seconds=0.6)
    with silent:
        forget_machine(run)
        began = time.monotonic()
        with fast_claim(run):
            assert 0.6 <= time.monotonic() - began < 5
            silent.renew()
            assert silent.lost is not None and "was taken over by a driver on" in silent.lost
            with pytest.raises(RunIsDriven):
                silent.check()


def test_a_stopped_process_is_taken_over_after_its_silence_and_ends_when_it_wakes(
    run: DiskPath, tmp_path: Path
) -> None:
    process = start_driver(run, tmp_path)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with fast_claim(run) as claim:
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.5)
            assert claim.lost is None
    finally:
        process.kill()
        process.join()


def test_of_several_drivers_that_take_over_one_succeeds(run: DiskPath, tmp_path: Path) -> None:
    with DriverClaim(run, renew_seconds=1000):
        forget_machine(run)
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        processes = [context.Process(target=_try, args=(run.path, results)) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(30)
        assert sorted(results.get() for _ in processes) == ["held", "told", "told", "told"]


def _try(folder: Path, results: "multiprocessing.SimpleQueue[str]") -> None:
    try:
        with fast_claim(DiskPath(folder)):
            time.sleep(2)
            results.put("held")
    except RunIsDriven:
        results.put("told")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_claim_is_repaired_by_its_holder_and_taken_over_where_there_is_none(
    run: DiskPath, damage: str
) -> None:
    file = run / "lease" / "driver-000001"
    with fast_claim(run) as claim:
        file.path.write_bytes(DAMAGES[damage](file.read_bytes()))
        with pytest.raises(RunIsDriven), fast_claim(run):
            pass
        assert claim.lost is None and unseal(file.read_bytes()) is not None
    file.path.write_bytes(DAMAGES[damage](file.read_bytes()))
    with fast_claim(run) as claim:
        assert claim.lost is None


def test_a_removed_lease_folder_does_not_end_the_driver_that_holds_the_run(run: DiskPath) -> None:
    with fast_claim(run) as claim:
        for entry in (run / "lease").entries():
            entry.remove()
        (run / "lease").path.rmdir()
        deadline = time.monotonic() + 10
        while not (run / "lease" / "driver-000001").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert claim.lost is None
