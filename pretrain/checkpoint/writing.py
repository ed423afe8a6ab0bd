"""Writing a checkpoint: each rank its tensors and a manifest, then rank 0 the table of slices and the marker.

Ranks meet through their manifests in the folder, never through a collective. Cost with 1,024 ranks and 150
parameters that are each shared by all: see LOG.md.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from torch import Tensor

from trifold.pretrain.checkpoint.format import (
    COMMIT,
    SLICES,
    Manifest,
    Marker,
    Origin,
    RankSlice,
    merge_slices,
    rank_file,
    render_slices,
)
from trifold.pretrain.checkpoint.lease import Lease
from trifold.pretrain.checkpoint.slice import Slice
from trifold.pretrain.checkpoint.state import CheckpointState
from trifold.pretrain.storage.safetensors_file import file_buffers
from trifold.pretrain.storage.storage_path import FileDigest, StoragePath, ignore


def write_rank(
    folder: StoragePath,
    lease: Lease,
    rank: int,
    world: int,
    slices: dict[str, Slice],
    on_written: Callable[[], object] = ignore,
) -> None:
    """Write a rank's tensors and then its manifest, in one step."""
    tensors: dict[str, Tensor] = {}
    for name, piece in slices.items():
        lengths = {tensor.numel() for tensor in piece.tensors.values()}
        assert len(lengths) == 1, f"{name}: its tensors differ in length"
        tensors |= {f"{name}/{key}": tensor for key, tensor in piece.tensors.items()}

    folder.make_folder()
    buffers = _ReportingBuffers(file_buffers(tensors), on_written)
    digest = (folder / rank_file(rank, "safetensors")).write(buffers)
    rank_slices = {
        name: RankSlice(piece.start, piece.tensors["fp32"].numel(), list(piece.shape), sorted(piece.tensors))
        for name, piece in slices.items()
    }
    manifest = Manifest(lease.run_id, lease.generation, world, rank, digest, rank_slices)
    (folder / rank_file(rank, "json")).replace(manifest.render())


class _ReportingBuffers(list[memoryview]):
    """Buffers of a file; `on_written` is called for each one when the next is taken, so that a rank with a
    slow storage is not taken for one that hangs.
    """

    def __init__(self, buffers: list[memoryview], on_written: Callable[[], object]) -> None:
        super().__init__(buffers)
        self._on_written = on_written

    def __iter__(self) -> Iterator[memoryview]:
        for buffer in super().__iter__():
            yield buffer
            self._on_written()


def commit(
    folder: StoragePath, lease: Lease, world: int, state: CheckpointState, origin: Origin, timeout: float
) -> int:
    """Wait for all manifests, check that they cover every parameter exactly once, and write the marker.
    Returns the tensor files' bytes.

    Raises Superseded, TimeoutError, ValueError (gap, overlap), RuntimeError (another rank gave up).
    """
    manifests = []
    files: dict[str, FileDigest] = {}
    deadline = time.monotonic() + timeout
    for rank in range(world):
        content = _wait_for_manifest(folder, rank, deadline, timeout)
        manifest = Manifest.parse(content)
        expected = (lease.run_id, lease.generation, world)
        assert (manifest.run_id, manifest.generation, manifest.world) == expected, (
            f"{folder}: rank {rank} is of another attempt"
        )
        manifests.append(manifest)
        files[rank_file(rank, "safetensors")] = manifest.digest
        files[rank_file(rank, "json")] = _digest(content)

    table = render_slices(merge_slices(manifests))
    (folder / SLICES).replace(table)
    files[SLICES] = _digest(table)
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    marker = Marker(lease.run_id, lease.generation, world, origin, now, state, files)
    content = marker.render()
    lease.check()
    (folder / COMMIT).replace(content)
    lease.check()  # the marker may be too late to be valid
    return sum(manifest.digest.bytes for manifest in manifests)


def find_origin() -> Origin:
    """The host, the versions of the packages that shape a checkpoint's numbers, and the code's git commit, if
    any.
    """
    installed = {distribution.name for distribution in metadata.distributions()}
    names = [name for name in ("trifold", "torch", "deepspeed", "safetensors") if name in installed]
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in names}
    git, code = shutil.which("git"), None
    if git:
        command = [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        code = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return Origin(socket.gethostname(), versions, code)


def _digest(content: bytes) -> FileDigest:
    return FileDigest(len(content), hashlib.sha256(content).hexdigest())


def _wait_for_manifest(folder: StoragePath, rank: int, deadline: float, timeout: float) -> bytes:
    manifest, note = folder / rank_file(rank, "json"), folder / rank_file(rank, "failed")
    pause = 0.02
    while not manifest.exists():
        if note.exists():
            raise RuntimeError(f"{note.name.removesuffix('.failed')} gave up: {note.read_text()}")
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{manifest} was not there after {timeout:g} s: its rank is dead, stuck, or does not share"
                " this folder"
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 0.5)  # in an object store each look is a request
    return manifest.read_bytes()
