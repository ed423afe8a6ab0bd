"""Leases: one holder per generation, and none of an earlier one commits."""

import itertools
from pathlib import Path

import pytest

from tests.pretrain.checkpoint.failpoints import (
    append_note,
    is_killed,
    read_notes,
    start_process,
    wait_until_paused,
)
from trifold.pretrain.checkpoint.format import COMMIT, unseal
from trifold.pretrain.checkpoint.lease import (
    Superseded,
    checkpoint_folder,
    newest_generation,
    take_generation,
    valid_folders,
)
from trifold.pretrain.storage.disk import DiskPath


@pytest.fixture
def run(tmp_path: Path) -> DiskPath:
    return DiskPath(tmp_path)


def mark(run: DiskPath, step: int, generation: int) -> DiskPath:
    folder = checkpoint_folder(run, step, generation)
    folder.make_folder()
    (folder / COMMIT).replace(b"")
    return folder


def take_five(run: DiskPath) -> None:
    for _ in range(5):
        append_note(run.path / "taken", "taken", {"generation": take_generation(run).generation})


def test_processes_that_race_for_generations_get_each_number_once(run: DiskPath) -> None:
    processes = [start_process(take_five, run) for _ in range(6)]
    for process in processes:
        process.join(60)
    assert sorted(event["generation"] for event in read_notes(run.path / "taken")) == list(range(1, 31))


def test_a_superseded_lease_names_its_successor(run: DiskPath) -> None:
    first = take_generation(run)
    first.check()
    take_generation(run)
    with pytest.raises(Superseded, match=r"generation 2 began on .*; generation 1 may not commit"):
        first.check()


def test_a_marker_written_after_the_next_generation_began_does_not_count(run: DiskPath) -> None:
    take_generation(run)
    early = mark(run, 10, 1)
    take_generation(run)
    mark(run, 20, 1)
    assert valid_folders(run) == [early]
    take_generation(run)  # nor does a still later generation take it in
    assert valid_folders(run) == [early]


def test_the_newest_checkpoint_is_of_the_last_generation_even_after_it_went_back(run: DiskPath) -> None:
    take_generation(run)
    late = mark(run, 30, 1)
    take_generation(run)
    early = mark(run, 20, 2)
    assert valid_folders(run) == [late, early]


def test_a_claim_killed_at_any_operation_leaves_the_next_claim_whole(tmp_path: Path) -> None:
    for at in itertools.count():
        run = DiskPath(tmp_path / str(at))
        take_generation(run)
        folder = mark(run, 10, 1)
        if not is_killed(take_generation, run, at=at):
            break
        before = newest_generation(run)
        assert take_generation(run).generation == before + 1
        mark(run, 20, 1)
        assert valid_folders(run) == [folder]
        assert all(unseal(path.read_bytes()) for path in (run / "lease").path.glob("0*"))
    assert at >= 12  # two files of six operations each


def test_a_paused_claim_is_closed_for_by_the_next_and_does_not_reopen(tmp_path: Path) -> None:
    for at in itertools.count():
        run, pause = DiskPath(tmp_path / str(at)), tmp_path / f"{at}.pause"
        take_generation(run)
        process = start_process(take_generation, run, at=at, pause=pause)
        if not wait_until_paused(process, pause):
            break
        take_generation(run)
        counting = valid_folders(run)
        mark(run, 10, 1)
        pause.unlink()
        process.join(60)
        assert process.exitcode == 0
        assert valid_folders(run) == counting == []
        assert newest_generation(run) == 3
    assert at >= 12
