"""Checkpoints as transactions: killed, torn, flipped, fenced off, on a full disk; and read back by any
world.
"""

import errno
import itertools
import json
import math
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests.pretrain.checkpoint.builders import (
    KEEP_ONE,
    Events,
    attempt,
    lease_of,
    new_run,
    newest_step,
    nothing,
    save,
    save_in,
    slices_of,
    state_of,
    tensors_of,
)
from tests.pretrain.checkpoint.failpoints import (
    is_killed,
    start_process,
    wait_until_paused,
    with_hook,
)
from tests.pretrain.checkpoint.races import check_complete, cut_off
from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.checkpoint import Checkpoint, newest_verified, open_checkpoint, verify
from trifold.pretrain.checkpoint.format import COMMIT, CorruptCheckpoint, Origin, read_marker, seal
from trifold.pretrain.checkpoint.lease import (
    Lease,
    Superseded,
    all_folders,
    checkpoint_folder,
    take_generation,
)
from trifold.pretrain.checkpoint.retention import Retention, folders_to_keep
from trifold.pretrain.checkpoint.saving import Checkpointer
from trifold.pretrain.checkpoint.slice import Slice
from trifold.pretrain.checkpoint.writing import commit, write_rank
from trifold.pretrain.config.training import CheckpointConfig
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.safetensors_file import DTYPES

ORIGIN = Origin("host", {}, None)
EVERY = pytest.mark.parametrize(
    "stride", [7, pytest.param(1, marks=pytest.mark.proof)]
)  # all failpoints are a proof, some a test


@pytest.fixture
def run(tmp_path: Path) -> DiskPath:
    """A run with a committed checkpoint of step 10 by generation 1, two ranks."""
    return new_run(tmp_path / "run")


def test_a_save_of_two_ranks_is_read_back_by_stock_safetensors(run: DiskPath) -> None:
    assert newest_step(run) == 10
    folder = checkpoint_folder(run, 10, 1)
    assert sorted(os.listdir(folder)) == [
        "commit.json",
        *(f"rank-0000{rank}.{kind}" for rank in (0, 1) for kind in ("json", "safetensors")),
        "slices.json",
    ]
    for rank in (0, 1):
        stock = load_file(folder / f"rank-0000{rank}.safetensors")
        ours = {
            f"{name}/{key}": t
            for name, piece in slices_of(10, rank, 2).items()
            for key, t in piece.tensors.items()
        }
        assert stock.keys() == ours.keys() and all(torch.equal(stock[name], ours[name]) for name in ours)


def test_a_checkpoint_says_where_it_came_from(run: DiskPath) -> None:
    marker = read_marker(checkpoint_folder(run, 10, 1))
    versions = marker.origin.versions
    assert versions["torch"] == torch.__version__ and versions.keys() >= {
        "python",
        "deepspeed",
    }
    assert (
        marker.origin.code
        == subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()
    )
    assert marker.state.config == {"engine": {"zero_stage": 1}}
    assert marker.origin.host and marker.time


@EVERY
def test_a_process_killed_at_any_file_operation_leaves_a_verified_checkpoint(
    tmp_path: Path, stride: int
) -> None:
    for at in itertools.count(0, stride):
        run, told = new_run(tmp_path / str(at)), tmp_path / f"{at}.told"
        write_rank(
            checkpoint_folder(run, 15, 1), lease_of(run), 1, 2, slices_of(15, 1, 2)
        )  # an earlier save that was cut off
        died = is_killed(attempt, run, 20, told, at=at)
        check_complete(run, told)
        if not died:
            break
    assert at >= 60, at
    print(f"killed at {at // stride} failpoints")


@EVERY
def test_a_group_that_was_cut_off_anywhere_in_a_save_commits_nothing_afterwards(
    tmp_path: Path, stride: int
) -> None:
    late = 0
    for at in itertools.count(0, stride):
        run, pause, told = new_run(tmp_path / str(at)), tmp_path / f"{at}.pause", tmp_path / f"{at}.told"
        process = start_process(save_in, lease_of(run), 20, told, at=at, pause=pause)
        if not wait_until_paused(process, pause):
            break
        late += cut_off(run, process, pause, told)
    assert at >= 40 and late >= 1, (at, late)  # the marker did come too late several times, and never counted


