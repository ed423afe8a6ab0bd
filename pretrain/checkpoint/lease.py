"""Who may commit: each attempt of a run takes the next generation, and closes the generations before it.

    RUN/lease/000002          generation 2's claim: run, holder, time
    RUN/lease/000001.closed   the checkpoints of generation 1 that stay valid, written once, by the claim
                              of a later generation

A checkpoint is valid when it has its marker and its generation is open, or was closed with it. So a group
that was cut off and still writes a marker commits nothing, however the two interleave: claiming comes before
closing, closing before the new generation reads.

These files are sealed and name their run (format.py). One that is damaged, or of another run, never makes a
checkpoint invalid, and never ends an attempt: it is passed over, reported (`Lease.problems`) and written
again. Where the folder is gone, generations continue above those of the checkpoints, and a running attempt
writes its claim again. All that this needs of a storage is to create a file only where there is none, and to
list a folder. Cost: a claim is about a dozen operations on tiny files, a check lists one folder and reads one
file.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.format import (
    COMMIT,
    CorruptCheckpoint,
    folder_name,
    is_folder_name,
    parse_folder_name,
    read_marker,
    seal,
    unseal,
)
from trifold.pretrain.storage.storage_path import StoragePath

P = TypeVar("P", bound=StoragePath)


class Superseded(UserError):
    """A later generation of this run has begun: this process may not commit any more, and should end."""


@dataclass(frozen=True)
class Lease:
    """One attempt's right to commit checkpoints of a run, held by all its ranks."""

    run: StoragePath
    generation: int
    claim: dict[str, Any] = field(compare=False)  # the content of its claim
    problems: tuple[tuple[str, str], ...] = field(default=(), compare=False)  # (file, what is wrong with it)

    @property
    def run_id(self) -> str:
        return str(self.claim["run_id"])

    def check(self) -> None:
        """Raise Superseded when a later generation has begun."""
        if (reason := self.superseded_by()) is not None:
            raise Superseded(reason)

    def superseded_by(self) -> str | None:
        """Who holds a later generation, in a sentence; None where nobody does."""
        names = [entry.name for entry in (self.run / "lease").entries()]
        later = [number for number in map(_parse_claim_name, names) if number > self.generation]
        for number in [*sorted(later, reverse=True), self.generation]:
            holder, _ = _read_claim(self.run, number)
            if holder is None or holder["run_id"] != self.run_id:
                continue  # damaged, or another run's
            if holder["claim_id"] == self.claim["claim_id"]:
                return None
            return (
                f"{self.run}: generation {number} began on {holder['host']} (process {holder['pid']}) at"
                f" {holder['time']}; generation {self.generation} may not commit any more, so this attempt"
                " ends here and that one continues"
            )
        self._restore_claim()
        return None

    def _restore_claim(self) -> None:
        """Write our own claim again, which is gone or damaged."""
        (self.run / "lease").make_folder()
        file, content = _claim_file(self.run, self.generation), seal(self.claim)
        if not file.create(content):
            holder, _ = _read_claim(self.run, self.generation)
            if holder is None or holder["run_id"] != self.run_id:
                file.replace(content)


def take_generation(run: StoragePath) -> Lease:
    """Take the run's next generation: exactly one process gets each number, and no earlier generation commits
    afterwards.
    """
    (run / "lease").make_folder()
    while True:
        known = _read_lease_folder(run)
        generation = max(known.generations, default=0) + 1
        while generation in known.taken:  # by a file that is no claim of this run
            generation += 1
        claim = _new_claim(known.run_id, generation)
        if _claim_file(run, generation).create(seal(claim)):
            break

    problems = list(known.problems)
    for earlier in sorted(known.generations):  # one that died between claiming and closing left it to us
        problems += _close(run, earlier, known.run_id)
    return Lease(run, generation, claim, tuple(problems))


def newest_generation(run: StoragePath) -> int:
    """The highest generation that was claimed or has saved; 0 for a run that never began."""
    return max(_read_lease_folder(run).generations, default=0)


def valid_folders(run: P) -> list[P]:
    """The checkpoint folders that are valid, oldest first: by generation, then by step (a later generation
    may have gone back). Their content is not looked at.
    """
    return valid_among(run, all_folders(run))


def valid_among(run: StoragePath, folders: list[P]) -> list[P]:
    """Those of some checkpoint folders of a run that are valid."""
    folders = [path for path in folders if (path / COMMIT).exists()]
    closed = {number: _closed_with(run, number) for number in {_generation(path) for path in folders}}
    return [path for path in folders if _is_among(path, closed[_generation(path)])]


def is_valid(folder: StoragePath) -> bool:
    """Whether a checkpoint folder that has its marker is valid: false when its generation was closed without
    it.
    """
    return _is_among(folder, _closed_with(folder.parent.parent, _generation(folder)))


def claimed_run_id(folder: StoragePath) -> str | None:
    """The run whose generation claims a checkpoint folder; None where its claim is gone or damaged."""
    claim, _ = _read_claim(folder.parent.parent, _generation(folder))
    return str(claim["run_id"]) if claim else None


