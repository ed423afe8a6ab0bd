"""Saving, off the critical path: slices in host memory -> rank files, written and hashed in the background ->
one marker.

In: each rank's slices (host copies that nobody changes any more) and the run's state. Out: a checkpoint
folder that counts, or an event that says why not; the run goes on to its next save, unless the storage is
full or refuses writes. Ranks meet through their manifests in the folder, never through a collective. Cost,
0.5 GB on 2 cores that other work kept busy: `save` returns in 0.3 ms, the background takes 1.2-5 s (95-415
MB/s; a plain write and fsync reached 900, save_file 285), 2 MB beyond the slices themselves. Hashing alone is
1.4 GB/s.
"""

from __future__ import annotations

import errno
import hashlib
import json
import platform
import shutil
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.checkpoint import CheckpointState, merge_manifests, render_marker
from trifold.pretrain.checkpoint.lease import COMMIT, Lease, Superseded, checkpoint_folder
from trifold.pretrain.checkpoint.retention import retain, sweep
from trifold.pretrain.checkpoint.slice import Slice
from trifold.pretrain.config.training import CheckpointConfig
from trifold.pretrain.monitor.events import OnEvent
from trifold.pretrain.storage.safetensors_file import file_buffers
from trifold.pretrain.storage.storage_path import StoragePath, ignore

PERMANENT_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
)  # a disk that takes nothing more


class Checkpointer:
    """One rank's saver: one save in flight, the next waits for it. Call `wait` before taking a snapshot, and
    only one copy is ever held.

    Events (from the saving thread): save_started (step, bytes, waited: seconds that `save` held the caller
    up), save_written (rank, bytes, seconds); on rank 0 also save_committed (step, checkpoint, bytes of all
    ranks, seconds since `save`), checkpoint_deleted, checkpoint_swept, retention_failed; save_failed (step,
    rank, reason) when there will be no such checkpoint. After `wait`, `failed` is that reason, or None when
    this rank's last save went well: a run whose last save failed has not finished. `lasting`: it will not
    mend by itself (a full disk, storage that refuses writes), so there is no use in training on.
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
        self.lease, self.rank, self.world, self.keep, self.on_event, self.timeout = (
            lease,
            rank,
            world,
            keep,
            on_event,
            timeout,
        )
        self.on_written = on_written
        self.failed: str | None = None
        self.permanent_failure = False
        self._origin = provenance() if rank == 0 else {}
        self._thread: threading.Thread | None = None
        self._superseded: Superseded | None = None
        self._steps: set[int] = set()

    def save(self, state: CheckpointState, slices: dict[str, Slice]) -> None:
        """Begin to save; every rank calls it for the same steps. A step is saved once: a second call for it
        does nothing.

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
        folder = checkpoint_folder(self.lease.run, state.step, self.lease.generation)
        size = sum(tensor.nbytes for piece in slices.values() for tensor in piece.tensors.values())
        self.failed, self.permanent_failure = None, False
        try:
            self.on_event("save_started", step=state.step, bytes=size, waited=waited)
            if self.rank == 0:
                sweep(self.lease, state.step, self.on_event)
            started = time.monotonic()
            write_rank(folder, self.lease, self.rank, self.world, slices, self.on_written)
            self.on_event(
                "save_written",
                step=state.step,
                rank=self.rank,
                bytes=size,
                seconds=time.monotonic() - started,
            )
            if self.rank == 0:
                total = commit(folder, self.lease, self.world, state, self._origin, self.timeout)
                self.on_event(
                    "save_committed",
                    step=state.step,
                    checkpoint=folder.name,
                    bytes=total,
                    seconds=time.monotonic() - began,
                )
        except Exception as error:  # the run goes on to its next save, whatever it was
            self._steps.discard(state.step)  # after a rollback it comes again
            self.failed, self.permanent_failure = (
                (reason := self._reason(error, folder, size)),
                _is_permanent(error),
            )
            with suppress(
                OSError, UserError
            ):  # what refuses writes refuses this too, or rank 0 was faster to remove the folder
                self._clear_away(folder, reason)  # before the event: it may need the room
            self.on_event("save_failed", step=state.step, rank=self.rank, reason=reason)
            return
        if self.rank == 0:
            try:
                retain(self.lease, self.keep, self.on_event)
            except Exception as error:
                self.on_event(
                    "retention_failed",
                    step=state.step,
                    rank=self.rank,
                    reason=self._reason(error, folder, size),
                )

    def _reason(self, error: Exception, folder: StoragePath, size: int) -> str:
        if isinstance(error, Superseded):
            self._superseded = error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(str(self.lease.run)).free + sum(
                path.size() for path in self._is_own_folder(folder)
            )
            return f"the disk of {self.lease.run} is full: this rank's part needs {size} bytes, {free} are free; the checkpoint before stays"
        if _is_permanent(error):
            said = (
                f"{self.lease.run} refuses writes ({error.strerror})"
                if isinstance(error, OSError)
                else str(error)
            )
            return f"{said}; the checkpoint before stays"
        if isinstance(error, OSError | UserError | RuntimeError):
            return str(error)
        return "".join(traceback.format_exception(error))

    def _clear_away(self, folder: StoragePath, reason: str) -> None:
        """Free the disk of a failed save. Rank 0 ends it; another rank leaves a note, so that rank 0 need not
        wait for its timeout.

        A manifest is a promise, which rank 0 may be committing by now: what failed after it changes nothing.
        """
        if self.rank == 0 and not (folder / COMMIT).exists():
            folder.remove_folder(COMMIT)
        elif self.rank != 0 and not (folder / _file(self.rank, "json")).exists():
            for path in self._is_own_folder(folder):
                path.remove()
            (folder / _file(self.rank, "failed")).replace(reason.encode())

    def _is_own_folder(self, folder: StoragePath) -> list[StoragePath]:
        return [path for path in folder.entries() if f"rank-{self.rank:05d}" in path.name]


