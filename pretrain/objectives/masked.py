"""The objective of an encoder: tokens hidden here and there, and predicted (BERT, Devlin et al. 2019)."""

import numpy as np

from modeling.config import IGNORE
from pretrain.objectives import config
from pretrain.objectives.piece import Marks, Segment, Sizes, Vocabulary, eights, needed_mask
from pretrain.packing import Room


class HiddenTokens:
    """Of a piece's n text tokens round(rate * n), at least 1, are picked and predicted; `mask` of the picked become the mask, `random` any
    ordinary token, the rest stay. Marks are never hidden.

    Whole words: words are drawn until none fits the number any more, so it can be a little smaller. Never is a word hidden in part.
    """

    def __init__(self, dials: config.Masked, vocabulary: Vocabulary, row_length: int) -> None:
        self.dials, self.marks, self.longest = dials, Marks(vocabulary.before, vocabulary.after), row_length
        self.mask, self.word_starts = needed_mask(vocabulary, dials.kind), vocabulary.word_starts
        n = np.arange(row_length + 1)
        self.picks = np.where(n > 0, np.maximum(np.rint(dials.rate * n), 1), 0).astype(np.int64)
        self.ordinary = np.setdiff1d(np.arange(vocabulary.vocab_size), vocabulary.special)

    def room(self, longest: int) -> Room:
        return Room(longest, picked=eights(int(self.picks[longest])))

    def sizes(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Sizes:
        return Sizes(stop - start, self.picks[self.marks.text(lengths, start, stop)])

    def segment(self, document: np.ndarray, start: int, stop: int, rng: np.random.Generator) -> Segment:
        tokens, first, last = self.marks.marked(document, start, stop)
        number = int(self.picks[last - first])
        if self.dials.whole_words:
            picked = _whole_words(self.word_starts[tokens[first:last]], number, rng)
        else:
            picked = rng.permutation(last - first)[:number]
            picked.sort()
        picked += first
        targets = np.full(len(tokens), IGNORE)
        targets[picked] = tokens[picked]
        draw = rng.random(len(picked))
        randoms = self.ordinary[rng.integers(len(self.ordinary), size=len(picked))]
        replaced = draw < self.dials.mask + self.dials.random
        tokens[picked[replaced]] = randoms[replaced]
        tokens[picked[draw < self.dials.mask]] = self.mask
        return Segment(tokens, targets, picked=picked)


def _whole_words(starts: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Places of whole words, `number` tokens at most; a word begins where `starts` says so, and at the piece's first token."""
    if number == 0:
        return np.empty(0, np.int64)
    word = starts.cumsum() - starts[0]
    sizes = np.bincount(word)
    chosen = np.zeros(len(sizes), bool)
    order = rng.permutation(len(sizes))
    for candidate, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if size <= number:
            chosen[candidate], number = True, number - size
        if number == 0:
            break
    return chosen[word].nonzero()[0]
