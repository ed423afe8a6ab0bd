"""The objective of an encoder: tokens hidden here and there, and predicted (BERT, Devlin et al. 2019)."""

import numpy as np

from modeling.batch import IGNORE
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
        tokens = self.marks.marked(document, start, stop)
        text, first = int(self.marks.text(len(document), start, stop)), self.marks.first(start)
        if self.dials.whole_words:
            places = _whole_words(self.word_starts[tokens[first : first + text]], int(self.picks[text]), rng)
        else:
            places = rng.permutation(text)[: self.picks[text]]
        picked = first + np.sort(places)
        targets = np.full_like(tokens, IGNORE)
        targets[picked] = tokens[picked]
        draw = rng.random(len(picked))
        randoms = rng.integers(len(self.ordinary), size=len(picked))
        masked, replaced = draw < self.dials.mask, draw < self.dials.mask + self.dials.random
        tokens[picked] = np.where(masked, self.mask, np.where(replaced, self.ordinary[randoms], tokens[picked]))
        return Segment(tokens, targets, picked=picked)


def _whole_words(starts: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Places of whole words, `number` tokens at most; a word begins where `starts` says so, and at the piece's first token."""
    if number == 0:
        return np.empty(0, np.int64)
    word = np.cumsum(starts) - starts[0]
    sizes = np.bincount(word)
    chosen = np.zeros(len(sizes), bool)
    for candidate, size in ((w, int(sizes[w])) for w in rng.permutation(len(sizes)).tolist()):
        if size <= number:
            chosen[candidate], number = True, number - size
        if number == 0:
            break
    return np.flatnonzero(chosen[word])
