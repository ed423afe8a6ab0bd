"""Text in, documents out, one at a time: the memory needed is that of one document (Parquet: of one row
group).

Parquet files and hub sets are read through `datasets`. Plain text and JSON lines are read here, because
`datasets` changes them: its text loader turns "\\r\\n" and a lone "\\r" into "\\n", its JSON loader turns a
column of texts that look like dates into timestamps, and neither can name the byte or the line that is wrong.

Cost: 48 MB of books from .gz in 0.5 s; importing `datasets` takes seconds, so it is imported where it is
needed.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from glob import escape, glob, has_magic
from hashlib import blake2b
from itertools import chain
from pathlib import Path

from trifold.modeling.errors import UserError
from trifold.pretrain.config.pretraining import SourceConfig
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.storage import location
from trifold.pretrain.storage.storage_path import StoragePath

_KINDS = (".txt", ".jsonl", ".parquet")


def documents(source: SourceConfig) -> Iterator[str]:
    """The documents of a source in a fixed order: files by name, each from its start.

    Plain text: a document is a run of lines up to an empty line ("blank_line"), with its inner line ends as
    they are and its last one removed, or each line ("line"). An empty line holds nothing at all: one that
    holds spaces is text. No document spans two files. Rows of JSONL, Parquet and hub sets are one document
    each; a null is an empty document. A .json file is SQuAD's: a document is a question and its context.
    Raises UserError for anything that cannot be read, and for a source in which no document has any text.
    """
    found = False
    for text in (
        _hub(source)
        if source.hub
        else chain.from_iterable(_file(path, source) for path in corpus_files(source))
    ):
        found = found or bool(text)
        yield text
    if not found:
        raise UserError(
            f"{source.path or source.hub} holds 0 documents with text; point the source at a corpus that is"
            " not empty"
        )


def corpus_files(source: SourceConfig) -> list[StoragePath]:
    """The files a path or URL names, sorted: itself, those that match the glob, or all of a known kind below
    the folder.
    """
    named = location(str(source.path))
    if not isinstance(named, DiskPath):
        return _objects(named)
    path = named.path.expanduser()
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and _kind(DiskPath(p)) in _KINDS]
        if not found:
            raise UserError(
                f"the folder {path} has no file that ends in .txt, .jsonl or .parquet (also with .gz): name"
                " the files by a glob"
            )
    elif path.exists():
        found = [path]
    elif has_magic(str(path)):
        found = [Path(p) for p in glob(str(path), recursive=True) if Path(p).is_file()]
        if not found:
            raise UserError(
                f"no file matches {path}: check the pattern and the folder it starts from ({Path.cwd()})"
            )
    else:
        raise UserError(f"there is no file or folder {path} (looked from {Path.cwd()})")
    return [DiskPath(file) for file in sorted(found)]


def _objects(path: StoragePath) -> list[StoragePath]:
    if has_magic(path.name):
        found = [
            each
            for each in path.parent.files_below()
            if each.parent == path.parent and fnmatchcase(each.name, path.name)
        ]
    else:
        found = [path] if path.exists() else [each for each in path.files_below() if _kind(each) in _KINDS]
    if not found:
        raise UserError(
            f"no object is named {path}, matches it in its last part, or lies below it and ends in .txt or"
            " .jsonl (also with .gz)"
        )
    return [*found]


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document is held out: a property of its text alone, so it stays on its side however the
    corpus grows or is split.
    """
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) < fraction * 2**64


def corpus_fingerprint(source: SourceConfig) -> str:
    """Changes when the text may have changed: names, sizes and times of the files, or the hub id, and how
    they are read.

    It decides only whether shards can be reused, in microseconds where hashing the text would take minutes. A
    copy with new times costs a new preparation but no exactness: what rows are keyed by, Shards.fingerprint,
    hashes the tokens themselves. A hub set is taken to stay the same under its id.
    """
    read = source.model_dump(exclude={"weight", "path"})
    stats = [(p.name, *p.version()) for p in corpus_files(source)] if source.path else []
    return blake2b(json.dumps([read, stats]).encode(), digest_size=16).hexdigest()


def _kind(path: StoragePath) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _hub(source: SourceConfig) -> Iterator[str]:
    """Without a network `datasets` gives up after 23 s of retries, with HF_HUB_OFFLINE=1 at once."""
    where = f"the hub's data set {source.hub} ({source.hub_config or 'default'} configuration, split {source.split})"
    return _table(where, source, source.hub, source.hub_config, split=source.split)


