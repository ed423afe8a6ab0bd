"""Texts by words, which recur: in, texts; out, their ids, each word encoded once. For a tokenizer of ours
alone.

A word here is what stands between two cuts, and a text is cut wherever no piece holds both the character
before and the one after: before each space and around each line end, but also inside "Xerxes" or 東京都は. No
path of pieces crosses a cut, and scores add up without rounding, so a word has the same ids wherever it
stands (`apart`). Arrow finds the different words of a batch, and each of these is looked up once.

Cost on one slow core: 0.15 us for a word, half of it Arrow's; for a new one 1.5 (Japanese) to 3 us (English)
more.
"""

import re
from collections.abc import Sequence
from itertools import compress, pairwise, repeat
from typing import Any

import numpy as np
import pyarrow
import tokenizers

from trifold.pretrain.data.ragged import mask_except, ragged_arange, split_runs
from trifold.pretrain.data.tokenizer.viterbi import Viterbi

MAX_CACHED = 4_000_000  # characters of words: 80 to 120 MB
_PLACES = 2**19  # of the table of pairs


def can_split_words(spec: dict[str, Any]) -> bool:
    """Whether words have ids of their own under a tokenizer.json that cuts as ours do: none of its pieces
    crosses a space or a line end, unknown characters become bytes, and scores are multiples of 2**-26, so
    that float64 adds up those of any line.
    """
    model = spec["model"]
    crossing = re.compile(r".[▁\n]|\n.", re.DOTALL)
    return bool(model.get("byte_fallback")) and not any(
        crossing.search(piece) or score * 2**26 % 1 for piece, score in model["vocab"]
    )


class WordCache:
    """The ids of all words seen so far, until they are too many."""

    def __init__(self, fast: tokenizers.Tokenizer, spec: dict[str, Any], dtype: np.dtype[Any]) -> None:
        """`spec` is tokenizer.json, which `fast` was made of."""
        self.fast, self.dtype = fast, dtype
        vocab, added = spec["model"]["vocab"], [token["content"] for token in spec["added_tokens"]]
        self.viterbi = Viterbi(
            vocab, {next((c for c in token if not c.isalnum()), token[0]) for token in added}
        )
        pieces = [*added, *(piece for piece, _ in vocab)]
        pairs = {piece[at : at + 2] for piece in pieces for at in range(len(piece) - 1)}
        self.joined = np.zeros(
            _PLACES, bool
        )  # where two pairs share a place a text is not cut, which costs time alone
        self.joined[_place(*_characters("".join(pairs)).reshape(-1, 2).T)] = True
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.number_of: dict[bytes, int] = {}  # of each word, as UTF-32
        self.ids: np.ndarray = np.empty(0, self.dtype)  # of one word after another
        self.starts: np.ndarray = np.empty(0, np.int64)  # where each word's begin among them
        self.sizes: np.ndarray = np.empty(0, np.int64)
        self.characters = 0

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""
        words, counts = self._cut(texts)
        different, places = words.dictionary.to_pylist(), np.from_dlpack(words.indices)
        numbers = np.fromiter(map(self.number_of.get, different, repeat(-1)), np.int64, len(different))
        if len(new := (numbers < 0).nonzero()[0]):
            numbers[new] = self._learn([different[place] for place in new])
        sizes = self.sizes[numbers][places]
        ids = self.ids[ragged_arange(self.starts[numbers][places], sizes)]
        ends = np.append(0, sizes.cumsum())[np.append(0, counts.cumsum())].tolist()
        if self.characters > MAX_CACHED:
            self.forget()
        return [ids[start:end] for start, end in pairwise(ends)]

    def _cut(self, texts: Sequence[str]) -> tuple[pyarrow.DictionaryArray, np.ndarray]:
        """The words of all texts, and how many each text has."""
        text = _characters("".join(texts).replace(" ", "▁"))
        begins = np.ones(len(text), bool)
        begins[1:] = ~self.joined[_place(text[:-1], text[1:])]
        starts, _, counts = split_runs(begins, np.fromiter(map(len, texts), np.int64, len(texts)))
        offsets = np.append(starts, len(text)) * text.itemsize
        buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(text)]
        return pyarrow.Array.from_buffers(
            pyarrow.large_binary(), len(starts), buffers
        ).dictionary_encode(), counts

    def _learn(self, words: list[bytes]) -> np.ndarray:
        """Encode new words: most by `Viterbi`, the rest by `tokenizers`."""
        text = np.frombuffer(b"".join(words), "<u4")
        lengths = np.fromiter(map(len, words), np.int64, len(words)) // text.itemsize
        which, ids, sizes = self.viterbi.encode(text, lengths)
        rest = mask_except(len(words), which)
        others = [
            self.fast.encode(word.decode("utf-32-le"), add_special_tokens=False).ids
            for word in compress(words, rest)
        ]
        all_sizes = np.empty(len(words), np.int64)
        all_sizes[which], all_sizes[rest] = sizes, [*map(len, others)]
        starts = np.empty(len(words), np.int64)
        starts[which], starts[rest] = (
            sizes.cumsum() - sizes,
            len(ids) + all_sizes[rest].cumsum() - all_sizes[rest],
        )
        numbers = np.arange(len(self.sizes), len(self.sizes) + len(words))
        self.number_of.update(zip(words, numbers.tolist(), strict=True))
        self.starts = np.concatenate([self.starts, len(self.ids) + starts])
        self.sizes = np.concatenate([self.sizes, all_sizes])
        self.ids = np.concatenate([self.ids, ids, *others], dtype=self.dtype, casting="unsafe")
        self.characters += len(text)
        return numbers


def _characters(text: str) -> np.ndarray:
    """As UTF-32. Raises UnicodeEncodeError for half of a surrogate pair."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _place(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Where a pair of characters stands in a table."""
    return (first * np.uint32(2_654_435_769) + second) % np.uint32(_PLACES)
