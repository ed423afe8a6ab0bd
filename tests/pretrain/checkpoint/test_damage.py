"""Every file of a run's checkpoints and lease, damaged in eight ways: named, repaired, or shown harmless."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pretrain.checkpoint.builders import Events, lease_of, newest_step, save, slices_of, state_of
from tests.pretrain.checkpoint.make_fixture import make_run
from trifold.pretrain.checkpoint.checkpoint import newest_verified, verify
from trifold.pretrain.checkpoint.format import COMMIT, CorruptCheckpoint, Origin, unseal
from trifold.pretrain.checkpoint.lease import (
    Superseded,
    all_folders,
    checkpoint_folder,
    newest_generation,
    take_generation,
    valid_folders,
)
from trifold.pretrain.checkpoint.writing import commit, write_rank
from trifold.pretrain.config.training import CheckpointConfig
from trifold.pretrain.storage.disk import DiskPath

KEEP_ALL = CheckpointConfig(keep_last=100, keep_best=False)
NAMES = ["step-00000010-g0001", "step-00000020-g0001", "step-00000030-g0002"]


def flip(content: bytes, other: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes, bytes], bytes | None]] = {
    "flip": flip,
    "zeros": lambda content, other: bytes(len(content)),
    "truncated": lambda content, other: content[: len(content) // 2],
    "longer": lambda content, other: content + b" ",
    "deleted": lambda content, other: None,
    "another run's": lambda content, other: other,
    "empty": lambda content, other: b"",
    "garbage": lambda content, other: b"\xff\x00{not json]" * 9,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with three checkpoints by two generations, and another one of the same names, other numbers."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "run")
    other = DiskPath(folder / "other")
    for steps, world in (((10, 20), 2), ((30,), 1)):
        lease = take_generation(other)
        for step in steps:
            target = checkpoint_folder(other, step, lease.generation)
            for rank in range(world):
                write_rank(target, lease, rank, world, slices_of(step + 100, rank, world))
            commit(target, lease, world, state_of(step, 9.0), Origin("b", {}, None), timeout=5)
    return folder / "run", folder / "other"


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_of_a_checkpoint_or_lease_is_silent_or_loses_another_checkpoint(
    runs: tuple[Path, Path], tmp_path: Path, damage: str
) -> None:
    source, other = runs
    files = [file.relative_to(source) for file in sorted(source.rglob("*")) if file.is_file()]
    assert len(files) == 19
    for number, file in enumerate(files):
        run = DiskPath(tmp_path / str(number))
        shutil.copytree(source, run.path)
        original = (run.path / file).read_bytes()
        content = DAMAGES[damage](original, (other / file).read_bytes())
        if content == original:  # the two runs share their table of slices
            continue
        if content is None:
            (run.path / file).unlink()
        else:
            (run.path / file).write_bytes(content)
        check(run, file, damage)


def check(run: DiskPath, file: Path, damage: str) -> None:
    """The run continues, with an event that names the damaged file, or without harm."""
    events, case = Events(), f"{file}, {damage}"
    lease = take_generation(run)
    assert lease.generation == 3, case
    newest = newest_verified(run, events)
    assert newest is not None, case
    rejected = [(event["checkpoint"], event["file"]) for event in events]

    if file.parts[0] == "lease":
        assert newest.state.step == 30 and rejected == [], case
        assert [folder.name for folder in valid_folders(run)] == NAMES, case
        assert damage == "deleted" or file.name in [name for name, _ in lease.problems], case
        damaged = set()
    else:
        damaged = {file.parts[1]}
        if damaged == {NAMES[-1]}:
            assert newest.state.step == 20 and rejected == [(file.parts[1], file.name)], case
        else:
            assert newest.state.step == 30 and rejected == [], case
            with pytest.raises(CorruptCheckpoint) as corrupt:
                verify(run / "checkpoints" / file.parts[1])
            assert corrupt.value.file == file.name, case

    save(lease, 40, KEEP_ALL, events)
    assert newest_step(run) == 40, case
    left = {folder.name for folder in all_folders(run)}
    assert left >= set(NAMES) - damaged, case
    if damaged - left:  # without a marker it is no checkpoint: swept, and reported
        assert file.name == COMMIT and damage == "deleted" and events.of("checkpoint_swept"), case


def test_without_its_lease_folder_a_run_continues_above_its_checkpoints_and_deletes_none(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    run = DiskPath(tmp_path / "run")
    shutil.rmtree(run.path / "lease")
    lease = take_generation(run)
    assert lease.generation == 3 and lease.run_id == newest(run)
    save(lease, 20, KEEP_ALL)  # an earlier step than the newest checkpoint's
    assert newest_step(run) == 20
    assert {folder.name for folder in valid_folders(run)} >= {*NAMES, "step-00000020-g0003"}


def newest(run: DiskPath) -> str:
    checkpoint = newest_verified(run, Events())
    assert checkpoint is not None
    return checkpoint.marker.run_id


def test_a_holder_whose_lease_folder_is_removed_writes_its_claim_again_and_saves(tmp_path: Path) -> None:
    run = DiskPath(tmp_path)
    lease = take_generation(run)
    save(lease, 10, KEEP_ALL)
    shutil.rmtree(run.path / "lease")
    save(lease, 20, KEEP_ALL)
    assert newest_step(run) == 20
    assert lease_of(run).claim["claim_id"] == lease.claim["claim_id"]
    take_generation(run)
    assert "generation 2 began" in str(lease.superseded_by())


def test_two_holders_of_one_number_after_the_folder_was_removed_are_told_apart(tmp_path: Path) -> None:
    run = DiskPath(tmp_path)
    first = take_generation(run)
    shutil.rmtree(run.path / "lease")
    second = take_generation(run)
    assert first.generation == second.generation == 1
    second.check()
    # a new run without a checkpoint: nothing but the claim says that these are the same run
    assert first.run_id != second.run_id or first.superseded_by() is not None


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"generation": 999999}'])
def test_a_stray_claim_of_a_high_number_is_passed_over(
    runs: tuple[Path, Path], tmp_path: Path, content: bytes
) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    run = DiskPath(tmp_path / "run")
    holder = take_generation(run)
    (run.path / "lease" / "999999").write_bytes(content)
    assert holder.superseded_by() is None
    lease = take_generation(run)
    assert lease.generation == 4 and [name for name, _ in lease.problems] == ["999999"]
    assert len((run / "lease").entries()) < 10
    assert newest_generation(run) == 4


def test_another_runs_claim_does_not_end_an_attempt(runs: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    run, other = DiskPath(tmp_path / "run"), DiskPath(runs[1])
    holder = take_generation(run)
    for _ in range(2):
        foreign = take_generation(other)
    assert foreign.generation == 4
    shutil.copy(other.path / "lease" / "000004", run.path / "lease" / "000004")
    assert holder.superseded_by() is None
    save(holder, 40, KEEP_ALL)
    assert newest_step(run) == 40
    lease = take_generation(run)
    assert lease.generation == 5 and ("000004", "it is the claim of another run") in lease.problems
    with pytest.raises(Superseded, match="generation 5 began"):
        holder.check()


def test_a_closing_list_of_nothing_disowns_nothing_and_is_written_again(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    for content in (b"[]", b""):
        run = DiskPath(tmp_path / str(len(content)))
        shutil.copytree(runs[0], run.path)
        file = run / "lease" / "000001.closed"
        file.path.write_bytes(content)
        assert [folder.name for folder in valid_folders(run)] == NAMES
        lease = take_generation(run)
        assert [name for name, _ in lease.problems] == [file.name]
        record = unseal(file.read_bytes())
        assert record is not None and record["checkpoints"] == NAMES[:2]
        save(lease, 40, KEEP_ALL)
        assert [folder.name for folder in valid_folders(run)] == [*NAMES, "step-00000040-g0003"]
