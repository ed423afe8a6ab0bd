"""The operations that a run's safety hangs on, in one place: written whole and durable, or not there.

In: bytes and places, which are paths on a POSIX folder that all hosts share, or objects.py's names in an
object store. Out: durable files, with their size and sha256. Each function answers for paths here and asks
objects.py where it is no path; callers need not know. `operation` is the one seam: it is called before every
operation that changes the storage, so that a test can kill a real process there. Cost: sha256 runs at 1.4
GB/s on an idle core (blake2b: 0.95), is computed while writing, and frees the interpreter's lock.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from uuid import uuid4

if TYPE_CHECKING:
    from trifold.pretrain.storage.object_store import ObjectPath

Location: TypeAlias = "Path | ObjectPath"
CHUNK = 16 << 20  # bytes of one write


def _nothing(*args: Any, **facts: Any) -> None:
    """What `operation` does outside tests, and `told` outside runs."""


before_write_hook: Callable[..., None] = _nothing  # operation(name, place)
on_retry: Callable[..., None] = (
    _nothing  # told("request_failed", **facts) hears of each request to an object store that is tried again
)


class FileDigest(NamedTuple):
    """What a file holds: its size and the sha256 of its content, in hexadecimal."""

    bytes: int
    sha256: str


def location(name: str) -> Location:
    """The path, or what a URL such as s3://bucket/prefix stands for. Raises UserError for a URL that no store
    has.
    """
    if "://" not in name:
        return Path(name)
    from trifold.pretrain.storage.object_store import (
        ObjectPath,  # obstore is an extra, imported only where a URL is named
    )

    return ObjectPath.open(name)


def checkpoint_root(run: Path, named: str | None) -> Location:
    """Where a run keeps lease/ and checkpoints/: its own folder, or its name below the place that
    `checkpoints.storage` names.
    """
    return run if named is None else location(named) / run.resolve().name


def make_folder(folder: Location) -> None:
    """Make a folder and its parents; one that exists is fine."""
    if not isinstance(folder, Path):
        return folder.make_folder()
    if not folder.exists():
        make_folder(folder.parent)
        before_write_hook("mkdir", folder)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def write(path: Location, pieces: Sequence[memoryview]) -> FileDigest:
    """Write a file that must not exist yet, hash it on the way, and force it to disk (its folder's entry is
    not: `sync_folder`).
    """
    if not isinstance(path, Path):
        return path.write(pieces)
    digest, size = hashlib.sha256(), 0
    before_write_hook("open", path)
    with open(path, "xb", buffering=0) as file:
        for piece in pieces:
            for start in range(0, len(piece), CHUNK):
                chunk = piece[start : start + CHUNK]
                before_write_hook("write", path)
                while len(
                    chunk
                ):  # an unbuffered write may take only a part: the disk is nearly full, or a signal came
                    done = file.write(chunk)
                    digest.update(chunk[:done])
                    size += done
                    chunk = chunk[done:]
        before_write_hook("fsync", path)
        os.fsync(file.fileno())
    return FileDigest(size, digest.hexdigest())


def replace(path: Location, content: bytes) -> FileDigest:
    """Put a small file in place in one stroke: readers see nothing, or all of it."""
    if not isinstance(path, Path):
        return path.replace(content)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    written = write(temporary, [memoryview(content)])
    sync_folder(path.parent)  # what the new file speaks of is on disk before it
    before_write_hook("rename", path)
    os.replace(temporary, path)
    sync_folder(path.parent)
    return written


def create(path: Location, content: bytes) -> bool:
    """Like `replace`, for the first who comes: False, and nothing changed, where the file exists already."""
    if not isinstance(path, Path):
        return path.create(content)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    write(temporary, [memoryview(content)])
    before_write_hook("link", path)
    try:
        os.link(temporary, path)
        first = True
    except FileExistsError:
        first = False
    before_write_hook("remove", temporary)
    temporary.unlink()
    sync_folder(path.parent)
    return first


def remove_folder(folder: Location, first: str) -> None:
    """Remove a folder of files, the one named `first` before all others, so that what is left after a crash
    does not count.

    Another rank or generation may be writing or removing there at the same time: what remains is for the next
    sweep.
    """
    if not isinstance(folder, Path):
        return folder.remove_folder(first)
    try:
        for path in sorted(folder.iterdir(), key=lambda path: path.name != first):
            before_write_hook("remove", path)
            path.unlink(missing_ok=True)
            if path.name == first:
                sync_folder(folder)
        before_write_hook("rmdir", folder)
        folder.rmdir()
        sync_folder(folder.parent)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
            raise


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk."""
    before_write_hook("fsync", folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def measure(path: Location) -> FileDigest:
    """Read a whole file in bounded memory. FileNotFoundError where there is none."""
    if not isinstance(path, Path):
        return path.measure()
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(file.tell(), digest)


def entries(folder: Location) -> list[Location]:
    """What a folder holds, by name; nothing where there is no such folder."""
    if not isinstance(folder, Path):
        return folder.entries()
    return sorted(folder.iterdir()) if folder.exists() else []


def size(path: Location) -> int:
    """A file's bytes. FileNotFoundError where there is none."""
    if not isinstance(path, Path):
        return path.size()
    return path.stat().st_size


def read_at(path: Location, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file."""
    if not isinstance(path, Path):
        return path.read_at(start, stop)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(stop - start)
