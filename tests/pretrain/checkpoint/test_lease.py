"""Leases: one holder per generation, and none of an earlier one commits."""

import itertools
import json
from pathlib import Path

import pytest

from tests.pretrain.checkpoint.failpoints import killed, note, notes, started, until_paused
from trifold.pretrain.checkpoint.lease import (
    COMMIT,
    Lease,
    Superseded,
    checkpoint_folder,
    newest_generation,
    take_generation,
    valid_folders,
)


def mark(run: Path, step: int, generation: int) -> Path:
    folder = checkpoint_folder(run, step, generation)
    folder.mkdir(parents=True)
    (folder / COMMIT).touch()
    return folder


def take_five(run: Path) -> None:
    for _ in range(5):
        note(run / "taken", "taken", {"generation": take_generation(run).generation})


def test_processes_that_race_for_generations_get_each_number_once(tmp_path: Path) -> None:
    processes = [started(take_five, tmp_path) for _ in range(6)]
    for process in processes:
        process.join(60)
    assert sorted(event["generation"] for event in notes(tmp_path / "taken")) == list(range(1, 31))


def test_a_superseded_lease_names_its_successor(tmp_path: Path) -> None:
    first = take_generation(tmp_path)
    first.check()
    take_generation(tmp_path)
    with pytest.raises(Superseded, match=r"generation 2 began on .*; generation 1 may not commit"):
        first.check()


def test_a_marker_written_after_the_next_generation_began_does_not_count(tmp_path: Path) -> None:
    take_generation(tmp_path)
    early = mark(tmp_path, 10, 1)
    take_generation(tmp_path)
    mark(tmp_path, 20, 1)
    assert valid_folders(tmp_path) == [early]
    take_generation(tmp_path)  # nor does a still later generation take it in
    assert valid_folders(tmp_path) == [early]


def test_the_newest_checkpoint_is_of_the_last_generation_even_after_it_went_back(tmp_path: Path) -> None:
    take_generation(tmp_path)
    late = mark(tmp_path, 30, 1)
    take_generation(tmp_path)
    early = mark(tmp_path, 20, 2)
    assert valid_folders(tmp_path) == [late, early]


def test_a_claim_killed_at_any_operation_leaves_the_next_claim_whole(tmp_path: Path) -> None:
    for at in itertools.count():
        run = tmp_path / str(at)
        run.mkdir()
        take_generation(run)
        folder = mark(run, 10, 1)
        if not killed(take_generation, run, at=at):
            break
        before = newest_generation(run)
        assert take_generation(run) == Lease(run, before + 1)
        mark(run, 20, 1)
        assert valid_folders(run) == [folder]
        assert all(json.loads(path.read_text()) is not None for path in (run / "lease").glob("0*"))
    assert at >= 12  # two files of six operations each


def test_a_paused_claim_is_closed_for_by_the_next_and_does_not_reopen(tmp_path: Path) -> None:
    for at in itertools.count():
        run, pause = tmp_path / str(at), tmp_path / f"{at}.pause"
        run.mkdir()
        take_generation(run)
        process = started(take_generation, run, at=at, pause=pause)
        if not until_paused(process, pause):
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
