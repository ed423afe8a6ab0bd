"""Texts by words, which recur: in, texts; out, their ids, each word encoded once. For a tokenizer of ours alone: it cuts text before each
space and around each line end, so a word always has the same ids.

A word here is what `_words` makes: "the" stands for " the", and "\\nThe" for a line end with the first word of its line. Each word that was
ever seen has a number; a text becomes numbers in one pass of Python's own loops, and ids in three of numpy's.

Cost on one slow core: 0.2 us for a word seen before, 6 us for a new one, nearly all of it inside `tokenizers`.
"""

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import tokenizers

from pretrain.objectives.piece import spread

REMEMBERED = 4_000_000  # characters of words: about 80 MB


class Words:
    """The ids of all words seen so far, until they are too many."""

    def __init__(self, fast: tokenizers.Tokenizer, vocab_size: int, dtype: np.dtype[Any]) -> None:
        self.fast = fast
        pieces = map(fast.id_to_token, range(vocab_size))
        newline = fast.encode("\n", add_special_tokens=False).ids
        self.begins = np.array([i in newline or (piece or "").startswith("▁") for i, piece in enumerate(pieces)])
        self.dtype = dtype
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.number_of = _Numbers()
        self.ids: np.ndarray = np.empty(0, self.dtype)  # of one word after another
        self.starts: np.ndarray = np.empty(0, np.int64)  # where each word's begin among them
        self.sizes: np.ndarray = np.empty(0, np.int64)
        self.characters = 0

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""
        words = [_words(text) for text in texts]
        numbers = np.fromiter(map(self.number_of.__getitem__, chain.from_iterable(words)), np.int64, sum(map(len, words)))
        if new := list(islice(self.number_of, len(self.sizes), None)):
            self._learn(new)
        sizes = self.sizes[numbers]
        ids = self.ids[spread(self.starts[numbers], sizes)]
        ends = sizes.cumsum()[np.cumsum([len(its) for its in words], dtype=np.int64) - 1]
        if self.characters > REMEMBERED:
            self.forget()
        return [part[1:] for part in np.split(ids, ends[:-1])] if words else []

    def _learn(self, words: list[str]) -> None:
        """Encode new words as one text: `tokenizers` takes twice as long for them one by one. A word's ids begin where a piece is a line
        end or begins with a space."""
        [encoding] = self.fast.encode_batch_fast([_text(words)], add_special_tokens=False)
        ids = np.array(encoding.ids, self.dtype)
        starts = self.begins[ids].nonzero()[0]
        assert len(starts) == len(words), "a space or a line end inside of a piece"
        self.starts = np.concatenate([self.starts, len(self.ids) + starts])
        self.sizes = np.concatenate([self.sizes, np.diff(starts, append=len(ids))])
        self.ids = np.concatenate([self.ids, ids])
        self.characters += sum(map(len, words))


class _Numbers(dict[str, int]):
    """Words in the order in which they came, and the number of each."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number


def _words(text: str) -> list[str]:
    """A text cut before each space, which its word leaves out, and each line end, which stays. The first word gets a line end too."""
    return ("\n" + text.replace("▁", " ").replace("\n", " \n")).split(" ")


def _text(words: Sequence[str]) -> str:
    """What `_words` cuts into these words."""
    return "".join(word if word[:1] == "\n" else " " + word for word in words)
