"""Reading a checkpoint: ranges of its tensors for any world size and any ZeRO stage.

`newest_verified` finds the newest checkpoint of a run whose every byte verifies; `Checkpoint` reads ranges.
Cost: verifying reads all files once, in parallel, at 1.4 GB/s per core (sha256); a range read fetches 16 MiB
at least.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.format import (
    COMMIT,
    SLICES,
    CorruptCheckpoint,
    Marker,
    ParameterSlices,
    parse_slices,
    rank_file,
    read_marker,
)
from trifold.pretrain.checkpoint.lease import all_folders, claimed_run_id, is_valid, valid_folders
from trifold.pretrain.monitor.events import OnEvent
from trifold.pretrain.storage.safetensors_file import SafetensorsFile
from trifold.pretrain.storage.storage_path import FileDigest, StoragePath


class Checkpoint:
    """A committed checkpoint, open for range reads, whatever world size wrote it."""

    def __init__(self, folder: StoragePath, marker: Marker, slices: dict[str, ParameterSlices]) -> None:
        self.folder, self.marker, self.state = folder, marker, marker.state
        self._slices = slices
        self._files: dict[int, SafetensorsFile] = {}

    @property
    def names(self) -> list[str]:
        """The parameters, sorted."""
        return sorted(self._slices)

    def keys(self, name: str) -> list[str]:
        """What is kept of a parameter: fp32, and its moments unless it was frozen."""
        return list(self._slices[name].keys)

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape."""
        return tuple(self._slices[name].shape)

    def read(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        """The elements [start, stop) of a flattened parameter and of its moments, by key: new flat host
        tensors.
        """
        return {key: self._range(name, key, start, stop) for key in self.keys(name)}

    def full(self, name: str, key: str = "fp32") -> Tensor:
        """A full tensor, in the parameter's shape."""
        return self._range(name, key, 0, math.prod(self.shape(name))).view(self.shape(name))

    def _range(self, name: str, key: str, start: int, stop: int) -> Tensor:
        shape = self.shape(name)
        assert 0 <= start <= stop <= math.prod(shape), f"{name}: elements {start} to {stop} of shape {shape}"
        ranges = self._slices[name].ranges(start, stop)
        return torch.cat([self._open(rank).read(f"{name}/{key}", low, high) for rank, low, high in ranges])

    def _open(self, rank: int) -> SafetensorsFile:
        if rank not in self._files:
            self._files[rank] = SafetensorsFile(self.folder / rank_file(rank, "safetensors"))
        return self._files[rank]


def newest_verified(run: StoragePath, on_event: OnEvent) -> Checkpoint | None:
    """The newest valid checkpoint whose every byte verifies; None when nothing was ever committed.

    Each newer one that was passed over is reported: on_event("checkpoint_rejected", checkpoint, file,
    reason). One rank verifies; the others open the folder that it names (`open_checkpoint`).

    Raises UserError where checkpoints were committed and none verifies: starting again is then a person's
    decision. Raises OtherFormat for a checkpoint of another version of Trifold.
    """
    rejected = []
    for folder in reversed(all_folders(run)):
        committed = (folder / COMMIT).exists()
        try:
            if not committed:
                raise CorruptCheckpoint(COMMIT, "missing: the save was cut off before its commit")
            if not is_valid(folder):
                committed = False
                raise CorruptCheckpoint(COMMIT, "written after a later generation had begun: it is not valid")
            verify(folder)
            return open_checkpoint(folder)
        except CorruptCheckpoint as error:
            on_event("checkpoint_rejected", checkpoint=folder.name, file=error.file, reason=error.reason)
            if committed:
                rejected.append(f"{folder.name}/{error}")
    if rejected:
        raise UserError(
            f"{run}: none of its {len(rejected)} checkpoints verifies ({'; '.join(rejected)}); give another"
            " run folder to start again"
        )
    return None


def intact_markers(run: StoragePath) -> Iterator[Marker]:
    """The markers of the valid checkpoints, newest first, without those that are damaged. Tensors are not
    looked at.
    """
    for folder in reversed(valid_folders(run)):
        with suppress(CorruptCheckpoint):
            yield read_marker(folder)


def verify(folder: StoragePath) -> None:
    """Read every file of a checkpoint and compare sizes and sha256 with its marker. Raises
    CorruptCheckpoint.
    """
    marker = read_marker(folder)
    try:
        _check_content(folder, marker.files)
    except CorruptCheckpoint:
        if claimed_run_id(folder) not in (None, marker.run_id):
            raise CorruptCheckpoint(COMMIT, "it is the marker of another run's checkpoint") from None
        raise


def _check_content(folder: StoragePath, files: dict[str, FileDigest]) -> None:
    _check_sizes(folder, files)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(_measure, [folder / file for file in files])
        for (file, expected), digest in zip(files.items(), digests, strict=True):
            _check_digest(file, digest.sha256, expected)


def open_checkpoint(folder: StoragePath) -> Checkpoint:
    """Open a checkpoint that was verified elsewhere. The marker and the table of slices are checked here
    again, tensors by their size alone.
    """
    marker = read_marker(folder)
    _check_sizes(folder, marker.files)
    content = (folder / SLICES).read_bytes()
    _check_digest(SLICES, hashlib.sha256(content).hexdigest(), marker.files[SLICES])
    return Checkpoint(folder, marker, parse_slices(content))


def _check_sizes(folder: StoragePath, files: dict[str, FileDigest]) -> None:
    for file, expected in files.items():
        try:
            size = (folder / file).size()
        except FileNotFoundError:
            raise CorruptCheckpoint(file, "missing") from None
        if size != expected.bytes:
            raise CorruptCheckpoint(file, f"it has {size} bytes, {expected.bytes} were committed")


def _check_digest(file: str, sha256: str, expected: FileDigest) -> None:
    if sha256 != expected.sha256:
        raise CorruptCheckpoint(
            file, f"its sha256 is {sha256}, {expected.sha256} was committed: bits have changed"
        )


def _measure(path: StoragePath) -> FileDigest:
    try:
        return path.measure()
    except OSError as error:  # deleted meanwhile by a group that was cut off, or the disk fails
        raise CorruptCheckpoint(path.name, f"it cannot be read: {error.strerror}") from error
