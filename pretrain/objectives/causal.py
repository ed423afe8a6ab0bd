"""Objectives of a decoder: next token, prefix LM, fill in the middle. A document is BOS text EOS, whatever a published tokenizer adds.

A piece from `start` to `stop` predicts positions start + 1 to stop, so that every token but BOS is predicted (or, in a prefix, passed
over) exactly once, whichever of the three its piece goes to.
"""

import numpy as np

from modeling.config import IGNORE
from pretrain.objectives import config
from pretrain.objectives.piece import Marks, Segment, Sizes, Vocabulary, needed_sentinels
from pretrain.packing import Room


class NextToken:
    """Each position predicts the next token."""

    extra = 0  # positions of a row that are none of the document's

    def __init__(self, dials: config.Causal | config.Prefix | config.Fim, vocabulary: Vocabulary, row_length: int) -> None:
        self.eos = vocabulary.eos
        self.document = Marks([vocabulary.bos], [self.eos])
        self.marks = Marks([vocabulary.bos], [])  # EOS is predicted, and never read
        self.longest = row_length - self.extra

    def room(self, longest: int) -> Room:
        return Room(longest + self.extra)

    def sizes(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Sizes:
        return Sizes(stop - start, np.zeros_like(start))

    def segment(self, document: np.ndarray, start: int, stop: int, rng: np.random.Generator) -> Segment:
        tokens, _, _ = self.document.marked(document, start, stop + 1)
        return Segment(tokens[:-1], tokens[1:])


class AfterPrefix(NextToken):
    """Prefix LM: the prefix ends at a point drawn uniformly, and only what follows it is predicted, one token at least.

    Attention stays causal over the prefix too (as in the causal prefix LM of Wang et al. 2022): only the loss differs, and what is
    published is an ordinary causal model.
    """

    def segment(self, document: np.ndarray, start: int, stop: int, rng: np.random.Generator) -> Segment:
        plain = super().segment(document, start, stop, rng)
        targets = plain.targets.copy()
        targets[: rng.integers(len(targets))] = IGNORE
        return Segment(plain.tokens, targets)


class Middle(NextToken):
    """A piece's text is cut at two points drawn uniformly; the middle is moved to the end (Bavarian et al. 2022, section 3).

    PRE prefix SUF suffix MID middle EOS, or PRE SUF suffix MID prefix middle EOS (their variant for training both orders), where PRE,
    SUF and MID are the first three sentinels and EOS also ends the middle. Every token is predicted, BOS before it all excepted. Points
    fall between tokens, not characters; a document longer than a row is cut first (their "context level").
    """

    extra = 4

    def __init__(self, dials: config.Fim, vocabulary: Vocabulary, row_length: int) -> None:
        super().__init__(dials, vocabulary, row_length)
        self.suffix_first = dials.suffix_first
        self.pre, self.suf, self.mid = np.array(needed_sentinels(vocabulary, 3, dials.kind)[:3], np.int64)[:, None]

    def sizes(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Sizes:
        return Sizes((start == 0) + 3 + np.minimum(stop, lengths) - start, np.zeros_like(start))

    def segment(self, document: np.ndarray, start: int, stop: int, rng: np.random.Generator) -> Segment:
        text = document[start:stop]  # what positions start + 1 to stop hold, without EOS
        first, second = sorted(rng.integers(len(text) + 1, size=2).tolist())
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        if rng.random() < self.suffix_first:
            moved = [self.pre, self.suf, suffix, self.mid, prefix, middle]
        else:
            moved = [self.pre, prefix, self.suf, suffix, self.mid, middle]
        tokens = np.concatenate([self.document.before[start:], *moved, [self.eos]], dtype=np.int64)
        return Segment(tokens[:-1], tokens[1:])
