"""Texts by words, which recur: in, texts; out, their ids, each word encoded once. For a tokenizer of ours alone: it cuts text before each
space and around each line end, so a word always has the same ids.

A word here is what `_words` makes: "the" stands for " the", and "\\nThe" for a line end with the first word of its line. Each word that was
ever seen has a number; a text becomes numbers in one pass of Python's own loops, and ids in three of numpy's.

Cost on one slow core: 0.3 us for a word, most of it looking it up among 280,000; for a new one 2 us more, 6 where `tokenizers` encodes it.
"""

from collections.abc import Sequence
from itertools import chain, compress, islice
from typing import Any

import numpy as np
import tokenizers

from pretrain.objectives.piece import other_than, spread
from pretrain.viterbi import Viterbi

REMEMBERED = 4_000_000  # characters of words: about 80 MB


class Words:
    """The ids of all words seen so far, until they are too many."""

    def __init__(self, fast: tokenizers.Tokenizer, spec: dict[str, Any], dtype: np.dtype[Any]) -> None:
        """`spec` is tokenizer.json, which `fast` was made of."""
        self.fast, self.dtype = fast, dtype
        vocab, added = spec["model"]["vocab"], [token["content"] for token in spec["added_tokens"]]
        self.viterbi = Viterbi(vocab, {next((c for c in token if not c.isalnum()), token[0]) for token in added})
        newline = fast.encode("\n", add_special_tokens=False).ids
        self.begins = np.array([i in newline or piece.startswith("▁") for i, (piece, _) in enumerate(vocab)])
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
        """Encode new words: most by `Viterbi`, the rest as one text. There a word's ids begin where a piece is a line end or begins with
        a space."""
        which, ids, sizes = self.viterbi.encode(words)
        rest = other_than(len(words), which)
        [encoding] = self.fast.encode_batch_fast([_text(list(compress(words, rest)))], add_special_tokens=False)
        others = np.array(encoding.ids, np.int64)
        begins = self.begins[others].nonzero()[0]
        all_sizes = np.empty(len(words), np.int64)
        all_sizes[which], all_sizes[rest] = sizes, np.diff(begins, append=len(others))
        starts = np.empty(len(words), np.int64)
        starts[which], starts[rest] = sizes.cumsum() - sizes, len(ids) + begins
        self.starts = np.concatenate([self.starts, len(self.ids) + starts])
        self.sizes = np.concatenate([self.sizes, all_sizes])
        self.ids = np.concatenate([self.ids, ids, others], dtype=self.dtype, casting="unsafe")
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
