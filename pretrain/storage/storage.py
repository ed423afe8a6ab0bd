"""From a name in a recipe to a path of a storage."""

from __future__ import annotations

from pathlib import Path

from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.storage_path import StoragePath


def location(name: str) -> StoragePath:
    """The path, or the object store's path of a URL such as s3://bucket/prefix. Raises UserError for a URL
    that no store has.
    """
    if "://" not in name:
        return DiskPath(Path(name))
    from trifold.pretrain.storage.object_store import ObjectPath  # obstore is an extra

    return ObjectPath.from_url(name)


def checkpoint_root(run: Path, storage: str | None) -> StoragePath:
    """Where a run keeps lease/ and checkpoints/: its own folder, or its name below `storage`, the recipe's
    `checkpoints.storage`.
    """
    return DiskPath(run) if storage is None else location(storage) / run.resolve().name
