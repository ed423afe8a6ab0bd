"""Tokenized documents in, one folder of token shards out, batch by batch; shards.py reads it and says what
lies in it.

A shard is full when it holds `shard_bytes` of text, and ends with a batch. What `saved` has told is on disk:
from it a writer goes on after a kill, to the same bytes. Cost: hashing at 1.4 GB/s; going on reads what lies
in unfinished files again.
"""

import json
import os
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np

from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer

FORMAT = 1


class ShardWriter:
    """Writes one folder of shards; the index comes last."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_bytes: int, saved: dict[str, Any]) -> None:
        """`saved`: what an earlier writer has told of the same folder; {}: a new one."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.tokenizer, self.shard_bytes = folder, tokenizer, shard_bytes
        self.shards: list[dict[str, Any]] = saved.get("shards", [])
        self.dropped, self.tokens = saved.get("dropped", 0), saved.get("tokens", 0)
        self.finished: dict[str, str] = saved.get("finished", {})  # full shards, and their hashes
        sizes = dict(saved.get("sizes", (("lengths.int64", 0), ("starts.int64", 0))))
        self.files = {
            name: _Hashed(folder / name, size) for name, size in sizes.items() if name not in self.finished
        }
        self.sizes = {name: size for name, size in sizes.items() if name in self.finished}

    def add(self, ids: np.ndarray, lengths: np.ndarray, sizes: np.ndarray) -> bool:
        """Append documents; those without tokens are dropped and counted. Whether a shard is full now."""
        kept = lengths > 0
        self.dropped += int((~kept).sum())
        lengths, sizes = lengths[kept], sizes[kept]
        if not len(lengths):
            return False
        if not self.shards or self.shards[-1]["file"] in self.finished:
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
        if full := shard["bytes"] >= self.shard_bytes:
            self._finish(shard["file"])
        return full

    def saved(self) -> dict[str, Any]:
        """What is on disk now, in plain values."""
        for file in self.files.values():
            file.sync()
        sizes = [*((name, file.size) for name, file in self.files.items()), *self.sizes.items()]
        return {
            "shards": self.shards,
            "dropped": self.dropped,
            "tokens": self.tokens,
            "finished": self.finished,
            "sizes": sizes,
        }

    def close(self, recipe: str) -> None:
        for name in list(self.files):
            self._finish(name)
        hashes = {
            name: self.finished[name]
            for name in ("lengths.int64", "starts.int64", *(shard["file"] for shard in self.shards))
        }
        index = {
            "format": FORMAT,
            "recipe": recipe,
            "fingerprint": blake2b(
                json.dumps([self.tokenizer.fingerprint, hashes]).encode(), digest_size=16
            ).hexdigest(),
            "tokenizer": self.tokenizer.fingerprint,
            "dtype": self.tokenizer.dtype.str,
            **{key: sum(shard[key] for shard in self.shards) for key in ("documents", "tokens", "bytes")},
            "dropped": self.dropped,
            "shards": self.shards,
            "sizes": {name: self.sizes[name] for name in hashes},
            "sha256": hashes,
        }
        (self.folder / "index.json").write_text(json.dumps(index, indent=1))

    def _finish(self, name: str) -> None:
        file = self.files.pop(name)
        file.sync()
        file.file.close()
        self.finished[name], self.sizes[name] = file.digest.hexdigest(), file.size


class _Hashed:
    """A file that is hashed while it is written; `size`: how much of one that is there counts."""

    def __init__(self, path: Path, size: int = 0) -> None:
        self.file, self.digest, self.size = path.open("r+b" if size else "w+b"), sha256(), size
        self.file.truncate(size)
        while block := self.file.read(1 << 20):
            self.digest.update(block)

    def write(self, numbers: np.ndarray) -> None:
        data = numbers.tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
