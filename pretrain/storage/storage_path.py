"""What a run's safety requires of a storage, as one Protocol: a file is there complete or not at all, and
only one of several creators succeeds.

`DiskPath` (disk.py) and `ObjectPath` (object_store.py) answer it; callers use the methods and need not know
which one they have. Both name files as pathlib.Path does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Protocol, Self


class FileDigest(NamedTuple):
    """What a file holds: its size and the sha256 of its content, in hexadecimal."""

    bytes: int
    sha256: str


def ignore(*args: Any, **facts: Any) -> None:
    """A callback that does nothing."""


@dataclass(frozen=True)
class StorageOptions:
    """How a path reads and writes, for it and all paths derived from it."""

    # called with the operation's name and the path before every operation that changes the storage, so that
    # a test can kill a process there
    before_write: Callable[[str, Any], object] = ignore
    # called with ("request_failed", place, tries, seconds, reason) when a request is going to be tried again
    on_retry: Callable[..., object] = ignore
    chunk_bytes: int = 16 << 20  # of one write, and of one part of an upload


class StoragePath(Protocol):
    """A file or folder of a storage. Missing files raise FileNotFoundError where they are read."""

    @property
    def name(self) -> str: ...

    @property
    def suffix(self) -> str: ...

    @property
    def parent(self) -> Self: ...

    @property
    def options(self) -> StorageOptions: ...

    @property
    def poll_seconds(self) -> float:
        """How often it is reasonable to look for a change."""

    def __truediv__(self, name: str) -> Self: ...

    def __lt__(self, other: Self) -> bool: ...

    def with_options(self, options: StorageOptions) -> Self:
        """The same path; options are not part of its identity and do not travel to other processes."""

    def exists(self) -> bool: ...

    def size(self) -> int: ...

    def version(self) -> tuple[int, int | str]:
        """Its size, and a time or tag that changes with the content."""

    def measure(self) -> FileDigest:
        """Read a file to its end, in bounded memory."""

    def read_bytes(self) -> bytes: ...

    def read_text(self) -> str: ...

    def read_at(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop)."""

    def open(self) -> BinaryIO:
        """The file to be read from its start."""

    def entries(self) -> list[Self]:
        """The content of a folder, sorted by name; empty where there is no such folder."""

    def files_below(self) -> list[Self]:
        """All files of a folder, at any depth, sorted."""

    def make_folder(self) -> None:
        """Make a folder and its parents; one that exists is fine."""

    def write(self, buffers: Sequence[memoryview]) -> FileDigest:
        """Write a file that does not exist yet, durably, and hash it on the way."""

    def replace(self, content: bytes) -> None:
        """Write a small file in one step: readers see nothing, the old content, or all of the new."""

    def create(self, content: bytes) -> bool:
        """Like `replace` for the first caller; for all others False, and nothing changes."""

    def remove(self) -> None:
        """Remove a file; a missing one is fine."""

    def remove_folder(self, first: str) -> None:
        """Remove a folder of files, the one named `first` before all others, so that what a crash leaves is
        not valid. Others may write or remove there meanwhile: what remains is for the next sweep.
        """
