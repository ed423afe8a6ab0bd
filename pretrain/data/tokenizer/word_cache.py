"""Texts as words, which recur: texts come in, their ids go out, each word encoded once. For a tokenizer
trained here only.

A word here is what stands between two cuts. A text is cut wherever no piece of the vocabulary holds both the
character before and the one after: before each space and around each line end, but also inside "Xerxes" or
東京都は. No path of pieces crosses a cut, and scores add up without rounding, so a word has the same ids in
every text (`can_split_words`). Arrow finds the different words of a batch, and each of these is looked up
once.

Cost on one slow core: 0.15 us for each word, half of it Arrow's; a new one 1.5 (Japanese) to 3 us (English)
more. Texts are encoded a million characters at a time, so the arrays of a document of 100 MB stay small.
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
AT_ONCE = 1 << 20  # characters of text whose arrays are made together, 30 bytes for each
_TABLE_SIZE = 2**19  # of the table of character pairs


def can_split_words(spec: dict[str, Any]) -> bool:
    """Whether words have ids of their own under a tokenizer.json that cuts as ours does: none of its pieces
    crosses a space or a line end, unknown characters become bytes, and scores are multiples of 2**-26, so
    that float64 adds up those of any line exactly.
    """
    model = spec["model"]
    crossing = re.compile(r".[▁\n]|\n.", re.DOTALL)
    if not model.get("byte_fallback"):
        return False
    return not any(crossing.search(piece) or score * 2**26 % 1 for piece, score in model["vocab"])


class WordCache:
    """The ids of all words seen so far, until there are too many."""

    def __init__(self, fast: tokenizers.Tokenizer, spec: dict[str, Any], dtype: np.dtype[Any]) -> None:
        """`spec` is the tokenizer.json that `fast` was made of."""
        self.fast, self.dtype = fast, dtype
        vocab = spec["model"]["vocab"]
        added = [token["content"] for token in spec["added_tokens"]]
        # one character of each added token: `tokenizers` encodes the words that hold one
        shunned = {next((c for c in token if not c.isalnum()), token[0]) for token in added}
        self.viterbi = Viterbi(vocab, shunned)

        pairs = set()
        for piece in [*added, *(piece for piece, _ in vocab)]:
            pairs |= {piece[i : i + 2] for i in range(len(piece) - 1)}
        # two pairs may share an index; a text is not cut there then, which costs time alone
        self.joined = np.zeros(_TABLE_SIZE, bool)
        self.joined[_pair_index(*_characters("".join(pairs)).reshape(-1, 2).T)] = True
        self.forget()

    def forget(self) -> None:
        """Remove all words."""
        self.number_of: dict[bytes, int] = {}  # of each word, as UTF-32
        self.ids: np.ndarray = np.empty(0, self.dtype)  # of one word after another
        self.starts: np.ndarray = np.empty(0, np.int64)  # where each word's ids begin
        self.sizes: np.ndarray = np.empty(0, np.int64)  # how many each word has
        self.characters = 0

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""
        if max(map(len, texts), default=0) <= AT_ONCE:
            return self._encode(texts)
        encoded = []
        for text in texts:
            if len(text) <= AT_ONCE:
                encoded += self._encode([text])
            else:
                ids = [self._encode([text[start:stop]])[0] for start, stop in pairwise(self._cuts(text))]
                encoded.append(np.concatenate(ids))
        return encoded

    def _cuts(self, text: str) -> list[int]:
        """The ends of stretches of about AT_ONCE characters: each is the last place in its stretch at which
        the text is cut. A stretch without one is joined to the next.
        """
        ends = [0]
        for start in range(AT_ONCE, len(text), AT_ONCE):
            low = max(ends[-1], start - AT_ONCE)
            characters = _characters(text[low:start].replace(" ", "▁"))
            cuts = (~self.joined[_pair_index(characters[:-1], characters[1:])]).nonzero()[0]
            if len(cuts):
                ends.append(low + int(cuts[-1]) + 1)
        return [*ends, len(text)]

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        words, counts = self._split(texts)
        distinct, indices = words.dictionary.to_pylist(), np.from_dlpack(words.indices)
        numbers = np.fromiter(map(self.number_of.get, distinct, repeat(-1)), np.int64, len(distinct))
        new = (numbers < 0).nonzero()[0]
        if len(new):
            numbers[new] = self._add([distinct[i] for i in new])

        sizes = self.sizes[numbers][indices]
        ids = self.ids[ragged_arange(self.starts[numbers][indices], sizes)]
        ends_of_words = np.append(0, sizes.cumsum())
        ends = ends_of_words[np.append(0, counts.cumsum())].tolist()
        if self.characters > MAX_CACHED:
            self.forget()
        return [ids[start:end] for start, end in pairwise(ends)]

    def _split(self, texts: Sequence[str]) -> tuple[pyarrow.DictionaryArray, np.ndarray]:
        """The words of all texts, and how many each text has."""
        characters = _characters("".join(texts).replace(" ", "▁"))
        begins = np.ones(len(characters), bool)
        begins[1:] = ~self.joined[_pair_index(characters[:-1], characters[1:])]
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        starts, _, counts = split_runs(begins, lengths)

        offsets = np.append(starts, len(characters)) * characters.itemsize
        buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(characters)]
        words = pyarrow.Array.from_buffers(pyarrow.large_binary(), len(starts), buffers)
        return words.dictionary_encode(), counts

    def _add(self, words: list[bytes]) -> np.ndarray:
        """Encode new words, most by `Viterbi`, the rest by `tokenizers`. Returns their numbers."""
        text = np.frombuffer(b"".join(words), "<u4")
        lengths = np.fromiter(map(len, words), np.int64, len(words)) // text.itemsize
        by_viterbi, ids, sizes = self.viterbi.encode(text, lengths)
        rest = mask_except(len(words), by_viterbi)
        ids_of_rest = []
        for word in compress(words, rest):
            text_of_word = word.decode("utf-32-le")
            ids_of_rest.append(self.fast.encode(text_of_word, add_special_tokens=False).ids)

        all_sizes = np.empty(len(words), np.int64)
        all_sizes[by_viterbi] = sizes
        all_sizes[rest] = [len(word_ids) for word_ids in ids_of_rest]
        starts = np.empty(len(words), np.int64)
        starts[by_viterbi] = sizes.cumsum() - sizes
        starts[rest] = len(ids) + all_sizes[rest].cumsum() - all_sizes[rest]

        numbers = np.arange(len(self.sizes), len(self.sizes) + len(words))
        self.number_of.update(zip(words, numbers.tolist(), strict=True))
        self.starts = np.concatenate([self.starts, len(self.ids) + starts])
        self.sizes = np.concatenate([self.sizes, all_sizes])
        self.ids = np.concatenate([self.ids, ids, *ids_of_rest], dtype=self.dtype, casting="unsafe")
        self.characters += len(text)
        return numbers


def _characters(text: str) -> np.ndarray:
    """As UTF-32. Raises UnicodeEncodeError for half of a surrogate pair."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _pair_index(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The index of a pair of characters in the table."""
    return (first * np.uint32(2_654_435_769) + second) % np.uint32(_TABLE_SIZE)
