"""The objective of an encoder: tokens hidden here and there, and predicted (BERT, Devlin et al. 2019)."""

from collections.abc import Sequence

import numpy as np

from modeling.config import IGNORE
from pretrain.objectives import config
from pretrain.objectives.piece import Marks, Piece, Segments, Sizes, Vocabulary, eights, needed_mask
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

    def drawn(self, piece: Piece, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each place that is picked, in any order: where in the text it is, a share in [0, 1), a random token."""
        low, high = self.marks.within(piece)
        number = int(self.picks[high - low])
        if self.dials.whole_words:
            picked = _whole_words(self.word_starts[piece.document[low:high]], number, rng)
        else:
            picked = rng.permutation(high - low)[:number]
        return picked, rng.random(len(picked)), rng.integers(len(self.ordinary), size=len(picked))

    def segments(self, pieces: Sequence[Piece], drawn: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Segments:
        tokens, begin, first, _, end = self.marks.joined(pieces)
        picks, shares, others = zip(*drawn, strict=True)
        counts = np.array([len(pick) for pick in picks])
        picked, share, randoms = np.concatenate(picks), np.concatenate(shares), self.ordinary[np.concatenate(others)]
        picked += np.repeat(first, counts)
        picked.sort()  # the pieces stay one after another
        originals = tokens[picked]
        targets = np.full(len(tokens), IGNORE)
        targets[picked] = originals
        shown = np.where(share < self.dials.mask + self.dials.random, randoms, originals)
        tokens[picked] = np.where(share < self.dials.mask, self.mask, shown)
        return Segments(tokens, targets, end - begin, picked=picked, picked_sizes=counts)


def _whole_words(starts: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Places of whole words, `number` tokens at most; a word begins where `starts` says so, and at the text's first token."""
    edges = [0, *(starts[1:].nonzero()[0] + 1).tolist(), len(starts)]
    places: list[int] = []
    for word in rng.permutation(len(edges) - 1).tolist() if number else ():
        first, last = edges[word], edges[word + 1]
        if last - first <= number:
            places += range(first, last)
            number -= last - first
        if number == 0:
            break
    return np.array(places, np.int64)
