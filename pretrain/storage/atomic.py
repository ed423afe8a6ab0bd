"""Replace a file or a folder on disk in one step.

Readers see the old content or all of the new content, never a mixture. The new content is written beside the
old one under a hidden name, forced to disk and renamed, so that a crash at any point leaves one of the two.
Files that are made here have the permissions that the umask gives.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

BeforeWrite = Callable[[str, Path], None]  # called with the operation's name before each change of the disk


def ignore(operation: str, path: Path) -> None:
    """A BeforeWrite that does nothing."""


def replace_file(path: Path, content: bytes | str) -> None:
    """Write a file in one step. Text is encoded as UTF-8."""
    with open_replacement(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def open_replacement(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which takes the place of `path` when the block ends. An error leaves `path` as
    it was.
    """
    temporary = hidden_sibling(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(folder: Path, overwrite: bool = True) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when the block ends. An error leaves `folder`
    as it was. With `overwrite=False` a `folder` that is not empty by then is an OSError.
    """
    temporary = hidden_sibling(folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        move_folder(temporary, folder, overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_folder(source: Path, target: Path, overwrite: bool = True) -> None:
    """Name a finished folder: force its files to disk, set their permissions by the umask, rename."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            _apply_umask(path)
            _sync(path)
    for path in (*source.rglob("*"), source):
        if path.is_dir():
            sync_folder(path)

    old = hidden_sibling(target)
    if not (overwrite and target.exists()):
        return rename_durably(source, target)
    os.rename(target, old)  # a folder that is not empty cannot be renamed over
    try:
        rename_durably(source, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def rename_durably(source: Path, target: Path, before: BeforeWrite = ignore) -> None:
    """Rename within a folder; what the new name refers to is on disk before the name is."""
    sync_folder(target.parent, before)
    before("rename", target)
    os.replace(source, target)
    sync_folder(target.parent, before)


def sync_folder(folder: Path, before: BeforeWrite = ignore) -> None:
    """Force a folder's entries to disk."""
    before("fsync", folder)
    _sync(folder)


def hidden_sibling(path: Path) -> Path:
    """A name beside `path` that nobody uses."""
    return path.with_name(f".{path.name}.{uuid4().hex}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _apply_umask(path: Path) -> None:
    """Some libraries create files as 0600. Reading the umask means setting it, which other threads would see;
    the mode of a new file shows it as well.
    """
    probe = hidden_sibling(path)
    try:
        probe.touch()
        path.chmod(probe.stat().st_mode | path.stat().st_mode & 0o111)
    finally:
        probe.unlink(missing_ok=True)