def all_folders(run: P) -> list[P]:
    """All checkpoint folders, complete or not, oldest first."""
    folders = [path for path in (run / "checkpoints").entries() if is_folder_name(path.name)]
    return sorted(folders, key=lambda path: parse_folder_name(path.name))


def checkpoint_folder(run: P, step: int, generation: int) -> P:
    """Where a generation writes the checkpoint of a step."""
    return run / "checkpoints" / folder_name(step, generation)


class _LeaseFolder(NamedTuple):
    """What is known of the generations of a run."""

    run_id: str
    generations: set[int]  # that were claimed, closed, or have saved
    taken: set[int]  # numbers whose claim exists, also where it is damaged or another run's
    problems: list[tuple[str, str]]  # (file, what is wrong with it)


def _read_lease_folder(run: StoragePath) -> _LeaseFolder:
    names = [entry.name for entry in (run / "lease").entries()]
    taken = {number for name in names if (number := _parse_claim_name(name))}
    claims, problems = {}, []
    for number in sorted(taken):
        claim, problem = _read_claim(run, number)
        if claim is not None:
            claims[number] = claim
        elif problem:
            problems.append((_claim_name(number), problem))

    checkpoints = all_folders(run)
    run_id = _find_run_id(checkpoints, claims)
    generations = {_generation(path) for path in checkpoints}
    for number, claim in claims.items():
        if claim["run_id"] == run_id:
            generations.add(number)
        else:
            problems.append((_claim_name(number), "it is the claim of another run"))
    for name in names:
        number = _parse_claim_name(name.removesuffix(".closed"))
        if name.endswith(".closed") and number and _read_closing(run, number, run_id)[0] is not None:
            generations.add(number)
    return _LeaseFolder(run_id, generations, taken, problems)


def _find_run_id(checkpoints: list[P], claims: dict[int, dict[str, Any]]) -> str:
    """The id of the run: that of most of its claims and newest checkpoints, one of which may have been copied
    from another run; a new one for a new run.
    """
    votes = Counter(str(claim["run_id"]) for claim in claims.values())
    for folder in checkpoints[-3:]:
        with suppress(CorruptCheckpoint):
            votes[read_marker(folder).run_id] += 1
    return votes.most_common(1)[0][0] if votes else uuid4().hex


def _new_claim(run_id: str, generation: int) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "generation": generation,
        "claim_id": uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _read_claim(run: StoragePath, generation: int) -> tuple[dict[str, Any] | None, str]:
    """A claim, or None and what is wrong with it; nothing is wrong where there is none."""
    claim, problem = _read_sealed(_claim_file(run, generation))
    if claim is not None and (claim.get("generation") != generation or "claim_id" not in claim):
        return None, f"it is no claim of generation {generation}"
    return claim, problem


def _close(run: StoragePath, generation: int, run_id: str) -> list[tuple[str, str]]:
    """Write down which checkpoints of a generation are valid, where nobody has. Returns what was wrong with a
    list that was there.
    """
    file = _closing_file(run, generation)
    names, problem = _read_closing(run, generation, run_id)
    if names is not None:
        return []
    folders = [path for path in all_folders(run) if _generation(path) == generation]
    marked = [path.name for path in folders if (path / COMMIT).exists()]
    content = seal({"run_id": run_id, "generation": generation, "checkpoints": marked})
    if not file.create(content) and problem:
        file.replace(content)
    return [(file.name, problem)] if problem else []


def _closed_with(run: StoragePath, generation: int) -> set[str] | None:
    """The checkpoints that a generation was closed with; None where it is open, or the list is damaged."""
    claim, _ = _read_claim(run, generation)
    return _read_closing(run, generation, claim["run_id"] if claim else None)[0]


def _read_closing(run: StoragePath, generation: int, run_id: str | None) -> tuple[set[str] | None, str]:
    """The list of a closed generation, or None and what is wrong with it. `run_id` None: of whatever run."""
    record, problem = _read_sealed(_closing_file(run, generation))
    if record is None:
        return None, problem
    known = "checkpoints" in record and record.get("generation") == generation
    if not known or record.get("run_id") != (run_id or record.get("run_id")):
        return None, f"it does not list the checkpoints of this run's generation {generation}"
    return set(record["checkpoints"]), ""


def _read_sealed(file: StoragePath) -> tuple[dict[str, Any] | None, str]:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None, ""
    record = unseal(content)
    return record, "" if record else f"its {len(content)} bytes do not agree with the sha256 inside"


def _is_among(folder: StoragePath, names: set[str] | None) -> bool:
    return names is None or folder.name in names


def _generation(folder: StoragePath) -> int:
    return parse_folder_name(folder.name)[0]


def _parse_claim_name(name: str) -> int:
    """The generation that a file of the lease folder claims; 0 for other files."""
    return int(name) if name.isascii() and name.isdecimal() and len(name) <= 12 else 0


def _claim_name(generation: int) -> str:
    return f"{generation:06d}"


def _claim_file(run: StoragePath, generation: int) -> StoragePath:
    return run / "lease" / _claim_name(generation)


def _closing_file(run: StoragePath, generation: int) -> StoragePath:
    return run / "lease" / f"{_claim_name(generation)}.closed"
