"""Chunks of text as training examples: chunks of documents and a random key for each come in, Segments, ready
to stand in rows, go out.

    segments.py   what all objectives share: Vocabulary, Chunk, Segments, special tokens around a document
    causal.py     decoder: next token, prefix LM, fill in the middle
    masked.py     encoder: masked tokens or words
    spans.py      encoder-decoder: span corruption, continuation, text infilling

ObjectiveMixture below is what rows.py and packing.py use: one member, or several that share the chunks. Each
member gives the `capacity` of a row, the `sizes` of chunks in closed form before any text is read, and then
`segments` of many chunks at once.

Rows of one objective are at most 1 % padding. A mixture for an encoder-decoder pads where the shapes of its
members differ: UL2's seven 17 % on documents of 20 to 300 tokens in rows of 512, and 30 % on longer ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trifold.pretrain.config import objectives
from trifold.pretrain.data import keyed_random
from trifold.pretrain.data.objectives.causal import CausalLM, FillInTheMiddle, PrefixLM
from trifold.pretrain.data.objectives.masked import MaskedLM
from trifold.pretrain.data.objectives.segments import Chunk, Objective, Segment, Segments, Vocabulary
from trifold.pretrain.data.objectives.spans import Continuation, Infilling, SpanCorruption
from trifold.pretrain.data.packing import Chunks, RowCapacity, chunk_documents

__all__ = ["Chunk", "Objective", "ObjectiveMixture", "Segment", "SegmentGroup", "Segments", "Vocabulary"]

OBJECTIVES = {
    "causal": CausalLM,
    "prefix": PrefixLM,
    "fim": FillInTheMiddle,
    "masked": MaskedLM,
    "spans": SpanCorruption,
    "continuation": Continuation,
    "infilling": Infilling,
}


class SegmentGroup(NamedTuple):
    """The segments of one member of a mixture, and their indices (N,) among all chunks."""

    member: int
    indices: np.ndarray
    segments: Segments


class ObjectiveMixture:
    """The objective that a config names, for rows of `row_length` positions (of the source, for spans and
    continuations).

    In a mixture each chunk belongs to one member, chosen by a hash of its document's number in the block and
    its start. So sizes are known before text is read, packing needs lengths alone, and a chunk keeps its
    member in every epoch (what is hidden is drawn anew). Chunks are as long as every member can take, and a
    row has capacity for the largest of any member.
    """

    def __init__(self, config: objectives.AnyObjective, vocabulary: Vocabulary, row_length: int) -> None:
        members = objectives.mixture_members(config)
        self.members: list[Objective] = [
            OBJECTIVES[member.kind](member, vocabulary, row_length) for member in members
        ]
        self.labels = objectives.member_labels(config)
        self.max_chunk_length = min(member.max_chunk_length for member in self.members)
        capacities = [member.capacity(self.max_chunk_length) for member in self.members]
        self.capacity = RowCapacity(*map(max, zip(*capacities, strict=True)))
        weights = [member.weight for member in members]
        self.bounds = np.cumsum(weights) / sum(weights)

    def chunks(self, lengths: np.ndarray) -> Chunks:
        """The chunks of a block's documents of `lengths` text tokens, and their sizes."""
        positions = lengths + self.members[0].specials.count
        document, start, stop = chunk_documents(positions, self.max_chunk_length)
        member_of = self.member_of(document, start)
        tokens, source_or_picked = np.zeros_like(start), np.zeros_like(start)
        num_over_sentinel_limit = 0
        for number, member in enumerate(self.members):
            is_member = member_of == number
            sizes = member.sizes(lengths[document[is_member]], start[is_member], stop[is_member])
            tokens[is_member] = sizes.tokens
            source_or_picked[is_member] = sizes.source_or_picked_tokens
            num_over_sentinel_limit += sizes.num_over_sentinel_limit
        return Chunks(document, start, stop, tokens, source_or_picked, num_over_sentinel_limit)

    def member_of(self, document: np.ndarray, start: np.ndarray) -> np.ndarray:
        """The member (N,) of the chunks that begin at `start` of these documents of a block."""
        if len(self.members) == 1:
            return np.zeros(len(document), np.int64)
        document_keys = keyed_random.hash64(document.astype(np.uint64))
        uniform = keyed_random.nth_random(document_keys, start) / 2.0**64
        return np.searchsorted(self.bounds[:-1], uniform, side="right")

    def segments(
        self, member_of: np.ndarray, chunks: Sequence[Chunk], keys: np.ndarray
    ) -> list[SegmentGroup]:
        """The segments of chunks, grouped by member. All random choices follow from `keys` (N,)."""
        groups = []
        for number, member in enumerate(self.members):
            indices = (member_of == number).nonzero()[0]
            if len(indices):
                segments = member.segments([chunks[i] for i in indices], keys[indices])
                groups.append(SegmentGroup(number, indices, segments))
        return groups