def test_a_claim_paused_anywhere_while_the_old_group_saves_and_deletes_finds_a_checkpoint(
    tmp_path: Path,
) -> None:
    for at in itertools.count():
        run, pause = new_run(tmp_path / str(at)), tmp_path / f"{at}.pause"
        process = start_process(take_generation, run, at=at, pause=pause)
        if not wait_until_paused(process, pause):
            break
        with suppress(Superseded):
            save(lease_of(run), 20, KEEP_ONE)
        pause.unlink()
        process.join(60)
        assert newest_step(run) in (10, 20)
    assert at >= 12


@EVERY
def test_a_rank_killed_anywhere_leaves_no_marker_and_the_run_goes_on(tmp_path: Path, stride: int) -> None:
    for at in itertools.count(0, stride):
        run, events = new_run(tmp_path / str(at)), Events()
        lease = lease_of(run)
        if not is_killed(write_rank, checkpoint_folder(run, 20, 1), lease, 1, 2, slices_of(20, 1, 2), at=at):
            break
        checkpointer = Checkpointer(lease, 0, 2, KEEP_ONE, events, timeout=0.05)
        checkpointer.save(state_of(20), slices_of(20, 0, 2))
        checkpointer.wait()
        if events.of("save_failed"):
            assert "rank-00001.json was not there after 0.05 s" in events.of("save_failed")[0]["reason"]
            assert newest_step(run) == 10 and not checkpoint_folder(run, 20, 1).exists()
        else:
            assert newest_step(run) == 20  # it died after its manifest
        save(lease, 30)
        assert newest_step(run) == 30
    assert at >= 15


