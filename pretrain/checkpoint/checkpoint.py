"""What a checkpoint is, and reading one: parameter slices that any world size and any ZeRO stage reads back.

    RUN/checkpoints/step-00000010-g0001/
        rank-00000.safetensors   tensors "NAME/KEY": this rank's flat part of a parameter's fp32 master, exp_avg, exp_avg_sq, ...
        rank-00000.json          its manifest: size, sha256, and which part of which parameter it holds
        commit.json              the marker, written last: the run's state, where it came from, every file's size and sha256

In: a run folder. Out: the newest checkpoint whose every byte verifies, and ranges of its tensors. Cost:
verifying reads all files once, in parallel, at 1.4 GB/s per core (sha256); a range read fetches 16 MiB at
least.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.lease import COMMIT, all_folders, is_valid, parse_folder_name
from trifold.pretrain.monitor.events import OnEvent
from trifold.pretrain.storage.safetensors_file import SafetensorsFile
from trifold.pretrain.storage.storage_path import FileDigest, StoragePath


@dataclass(frozen=True)
class CheckpointState:
    """What a run is beyond its tensors. All of it is JSON."""

    step: int  # optimizer steps done
    cursor: int  # the next row
    optimizer_step: int  # the optimizer's own count, without the skipped steps
    skips: list[tuple[int, int]]  # ranges of rows left out
    fingerprint: str  # of the data
    config: dict[str, Any]  # the resolved recipe
    heldout_loss: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    selection_loss: float | None = None  # what the best checkpoint has the lowest of; None: the held-out loss


class CorruptCheckpoint(Exception):
    """A file of a checkpoint is not what was committed: which one, and how."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file, self.reason = file, reason


class Checkpoint:
    """A committed checkpoint, open for range reads, whatever world size wrote it."""

    def __init__(self, folder: StoragePath, record: dict[str, Any], manifests: list[dict[str, Any]]) -> None:
        self.folder, self.record = folder, record
        self.state = CheckpointState(
            **record["state"] | {"skips": [(first, last) for first, last in record["state"]["skips"]]}
        )
        self._slices = merge_manifests(manifests)
        self._files: dict[str, SafetensorsFile] = {}

    @property
    def names(self) -> list[str]:
        """The parameters, sorted."""
        return sorted(self._slices)

    def keys(self, name: str) -> list[str]:
        """What is kept of a parameter: fp32, and its moments unless it was frozen."""
        return list(self._slices[name][0]["keys"])

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape."""
        return tuple(self._slices[name][0]["shape"])

    def read(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        """The elements [start, stop) of a flattened parameter and of its moments, by key: new flat host
        tensors.
        """
        return {key: self._range(name, key, start, stop) for key in self.keys(name)}

    def full(self, name: str, key: str = "fp32") -> Tensor:
        """A whole tensor, in the parameter's shape."""
        return self._range(name, key, 0, math.prod(self.shape(name))).view(self.shape(name))

    def _range(self, name: str, key: str, start: int, stop: int) -> Tensor:
        pieces = self._slices[name]
        assert 0 <= start <= stop <= math.prod(self.shape(name)), (
            f"{name}: elements {start} to {stop} of shape {self.shape(name)}"
        )
        touched = [
            piece for piece in pieces if piece["start"] < stop and start < piece["start"] + piece["count"]
        ]
        parts = []
        for piece in touched or pieces[:1]:  # an empty range has its dtype from any piece
            low, high = (min(max(at - piece["start"], 0), piece["count"]) for at in (start, stop))
            parts.append(self._open(piece["file"]).read(f"{name}/{key}", low, high))
        return torch.cat(parts)

    def _open(self, file: str) -> SafetensorsFile:
        if file not in self._files:
            self._files[file] = SafetensorsFile(self.folder / file)
        return self._files[file]


def newest_verified(run: StoragePath, on_event: OnEvent) -> Checkpoint | None:
    """The newest checkpoint that counts and whose every byte verifies; None when nothing was ever committed.

    Each newer one that was passed over is reported: on_event("checkpoint_rejected", checkpoint, file,
    reason). One rank verifies; the others `open_checkpoint` the folder that it names.

    Raises UserError where checkpoints were committed and none verifies: starting anew is then a person's
    decision.
    """
    rejected = []
    for folder in reversed(all_folders(run)):
        try:
            if not (folder / COMMIT).exists():
                raise CorruptCheckpoint(COMMIT, "missing: the save was cut off before its commit")
            if not is_valid(folder):
                raise CorruptCheckpoint(
                    COMMIT, "written after a later generation had begun: it does not count"
                )
            verify(folder)
            return open_checkpoint(folder)
        except CorruptCheckpoint as error:
            on_event("checkpoint_rejected", checkpoint=folder.name, file=error.file, reason=error.reason)
            if (folder / COMMIT).exists() and is_valid(folder):
                rejected.append(f"{folder.name}/{error}")
    if rejected:
        raise UserError(
            f"{run}: none of its {len(rejected)} checkpoints verifies ({'; '.join(rejected)}); give another"
            " run folder to start anew"
        )
    return None


