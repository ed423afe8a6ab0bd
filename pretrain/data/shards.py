"""Token shards: documents as token ids in files that are memory-mapped. ShardWriter writes one folder of
them, Shards reads it.

    00000.tokens, 00001.tokens, ...   ids one after another, uint16 or uint32, little endian lengths.int64
    the number of tokens of each document starts.int64                      where each document begins among
    all tokens index.json                        sizes and SHA-256 of these files, counts, recipe, tokenizer;
    written last verified.json                     which files were found to have these hashes, as `stat` saw
    them then

No row is made of bytes that are not what was written: opening a folder verifies every file. A file whose
inode, size, mtime and ctime are those of its last verification is not read again. No program can change a
file's content and keep its ctime, so an edit of the same size is found even where it restores the mtime.

Cost: writing hashes at 1.4 GB/s for each core. Opening 1e9 tokens (2 GB): 1.4 s of hashing the first time, on
up to four threads, then 1 ms. A document costs a search in the list of shards and a view.
"""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np

from trifold.modeling.errors import UserError
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.storage.atomic import replace_file
from trifold.pretrain.storage.fingerprint import fingerprint

FORMAT = 1
LENGTHS, STARTS, INDEX, VERIFIED = "lengths.int64", "starts.int64", "index.json", "verified.json"
# a file that changed so recently may change again within one tick of the file system's clock
CLOCK_NANOSECONDS = 2_000_000_000


class Shards:
    """The token documents of one folder, in corpus order."""

    fingerprint: str  # of the tokens, their order and their tokenizer: what the rows of a run are keyed by
    num_documents: int
    num_tokens: int
    num_bytes: int  # of UTF-8 text
    lengths: np.ndarray  # (num_documents,) int64, memory-mapped: tokens of each document, at least 1

    def __init__(self, folder: Path | str) -> None:
        """Raises UserError where the index is missing or damaged, or a file is not what was written."""
        self.folder = Path(folder)
        self.index = _read_index(self.folder)
        self._states = verify_files(self.folder, self.index["sizes"], self.index["sha256"])

        self.fingerprint = self.index["fingerprint"]
        self.num_documents = self.index["documents"]
        self.num_tokens = self.index["tokens"]
        self.num_bytes = self.index["bytes"]
        self.lengths, self._starts = self._map(LENGTHS, "<i8"), self._map(STARTS, "<i8")
        self._first = np.cumsum([0] + [shard["documents"] for shard in self.index["shards"]])
        self._tokens = lru_cache(maxsize=128)(self._map_shard)

    def check_made_with(self, tokenizer_fingerprint: str, recipe: str | None) -> None:
        """Raises UserError where another tokenizer made these shards, or another recipe (see `prepare`): then
        another run has used the same folder since.
        """
        if self.index["tokenizer"] != tokenizer_fingerprint:
            kind, found, expected = "tokenizer", self.index["tokenizer"], tokenizer_fingerprint
        elif recipe is not None and self.index["recipe"] != recipe:
            kind, found, expected = "recipe", self.index["recipe"], recipe
        else:
            return
        raise UserError(
            f"the token shards in {self.folder} were made with the {kind} {found}, and this run's is"
            f" {expected}: another run with the same data.cache has replaced them. Give each run a data.cache"
            " of its own, and start this one again."
        )

    def document(self, i: int) -> np.ndarray:
        """The ids of document i, (lengths[i],), a view of the mapped file."""
        shard = int(self._first.searchsorted(i, side="right")) - 1
        start = int(self._starts[i] - self._starts[self._first[shard]])
        return self._tokens(shard)[start : start + int(self.lengths[i])]

    def _map_shard(self, shard: int) -> np.ndarray:
        return self._map(self.index["shards"][shard]["file"], self.index["dtype"])

    def _map(self, name: str, dtype: str) -> np.ndarray:
        """A file that is still the one that was verified; another run may have replaced it since."""
        with (self.folder / name).open("rb") as file:
            if _state(os.fstat(file.fileno())) != self._states[name]:
                _check_hash(self.folder / name, self.index["sha256"][name])
            mapped = np.memmap(file, dtype, mode="r") if self._states[name][1] else np.empty(0, dtype)
        return np.asarray(mapped)  # a view of a memmap costs five times that of a plain array


def _read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder, if it is what was written. Its own fingerprint covers the tokenizer and the
    hashes of the files; `checksum` covers everything else in it.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index.pop("checksum") == fingerprint(index):
            return dict(index)
    except (FileNotFoundError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        pass
    raise UserError(
        f"{folder} holds no complete token shards ({INDEX} is missing, damaged, or of another version):"
        f" delete {folder} and prepare it again"
    )


def verify_files(folder: Path, sizes: dict[str, int], hashes: dict[str, str]) -> dict[str, list[int]]:
    """The state of each file (inode, size, mtime, ctime). Raises UserError where one has another size or
    SHA-256. Files that have not changed since they were last verified (VERIFIED) are not read.
    """
    known = _read_verified(folder)
    now = time.time_ns()
    states: dict[str, list[int]] = {}
    for name, size in sizes.items():
        states[name] = _file_state(folder / name)
        if states[name][1] != size:
            raise UserError(
                f"{folder / name} has {states[name][1]} bytes where its index says {size}: delete {folder}"
                " and prepare it again"
            )

    unknown = [name for name in hashes if known.get(name) != [hashes[name], *states[name]]]
    if not unknown:
        return states
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1, len(unknown))) as pool:
        list(pool.map(_check_hash, [folder / name for name in unknown], [hashes[name] for name in unknown]))

    for name in unknown:
        if states[name][3] < now - CLOCK_NANOSECONDS:
            known[name] = [hashes[name], *states[name]]
    with suppress(OSError):  # a folder that may not be written is hashed at every start
        if known:
            replace_file(folder / VERIFIED, json.dumps(known))
    return states


