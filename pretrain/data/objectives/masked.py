"""The objective of an encoder: tokens hidden here and there, and predicted (BERT, Devlin et al. 2019)."""

from collections.abc import Sequence

import numpy as np

from trifold.modeling.config import IGNORE
from trifold.pretrain.config import objectives
from trifold.pretrain.data import keyed_random
from trifold.pretrain.data.objectives.segments import (
    Chunk,
    ChunkSizes,
    DocumentWithSpecials,
    Segments,
    Vocabulary,
    required_mask,
)
from trifold.pretrain.data.packing import RowCapacity
from trifold.pretrain.data.ragged import ragged_arange, round_up_to_8, split_runs


class MaskedLM:
    """Of a piece's n text tokens round(rate * n), at least 1, are picked and predicted; `mask` of the picked
    become the mask, `random` any ordinary token, the rest stay. Marks are never hidden.

    Whole words: words are drawn until none fits the number any more, so it can be a little smaller. Never is
    a word hidden in part.
    """

    def __init__(self, dials: objectives.MaskedConfig, vocabulary: Vocabulary, row_length: int) -> None:
        self.dials, self.marks, self.longest = (
            dials,
            DocumentWithSpecials(vocabulary.before, vocabulary.after),
            row_length,
        )
        self.mask, self.word_starts = required_mask(vocabulary, dials.kind), vocabulary.word_starts
        n = np.arange(row_length + 1)
        self.picks = np.where(n > 0, np.maximum(np.rint(dials.rate * n), 1), 0).astype(np.int64)
        self.ordinary = np.setdiff1d(np.arange(vocabulary.vocab_size), vocabulary.special)

    def room(self, longest: int) -> RowCapacity:
        return RowCapacity(longest, picked=round_up_to_8(int(self.picks[longest])))

    def sizes(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> ChunkSizes:
        return ChunkSizes(stop - start, self.picks[self.marks.text(lengths, start, stop)])

    def segments(self, pieces: Sequence[Chunk], keys: np.ndarray) -> Segments:
        tokens, begin, first, last, end = self.marks.joined(pieces)
        text, counts = last - first, self.picks[last - first]
        places, shares, others = keyed_random.split(keys, 3)
        if self.dials.whole_words:
            at = ragged_arange(first, text)
            picked = at[_whole_words(self.word_starts[tokens[at]], text, counts, places)]
            counts = np.diff(picked.searchsorted(end), prepend=0)
        else:
            picked = keyed_random.sample_without_replacement(places, text, counts) + np.repeat(first, counts)
            picked.sort()  # the pieces stay one after another
        share, other = keyed_random.uniform(shares, counts), keyed_random.uniform(others, counts)
        originals = tokens[picked]
        targets = np.full(len(tokens), IGNORE)
        targets[picked] = originals
        randoms = self.ordinary[(other * len(self.ordinary)).astype(np.int64)]
        shown = np.where(share < self.dials.mask + self.dials.random, randoms, originals)
        tokens[picked] = np.where(share < self.dials.mask, self.mask, shown)
        return Segments(tokens, targets, end - begin, picked=picked, picked_sizes=counts)


def _whole_words(begins: np.ndarray, text: np.ndarray, most: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Places of whole words in texts of `text` tokens (N,), one after another: each text's words in random
    order, those that still fit into its `most` (N,) places. A word begins where `begins` (T,) says so, and at
    a text's first token.

    In rounds, for all texts at once: of the words that fit alone, those that fit together with all before
    them; what did not fit alone once never will.
    """
    starts, sizes, words = split_runs(begins, text)
    text_of = np.repeat(np.arange(len(words)), words)
    waiting = keyed_random.shuffled(keys, words) + np.repeat(words.cumsum() - words, words)
    left, taken = most.copy(), np.zeros(len(sizes), bool)
    while len(waiting):
        waiting = waiting[sizes[waiting] <= left[text_of[waiting]]]
        its, size = text_of[waiting], sizes[waiting]
        before = size.cumsum() - size
        fits = (
            before + size - before[its.searchsorted(its)] <= left[its]
        )  # with those of the same text before it
        taken[waiting[fits]] = True
        left -= np.bincount(its[fits], size[fits], len(left)).astype(np.int64)
        waiting = waiting[~fits]
    return ragged_arange(starts[taken], sizes[taken])