def _file(path: StoragePath, source: SourceConfig) -> Iterator[str]:
    match _kind(path):
        case ".jsonl":
            return _json_lines(path, source.text_column)
        case ".json":
            return _questions(path)
        case ".parquet" if path.suffix == ".gz":
            raise UserError(
                f"{path} is Parquet inside gzip, which cannot be streamed: unpack it first (gunzip)"
            )
        case ".parquet" if not isinstance(path, DiskPath):
            raise UserError(
                f"{path}: Parquet is read from disks alone: copy it to one, or give its text as .jsonl"
            )
        case ".parquet":
            return _table(str(path), source, "parquet", data_files=escape(str(path)), split="train")
        case _:
            return _plain(path, source.documents)


def _plain(path: StoragePath, rule: str) -> Iterator[str]:
    block: list[str] = []
    for line in lines(path):
        if line not in ("\n", "\r\n"):
            block.append(line)
        if block and (rule == "line" or line in ("\n", "\r\n")):
            yield _without_end(block)
            block = []
    if block:
        yield _without_end(block)


def _without_end(lines: list[str]) -> str:
    text = "".join(lines)
    return text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")


def _json_lines(path: StoragePath, column: str) -> Iterator[str]:
    for number, line in enumerate(lines(path), 1):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}, is not JSON ({error}): each line must hold one whole object") from None
        if not isinstance(row, dict) or column not in row:
            has = (
                f"has the columns {', '.join(row)}"
                if isinstance(row, dict)
                else f"is a {type(row).__name__}, not an object"
            )
            raise UserError(f"{where}, has no column {column!r}: it {has}; set text_column")
        yield _text(row[column], column, where)


def _questions(path: StoragePath) -> Iterator[str]:
    """Each question of a SQuAD file before its context: text in which a model learns to find the one in the
    other.
    """
    try:
        whole = json.loads("".join(lines(path)))
        for paragraph in (paragraph for article in whole["data"] for paragraph in article["paragraphs"]):
            yield from (f"{asked['question']}\n{paragraph['context']}" for asked in paragraph["qas"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is no SQuAD file, as which .json is read ({type(error).__name__} {error}): give other"
            " text as .jsonl"
        ) from None


def _text(value: object, column: str, where: str) -> str:
    if not isinstance(value, str | None):
        raise UserError(
            f"{where}: the column {column!r} holds a {type(value).__name__}, not text; set text_column"
        )
    return check_unicode(value or "", where, f"the column {column!r}")


def check_unicode(text: str, where: str, what: str) -> str:
    """The text. Raises UserError where UTF-8 cannot say it: JSON may hold half of a surrogate pair, and as such
    Python reads stray bytes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} of {what} is half of a surrogate pair, or a byte that is not"
            " UTF-8, which is no text"
        ) from None
    return text


def lines(path: StoragePath) -> Iterator[str]:
    """Lines as they are, ended by "\\n" alone, without a byte order mark."""
    offset = 0
    try:
        with path.open() as file, gzip.open(file) if path.suffix == ".gz" else file as stream:
            for raw in stream:
                if b"\0" in raw:
                    at = offset + raw.index(b"\0")
                    raise UserError(
                        f"{path} is not text: byte {at} is zero; name only text files, and convert UTF-16 to"
                        " UTF-8"
                    )
                try:
                    line = raw.decode()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path} is not UTF-8: byte {offset + error.start} is 0x{raw[error.start]:02x};"
                        " convert it, for example by"
                        " `iconv -f LATIN1 -t UTF-8`"
                    ) from None
                yield line if offset else line.removeprefix("\ufeff")
                offset += len(raw)
    except PermissionError:
        raise UserError(f"{path} may not be read: give this user permission") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path} is not a whole gzip file (after {offset} bytes of text: {error}); copy or download it"
            " again"
        ) from None


def _table(where: str, source: SourceConfig, *args: object, **kwargs: object) -> Iterator[str]:
    """The text column of a data set that `datasets` streams, row by row."""
    import datasets

    column = source.text_column
    try:
        table = datasets.load_dataset(*args, **kwargs, streaming=True)
        if column in (table.column_names or ()):
            table = table.select_columns([column])
        for number, row in enumerate(table):
            if column not in row:
                raise UserError(f"{where} has no column {column!r}: it has {', '.join(row)}; set text_column")
            yield _text(row[column], column, f"{where}, row {number}")
    except UserError:
        raise
    except (OSError, ValueError) as error:  # its own errors and Arrow's are all of these
        advice = (
            "check these names, the network and your permission, or download it and set `path`"
            if source.hub
            else "copy it again"
        )
        raise UserError(f"{where} cannot be read ({str(error).splitlines()[0]}): {advice}") from None