def _read_verified(folder: Path) -> dict[str, list[Any]]:
    try:
        known = json.loads((folder / VERIFIED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _file_state(path: Path) -> list[int]:
    try:
        return _state(path.stat())
    except FileNotFoundError:
        return [0, 0, 0, 0]


def _state(stat: os.stat_result) -> list[int]:
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _check_hash(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as file:
            digest = file_digest(file, sha256).hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: delete {path.parent} and prepare it again") from None
    if digest != expected:
        raise UserError(
            f"{path} is not what was written (its SHA-256 differs): delete {path.parent} and prepare it again"
        )


class ChangedSinceSaved(ValueError):
    """An unfinished file is not what an interrupted writer left."""


class ShardWriter:
    """Writes one folder of shards, batch by batch; the index comes last.

    A shard is full when it holds `shard_bytes` of text, and ends with a batch. What `saved` returns is on
    disk: from it another writer continues after a kill, to the same bytes.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_bytes: int, saved: dict[str, Any]) -> None:
        """`saved`: what an earlier writer of the same folder has returned; {}: a new folder. Raises
        ChangedSinceSaved where an unfinished file does not begin with what was saved.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.tokenizer, self.shard_bytes = folder, tokenizer, shard_bytes
        self.shards: list[dict[str, Any]] = saved.get("shards", [])
        self.dropped, self.tokens = saved.get("dropped", 0), saved.get("tokens", 0)
        self.finished: dict[str, str] = saved.get("finished", {})  # full shards, and their hashes
        self.files: dict[str, _HashedFile] = {}  # being written
        self.sizes: dict[str, int] = {}  # of finished files
        for name, size in saved.get("sizes", ((LENGTHS, 0), (STARTS, 0))):
            if name in self.finished:
                self.sizes[name] = size
            else:
                file = self.files[name] = _HashedFile(folder / name, size)
                if file.digest.hexdigest() != saved.get("digests", {}).get(name, file.digest.hexdigest()):
                    raise ChangedSinceSaved(name)

    def add(self, ids: np.ndarray, lengths: np.ndarray, sizes: np.ndarray) -> bool:
        """Append documents; those without tokens are dropped and counted. Returns whether a shard is full
        now.

        `ids`: of all documents, one after another; `lengths` and `sizes`: tokens and bytes of each.
        """
        kept = lengths > 0
        self.dropped += int((~kept).sum())
        lengths, sizes = lengths[kept], sizes[kept]
        if not len(lengths):
            return False
        if not self.shards or self.shards[-1]["file"] in self.finished:
            name = f"{len(self.shards):05d}.tokens"
            self.files[name] = _HashedFile(self.folder / name)
            self.shards.append({"file": name, "documents": 0, "tokens": 0, "bytes": 0})

        shard = self.shards[-1]
        self.files[shard["file"]].write(ids)
        self.files[LENGTHS].write(lengths)
        self.files[STARTS].write(self.tokens + np.cumsum(lengths) - lengths)
        self.tokens += len(ids)
        shard["documents"] += len(lengths)
        shard["tokens"] += len(ids)
        shard["bytes"] += int(sizes.sum())

        full = bool(shard["bytes"] >= self.shard_bytes)
        if full:
            self._finish(shard["file"])
        return full

    def saved(self) -> dict[str, Any]:
        """What is on disk now, in plain values."""
        for file in self.files.values():
            file.sync()
        unfinished = [(name, file.size) for name, file in self.files.items()]
        return {
            "shards": self.shards,
            "dropped": self.dropped,
            "tokens": self.tokens,
            "finished": self.finished,
            "sizes": [*unfinished, *self.sizes.items()],
            "digests": {name: file.digest.hexdigest() for name, file in self.files.items()},
        }

    def close(self, recipe: str) -> None:
        for name in list(self.files):
            self._finish(name)
        names = [LENGTHS, STARTS, *(shard["file"] for shard in self.shards)]
        hashes = {name: self.finished[name] for name in names}
        index = {
            "format": FORMAT,
            "recipe": recipe,
            "fingerprint": fingerprint([self.tokenizer.fingerprint, hashes]),
            "tokenizer": self.tokenizer.fingerprint,
            "dtype": self.tokenizer.dtype.str,
            "documents": sum(shard["documents"] for shard in self.shards),
            "tokens": sum(shard["tokens"] for shard in self.shards),
            "bytes": sum(shard["bytes"] for shard in self.shards),
            "dropped": self.dropped,
            "shards": self.shards,
            "sizes": {name: self.sizes[name] for name in hashes},
            "sha256": hashes,
        }
        index["checksum"] = fingerprint(index)
        replace_file(self.folder / INDEX, json.dumps(index, indent=1))

    def _finish(self, name: str) -> None:
        file = self.files.pop(name)
        file.sync()
        file.file.close()
        self.finished[name], self.sizes[name] = file.digest.hexdigest(), file.size


class _HashedFile:
    """A file that is hashed while it is written; `size`: how many bytes of an existing one to keep."""

    def __init__(self, path: Path, size: int = 0) -> None:
        self.file, self.digest, self.size = path.open("r+b" if size else "w+b"), sha256(), size
        self.file.truncate(size)
        while chunk := self.file.read(1 << 20):
            self.digest.update(chunk)

    def write(self, numbers: np.ndarray) -> None:
        data = np.ascontiguousarray(numbers).view(np.uint8).data
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