def write_rank(
    folder: StoragePath,
    lease: Lease,
    rank: int,
    world: int,
    slices: dict[str, Slice],
    on_written: Callable[[], object] = ignore,
) -> None:
    """Write a rank's tensors and then, in one stroke, its manifest."""
    for name, piece in slices.items():
        assert len({tensor.numel() for tensor in piece.tensors.values()}) == 1, (
            f"{name}: its tensors differ in length"
        )
    folder.make_folder()
    file = _file(rank, "safetensors")
    tensors = {
        f"{name}/{key}": tensor for name, piece in slices.items() for key, tensor in piece.tensors.items()
    }
    written = (folder / file).write(_ReportingBuffers(file_buffers(tensors), on_written))
    manifest = {
        "generation": lease.generation,
        "world": world,
        "rank": rank,
        "file": file,
        **written._asdict(),
    }
    manifest["slices"] = {
        name: {
            "start": piece.start,
            "count": piece.tensors["fp32"].numel(),
            "shape": list(piece.shape),
            "keys": sorted(piece.tensors),
        }
        for name, piece in slices.items()
    }
    (folder / _file(rank, "json")).replace(json.dumps(manifest).encode())


class _ReportingBuffers(list[memoryview]):
    """Buffers of a file; `on_written` is called for each one when the next is taken, so that a rank with a slow
    storage is not taken for one that hangs.
    """

    def __init__(self, buffers: list[memoryview], on_written: Callable[[], object]) -> None:
        super().__init__(buffers)
        self._on_written = on_written

    def __iter__(self) -> Iterator[memoryview]:
        for piece in super().__iter__():
            yield piece
            self._on_written()


def commit(
    folder: StoragePath,
    lease: Lease,
    world: int,
    state: CheckpointState,
    origin: dict[str, Any],
    timeout: float,
) -> int:
    """Wait for all manifests, see that they cover every parameter exactly once, and write the marker. Returns
    the tensor files' bytes.

    Raises Superseded, TimeoutError, ValueError (gap, overlap), RuntimeError (another rank gave up).
    """
    manifests, files, total = [], {}, 0
    deadline = time.monotonic() + timeout
    for rank in range(world):
        content = _wait_for_manifest(
            folder / _file(rank, "json"), folder / _file(rank, "failed"), deadline, timeout
        )
        manifest = json.loads(content)
        assert (manifest["generation"], manifest["world"]) == (lease.generation, world), (
            f"{folder}: rank {rank} is of another attempt"
        )
        manifests.append(manifest)
        files[manifest["file"]] = {"bytes": manifest["bytes"], "sha256": manifest["sha256"]}
        files[_file(rank, "json")] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        total += manifest["bytes"]
    merge_manifests(manifests)
    record = {
        "generation": lease.generation,
        "world": world,
        **origin,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "state": asdict(state),
        "files": files,
    }
    marker = render_marker(record)
    lease.check()
    (folder / COMMIT).replace(marker)
    lease.check()  # it may have come too late to count
    return total


def provenance() -> dict[str, Any]:
    """Where a checkpoint comes from: host, versions of the packages that shape its numbers, and the code's
    git commit, if any.
    """
    versions = {"python": platform.python_version()}
    installed = {distribution.name for distribution in metadata.distributions()}
    versions |= {
        name: metadata.version(name)
        for name in ("trifold", "torch", "deepspeed", "safetensors")
        if name in installed
    }
    git, code = shutil.which("git"), None
    if git:
        answer = subprocess.run(
            [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True
        )
        code = answer.stdout.strip() or None
    return {"host": socket.gethostname(), "versions": versions, "code": code}


def _is_permanent(error: Exception) -> bool:
    return getattr(error, "permanent", False) or getattr(error, "errno", None) in PERMANENT_ERRORS


def _wait_for_manifest(manifest: StoragePath, failed: StoragePath, deadline: float, timeout: float) -> bytes:
    pause = 0.02
    while not manifest.exists():
        if failed.exists():
            raise RuntimeError(f"{failed.name.removesuffix('.failed')} gave up: {failed.read_text()}")
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{manifest} was not there after {timeout:g} s: its rank is dead, stuck, or does not share"
                " this folder"
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 0.5)  # each look is a request where this is an object store
    return manifest.read_bytes()


def _file(rank: int, kind: str) -> str:
    return f"rank-{rank:05d}.{kind}"
