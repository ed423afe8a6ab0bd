"""JSON files on a local disk, ours and strangers': a path comes in, a plain value goes out.

A file that is missing, no regular file, too large, not UTF-8 or not JSON is one sentence. Size and number of
values are checked before the file is parsed: 64 MB of "[],[],..." would become 2 GB of Python lists.
"""

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trifold.modeling.errors import UserError

MAX_BYTES = 64 << 20  # the largest tokenizer.json in use (262,144 tokens and their merges) has 33 MB
MAX_VALUES = 5_000_000  # of about 64 bytes each once parsed


def read_json(path: Path, purpose: str = "") -> Any:
    """The JSON value of a file. `purpose` says what a missing file is needed for.

    Raises UserError naming the file where it is missing, no regular file, too large, or not JSON in UTF-8.
    """
    check_regular_file(path, purpose)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes; JSON files of at most {MAX_BYTES:,} bytes are read")
    content = path.read_bytes()
    values = 1 + content.count(b",") + content.count(b"[") + content.count(b"{")
    if values > MAX_VALUES:
        raise UserError(
            f"{path} holds up to {values:,} values; JSON files of at most {MAX_VALUES:,} are read"
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): copy or write it again") from None
    return parse_json(text, path)


def parse_json(text: str, path: Path) -> Any:
    """The JSON value of a file's text. Raises UserError naming the file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not complete JSON ({error}): copy or write it again") from None


def read_json_object(path: Path, purpose: str = "") -> dict[str, Any]:
    """The JSON object of a file, as `read_json`; any other value is a UserError too."""
    content = read_json(path, purpose)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object of names and values")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_regular_file(path: Path, purpose: str = "") -> None:
    """Raise UserError for a missing path, a folder, device, FIFO or socket (a link is followed)."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise missing_file_error(path, purpose) from None
    except OSError as error:  # a link to itself, or no permission
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a regular file: replace it with a copy of the file")


def missing_file_error(path: Path, purpose: str = "") -> UserError:
    """The error for a file that does not exist; `purpose` says what it is needed for."""
    because = f": {purpose}" if purpose else ""
    if not path.parent.exists():
        return UserError(f"there is no folder {path.parent}{because}")
    if (path.parent / "config.yaml").exists():
        return UserError(
            f"{path.parent} is the folder of a run: publish it first,"
            f" trifold publish {path.parent} --out FOLDER"
        )
    return UserError(f"there is no {path}{because}")
