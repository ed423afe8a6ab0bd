"""Text in, documents out, one at a time: the memory needed is that of one document (Parquet: of one batch of
rows).

Hub sets are read through `datasets`. Everything else is read here, because `datasets` changes text: its text
loader turns "\\r\\n" and a lone "\\r" into "\\n", its JSON loader turns a column of texts that look like
dates into timestamps, and neither can name the byte or the line that is wrong. Its Parquet loader reads
names as patterns and rejects files without rows.

Cost: 48 MB of books from .gz in 0.5 s; importing `datasets` takes seconds, so it is imported where it is
needed. A line of 100 MB costs twice its size in memory while it is read.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from glob import has_magic, iglob
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from trifold.modeling.errors import UserError
from trifold.pretrain.config.pretraining import SourceConfig
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.fingerprint import fingerprint
from trifold.pretrain.storage.storage import location
from trifold.pretrain.storage.storage_path import StoragePath

_KINDS = (".txt", ".jsonl", ".parquet")
_READ_BYTES = 1 << 20  # of a line that are read at once
_MAX_EXPANSION = 200  # text expands to 2 to 20 times its .gz, a bomb to 1,000 times
_BOMB_BYTES = 16 << 20  # a shorter line is not suspected


def documents(source: SourceConfig) -> Iterator[str]:
    """The documents of a source in a fixed order: files by name, each from its start.

    Plain text: a document is a run of lines up to an empty line ("blank_line"), with its inner line ends as
    they are and its last one removed, or each line ("line"). An empty line holds nothing at all: one that
    holds spaces is text. No document spans two files. Rows of JSONL, Parquet and hub sets are one document
    each; a null is an empty document. A .json file is SQuAD's: a document is a question and its context.
    Raises UserError for anything that cannot be read, and for a source in which no document has any text.
    """
    if source.hub:
        texts = _hub(source)
    else:
        texts = chain.from_iterable(_file(path, source) for path in corpus_files(source))
    has_text = False
    for text in texts:
        has_text = has_text or bool(text)
        yield text
        del text  # a document of 100 MB is not held while the next is read
    if not has_text:
        raise UserError(
            f"{source.path or source.hub} holds 0 documents with text; point the source at a corpus that is"
            " not empty"
        )


def corpus_files(source: SourceConfig) -> list[StoragePath]:
    """The files a path or URL names, sorted: itself, those that match the pattern, or all of a known kind
    below the folder (linked folders too; hidden files and folders not). Raises UserError where there are
    none.
    """
    named = location(str(source.path))
    if not isinstance(named, DiskPath):
        return _objects(named)
    return [DiskPath(Path(name)) for name, _ in _files_on_disk(named.path.expanduser())]


def _files_on_disk(path: Path) -> list[tuple[str, os.stat_result]]:
    """Names and stats. In strings and with one stat for each file: Path objects cost 20 us each."""
    if path.is_dir():
        names = [name for name in _walk(str(path)) if _kind(name) in _KINDS]
        missing = f"the folder {path} has no file that ends in .txt, .jsonl or .parquet (also with .gz): name"
        missing += " the files by a glob"
    elif path.exists():
        names, missing = [str(path)], ""
    elif has_magic(str(path)):
        names = list(iglob(str(path), recursive=True))
        missing = f"no file matches {path}: check the pattern and the folder it starts from ({Path.cwd()})"
    else:
        raise UserError(f"there is no file or folder {path} (looked from {Path.cwd()})")

    files = []
    for name in names:
        try:
            status = os.stat(name)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):  # a link to nothing, or to itself
                continue
            raise
        if not stat.S_ISDIR(status.st_mode):
            check_regular(name, status)
            files.append((name, status))
    if not files:
        raise UserError(missing)
    files.sort(key=lambda file: file[0].split(os.sep))
    if "**" in str(path):  # it follows a link to a folder above it again and again
        by_inode: dict[tuple[int, int], tuple[str, os.stat_result]] = {}
        for name, status in files:
            by_inode.setdefault((status.st_dev, status.st_ino), (name, status))
        files = list(by_inode.values())
    return files


def _walk(folder: str) -> Iterator[str]:
    """Files below a folder, through links to folders, each folder once. Hidden names are left out."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in files if not name.startswith("."))


