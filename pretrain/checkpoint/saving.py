"""Saving, off the critical path: a thread writes and hashes host copies of the slices while training
continues.

A save ends as a valid checkpoint, or as an event that says why not; the run continues to its next save,
unless the storage is full or refuses writes. Cost, 0.5 GB on 2 cores that other work kept busy: `save`
returns in 0.3 ms, the thread takes 1.2-5 s (95-415 MB/s; a plain write and fsync reached 900, save_file 285),
2 MB beyond the slices themselves. Hashing alone is 1.4 GB/s.
"""

from __future__ import annotations

import errno
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy

from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.format import COMMIT, rank_file
from trifold.pretrain.checkpoint.lease import Lease, Superseded, checkpoint_folder
from trifold.pretrain.checkpoint.retention import Retention
from trifold.pretrain.checkpoint.slice import Slice
from trifold.pretrain.checkpoint.state import CheckpointState
from trifold.pretrain.checkpoint.writing import commit, find_origin, write_rank
from trifold.pretrain.config.training import CheckpointConfig
from trifold.pretrain.monitor.events import OnEvent
from trifold.pretrain.storage.storage_path import StoragePath, ignore

# errors of a disk that will take no later write either
PERMANENT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class Checkpointer:
    """One rank's saver: one save in flight, the next waits for it. Call `wait` before taking a snapshot, so
    that only one copy is ever in memory.

    Events (from the saving thread): save_started (step, bytes, waited: seconds that `save` held the caller
    up), save_written (rank, bytes, seconds); on rank 0 also save_committed (step, checkpoint, bytes of all
    ranks, seconds since `save`), checkpoint_deleted, checkpoint_swept, retention_failed; save_failed (step,
    rank, reason) when there will be no such checkpoint.

    After `wait`, `failed` is that reason, or None when this rank's last save succeeded: a run whose last save
    failed has not finished. With `permanent_failure` the next save would fail too (a full disk, a storage
    that refuses writes), so there is no use in training on.
    """

    def __init__(
        self,
        lease: Lease,
        rank: int,
        world: int,
        keep: CheckpointConfig,
        on_event: OnEvent,
        timeout: float = 900.0,
        on_written: Callable[[], object] = ignore,
    ) -> None:
        self.lease, self.rank, self.world = lease, rank, world
        self.on_event, self.timeout, self.on_written = on_event, timeout, on_written
        self.failed: str | None = None
        self.permanent_failure = False
        self._retention = Retention(lease, keep, on_event) if rank == 0 else None
        self._origin = find_origin() if rank == 0 else None
        self._thread: threading.Thread | None = None
        self._superseded: Superseded | None = None
        self._steps: set[int] = set()

    def save(self, state: CheckpointState, slices: dict[str, Slice]) -> None:
        """Start to save; every rank calls it for the same steps. A second call for a step does nothing.

        Raises Superseded (rank 0) when the save before found that a later generation has begun.
        """
        began = time.monotonic()
        self.wait()
        if state.step in self._steps:
            return
        self._steps.add(state.step)
        waited = time.monotonic() - began
        self._thread = threading.Thread(
            target=self._save,
            args=(deepcopy(state), slices, began, waited),
            name=f"save-{state.step}",
            daemon=True,
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is in flight: committed or failed on rank 0, written elsewhere. Raises
        Superseded like `save`.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._superseded is not None:
            raise self._superseded

    def _save(self, state: CheckpointState, slices: dict[str, Slice], began: float, waited: float) -> None:
        """The thread: nothing that goes wrong here ends it without an event."""
        folder = checkpoint_folder(self.lease.run, state.step, self.lease.generation)
        size = sum(tensor.nbytes for piece in slices.values() for tensor in piece.tensors.values())
        self.failed, self.permanent_failure = None, False
        try:
            self.on_event("save_started", step=state.step, bytes=size, waited=waited)
            self._write(folder, state, slices, size, began)
        except Exception as error:
            self._steps.discard(state.step)  # after a rollback it comes again
            reason = self._reason(error, folder, size)
            self.failed, self.permanent_failure = reason, _is_permanent(error)
            # a storage that refuses writes may refuse this too, or rank 0 has removed the folder meanwhile
            with suppress(OSError, UserError):
                self._clear_away(folder, reason)  # before the event, which may need the disk's space
            self.on_event("save_failed", step=state.step, rank=self.rank, reason=reason)
            return
        if self._retention is not None:
            try:
                self._retention.delete_old()
            except Exception as error:
                reason = self._reason(error, folder, size)
                self.on_event("retention_failed", step=state.step, rank=self.rank, reason=reason)

    def _write(
        self,
        folder: StoragePath,
        state: CheckpointState,
        slices: dict[str, Slice],
        size: int,
        began: float,
    ) -> None:
        if self._retention is not None:
            self._retention.sweep(state.step)
        started = time.monotonic()
        write_rank(folder, self.lease, self.rank, self.world, slices, self.on_written)
        seconds = time.monotonic() - started
        self.on_event("save_written", step=state.step, rank=self.rank, bytes=size, seconds=seconds)
        if self._origin is not None:
            total = commit(folder, self.lease, self.world, state, self._origin, self.timeout)
            seconds = time.monotonic() - began
            self.on_event(
                "save_committed", step=state.step, checkpoint=folder.name, bytes=total, seconds=seconds
            )

    def _reason(self, error: Exception, folder: StoragePath, size: int) -> str:
        run = self.lease.run
        if isinstance(error, Superseded):
            self._superseded = error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(str(run)).free + sum(path.size() for path in self._own_files(folder))
            return (
                f"the disk of {run} is full: this rank's part needs {size} bytes, {free} are free; the"
                " checkpoint before stays"
            )
        if _is_permanent(error):
            refusal = f"{run} refuses writes ({error.strerror})" if isinstance(error, OSError) else str(error)
            return f"{refusal}; the checkpoint before stays"
        if isinstance(error, OSError | UserError | RuntimeError):
            return str(error)
        return "".join(traceback.format_exception(error))

    def _clear_away(self, folder: StoragePath, reason: str) -> None:
        """Free the disk of a failed save. Rank 0 removes the folder; another rank leaves a note, so that rank
        0 need not wait for its timeout.

        A manifest is a promise, which rank 0 may be committing by now: what failed after it changes nothing.
        """
        if self.rank == 0 and not (folder / COMMIT).exists():
            folder.remove_folder(COMMIT)
        elif self.rank != 0 and not (folder / rank_file(self.rank, "json")).exists():
            for path in self._own_files(folder):
                path.remove()
            (folder / rank_file(self.rank, "failed")).replace(reason.encode())

    def _own_files(self, folder: StoragePath) -> list[StoragePath]:
        return [path for path in folder.entries() if f"rank-{self.rank:05d}" in path.name]


def _is_permanent(error: Exception) -> bool:
    return getattr(error, "permanent", False) or getattr(error, "errno", None) in PERMANENT_ERRORS
