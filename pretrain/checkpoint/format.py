"""The files of a checkpoint: their names and what is in them. This is format 1.

    RUN/checkpoints/step-00000010-g0001/      step 10, saved by generation 1 (lease.py)
        rank-00000.safetensors   tensors "NAME/KEY": this rank's flat range of a parameter's fp32 master
                                 and of its optimizer state (exp_avg, exp_avg_sq, ...)
        rank-00000.json          its manifest: size, sha256, and which range of which parameter it holds
        slices.json              the ranges of all ranks, merged: which file holds which range
        commit.json              the marker, written last: the run's state, where the checkpoint comes from,
                                 and the size and sha256 of every file

Markers, claims and lists are sealed: they hold the sha256 of the rest of their content, so that every changed
bit shows. Whoever changes anything here raises FORMAT: a checkpoint of another format is rejected by name.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.state import CheckpointState
from trifold.pretrain.storage.storage_path import FileDigest, StoragePath

FORMAT = 1
COMMIT = "commit.json"  # the marker
SLICES = "slices.json"
_NAME = re.compile(r"step-(\d{8,})-g(\d{4,})")


class CorruptCheckpoint(Exception):
    """A file of a checkpoint is not what was committed: which one, and how."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file, self.reason = file, reason


class OtherFormat(UserError):
    """A checkpoint of another version of Trifold."""


def folder_name(step: int, generation: int) -> str:
    return f"step-{step:08d}-g{generation:04d}"


def is_folder_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def parse_folder_name(name: str) -> tuple[int, int]:
    """(generation, step), in the order in which checkpoints supersede each other."""
    match = _NAME.fullmatch(name)
    assert match, name
    return int(match[2]), int(match[1])


def rank_file(rank: int, kind: str) -> str:
    """The name of a rank's file: `kind` is safetensors, json, or failed (a note that the rank gave up)."""
    return f"rank-{rank:05d}.{kind}"


def seal(record: dict[str, Any]) -> bytes:
    """A record as JSON that ends with the sha256 of the rest."""
    text = json.dumps({key: value for key, value in record.items() if key != "sha256"})
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{text[:-1]}, "sha256": "{digest}"}}\n'.encode()


def unseal(content: bytes) -> dict[str, Any] | None:
    """The record of sealed bytes, with its sha256; None where they were changed in any bit."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):  # not UTF-8, or not JSON
        return None
    if not isinstance(record, dict):
        return None
    return record if seal(record) == content else None


class RankSlice(NamedTuple):
    """The range [start, start + length) of a flattened parameter that one rank holds, under each key."""

    start: int
    length: int
    shape: list[int]  # of the parameter
    keys: list[str]  # "fp32", and unless the parameter is frozen its moments


@dataclass(frozen=True)
class Manifest:
    """What one rank wrote."""

    run_id: str
    generation: int
    world: int
    rank: int
    digest: FileDigest  # of its tensors
    slices: dict[str, RankSlice]

    def render(self) -> bytes:
        return json.dumps({"format": FORMAT, **vars(self)}).encode()

    @classmethod
    def parse(cls, content: bytes) -> Manifest:
        fields = json.loads(content)
        assert fields.pop("format") == FORMAT
        slices = {name: RankSlice(*piece) for name, piece in fields["slices"].items()}
        return cls(**fields | {"digest": FileDigest(*fields["digest"]), "slices": slices})


@dataclass(frozen=True)
class ParameterSlices:
    """A parameter's ranges in all files, in order: rank `ranks[i]` saved [starts[i], starts[i + 1]).

    A parameter of 10 elements, saved by two ranks: starts [0, 6], ranks [0, 1]. Its elements 4 to 8
    (excluded) are 4 to 6 of what rank 0's file holds and 0 to 2 of what rank 1's file holds.
    """

    shape: list[int]
    keys: list[str]
    starts: list[int]
    ranks: list[int]

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(rank, start, stop) of the elements [start, stop), relative to what the rank's file holds. An empty
        range is one of them, for its dtype.
        """
        index = max(0, bisect_right(self.starts, start) - 1)
        if start == stop:
            yield self.ranks[index], 0, 0
        while start < stop:
            first = self.starts[index]
            end = self.starts[index + 1] if index + 1 < len(self.starts) else prod(self.shape)
            if start < min(stop, end):
                yield self.ranks[index], start - first, min(stop, end) - first
            start = max(start, end)
            index += 1


