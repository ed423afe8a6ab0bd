"""Token shards from text (the format: shards.py): a source comes in, training and held-out shards go out,
from one pass over the text.

This process reads, writes and hashes. Batches of about a megabyte are tokenized wherever `spread` runs them,
and come back in order. So the bytes do not depend on where or how many, and memory is bounded by a few
batches for each worker. Everything is written into a folder of its own, which gets its name when it is
complete. An interrupted preparation continues after its last full shard: it reads the text before that
again, a tenth of the work, and tokenizes none of it.

Cost: 47.8 MB of books, 12.0M tokens: 2.7 s of one core in all; 0.6 s of it is this process's share, so it
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
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trifold.modeling.errors import UserError
from trifold.pretrain.config.pretraining import SourceConfig
from trifold.pretrain.data.corpus import corpus_fingerprint, documents, is_heldout
from trifold.pretrain.data.shards import FORMAT, ChangedSinceSaved, Shards, ShardWriter
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.storage.atomic import replace_file
from trifold.pretrain.storage.fingerprint import fingerprint

_BATCH = 1 << 20  # characters of text that one worker tokenizes at a time
_SHARD = 1 << 28  # bytes of text after which a shard is full
_log = logging.getLogger(__name__)


class Tokenized(NamedTuple):
    """A batch of N documents."""

    ids: np.ndarray  # of all documents, one after another
    lengths: np.ndarray  # (N,) tokens
    sizes: np.ndarray  # (N,) bytes of UTF-8
    heldout: np.ndarray  # (N,) bool


class Tokenize:
    """What is done to each batch of documents, wherever that happens."""

    def __init__(self, tokenizer: Tokenizer, heldout_fraction: float) -> None:
        self.tokenizer, self.heldout_fraction = tokenizer, heldout_fraction

    def __call__(self, texts: list[str]) -> Tokenized:
        ids = self.tokenizer.encode_batch(texts)
        return Tokenized(
            ids=ids[0] if len(ids) == 1 else np.concatenate(ids),
            lengths=np.array([len(i) for i in ids], "<i8"),
            sizes=np.array([len(text.encode()) for text in texts], "<i8"),
            heldout=np.array([is_heldout(text, self.heldout_fraction) for text in texts], bool),
        )


# like `map`, which is one: results in order, few batches at a time
Spread = Callable[[Tokenize, Iterable[list[str]]], Iterable[Tokenized]]


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
    """The (training, held-out) shards of a source, in `folder`/train and `folder`/heldout.

    Complete shards are used again when corpus, tokenizer and rules are the same and every file is what was
    written; incomplete ones are completed; others are made anew. Two callers do not disturb each other: the
    second waits and uses what the first made. `progress` is called with (documents, bytes of text) so far.
    `spread` runs the tokenizing of batches: here, or in `over_processes`. Raises UserError for a corpus that
    cannot be read or a disk that is full.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    recipe = fingerprint(
        [FORMAT, corpus_fingerprint(source), tokenizer.fingerprint, heldout_fraction, shard_bytes]
    )
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shards = _open_complete(folder, recipe)
        if shards is None:
            incomplete = folder.with_name(folder.name + ".incomplete")
            shutil.rmtree(folder, ignore_errors=True)
            work = Tokenize(tokenizer, heldout_fraction)
            try:
                _write(source, work, incomplete, spread, progress, shard_bytes, recipe)
            except OSError as error:
                if error.errno != ENOSPC:
                    raise
                shutil.rmtree(incomplete, ignore_errors=True)
                raise UserError(
                    f"no space is left for token shards in {folder.parent}: free some, or move data.cache"
                ) from None
            incomplete.rename(folder)
            shards = Shards(folder / "train"), Shards(folder / "heldout")
    return shards


def _open_complete(folder: Path, recipe: str) -> tuple[Shards, Shards] | None:
    """The folder's shards, if they are complete and of this recipe."""
    if not folder.exists():
        return None
    try:
        shards = Shards(folder / "train"), Shards(folder / "heldout")
    except UserError as error:
        _log.warning("%s (doing so now)", error)
        return None
    return shards if all(half.index["recipe"] == recipe for half in shards) else None


def _write(
    source: SourceConfig,
    work: Tokenize,
    folder: Path,
    spread: Spread,
    progress: Callable[[int, int], None],
    shard_bytes: int,
    recipe: str,
) -> None:
    saved = _read_saved(folder, recipe)
    if not saved:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        train = ShardWriter(folder / "train", work.tokenizer, shard_bytes, saved.get("train", {}))
        heldout = ShardWriter(folder / "heldout", work.tokenizer, shard_bytes, saved.get("heldout", {}))
    except ChangedSinceSaved as error:
        _log.warning("%s in %s changed after the preparation was interrupted: beginning again", error, folder)
        shutil.rmtree(folder)
        return _write(source, work, folder, spread, progress, shard_bytes, recipe)
    num_batches, num_documents, num_bytes = saved.get("done", (0, 0, 0))

    remaining = islice(batched(documents(source)), num_batches, None)
    for ids, lengths, sizes, is_held in spread(work, remaining):
        full = train.add(ids[np.repeat(~is_held, lengths)], lengths[~is_held], sizes[~is_held])
        full |= heldout.add(ids[np.repeat(is_held, lengths)], lengths[is_held], sizes[is_held])
        num_batches += 1
        num_documents += len(lengths)
        num_bytes += int(sizes.sum())
        if full:
            done = (num_batches, num_documents, num_bytes)
            state = {"recipe": recipe, "done": done, "train": train.saved(), "heldout": heldout.saved()}
            replace_file(folder / "state.json", json.dumps(state))
        progress(num_documents, num_bytes)

    train.close(recipe)
    heldout.close(recipe)
    (folder / "state.json").unlink(missing_ok=True)


def _read_saved(folder: Path, recipe: str) -> dict[str, Any]:
    """How far an interrupted preparation of this recipe has come, if every byte that it speaks of is there;
    else {}.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        if state["recipe"] != recipe:
            return {}
        for half in ("train", "heldout"):
            for name, size in state[half]["sizes"]:
                if (folder / half / name).stat().st_size < size:
                    return {}
    except (FileNotFoundError, ValueError, RecursionError, KeyError, TypeError):
        return {}
    return dict(state)


def batched(texts: Iterator[str]) -> Iterator[list[str]]:
    """Texts in lists of about `_BATCH` characters: large enough for a tokenizer's calls to pay, small enough
    for its arrays.
    """
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            del text  # a document of 100 MB is not held twice
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


_work: Tokenize  # in a worker process


def _start_process(work: Tokenize) -> None:
    """A worker leaves Ctrl-C to its parent, and exits when the parent was killed: a worker of the pool itself
    would wait for work forever.
    """
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with, args=(parent_process(),), daemon=True).start()
    _work = work


def _exit_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _tokenize(texts: list[str]) -> Tokenized:
    return _work(texts)