def check_regular(path: Path | str, status: os.stat_result) -> None:
    """Raises UserError for what is no file of bytes: a device or a FIFO may never end."""
    kinds = {stat.S_IFIFO: "a FIFO (pipe)", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    kinds[stat.S_IFSOCK] = "a socket"
    if kind := kinds.get(stat.S_IFMT(status.st_mode)):
        raise UserError(f"{path} is {kind}, not a file: write the text to a file and name that")


def _objects(path: StoragePath) -> list[StoragePath]:
    found: list[StoragePath]
    if has_magic(path.name):
        siblings = [each for each in path.parent.files_below() if each.parent == path.parent]
        found = [each for each in siblings if fnmatchcase(each.name, path.name)]
    elif path.exists():
        found = [path]
    else:
        found = [each for each in path.files_below() if _kind(each.name) in _KINDS]
    if not found:
        raise UserError(
            f"no object is named {path}, matches it in its last part, or lies below it and ends in .txt or"
            " .jsonl (also with .gz)"
        )
    return found


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document is held out: a property of its text alone, so it stays on its side however the
    corpus grows or is split.
    """
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) < fraction * 2**64


def corpus_fingerprint(source: SourceConfig) -> str:
    """Changes when the text may have changed: names, sizes and times of the files, or the hub id, and how
    they are read.

    It decides only whether shards can be reused, at 5 us a file where hashing the text would take minutes. A
    copy with new times costs a new preparation but no exactness: what rows are keyed by, Shards.fingerprint,
    hashes the tokens themselves. A hub set is assumed to stay the same under its id.
    """
    settings = source.model_dump(exclude={"weight", "path"})
    files: list[Any] = []
    if source.path:
        named = location(str(source.path))
        if isinstance(named, DiskPath):
            for name, status in _files_on_disk(named.path.expanduser()):
                files.append((os.path.basename(name), status.st_size, status.st_mtime_ns))
        else:
            files = [(path.name, *path.version()) for path in _objects(named)]
    return fingerprint([settings, files])


def _kind(name: str) -> str:
    return os.path.splitext(name.removesuffix(".gz"))[1]


def _hub(source: SourceConfig) -> Iterator[str]:
    """Without a network `datasets` gives up after 23 s of retries, with HF_HUB_OFFLINE=1 at once."""
    import datasets

    config = source.hub_config or "default"
    where = f"the hub's data set {source.hub} ({config} configuration, split {source.split})"
    column = source.text_column
    try:
        table = datasets.load_dataset(source.hub, source.hub_config, split=source.split, streaming=True)
        if column in (table.column_names or ()):
            table = table.select_columns([column])
        for number, row in enumerate(table):
            yield _text_of(row, column, where, f"{where}, row {number}")
    except UserError:
        raise
    except (OSError, ValueError) as error:  # its own errors and Arrow's are all of these
        raise UserError(
            f"{where} cannot be read ({first_line(error)}): check these names, the network and your"
            " permission, or download it and set `path`"
        ) from None


def _file(path: StoragePath, source: SourceConfig) -> Iterator[str]:
    match _kind(path.name):
        case ".jsonl":
            return _json_lines(path, source.text_column)
        case ".json":
            return _questions(path)
        case ".parquet":
            return _parquet(path, source.text_column)
        case _:
            return _plain(path, source.documents)


def _plain(path: StoragePath, rule: str) -> Iterator[str]:
    document: list[str] = []
    for line in lines(path):
        is_empty = line in ("\n", "\r\n")
        if not is_empty:
            document.append(line)
        del line
        if document and (rule == "line" or is_empty):
            yield _take(document)
    if document:
        yield _take(document)


def _take(lines: list[str]) -> str:
    """The document of these lines, without its last line end; the list is empty then."""
    last = lines.pop()
    lines.append(last[:-2] if last.endswith("\r\n") else last.removesuffix("\n"))
    del last
    text = "".join(lines)
    lines.clear()
    return text


def _json_lines(path: StoragePath, column: str) -> Iterator[str]:
    for number, line in enumerate(lines(path), 1):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}, is not JSON ({error}): each line must hold one whole object") from None
        del line
        if not isinstance(row, dict):
            raise UserError(
                f"{where} has no column {column!r}: it is a {type(row).__name__}, not an object;"
                " set text_column"
            )
        text = _text_of(row, column, where, where)
        del row
        yield text
        del text


def _text_of(row: dict[str, Any], column: str, where: str, place: str) -> str:
    """The text in a row's column. `where`: the file; `place`: the row in it."""
    if column not in row:
        has = ", ".join(row)
        raise UserError(f"{where} has no column {column!r}: it has the columns {has}; set text_column")
    value = row[column]
    if not isinstance(value, str | None):
        raise UserError(
            f"{place}: the column {column!r} holds a {type(value).__name__}, not text; set text_column"
        )
    return check_unicode(value or "", place, f"the column {column!r}")


def _parquet(path: StoragePath, column: str) -> Iterator[str]:
    if path.suffix == ".gz":
        raise UserError(f"{path} is Parquet inside gzip, which cannot be streamed: unpack it first (gunzip)")
    if not isinstance(path, DiskPath):
        raise UserError(
            f"{path}: Parquet is read from disks alone: copy it to one, or give its text as .jsonl"
        )
    for number, row in enumerate(parquet_rows(path.path, column)):
        yield _text_of(row, column, str(path), f"{path}, row {number}")


def parquet_rows(path: Path, *columns: str) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file with these columns, all columns where one of them is missing or none is
    named. A file without rows has none. Raises UserError where it cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    check_regular(path, path.stat())
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            chosen = list(columns) if columns and set(columns) <= set(names) else None
            for batch in file.iter_batches(batch_size=1024, columns=chosen):
                yield from batch.to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): copy it again") from None


