"""Objectives of a decoder: next token, prefix LM, fill in the middle. A document is BOS text EOS, whatever a
published tokenizer adds.

A chunk from `start` to `stop` predicts the positions start + 1 to stop, so that every token except BOS is
predicted (or, in a prefix, passed over) exactly once under each of the three.
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
    """Each position predicts the next token.

    Example: the document 7 8 9 with BOS 1 and EOS 2, whole: tokens 1 7 8 9, targets 7 8 9 2.
    """

    extra = 0  # positions of a segment that are none of the document's

    def __init__(
        self,
        config: objectives.CausalConfig | objectives.PrefixConfig | objectives.FimConfig,
        vocabulary: Vocabulary,
        row_length: int,
    ) -> None:
        self.eos = vocabulary.eos
        self.document = DocumentWithSpecials([vocabulary.bos], [self.eos])
        self.specials = DocumentWithSpecials([vocabulary.bos], [])  # EOS is predicted, and never read
        self.max_chunk_length = row_length - self.extra

    def capacity(self, chunk_length: int) -> RowCapacity:
        return RowCapacity(chunk_length + self.extra)

    def sizes(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> ChunkSizes:
        return ChunkSizes(stop - start, np.zeros_like(start))

    def segments(self, chunks: Sequence[Chunk], keys: np.ndarray) -> Segments:
        with_next = [Chunk(document, start, stop + 1) for document, start, stop in chunks]
        tokens, begin, _, _, end = self.document.concatenate(with_next)
        return shifted(tokens, begin, end)


class PrefixLM(CausalLM):
    """Prefix LM: the prefix ends at a point drawn uniformly, and only what follows it is predicted, at least
    one token.

    Attention stays causal over the prefix too (as in the causal prefix LM of Wang et al. 2022): only the loss
    differs, and what is published is an ordinary causal model.
    """

    def segments(self, chunks: Sequence[Chunk], keys: np.ndarray) -> Segments:
        segments = super().segments(chunks, keys)
        sizes = segments.sizes
        prefixes = (keyed_random.uniform(keys, np.ones_like(sizes)) * sizes).astype(np.int64)
        segments.targets[ragged_arange(sizes.cumsum() - sizes, prefixes)] = IGNORE
        return segments


class FillInTheMiddle(CausalLM):
    """A chunk's text is cut at two points drawn uniformly; the middle is moved to the end (Bavarian et al.
    2022, section 3).

    PRE prefix SUF suffix MID middle EOS, or PRE SUF suffix MID prefix middle EOS (their variant for training
    both orders), where PRE, SUF and MID are the first three sentinels and EOS also ends the middle. Every
    token is predicted, except a BOS before it all. Points fall between tokens, not characters; a document
    longer than a row is cut into chunks first (their "context level").

    Example: BOS, then 7 8 9 10 with points after 1 and 3 tokens: BOS PRE 7 SUF 10 MID 8 9 EOS.
    """

    extra = 4

    def __init__(self, config: objectives.FimConfig, vocabulary: Vocabulary, row_length: int) -> None:
        super().__init__(config, vocabulary, row_length)
        self.suffix_first = config.suffix_first
        sentinels = np.array(required_sentinels(vocabulary, 3, config.kind)[:3], np.int64)
        self.pre, self.suf, self.mid = sentinels[:, None]

    def sizes(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> ChunkSizes:
        tokens = (start == 0) + 3 + np.minimum(stop, lengths) - start
        return ChunkSizes(tokens, np.zeros_like(start))

    def segments(self, chunks: Sequence[Chunk], keys: np.ndarray) -> Segments:
        arrays: list[np.ndarray] = []
        sizes = []
        draws = keyed_random.uniform(keys, np.full(len(keys), 3)).reshape(-1, 3).tolist()
        for chunk, (one, other, order) in zip(chunks, draws, strict=True):
            # the tokens at the positions start + 1 to stop, without EOS
            text = chunk.document[chunk.start : chunk.stop]
            first, second = sorted((int(one * (len(text) + 1)), int(other * (len(text) + 1))))
            prefix, middle, suffix = text[:first], text[first:second], text[second:]
            if order < self.suffix_first:
                context = (self.suf, suffix, self.mid, prefix)
            else:
                context = (prefix, self.suf, suffix, self.mid)
            bos = self.document.before[chunk.start :]
            arrays += (bos, self.pre, *context, middle, self.document.after)
            sizes.append(len(bos) + len(text) + 4)
        end = np.cumsum(sizes)
        return shifted(np.concatenate(arrays, dtype=np.int64), end - sizes, end)


def shifted(tokens: np.ndarray, begin: np.ndarray, end: np.ndarray) -> Segments:
    """Segments in which each token from `begin` to `end` (N,) except the first is predicted from those before
    it: one position less than there are tokens.
    """
    inputs = tokens[mask_except(len(tokens), end - 1)]
    targets = tokens[mask_except(len(tokens), begin)]
    return Segments(inputs, targets, end - begin - 1)
