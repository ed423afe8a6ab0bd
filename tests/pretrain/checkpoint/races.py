"""What must hold after a process was killed or cut off in the middle of a save."""

from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.pretrain.checkpoint.builders import KEEP_ONE, newest_step, save
from tests.pretrain.checkpoint.failpoints import read_notes
from trifold.pretrain.checkpoint.checkpoint import verify
from trifold.pretrain.checkpoint.format import COMMIT
from trifold.pretrain.checkpoint.lease import (
    all_folders,
    checkpoint_folder,
    take_generation,
    valid_folders,
)
from trifold.pretrain.storage.storage_path import StoragePath


def check_complete(run: StoragePath, notes: Path) -> None:
    """After an attempt at step 20 that was killed: a verified checkpoint, and nothing that the next save does
    not sweep away.
    """
    lease, kinds = take_generation(run), {event["kind"] for event in read_notes(notes)}
    assert "save_failed" not in kinds
    assert newest_step(run) == 20 if "save_committed" in kinds else newest_step(run) in (10, 20)
    for folder in valid_folders(run):
        verify(folder)  # what counts is whole, also while it is being deleted
    save(lease, 30, KEEP_ONE)
    assert newest_step(run) == 30
    assert all_folders(run) == [checkpoint_folder(run, 30, lease.generation)]


def cut_off(run: StoragePath, process: BaseProcess, pause: Path, notes: Path) -> bool:
    """While a save of step 20 stands at its failpoint the next generation begins, and nothing changes
    afterwards; whether its marker was written, too late.
    """
    take_generation(run)
    step, counting = newest_step(run), valid_folders(run)
    pause.unlink()
    process.join(60)
    assert process.exitcode == 0
    assert newest_step(run) == step
    assert set(valid_folders(run)) <= set(counting)
    assert "superseded" in {event["kind"] for event in read_notes(notes)} or step == 20
    return step == 10 and (checkpoint_folder(run, 20, 1) / COMMIT).exists()