def first_line(error: Exception) -> str:
    """The first line of an error's text; its kind where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _questions(path: StoragePath) -> Iterator[str]:
    """Each question of a SQuAD file before its context: text in which a model learns to find the one in the
    other.
    """
    try:
        content = json.loads("".join(lines(path)))
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield f"{question['question']}\n{paragraph['context']}"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is no SQuAD file, as which .json is read ({type(error).__name__} {error}): give other"
            " text as .jsonl"
        ) from None


def check_unicode(text: str, where: str, what: str) -> str:
    """The text. Raises UserError where UTF-8 cannot encode it: JSON may hold half of a surrogate pair, and
    Python reads stray bytes as such.
    """
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} of {what} is half of a surrogate pair, or a byte that is not"
            " UTF-8, which is no text"
        ) from None
    return text


def lines(path: StoragePath) -> Iterator[str]:
    """Lines as they are, ended by "\\n" alone, without a byte order mark. Raises UserError for what is no
    text.
    """
    offset = 0
    try:
        if isinstance(path, DiskPath):
            check_regular(path.path, path.path.stat())
        with path.open() as file, gzip.open(file) if path.suffix == ".gz" else file as stream:
            while raw := _read_line(stream, file, path, offset):
                size = len(raw)
                try:
                    line = raw.decode()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path} is not UTF-8: byte {offset + error.start} is 0x{raw[error.start]:02x};"
                        " convert it, for example by `iconv -f LATIN1 -t UTF-8`"
                    ) from None
                del raw
                yield line if offset else line.removeprefix("\ufeff")
                del line
                offset += size
    except PermissionError:
        raise UserError(f"{path} may not be read: give this user permission") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path} is not a whole gzip file (after {offset} bytes of text: {error}); copy or download it"
            " again"
        ) from None


def _read_line(
    stream: BinaryIO | gzip.GzipFile, file: BinaryIO, path: StoragePath, offset: int
) -> bytes | bytearray:
    """The next line, b"" at the end. `file`: the compressed one of `stream`; `offset`: where the line begins.

    A line is checked while it grows, so that what is no text is rejected before it fills the memory.
    """
    line: bytes | bytearray = b""
    while chunk := stream.readline(_READ_BYTES):
        if b"\0" in chunk:
            zero = offset + len(line) + chunk.index(b"\0")
            raise UserError(
                f"{path} is not text: byte {zero} is zero; name only text files, and convert UTF-16 to UTF-8"
            )
        if not line and (len(chunk) < _READ_BYTES or chunk.endswith(b"\n")):
            return chunk
        line = line or bytearray()
        line += chunk
        if stream is not file and len(line) > _BOMB_BYTES and len(line) > _MAX_EXPANSION * file.tell():
            raise UserError(
                f"{path} expands to more than {_MAX_EXPANSION} times its size in one line, which is no text:"
                " if it is, unpack it first (gunzip)"
            )
        if chunk.endswith(b"\n"):
            break
    return line
