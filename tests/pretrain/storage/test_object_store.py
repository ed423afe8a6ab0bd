"""Checkpoints in an object store, against an S3 server on loopback: the same transaction, killed, fenced off,
throttled and refused.
"""

import itertools
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.pretrain.checkpoint.builders import (
    KEEP_ONE,
    Events,
    attempt,
    lease_of,
    newest_step,
    save,
    save_in,
    slices_of,
    state_of,
)
from tests.pretrain.checkpoint.failpoints import is_killed, start_process, wait_until_paused
from tests.pretrain.checkpoint.races import check_complete, cut_off
from tests.s3 import Server, served
from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.checkpoint import newest_verified
from trifold.pretrain.checkpoint.format import COMMIT
from trifold.pretrain.checkpoint.lease import (
    Lease,
    Superseded,
    checkpoint_folder,
    take_generation,
    valid_folders,
)
from trifold.pretrain.checkpoint.saving import Checkpointer
from trifold.pretrain.checkpoint.slice import Slice
from trifold.pretrain.checkpoint.writing import write_rank
from trifold.pretrain.storage import object_store
from trifold.pretrain.storage.object_store import ObjectPath, StorageDenied, StorageUnreachable
from trifold.pretrain.storage.storage import location
from trifold.pretrain.storage.storage_path import StorageOptions

