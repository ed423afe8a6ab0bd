"""Who may commit: each attempt of a run takes the next generation, and with it closes the ones before.

    RUN/lease/000002          generation 2's claim: host, process, time
    RUN/lease/000001.closed   the checkpoints of generation 1 that count for ever, written once, by whoever claimed a later generation
    RUN/checkpoints/step-00000010-g0001/commit.json

A checkpoint counts when it has its marker and its generation is open, or was closed with it. So a group that
was cut off and still writes a marker commits nothing, however the two interleave: claiming comes before
closing, closing before the new generation reads. The run's place may be a POSIX folder or an object store:
creating a file only where there is none, and listing what is there, are all that this needs of it. Cost: a
claim is about a dozen operations on tiny files; a check lists one folder.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from dataclasses import dataclass
from typing import TypeVar

from trifold.modeling.errors import UserError
from trifold.pretrain.storage.storage_path import StoragePath

COMMIT = "commit.json"  # the marker
P = TypeVar("P", bound=StoragePath)


class Superseded(UserError):
    """A later generation of this run has begun: this process may not commit any more, and should end."""


@dataclass(frozen=True)
class Lease:
    """One attempt's right to commit checkpoints of a run, held by all its ranks."""

    run: StoragePath
    generation: int

    def check(self) -> None:
        """Raise Superseded when a later generation has begun."""
        if (reason := self.superseded_by()) is not None:
            raise Superseded(reason)

    def superseded_by(self) -> str | None:
        """Who holds a later generation, in a sentence; None where nobody does."""
        newest = newest_generation(self.run)
        if newest > self.generation:
            holder = json.loads((self.run / "lease" / f"{newest:06d}").read_text())
            return (
                f"{self.run}: generation {newest} began on {holder['host']} (process {holder['pid']}) at"
                f" {holder['time']}; generation {self.generation} may not commit any more, so this attempt"
                " ends here and that one continues"
            )
        return None


def take_generation(run: StoragePath) -> Lease:
    """Take the run's next generation: exactly one process gets each number, and no earlier generation commits
    afterwards.
    """
    folder = run / "lease"
    folder.make_folder()
    facts = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    generation = newest_generation(run) + 1
    while not (folder / f"{generation:06d}").create(json.dumps({"generation": generation, **facts}).encode()):
        generation += 1
    for earlier in range(1, generation):  # one that died between claiming and closing left it to us
        if not _closing_file(run, earlier).exists():
            names = [
                path.name for path in _folders_with_marker(run) if parse_folder_name(path.name)[0] == earlier
            ]
            _closing_file(run, earlier).create(json.dumps(names).encode())
    return Lease(run, generation)


def newest_generation(run: StoragePath) -> int:
    """The highest generation that was claimed; 0 for a run that never began."""
    return max((int(path.name) for path in (run / "lease").entries() if path.name.isdecimal()), default=0)


def valid_folders(run: P) -> list[P]:
    """The checkpoint folders that count, oldest first: by generation, then by step (a later generation may
    have gone back).
    """
    return [path for path in _folders_with_marker(run) if is_valid(path)]


def is_valid(folder: StoragePath) -> bool:
    """Whether a marked checkpoint folder counts: false when its generation was closed without it."""
    closed = _closing_file(folder.parent.parent, parse_folder_name(folder.name)[0])
    return not closed.exists() or folder.name in json.loads(closed.read_text())


def all_folders(run: P) -> list[P]:
    """All checkpoint folders, whole or not, oldest first."""
    found = (path for path in (run / "checkpoints").entries() if _NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: parse_folder_name(path.name))


def checkpoint_folder(run: P, step: int, generation: int) -> P:
    """Where a generation writes the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:08d}-g{generation:04d}"


def parse_folder_name(name: str) -> tuple[int, int]:
    """(generation, step) of a checkpoint folder's name."""
    match = _NAME.fullmatch(name)
    assert match, name
    return int(match[2]), int(match[1])


_NAME = re.compile(r"step-(\d{8,})-g(\d{4,})")


def _folders_with_marker(run: P) -> list[P]:
    return [path for path in all_folders(run) if (path / COMMIT).exists()]


def _closing_file(run: StoragePath, generation: int) -> StoragePath:
    return run / "lease" / f"{generation:06d}.closed"
