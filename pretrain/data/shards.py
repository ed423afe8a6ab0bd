"""Token documents, read through memory-mapped shards; prepare.py writes them.

A folder of shards holds `00000.tokens`, ... (ids one after another, uint16 or uint32, little endian),
`lengths.int64` and `starts.int64` (one number per document: its tokens, and where it begins among all
tokens), and `index.json`. Nothing in it needs unpickling. Opening reads the index alone; a document costs a
search in the list of shards and a view.
"""

import json
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np

from trifold.modeling.errors import UserError


class Shards:
    """The token documents of one folder, in corpus order. Cheap to open: every file's size is checked, its
    bytes by `verify`.
    """

    fingerprint: str  # of the tokens, their order and their tokenizer: what the rows of a run are keyed by
    num_documents: int
    num_tokens: int
    num_bytes: int  # of UTF-8 text
    lengths: np.ndarray  # (num_documents,) int64, memory-mapped: tokens of each document, at least 1

    def __init__(self, folder: Path | str) -> None:
        """Raises UserError where the index is missing or a file is not as long as the index says."""
        self.folder = Path(folder)
        try:
            self.index: dict[str, Any] = json.loads((self.folder / "index.json").read_text())
        except (FileNotFoundError, ValueError, RecursionError):
            raise UserError(
                f"{self.folder} holds no complete token shards (index.json is missing or broken): prepare"
                " them again"
            ) from None
        for name, size in self.index["sizes"].items():
            path = self.folder / name
            found = path.stat().st_size if path.exists() else 0
            if found != size:
                raise UserError(
                    f"{path} has {found} bytes where its index says {size}: delete {self.folder} and prepare"
                    " it again"
                )
        self.fingerprint = self.index["fingerprint"]
        self.num_documents, self.num_tokens, self.num_bytes = (
            self.index[key] for key in ("documents", "tokens", "bytes")
        )
        self.lengths, self._starts = self._map("lengths.int64", "<i8"), self._map("starts.int64", "<i8")
        self._first = np.cumsum([0] + [shard["documents"] for shard in self.index["shards"]])
        self._tokens = lru_cache(maxsize=128)(
            lambda shard: self._map(self.index["shards"][shard]["file"], self.index["dtype"])
        )

    def document(self, i: int) -> np.ndarray:
        """The ids of document i, (lengths[i],), a view of the mapped file."""
        shard = int(self._first.searchsorted(i, side="right")) - 1
        start = int(self._starts[i] - self._starts[self._first[shard]])
        return self._tokens(shard)[start : start + int(self.lengths[i])]

    def verify(self) -> None:
        """Hash every file; raises UserError with the first that is not what was written."""
        for name, expected in self.index["sha256"].items():
            path = self.folder / name
            with path.open("rb") as file:
                if file_digest(file, sha256).hexdigest() != expected:
                    raise UserError(
                        f"{path} is not what was written (its SHA-256 differs): delete {self.folder} and"
                        " prepare it again"
                    )

    def _map(self, name: str, dtype: str) -> np.ndarray:
        path = self.folder / name
        mapped = np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
        return np.asarray(mapped)  # a view of a memmap costs five times that of a plain array
