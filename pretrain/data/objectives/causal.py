"""Objectives of a decoder: next token, prefix LM, fill in the middle. A document is BOS text EOS, whatever a
published tokenizer adds.

A piece from `start` to `stop` predicts positions start + 1 to stop, so that every token but BOS is predicted
(or, in a prefix, passed over) exactly once, whichever of the three its piece goes to.
"""

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
    required_sentinels,
)
from trifold.pretrain.data.packing import RowCapacity
from trifold.pretrain.data.ragged import mask_except, ragged_arange


class CausalLM:
    """Each position predicts the next token."""

    extra = 0  # positions of a row that are none of the document's

    def __init__(
        self,
        dials: objectives.CausalConfig | objectives.PrefixConfig | objectives.FimConfig,
        vocabulary: Vocabulary,
        row_length: int,
    ) -> None:
        self.eos = vocabulary.eos
        self.document = DocumentWithSpecials([vocabulary.bos], [self.eos])
        self.marks = DocumentWithSpecials([vocabulary.bos], [])  # EOS is predicted, and never read
        self.longest = row_length - self.extra

    def room(self, longest: int) -> RowCapacity:
        return RowCapacity(longest + self.extra)

    def sizes(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> ChunkSizes:
        return ChunkSizes(stop - start, np.zeros_like(start))

    def segments(self, pieces: Sequence[Chunk], keys: np.ndarray) -> Segments:
        tokens, begin, _, _, end = self.document.joined(
            [Chunk(document, start, stop + 1) for document, start, stop in pieces]
        )
        return shifted(tokens, begin, end)


class PrefixLM(CausalLM):
    """Prefix LM: the prefix ends at a point drawn uniformly, and only what follows it is predicted, one token
    at least.

    Attention stays causal over the prefix too (as in the causal prefix LM of Wang et al. 2022): only the loss
    differs, and what is published is an ordinary causal model.
    """

    def segments(self, pieces: Sequence[Chunk], keys: np.ndarray) -> Segments:
        made = super().segments(pieces, keys)
        prefixes = (keyed_random.uniform(keys, np.ones_like(made.sizes)) * made.sizes).astype(np.int64)
        made.targets[ragged_arange(made.sizes.cumsum() - made.sizes, prefixes)] = IGNORE
        return made


class FillInTheMiddle(CausalLM):
    """A piece's text is cut at two points drawn uniformly; the middle is moved to the end (Bavarian et al.
    2022, section 3).

    PRE prefix SUF suffix MID middle EOS, or PRE SUF suffix MID prefix middle EOS (their variant for training
    both orders), where PRE, SUF and MID are the first three sentinels and EOS also ends the middle. Every
    token is predicted, BOS before it all excepted. Points fall between tokens, not characters; a document
    longer than a row is cut first (their "context level").
    """

    extra = 4

    def __init__(self, dials: objectives.FimConfig, vocabulary: Vocabulary, row_length: int) -> None:
        super().__init__(dials, vocabulary, row_length)
        self.suffix_first = dials.suffix_first
        self.pre, self.suf, self.mid = np.array(required_sentinels(vocabulary, 3, dials.kind)[:3], np.int64)[
            :, None
        ]

    def sizes(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> ChunkSizes:
        return ChunkSizes((start == 0) + 3 + np.minimum(stop, lengths) - start, np.zeros_like(start))

    def segments(self, pieces: Sequence[Chunk], keys: np.ndarray) -> Segments:
        chunks: list[np.ndarray] = []
        sizes = []
        draws = keyed_random.uniform(keys, np.full(len(keys), 3)).reshape(-1, 3).tolist()
        for piece, (one, other, order) in zip(pieces, draws, strict=True):
            text = piece.document[
                piece.start : piece.stop
            ]  # what positions start + 1 to stop hold, without EOS
            first, second = sorted((int(one * (len(text) + 1)), int(other * (len(text) + 1))))
            prefix, middle, suffix = text[:first], text[first:second], text[second:]
            moved = (
                (self.suf, suffix, self.mid, prefix)
                if order < self.suffix_first
                else (prefix, self.suf, suffix, self.mid)
            )
            bos = self.document.before[piece.start :]
            chunks += bos, self.pre, *moved, middle, self.document.after
            sizes.append(len(bos) + len(text) + 4)
        end = np.cumsum(sizes)
        return shifted(np.concatenate(chunks, dtype=np.int64), end - sizes, end)


def shifted(tokens: np.ndarray, begin: np.ndarray, end: np.ndarray) -> Segments:
    """Segments of one token less than they have from `begin` to `end`, in which each is predicted from those
    before it.
    """
    return Segments(
        tokens[mask_except(len(tokens), end - 1)], tokens[mask_except(len(tokens), begin)], end - begin - 1
    )