def verify(folder: StoragePath) -> None:
    """Read every file of a checkpoint and compare sizes and sha256 with its marker. Raises Damaged."""
    files = read_marker(folder)["files"]
    for file, expected in files.items():
        _check_size(folder / file, expected["bytes"])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (file, expected), found in zip(
            files.items(), pool.map(_measure, (folder / file for file in files)), strict=True
        ):
            if found.sha256 != expected["sha256"]:
                raise CorruptCheckpoint(
                    file,
                    f"its sha256 is {found.sha256}, {expected['sha256']} was committed: bits have changed",
                )


def open_checkpoint(folder: StoragePath) -> Checkpoint:
    """Open a checkpoint that was verified elsewhere: marker and manifests are checked here again, tensors by
    their size alone.
    """
    record = read_marker(folder)
    manifests = []
    for file, expected in record["files"].items():
        _check_size(folder / file, expected["bytes"])
        if file.endswith(".json"):
            content = (folder / file).read_bytes()
            if hashlib.sha256(content).hexdigest() != expected["sha256"]:
                raise CorruptCheckpoint(file, "its sha256 is not the committed one: bits have changed")
            manifests.append(json.loads(content))
    return Checkpoint(folder, record, manifests)


def render_marker(record: dict[str, Any]) -> bytes:
    """A marker's bytes: the record and, last, the sha256 of it, so that each changed bit shows."""
    digest = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    return json.dumps(record | {"sha256": digest}, indent=1).encode()


def read_marker(folder: StoragePath) -> dict[str, Any]:
    """A checkpoint's record. Raises Damaged when it is missing or was changed in any bit."""
    try:
        content = (folder / COMMIT).read_bytes()
        record = json.loads(content)
        sound = (
            isinstance(record, dict)
            and render_marker({key: record[key] for key in record if key != "sha256"}) == content
        )
    except FileNotFoundError:
        raise CorruptCheckpoint(COMMIT, "missing") from None
    except ValueError:  # not UTF-8, or not JSON
        sound = False
    if not sound:
        raise CorruptCheckpoint(
            COMMIT,
            f"its {len(content)} bytes do not agree with the sha256 inside: cut short, or bits have changed",
        )
    if (record["generation"], record["state"]["step"]) != parse_folder_name(folder.name):
        raise CorruptCheckpoint(
            COMMIT, f"it speaks of step {record['state']['step']}, generation {record['generation']}"
        )
    return dict(record)


def merge_manifests(manifests: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Each parameter's slices, of all ranks, in order; ValueError unless they cover it exactly once and agree
    on shape and keys.
    """
    slices: dict[str, list[dict[str, Any]]] = {}
    for manifest in manifests:
        for name, piece in manifest["slices"].items():
            slices.setdefault(name, []).append(piece | {"file": manifest["file"]})
    for name, pieces in slices.items():
        pieces.sort(key=lambda piece: (piece["start"], piece["count"]))
        end = 0
        for piece in pieces:
            if (piece["shape"], piece["keys"]) != (pieces[0]["shape"], pieces[0]["keys"]):
                raise ValueError(
                    f"{name}: {piece['file']} and {pieces[0]['file']} disagree on its shape or moments"
                )
            if piece["start"] != end:
                raise ValueError(
                    f"{name}: {'a gap' if piece['start'] > end else 'an overlap'} at element"
                    f" {min(end, piece['start'])}, in {piece['file']}"
                )
            end += piece["count"]
        if end != math.prod(pieces[0]["shape"]):
            raise ValueError(
                f"{name}: its slices hold {end} elements, its shape {pieces[0]['shape']} has"
                f" {math.prod(pieces[0]['shape'])}"
            )
    return slices


def _measure(path: StoragePath) -> FileDigest:
    try:
        return path.measure()
    except OSError as error:  # deleted meanwhile by a group that was cut off, or the disk fails
        raise CorruptCheckpoint(path.name, f"it cannot be read: {error.strerror}") from error


def _check_size(path: StoragePath, expected: int) -> None:
    try:
        found = path.size()
    except FileNotFoundError:
        raise CorruptCheckpoint(path.name, "missing") from None
    if found != expected:
        raise CorruptCheckpoint(path.name, f"it has {found} bytes, {expected} were committed")
