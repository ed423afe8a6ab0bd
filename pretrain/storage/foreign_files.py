"""What is checked of a folder that a stranger may have written, before anything in it is used.

No code of a folder runs, no file outside it is named by one of its files, and nothing but regular files is
opened: a FIFO would wait for ever, a device has no end. Links are followed, so that the snapshots of a hub
cache open (snapshots/COMMIT/config.json -> ../../blobs/HASH).
"""

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from trifold.modeling.errors import UserError
from trifold.pretrain.storage.json_files import read_json_object

MAX_FILES = 10_000
_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")
# Settings by which transformers imports Python files, compiles kernels from the hub, or opens other weights.
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code")
_OTHER_FILES = ("fast_tokenizer_files", "transformers_weights", "gguf_file")
_KERNELS = ("attn_implementation", "experts_implementation")  # also with a leading underscore
_BUILT_IN = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "grouped_mm")


def check_folder(folder: Path) -> None:
    """Raise UserError where a folder holds anything but regular files and folders, or one of its JSON files
    asks for code or for files elsewhere.
    """
    names = {path.name for path in _entries(folder) if path.parent == folder}
    if "adapter_config.json" in names:
        raise UserError(
            f"{folder} holds adapters (adapter_config.json), which name a model elsewhere:"
            " merge them into it and"
            " save that"
        )
    for name in sorted(names & set(_SETTINGS)):
        check_settings(folder / name, read_json_object(folder / name))


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise UserError where a config file asks for code or for files elsewhere."""
    for name in _CODE:
        if settings.get(name):
            raise UserError(
                f"{path} sets {name}, which would run code from the folder; Trifold runs none:"
                " remove it, and use"
                " a class that transformers has"
            )
    for name in (*_KERNELS, *(f"_{name}" for name in _KERNELS)):
        value = settings.get(name)
        if isinstance(value, str) and value not in _BUILT_IN:
            raise UserError(f"{path} sets {name} = {value!r}, which would run code from elsewhere: remove it")
    for name in _OTHER_FILES:
        value = settings.get(name)
        files = value if isinstance(value, list) else [value]
        for file in files:
            if file is not None and not (isinstance(file, str) and is_plain_name(file)):
                raise UserError(f"{path} names {file!r} in {name}; only files of the folder itself are read")


def is_plain_name(name: str) -> bool:
    """Whether a name in a file of a folder names a file in this folder: no separator, drive or `..`."""
    parts = {len(PurePosixPath(name).parts), len(PureWindowsPath(name).parts)}
    return parts == {1} and name not in (".", "..") and not any(mark in name for mark in "/\\:\0")


def _entries(folder: Path) -> Iterator[Path]:
    """All files below a folder. Raises UserError for what is neither a file nor a folder, for a link that
    leads nowhere, and for too many files.
    """
    count = 0
    for parent, folders, files in os.walk(folder):  # does not follow links to folders
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(parent) / name
            count += 1
            if count > MAX_FILES:
                raise UserError(f"{folder} holds over {MAX_FILES:,} files, and is no folder of a model")
            try:
                mode = path.stat().st_mode
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from None
            if not stat.S_ISREG(mode):
                raise UserError(f"{path} is not a regular file: replace it with a copy of the file")
            yield path
