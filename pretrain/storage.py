"""The file operations that a run's safety hangs on, in one place: written whole and forced to disk, or not there.

In: bytes and paths on a POSIX folder that all hosts share. Out: durable files, with their size and sha256.
`operation` is the one seam: it is called before every operation that changes the disk, so that a test can kill a real process there.
Cost: sha256 runs at 1.4 GB/s on an idle core (blake2b: 0.95), is computed while writing, and frees the interpreter's lock.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

CHUNK = 16 << 20  # bytes of one write


def _nothing(name: str, path: Path) -> None:
    """What `operation` does outside tests."""


operation: Callable[[str, Path], None] = _nothing


class Written(NamedTuple):
    """What a file holds: its size and the sha256 of its content, in hexadecimal."""

    bytes: int
    sha256: str


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; one that exists is fine."""
    if not folder.exists():
        make_folder(folder.parent)
        operation("mkdir", folder)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def write(path: Path, pieces: Iterable[memoryview]) -> Written:
    """Write a file that must not exist yet, hash it on the way, and force it to disk (its folder's entry is not: `sync_folder`)."""
    digest, size = hashlib.sha256(), 0
    operation("open", path)
    with open(path, "xb", buffering=0) as file:
        for piece in pieces:
            for start in range(0, len(piece), CHUNK):
                chunk = piece[start : start + CHUNK]
                operation("write", path)
                while len(chunk):  # an unbuffered write may take only a part: the disk is nearly full, or a signal came
                    done = file.write(chunk)
                    digest.update(chunk[:done])
                    size += done
                    chunk = chunk[done:]
        operation("fsync", path)
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def replace(path: Path, content: bytes) -> Written:
    """Put a small file in place in one stroke: readers see nothing, or all of it."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    written = write(temporary, [memoryview(content)])
    sync_folder(path.parent)  # what the new file speaks of is on disk before it
    operation("rename", path)
    os.replace(temporary, path)
    sync_folder(path.parent)
    return written


def create(path: Path, content: bytes) -> bool:
    """Like `replace`, for the first who comes: False, and nothing changed, where the file exists already."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    write(temporary, [memoryview(content)])
    operation("link", path)
    try:
        os.link(temporary, path)
        first = True
    except FileExistsError:
        first = False
    operation("remove", temporary)
    temporary.unlink()
    sync_folder(path.parent)
    return first


def remove_folder(folder: Path, first: str) -> None:
    """Remove a folder of files, the one named `first` before all others, so that what is left after a crash does not count.

    Another rank or generation may be writing or removing there at the same time: what remains is for the next sweep.
    """
    try:
        for path in sorted(folder.iterdir(), key=lambda path: path.name != first):
            operation("remove", path)
            path.unlink(missing_ok=True)
            if path.name == first:
                sync_folder(folder)
        operation("rmdir", folder)
        folder.rmdir()
        sync_folder(folder.parent)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
            raise


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk."""
    operation("fsync", folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def measure(path: Path) -> Written:
    """Read a whole file in bounded memory. FileNotFoundError where there is none."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Written(file.tell(), digest)