EVERY = pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.proof)])
names = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(autouse=True)
def well(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(object_store, "FIRST_WAIT", 0.01)
    yield
    server.faults()
    object_store._store.cache_clear()


@pytest.fixture
def run(server: Server) -> ObjectPath:
    """A run in a bucket of its own, with a committed checkpoint of step 10 by generation 1, two ranks."""
    return begun(server)


def begun(server: Server) -> ObjectPath:
    run = ObjectPath.from_url(f"{server.bucket(f'bucket-{next(names)}')}/runs/small run")
    save(take_generation(run), 10)
    return run


def save_large(lease: Lease, step: int) -> None:
    """Twenty million bytes by one rank: more than one part."""
    checkpointer = Checkpointer(lease, 0, 1, KEEP_ONE, lambda event, **facts: None)
    checkpointer.save(state_of(step), {"large": Slice(0, (5_000_000,), {"fp32": torch.arange(5e6) + step})})
    checkpointer.wait()


def test_a_save_of_two_ranks_is_read_back_number_for_number(run: ObjectPath) -> None:
    assert newest_step(run) == 10
    names = [path.name for path in checkpoint_folder(run, 10, 1).entries()]
    assert names == [
        "commit.json",
        *(f"rank-0000{rank}.{kind}" for rank in (0, 1) for kind in ("json", "safetensors")),
        "slices.json",
    ]


@EVERY
def test_a_process_killed_at_any_operation_leaves_a_verified_checkpoint(
    server: Server, tmp_path: Path, stride: int
) -> None:
    for at in itertools.count(0, stride):
        run, told = begun(server), tmp_path / str(at)
        write_rank(
            checkpoint_folder(run, 15, 1), lease_of(run), 1, 2, slices_of(15, 1, 2)
        )  # an earlier save that was cut off
        died = is_killed(attempt, run, 20, told, at=at)
        check_complete(run, told)
        if not died:
            break
    assert at >= 25, at
    print(f"killed at {at // stride} failpoints")


@pytest.mark.proof
def test_a_group_that_was_cut_off_anywhere_in_a_save_commits_nothing_afterwards(
    server: Server, tmp_path: Path
) -> None:
    late = 0
    for at in itertools.count():
        run, pause, told = begun(server), tmp_path / f"{at}.pause", tmp_path / str(at)
        process = start_process(save_in, lease_of(run), 20, told, at=at, pause=pause)
        if not wait_until_paused(process, pause):
            break
        late += cut_off(run, process, pause, told)
    assert at >= 17 and late >= 1, (at, late)
    print(f"cut off at {at} operations, {late} markers came too late")


def test_of_all_who_create_an_object_one_succeeds_and_its_content_stays(run: ObjectPath) -> None:
    for number in range(5):
        place = run / "lease" / f"1{number:05d}"
        with ThreadPoolExecutor(8) as pool:
            made = [*pool.map(place.create, [b"%d" % who for who in range(8)])]
        assert made.count(True) == 1 and place.read_text() == str(made.index(True))


def test_a_marker_written_after_the_next_generation_began_does_not_count(run: ObjectPath) -> None:
    for rank in (0, 1):
        write_rank(checkpoint_folder(run, 20, 1), lease_of(run), rank, 2, slices_of(20, rank, 2))
    take_generation(run)
    (checkpoint_folder(run, 20, 1) / COMMIT).replace(b"{}")
    assert valid_folders(run) == [checkpoint_folder(run, 10, 1)] and newest_step(run) == 10
    with pytest.raises(Superseded, match=r"generation 2 began on .*; generation 1 may not commit"):
        lease_of(run).check()


def test_a_process_killed_in_an_upload_of_several_parts_leaves_the_checkpoint_before(
    server: Server, run: ObjectPath
) -> None:
    server.faults(slow=0.5)
    before = len(server.requests())
    process = start_process(save_large, lease_of(run), 20)
    while not any("partNumber" in line for line in server.requests()[before:]):
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    server.faults()
    assert "rank-00000.safetensors" not in [path.name for path in checkpoint_folder(run, 20, 1).entries()]
    assert newest_step(run) == 10
    lease = take_generation(run)
    save_large(lease, 20)
    found = newest_verified(run, Events())
    assert (
        found is not None
        and found.state.step == 20
        and torch.equal(found.full("large"), torch.arange(5e6) + 20)
    )
    assert torch.equal(found.read("large", 4_999_990, 5_000_000)["fp32"], torch.arange(4_999_990.0, 5e6) + 20)


def test_a_busy_store_is_asked_again_and_each_time_is_told(
    server: Server, run: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = Events()
    monkeypatch.setattr(object_store, "TRIES", 50)
    monkeypatch.setattr(object_store, "RETRY", {"max_retries": 0})  # obstore's own tries are not told
    object_store._store.cache_clear()
    before = len(server.requests())
    server.faults(busy=2)
    heard = run.with_options(StorageOptions(on_retry=events))
    save(lease_of(heard), 20, KEEP_ONE, events)
    assert newest_step(heard) == 20 and events.of("save_committed") and not events.of("save_failed")
    failed = events.of("request_failed")
    assert len(failed) == sum("503" in line for line in server.requests()[before:]) > 10
    assert all(event["place"].startswith(str(run)) for event in failed) and any(
        "SlowDown" in event["reason"] for event in failed
    )


def test_a_store_that_stays_away_is_given_up_and_the_run_may_go_on(
    server: Server, run: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = lease_of(run)
    server.faults(busy=10**9)
    monkeypatch.setattr(object_store, "TRIES", 2)
    events = Events()
    checkpointer = Checkpointer(lease, 0, 1, KEEP_ONE, events)
    checkpointer.save(state_of(20), slices_of(20, 0, 1))
    checkpointer.wait()
    assert (
        "could not be reached, tried 2 times: SlowDown" in str(checkpointer.failed)
        and not checkpointer.permanent_failure
    )
    with pytest.raises(
        StorageUnreachable, match="SlowDown"
    ):  # and nobody takes an older checkpoint for the newest meanwhile
        newest_verified(run, events)
    server.faults()
    checkpointer.save(state_of(30), slices_of(30, 0, 1))
    checkpointer.wait()
    assert checkpointer.failed is None and newest_step(run) == 30


def test_a_bucket_that_refuses_writes_is_a_lasting_failure_said_in_one_sentence(
    server: Server, run: ObjectPath
) -> None:
    lease = lease_of(run)
    server.faults(deny=True)
    events = Events()
    ranks = [Checkpointer(lease, rank, 2, KEEP_ONE, events, timeout=1) for rank in (0, 1)]
    for rank, checkpointer in enumerate(ranks):
        checkpointer.save(state_of(20), slices_of(20, rank, 2))
        checkpointer.wait()
    assert [checkpointer.permanent_failure for checkpointer in ranks] == [True, True]
    assert "was refused: AccessDenied, Access Denied; the checkpoint before stays" in str(ranks[0].failed)
    assert len(events.of("save_failed")) == 2 and not events.of("request_failed")
    assert newest_step(run) == 10


def test_resume_falls_back_from_a_damaged_or_missing_object_and_names_it(run: ObjectPath) -> None:
    save(lease_of(run), 20)
    file = checkpoint_folder(run, 20, 1) / "rank-00001.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:-1], None):
        file.remove() if damaged is None else file.replace(damaged)
        events = Events()
        found = newest_verified(run, events)
        assert (
            found is not None
            and found.state.step == 10
            and [event["file"] for event in events] == [file.name]
        )
    file.replace(content)
    assert newest_step(run) == 20


def test_mistaken_urls_are_refused_in_one_sentence(server: Server) -> None:
    with pytest.raises(UserError, match=r"s4://x/y is no place of an object store"):
        location("s4://x/y")
    with pytest.raises(
        StorageDenied,
        match=r"s3://nowhere/run/lease.* was refused: NoSuchBucket, The specified bucket does not exist$",
    ) as denied:
        take_generation(ObjectPath.from_url("s3://nowhere/run"))
    assert (
        pickle.loads(pickle.dumps(denied.value)).args == denied.value.args
    )  # rank 0's refusal travels to the others


def test_an_object_is_read_as_a_file_in_ranges(run: ObjectPath) -> None:
    run = run.with_options(StorageOptions(chunk_bytes=1000))
    content = bytes(range(256)) * 40
    (run / "text").replace(content)
    with (run / "text").open() as stream:
        assert stream.read(10) == content[:10] and stream.read() == content[10:]