def merge_slices(manifests: list[Manifest]) -> dict[str, ParameterSlices]:
    """Each parameter's ranges of all ranks; ValueError unless they cover it exactly once and agree on its
    shape and keys.
    """
    pieces: dict[str, list[tuple[int, int, int, RankSlice]]] = {}
    for manifest in manifests:
        for name, piece in manifest.slices.items():
            pieces.setdefault(name, []).append((piece.start, piece.length, manifest.rank, piece))
    return {name: _merge(name, sorted(ranges, key=_by_position)) for name, ranges in pieces.items()}


def _by_position(entry: tuple[int, int, int, RankSlice]) -> tuple[int, int, int]:
    return entry[:3]


def _merge(name: str, pieces: list[tuple[int, int, int, RankSlice]]) -> ParameterSlices:
    _, _, first_rank, first = pieces[0]
    end = 0
    for start, count, rank, piece in pieces:
        file = rank_file(rank, "safetensors")
        if (piece.shape, piece.keys) != (first.shape, first.keys):
            other = rank_file(first_rank, "safetensors")
            raise ValueError(f"{name}: {file} and {other} disagree on its shape or moments")
        if start != end:
            problem = "a gap" if start > end else "an overlap"
            raise ValueError(f"{name}: {problem} at element {min(end, start)}, in {file}")
        end += count
    if end != prod(first.shape):
        raise ValueError(
            f"{name}: its slices hold {end} elements, its shape {first.shape} has {prod(first.shape)}"
        )
    starts, ranks = [piece[0] for piece in pieces], [piece[2] for piece in pieces]
    return ParameterSlices(first.shape, first.keys, starts, ranks)


def render_slices(slices: dict[str, ParameterSlices]) -> bytes:
    return json.dumps({name: vars(piece) for name, piece in slices.items()}).encode()


def parse_slices(content: bytes) -> dict[str, ParameterSlices]:
    return {name: ParameterSlices(**piece) for name, piece in json.loads(content).items()}


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint was made."""

    host: str
    versions: dict[str, str]  # of the packages that shape its numbers
    code: str | None  # the git commit


@dataclass(frozen=True)
class Marker:
    """What makes a folder a checkpoint."""

    run_id: str  # one for all checkpoints and claims of a run (lease.py)
    generation: int
    world: int
    origin: Origin
    time: str
    state: CheckpointState
    files: dict[str, FileDigest]
    sha256: str = ""  # of the marker itself; empty before it is written

    def render(self) -> bytes:
        fields = {"format": FORMAT, **vars(self), "origin": vars(self.origin), "state": self.state.to_json()}
        fields["files"] = {name: digest._asdict() for name, digest in self.files.items()}
        return seal(fields)

    @classmethod
    def parse(cls, folder: StoragePath, content: bytes) -> Marker:
        """Raises CorruptCheckpoint where a bit was changed, OtherFormat for another version's."""
        fields = unseal(content)
        if fields is None:
            raise CorruptCheckpoint(
                COMMIT,
                f"its {len(content)} bytes do not agree with the sha256 inside: cut short,"
                " or bits have changed",
            )
        number = fields.pop("format", None)
        if number != FORMAT:
            has = "no format number" if number is None else f"format {number}"
            raise OtherFormat(
                f"{folder} has {has}, and this version of Trifold reads format {FORMAT}: continue the run"
                " with the version that saved it, or name another run folder"
            )
        files = {name: FileDigest(**digest) for name, digest in fields["files"].items()}
        state = CheckpointState.from_json(fields["state"])
        marker = cls(**fields | {"origin": Origin(**fields["origin"]), "state": state, "files": files})
        if (marker.generation, state.step) != parse_folder_name(folder.name):
            raise CorruptCheckpoint(COMMIT, f"it records step {state.step}, generation {marker.generation}")
        return marker


def read_marker(folder: StoragePath) -> Marker:
    """A checkpoint's marker. Raises CorruptCheckpoint where it is missing or damaged, OtherFormat for another
    version's.
    """
    try:
        content = (folder / COMMIT).read_bytes()
    except FileNotFoundError:
        raise CorruptCheckpoint(COMMIT, "missing") from None
    return Marker.parse(folder, content)
