"""A source in, its token shards out (shards.py reads them): training and held-out documents apart, from one
pass over the text.

This process reads, writes and hashes; batches of about a megabyte are tokenized wherever `spread` has it, and
come back in order. So the bytes do not depend on where or how many, and memory is bounded by a few batches
each. Everything is written into a folder of its own, which gets its name when it is complete. An interrupted
preparation goes on after its last full shard: it reads the text before that again, a tenth of the work, and
tokenizes none of it.

Cost: 47.8 MB of books, 12.0M tokens: 2.7 s of one core, all told; 0.6 s of it is this process's share, so it
keeps three workers busy.
"""

import fcntl
import json
import logging
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from errno import ENOSPC
from hashlib import blake2b
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from trifold.modeling.errors import UserError
from trifold.pretrain.config.pretraining import SourceConfig
from trifold.pretrain.data.corpus import corpus_fingerprint, documents, is_heldout
from trifold.pretrain.data.shard_writer import FORMAT, ShardWriter
from trifold.pretrain.data.shards import Shards
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer

_BATCH = 1 << 20  # characters of text that one worker tokenizes at a time
_SHARD = 1 << 28  # bytes of text after which a shard is full
_log = logging.getLogger(__name__)

Tokenized = tuple[
    np.ndarray, np.ndarray, np.ndarray, np.ndarray
]  # ids of all documents; per document: tokens, bytes, held out


class Tokenize:
    """What is done to each batch of documents, wherever that happens."""

    def __init__(self, tokenizer: Tokenizer, heldout_fraction: float) -> None:
        self.tokenizer, self.heldout_fraction = tokenizer, heldout_fraction

    def __call__(self, texts: list[str]) -> Tokenized:
        ids = self.tokenizer.encode_batch(texts)
        sizes = np.array([len(text.encode()) for text in texts], "<i8")
        held = np.array([is_heldout(text, self.heldout_fraction) for text in texts], bool)
        return np.concatenate(ids), np.array([len(i) for i in ids], "<i8"), sizes, held


Spread = Callable[
    [Tokenize, Iterable[list[str]]], Iterable[Tokenized]
]  # like `map`, which is one: results in order, few batches at a time


def prepare(
    source: SourceConfig,
    tokenizer: Tokenizer,
    folder: Path | str,
    *,
    heldout_fraction: float = 0.0,
    spread: Spread = map,
    progress: Callable[[int, int], None] = lambda documents, bytes: None,
    shard_bytes: int = _SHARD,
) -> tuple[Shards, Shards]:
    """The (training, held-out) shards of a source, from one pass over its text into `folder`/train and
    `folder`/heldout.

    Shards that are there are used when corpus, tokenizer and rules are the same, incomplete ones are
    completed; others are made anew. Two callers do not disturb each other: the second waits and uses what the
    first made. `progress` hears (documents, bytes of text) so far. `spread` says where batches are tokenized:
    here, or `over_processes`. Raises UserError for a corpus that cannot be read or a disk that is full.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    rules = [FORMAT, corpus_fingerprint(source), tokenizer.fingerprint, heldout_fraction, shard_bytes]
    recipe = blake2b(json.dumps(rules).encode(), digest_size=16).hexdigest()
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _made(folder, recipe):
            fresh = folder.with_name(folder.name + ".incomplete")
            shutil.rmtree(folder, ignore_errors=True)
            work = Tokenize(tokenizer, heldout_fraction)
            try:
                _write(source, work, fresh, spread, progress, shard_bytes, recipe)
            except OSError as error:
                if error.errno != ENOSPC:
                    raise
                shutil.rmtree(fresh, ignore_errors=True)
                raise UserError(
                    f"no space is left for token shards in {folder.parent}: free some, or move data.cache"
                ) from None
            fresh.rename(folder)
    return Shards(folder / "train"), Shards(folder / "heldout")


def _made(folder: Path, recipe: str) -> bool:
    """Whether the folder holds complete shards of this recipe."""
    if not folder.exists():
        return False
    try:
        return all(Shards(folder / part).index["recipe"] == recipe for part in ("train", "heldout"))
    except UserError as error:
        _log.warning("%s (doing so now)", error)
        return False


def _write(
    source: SourceConfig,
    work: Tokenize,
    folder: Path,
    spread: Spread,
    progress: Callable[[int, int], None],
    shard_bytes: int,
    recipe: str,
) -> None:
    saved = _saved(folder, recipe)
    if not saved:
        shutil.rmtree(folder, ignore_errors=True)
    train, heldout = (
        ShardWriter(folder / part, work.tokenizer, shard_bytes, saved.get(part, {}))
        for part in ("train", "heldout")
    )
    batches, documents_done, bytes_done = saved.get("done", (0, 0, 0))
    for ids, lengths, sizes, held in spread(work, islice(batched(documents(source)), batches, None)):
        full = False
        for writer, chosen in ((train, ~held), (heldout, held)):
            full |= writer.add(ids[np.repeat(chosen, lengths)], lengths[chosen], sizes[chosen])
        batches, documents_done, bytes_done = (
            batches + 1,
            documents_done + len(lengths),
            bytes_done + int(sizes.sum()),
        )
        if full:
            done = (batches, documents_done, bytes_done)
            state = {"recipe": recipe, "done": done, "train": train.saved(), "heldout": heldout.saved()}
            (folder / "state.fresh").write_text(json.dumps(state))
            (folder / "state.fresh").replace(folder / "state.json")
        progress(documents_done, bytes_done)
    for writer in (train, heldout):
        writer.close(recipe)
    (folder / "state.json").unlink(missing_ok=True)


def _saved(folder: Path, recipe: str) -> dict[str, Any]:
    """How far an interrupted preparation of this recipe has come, where every byte that it tells of is there;
    else nothing.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        whole = all(
            (folder / part / name).stat().st_size >= size
            for part in ("train", "heldout")
            for name, size in state[part]["sizes"]
        )
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return state if whole and state["recipe"] == recipe else {}


def batched(texts: Iterator[str]) -> Iterator[list[str]]:
    """Texts in lists of about `_BATCH` characters, so that a tokenizer's calls are worth their cost and its
    arrays stay small.
    """
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def over_processes(workers: int) -> Spread:
    """Tokenize in `workers` processes of this machine; at 1 in this one."""

    def over(work: Tokenize, batches: Iterable[list[str]]) -> Iterator[Tokenized]:
        waiting = iter(batches)
        with ProcessPoolExecutor(workers, get_context("spawn"), _start_process, (work,)) as pool:
            pending = deque(pool.submit(_tokenize, batch) for batch in islice(waiting, 2 * workers))
            while pending:
                yield pending.popleft().result()
                pending.extend(pool.submit(_tokenize, batch) for batch in islice(waiting, 1))

    return over if workers > 1 else map


_work: Tokenize  # of a worker's process


def _start_process(work: Tokenize) -> None:
    """A worker leaves Ctrl-C to its parent, and ends when that was killed: the pool's own would wait for work
    for ever.
    """
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    _work = work


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _tokenize(texts: list[str]) -> Tokenized:
    return _work(texts)
