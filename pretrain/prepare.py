"""A source in, its token shards out (shards.py reads them): training and held-out documents apart, from one pass over the text.

This process reads, writes and hashes; `workers` processes tokenize batches of about a megabyte, which come back in order. So the bytes
do not depend on how many there are, and memory is bounded by a few batches each. Everything is written into a folder of its own, which
gets its name when it is complete: an interrupted preparation starts again.

Cost: 47.8 MB of books, 11.9M tokens: 8 s of one core, all told; 0.8 s of it is this process's share, so it keeps about 10 workers busy.
"""

import fcntl
import json
import logging
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from errno import ENOSPC
from hashlib import blake2b, sha256
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from modeling.config import Refused
from pretrain.config import Source
from pretrain.corpus import corpus_fingerprint, documents, is_heldout
from pretrain.shards import Shards
from pretrain.tokenizer import Tokenizer

_FORMAT = 1
_BATCH = 1 << 20  # characters of text that one worker tokenizes at a time
_SHARD = 1 << 28  # bytes of text after which a shard is full
_log = logging.getLogger(__name__)


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path | str,
    *,
    heldout_fraction: float = 0.0,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda documents, bytes: None,
    shard_bytes: int = _SHARD,
) -> tuple[Shards, Shards]:
    """The (training, held-out) shards of a source, from one pass over its text into `folder`/train and `folder`/heldout.

    Shards that are there are used when corpus, tokenizer and rules are the same; others, and incomplete ones, are made anew. Two
    callers do not disturb each other: the second waits and uses what the first made. `progress` hears (documents, bytes of text) so far.
    `workers` processes tokenize; at 1 this process does. Raises Refused for a corpus that cannot be read or a disk that is full.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    rules = [_FORMAT, corpus_fingerprint(source), tokenizer.fingerprint, heldout_fraction, shard_bytes]
    recipe = blake2b(json.dumps(rules).encode(), digest_size=16).hexdigest()
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _made(folder, recipe):
            fresh = folder.with_name(folder.name + ".incomplete")
            for old in (folder, fresh):
                shutil.rmtree(old, ignore_errors=True)
            try:
                _write(source, tokenizer, fresh, heldout_fraction, workers, progress, shard_bytes, recipe)
            except OSError as error:
                if error.errno != ENOSPC:
                    raise
                shutil.rmtree(fresh, ignore_errors=True)
                raise Refused(f"no space is left for token shards in {folder.parent}: free some, or move data.cache") from None
            fresh.rename(folder)
    return Shards(folder / "train"), Shards(folder / "heldout")


def _made(folder: Path, recipe: str) -> bool:
    """Whether the folder holds complete shards of this recipe."""
    if not folder.exists():
        return False
    try:
        return all(Shards(folder / part).index["recipe"] == recipe for part in ("train", "heldout"))
    except Refused as error:
        _log.warning("%s (doing so now)", error)
        return False


def _write(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    heldout_fraction: float,
    workers: int,
    progress: Callable[[int, int], None],
    shard_bytes: int,
    recipe: str,
) -> None:
    train, heldout = (_Writer(folder / part, tokenizer, shard_bytes) for part in ("train", "heldout"))
    documents_done = bytes_done = 0
    for ids, lengths, sizes, held in _tokenized(_batches(documents(source)), tokenizer, heldout_fraction, workers):
        for writer, chosen in ((train, ~held), (heldout, held)):
            writer.add(ids[np.repeat(chosen, lengths)], lengths[chosen], sizes[chosen])
        documents_done, bytes_done = documents_done + len(lengths), bytes_done + int(sizes.sum())
        progress(documents_done, bytes_done)
    for writer in (train, heldout):
        writer.close(recipe)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_Tokenized = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # ids of all documents; per document: tokens, bytes, held out


def _tokenized(batches: Iterator[list[str]], tokenizer: Tokenizer, fraction: float, workers: int) -> Iterator[_Tokenized]:
    """The batches tokenized, in their order."""
    if workers <= 1:
        _start(tokenizer, fraction)
        yield from map(_tokenize, batches)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_process, (tokenizer, fraction)) as pool:
        pending = deque(pool.submit(_tokenize, batch) for batch in islice(batches, 2 * workers))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(_tokenize, batch) for batch in islice(batches, 1))


_work: tuple[Tokenizer, float]  # of this process


def _start(tokenizer: Tokenizer, fraction: float) -> None:
    global _work
    _work = (tokenizer, fraction)


def _start_process(tokenizer: Tokenizer, fraction: float) -> None:
    """A worker leaves Ctrl-C to its parent, and ends when that was killed: the pool's own would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    _start(tokenizer, fraction)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _tokenize(texts: list[str]) -> _Tokenized:
    tokenizer, fraction = _work
    ids = tokenizer.encode_batch(texts)
    sizes = np.array([len(text.encode()) for text in texts], "<i8")
    held = np.array([is_heldout(text, fraction) for text in texts], bool)
    return np.concatenate(ids), np.array([len(i) for i in ids], "<i8"), sizes, held


class _Writer:
    """Writes one folder of shards; the index comes last."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_bytes: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self.tokenizer, self.shard_bytes = folder, tokenizer, shard_bytes
        self.shards: list[dict[str, Any]] = []
        self.dropped = self.tokens = 0
        self.files: dict[str, _Hashed] = {name: _Hashed(folder / name) for name in ("lengths.int64", "starts.int64")}

    def add(self, ids: np.ndarray, lengths: np.ndarray, sizes: np.ndarray) -> None:
        """Append documents; those without tokens are dropped and counted."""
        kept = lengths > 0
        self.dropped += int((~kept).sum())
        lengths, sizes = lengths[kept], sizes[kept]
        if not len(lengths):
            return
        if not self.shards or self.shards[-1]["bytes"] >= self.shard_bytes:
            name = f"{len(self.shards):05d}.tokens"
            self.files[name] = _Hashed(self.folder / name)
            self.shards.append({"file": name, "documents": 0, "tokens": 0, "bytes": 0})
        shard = self.shards[-1]
        self.files[shard["file"]].write(ids)
        self.files["lengths.int64"].write(lengths)
        self.files["starts.int64"].write(self.tokens + np.cumsum(lengths) - lengths)
        self.tokens += len(ids)
        for key, more in (("documents", len(lengths)), ("tokens", len(ids)), ("bytes", int(sizes.sum()))):
            shard[key] += more

    def close(self, recipe: str) -> None:
        for file in self.files.values():
            file.close()
        hashes = {name: file.digest.hexdigest() for name, file in self.files.items()}
        index = {
            "format": _FORMAT,
            "recipe": recipe,
            "fingerprint": blake2b(json.dumps([self.tokenizer.fingerprint, hashes]).encode(), digest_size=16).hexdigest(),
            "tokenizer": self.tokenizer.fingerprint,
            "dtype": self.tokenizer.dtype.str,
            **{key: sum(shard[key] for shard in self.shards) for key in ("documents", "tokens", "bytes")},
            "dropped": self.dropped,
            "shards": self.shards,
            "sizes": {name: file.size for name, file in self.files.items()},
            "sha256": hashes,
        }
        (self.folder / "index.json").write_text(json.dumps(index, indent=1))


class _Hashed:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self.file, self.digest, self.size = path.open("wb"), sha256(), 0

    def write(self, numbers: np.ndarray) -> None:
        data = numbers.tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