def damages(folder: DiskPath) -> Iterator[tuple[str, str]]:
    """Each way to hurt one file of a checkpoint, done and undone; yields the file and what a person should
    read.
    """
    for path in sorted(folder.path.iterdir()):
        content = path.read_bytes()
        path.unlink()
        yield path.name, "missing"
        for size in (0, 1, 8, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            yield (
                path.name,
                "cut short" if path.name == COMMIT else f"it has {size} bytes, {len(content)} were committed",
            )
        for bit in range(0, len(content) * 8, max(1, len(content) * 8 // 60) | 1):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            yield path.name, "bits have changed"
        path.write_bytes(content)


def test_resume_falls_back_from_any_damage_and_names_the_file(run: DiskPath) -> None:
    save(lease_of(run), 20)
    done = 0
    for file, reason in damages(checkpoint_folder(run, 20, 1)):
        events = Events()
        found = newest_verified(run, events)
        assert found is not None and found.state.step == 10, (file, reason)
        assert [event["file"] for event in events] == [file] and reason in events[0]["reason"], (
            file,
            reason,
            events,
        )
        done += 1
    assert newest_step(run) == 20 and done > 300


def test_every_byte_of_the_marker_is_guarded(run: DiskPath) -> None:
    folder = checkpoint_folder(run, 10, 1)
    marker = folder.path / COMMIT
    content = marker.read_bytes()
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        marker.write_bytes(flipped)
        with pytest.raises(CorruptCheckpoint, match=COMMIT):
            read_marker(folder)


def test_a_marker_moved_to_another_step_is_damage(run: DiskPath) -> None:
    checkpoint_folder(run, 10, 1).path.rename(checkpoint_folder(run, 40, 1).path)
    with pytest.raises(CorruptCheckpoint, match="records step 10"):
        verify(checkpoint_folder(run, 40, 1))


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_by_name(run: DiskPath) -> None:
    (checkpoint_folder(run, 10, 1) / "rank-00001.safetensors").remove()
    with pytest.raises(
        UserError,
        match=r"none of its 1 checkpoints verifies \(step-00000010-g0001/rank-00001.safetensors: missing\)",
    ):
        newest_verified(run, Events())


def test_a_run_that_never_committed_has_no_checkpoint(tmp_path: Path) -> None:
    run = DiskPath(tmp_path)
    assert newest_verified(run, Events()) is None
    write_rank(checkpoint_folder(run, 10, 1), take_generation(run), 0, 1, slices_of(10, 0, 1))
    events = Events()
    assert newest_verified(run, events) is None
    assert "cut off before its commit" in events[0]["reason"]


def test_saving_does_not_hold_up_the_caller_and_the_next_save_waits(
    run: DiskPath,
) -> None:
    gate, events = threading.Event(), Events()
    slow = with_hook(run, lambda operation, path: gate.wait(10))
    checkpointer = Checkpointer(lease_of(slow), 0, 1, CheckpointConfig(), events)
    began = time.monotonic()
    checkpointer.save(state_of(20), slices_of(20, 0, 1))
    assert time.monotonic() - began < 0.1 and not checkpoint_folder(run, 20, 1).exists()
    threading.Timer(0.3, gate.set).start()
    checkpointer.save(state_of(30), slices_of(30, 0, 1))
    assert [event["waited"] > 0.2 for event in events.of("save_started")] == [False, True]
    checkpointer.wait()
    assert [event["step"] for event in events.of("save_committed")] == [20, 30]
    assert events.of("save_committed")[0]["seconds"] > 0.2 and newest_step(run) == 30


def test_what_the_caller_changes_after_save_does_not_reach_the_checkpoint(
    run: DiskPath,
) -> None:
    gate, state = threading.Event(), state_of(20)
    slow = with_hook(run, lambda operation, path: gate.wait(10))
    checkpointer = Checkpointer(lease_of(slow), 0, 1, KEEP_ONE, nothing)
    checkpointer.save(state, slices_of(20, 0, 1))
    state.config["engine"] = {}
    gate.set()
    checkpointer.wait()
    assert newest_step(run) == 20


def test_a_crash_in_the_background_is_reported_and_the_next_save_commits(
    run: DiskPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = Events()
    checkpointer = Checkpointer(lease_of(run), 0, 1, CheckpointConfig(), events)
    with monkeypatch.context() as broken:
        broken.setattr("trifold.pretrain.checkpoint.writing.merge_slices", lambda manifests: 1 / 0)
        checkpointer.save(state_of(20), slices_of(20, 0, 1))
        checkpointer.wait()
    assert checkpointer.failed == events.of("save_failed")[0]["reason"] and "ZeroDivisionError" in str(
        checkpointer.failed
    )
    assert newest_step(run) == 10
    checkpointer.save(state_of(30), slices_of(30, 0, 1))
    checkpointer.wait()
    assert checkpointer.failed is None and newest_step(run) == 30


def test_a_full_disk_at_any_write_leaves_the_checkpoint_before(
    run: DiskPath,
) -> None:
    failed = 0
    for at in itertools.count():
        events, writes = Events(), itertools.count()

        def full(name: str, path: Path, writes: Iterator[int] = writes, at: int = at) -> None:
            if name == "write" and next(writes) == at:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

        checkpointer = Checkpointer(lease_of(with_hook(run, full)), 0, 1, CheckpointConfig(), events)
        checkpointer.save(state_of(20), slices_of(20, 0, 1))
        checkpointer.wait()
        if not events.of("save_failed"):
            break
        failed += 1
        assert "is full: this rank's part needs" in events.of("save_failed")[0]["reason"]
        assert newest_step(run) == 10 and not checkpoint_folder(run, 20, 1).exists()
    assert failed >= 5 and newest_step(run) == 20


def test_a_really_full_disk_names_needed_and_free_bytes_and_is_left_as_it_was(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small disk needs root")
    try:
        run, events = new_run(disk / "run"), Events()
        free = os.statvfs(disk).f_bavail
        checkpointer = Checkpointer(lease_of(run), 0, 1, KEEP_ONE, events)
        checkpointer.save(state_of(20), {"large": Slice(0, (100_000,), {"fp32": torch.zeros(100_000)})})
        checkpointer.wait()
        assert "needs 400000 bytes," in events.of("save_failed")[0]["reason"]
        assert newest_step(run) == 10 and os.statvfs(disk).f_bavail == free
        checkpointer.save(state_of(30), slices_of(30, 0, 1))
        checkpointer.wait()
        assert newest_step(run) == 30
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_rank_that_fails_tells_rank_0_at_once(run: DiskPath) -> None:
    def full(name: str, path: Path) -> None:
        if name == "write" and path.name == "rank-00001.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    events, lease = Events(), lease_of(with_hook(run, full))
    ranks = [Checkpointer(lease, rank, 2, KEEP_ONE, events, timeout=30) for rank in (0, 1)]
    began = time.monotonic()
    for rank, checkpointer in enumerate(ranks):
        checkpointer.save(state_of(20), slices_of(20, rank, 2))
    for checkpointer in ranks:
        checkpointer.wait()
    assert time.monotonic() - began < 5
    reasons = {event["rank"]: event["reason"] for event in events.of("save_failed")}
    assert reasons[0].startswith("rank-00001 gave up: the disk of") and reasons[1].startswith("the disk of")
    assert newest_step(run) == 10 and not checkpoint_folder(run, 20, 1).exists()


def test_an_event_that_cannot_be_recorded_does_not_hurt_a_checkpoint_that_others_commit(
    run: DiskPath,
) -> None:
    def full(event: str, **facts: Any) -> None:
        if event == "save_written":
            raise OSError(errno.ENOSPC, "No space left on device", "events.jsonl")

    ranks = [
        Checkpointer(lease_of(run), rank, 2, KEEP_ONE, on_event)
        for rank, on_event in enumerate([nothing, full])
    ]
    for rank in (1, 0):
        ranks[rank].save(state_of(20), slices_of(20, rank, 2))
        ranks[rank].wait()
    assert newest_step(run) == 20


@pytest.mark.parametrize(("start", "word"), [(31, "a gap at element 30"), (29, "an overlap at element 29")])
def test_slices_that_do_not_cover_a_parameter_exactly_once_are_not_committed(
    run: DiskPath, start: int, word: str
) -> None:
    lease = lease_of(run)
    for rank, (low, high) in enumerate([(0, 30), (start, 60)]):
        write_rank(
            checkpoint_folder(run, 20, 1),
            lease,
            rank,
            2,
            {"w": Slice(low, (10, 6), {"fp32": torch.zeros(high - low)})},
        )
    with pytest.raises(ValueError, match=f"w: {word}, in rank-00001"):
        commit(checkpoint_folder(run, 20, 1), lease, 2, state_of(20), ORIGIN, 1)
    assert newest_step(run) == 10


def test_retention_keeps_the_last_the_multiples_and_the_best(run: DiskPath) -> None:
    found = [
        (DiskPath(Path(str(step))), step, None if loss is None else (loss, float(60 - step)))
        for step, loss in [(10, 1.0), (20, 1.0), (30, None), (40, math.nan), (50, 2.0), (60, 2.5)]
    ]

    def steps(**keep: Any) -> list[int]:
        return sorted(int(folder.name) for folder in folders_to_keep(found, CheckpointConfig(**keep)))

    assert steps(keep_last=1, keep_best=False) == [60]
    assert steps(keep_last=2, keep_best=True) == [20, 50, 60]
    assert steps(keep_last=1, keep_every=20, keep_best=False) == [20, 40, 60]


def test_nothing_is_deleted_when_the_newest_does_not_verify(
    run: DiskPath,
) -> None:
    def rot(name: str, path: Path) -> None:
        if name == "rename" and path.name == COMMIT:
            file = path.with_name("rank-00000.safetensors")
            file.write_bytes(file.read_bytes()[:-1] + b"\xff")

    events = Events()
    save(lease_of(with_hook(run, rot)), 20, KEEP_ONE, events)
    assert events.of("checkpoint_rejected")[0]["file"] == "rank-00000.safetensors"
    assert newest_step(run) == 10
    save(lease_of(run), 30, KEEP_ONE, events)
    assert [folder.name for folder in all_folders(run)] == ["step-00000030-g0001"]


def test_a_group_that_lost_its_lease_writes_no_marker_and_is_told_to_end(run: DiskPath) -> None:
    lease, events = lease_of(run), Events()
    checkpointer = Checkpointer(lease, 0, 1, KEEP_ONE, events)
    take_generation(run)
    write_rank(checkpoint_folder(run, 30, 1), lease, 0, 1, slices_of(30, 0, 1))
    with pytest.raises(Superseded):
        commit(checkpoint_folder(run, 30, 1), lease, 1, state_of(30), ORIGIN, 1)
    assert not (checkpoint_folder(run, 30, 1) / COMMIT).exists()
    checkpointer.save(state_of(20), slices_of(20, 0, 1))
    with pytest.raises(Superseded, match="generation 2 began"):
        checkpointer.wait()
    with pytest.raises(Superseded):
        checkpointer.save(state_of(40), slices_of(40, 0, 1))
    assert (
        not checkpoint_folder(run, 20, 1).exists()
        and "generation 2 began" in events.of("save_failed")[0]["reason"]
    )


def test_a_group_that_lost_its_lease_deletes_nothing(run: DiskPath, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = lease_of(run)
    for rank in (0, 1):
        write_rank(checkpoint_folder(run, 20, 1), lease, rank, 2, slices_of(20, rank, 2))
    claim = seal(lease.claim | {"generation": 2, "claim_id": "other", "host": "elsewhere"})
    (run / "lease" / "000002").create(claim)  # it has begun, and not yet written down which of ours count
    monkeypatch.setattr(Lease, "check", lambda lease: None)
    commit(
        checkpoint_folder(run, 20, 1), lease, 2, state_of(20), ORIGIN, 1
    )  # our marker comes too late, or in time: it is not decided
    monkeypatch.undo()
    with pytest.raises(Superseded, match="elsewhere"):
        Retention(lease, KEEP_ONE, nothing).delete_old()
    assert [folder.name for folder in all_folders(run)] == ["step-00000010-g0001", "step-00000020-g0001"]


def test_a_folder_in_flight_is_not_swept(run: DiskPath) -> None:
    lease = lease_of(run)
    write_rank(checkpoint_folder(run, 30, 1), lease, 1, 2, slices_of(30, 1, 2))  # rank 1 is ahead
    save(lease, 20)
    assert checkpoint_folder(run, 30, 1) in all_folders(run)


def test_a_step_is_saved_once(run: DiskPath) -> None:
    events = Events()
    checkpointer = Checkpointer(lease_of(run), 0, 1, CheckpointConfig(), events)
    for _ in range(2):
        checkpointer.save(state_of(20), slices_of(20, 0, 1))
    checkpointer.wait()
    assert len(events.of("save_committed")) == 1 and not events.of("save_failed")


def test_an_empty_rank_and_an_empty_parameter_are_fine(tmp_path: Path) -> None:
    lease = take_generation(DiskPath(tmp_path))
    folder = checkpoint_folder(lease.run, 1, 1)
    write_rank(folder, lease, 0, 2, {"none": Slice(0, (0, 4), {"fp32": torch.zeros(0)})})
    write_rank(folder, lease, 1, 2, {})
    commit(folder, lease, 2, state_of(1), ORIGIN, 1)
    verify(folder)
    assert open_checkpoint(folder).full("none").shape == (0, 4)


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_partition_over_any_world_reads_back_exactly_in_any_other(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    run = DiskPath(tmp_path_factory.mktemp("run"))
    lease, world = take_generation(run), data.draw(st.integers(1, 4))
    full: dict[str, dict[str, Tensor]] = {}
    ranks: list[dict[str, Slice]] = [{} for _ in range(world)]
    for number, shape in enumerate(data.draw(st.lists(shapes, min_size=1, max_size=4))):
        size, name = math.prod(shape), f"layers.{number}.weight"
        keys = data.draw(st.sampled_from([["fp32"], ["fp32", "exp_avg", "exp_avg_sq"], ["fp32", "momentum"]]))
        full[name] = {
            key: torch.randint(0, 2, (size,)).to(data.draw(st.sampled_from(list(DTYPES)))) for key in keys
        }
        cuts = sorted(data.draw(st.lists(st.integers(0, size), min_size=world - 1, max_size=world - 1)))
        order = data.draw(st.permutations(range(world)))
        for rank, low, high in zip(order, [0, *cuts], [*cuts, size], strict=True):
            if low < high or (size == 0 and rank == order[0]):
                ranks[rank][name] = Slice(
                    low, shape, {key: tensor[low:high] for key, tensor in full[name].items()}
                )
    for rank, slices in enumerate(ranks):
        write_rank(checkpoint_folder(run, 1, 1), lease, rank, world, slices)
    commit(checkpoint_folder(run, 1, 1), lease, world, state_of(1), ORIGIN, 1)
    found = newest_verified(run, Events())
    assert found is not None and found.names == sorted(full)
    readers = data.draw(st.integers(1, 5))
    for name, tensors in full.items():
        size = tensors["fp32"].numel()
        parts = [
            found.read(name, size * reader // readers, size * (reader + 1) // readers)
            for reader in range(readers)
        ]
        for key, tensor in tensors.items():
            whole = torch.cat([part[key] for part in parts])
            assert whole.dtype == tensor.dtype and torch.equal(whole, tensor)


def test_a_range_is_a_copy_that_outlives_the_folder(run: DiskPath) -> None:
    found = newest_verified(run, Events())
    assert isinstance(found, Checkpoint)
    part = found.read("wte.weight", 3, 33)["fp32"]
    for path in found.folder.entries():
        os.truncate(str(path), 0)
    assert torch.equal(part, tensors_of(10)["wte.weight"].flatten()[3:33])
    assert json.dumps(found.state.config)
