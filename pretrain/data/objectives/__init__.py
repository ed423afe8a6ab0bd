"""What is asked of a piece of text: in, a document's tokens and a key of chance; out, Segments, the pieces'
shares of rows.

An objective has parts, one or (a mixture) several, which answer the same questions: `room` (what a row
holds), `sizes` (of pieces, in closed form, before any text is read), and then `segments`, made for many
pieces at once. A document's marks are positions too: what stands before its text comes first.

Rows of one objective waste 1 % and less; a mixture of an encoder-decoder's parts wastes what their shapes
differ: UL2's seven 17 % on documents of 20 to 300 tokens in rows of 512, and 30 % on longer ones.
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

__all__ = ["Group", "Objective", "Piece", "Segment", "Segments", "Vocabulary"]

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
    """Segments under one part of an objective, and which pieces (N,) they are."""

    part: int
    pieces: np.ndarray
    segments: Segments


class ObjectiveMixture:
    """The objective that a recipe names, for rows of `row_length` positions (of the source, for spans and
    continuations).

    In a mixture each piece belongs to one part, drawn by a hash of its place: its document's number in the
    block, and where it starts. So sizes are known before text is read, packing needs no more than lengths,
    and a piece keeps its part in every epoch (what is hidden is drawn anew). Pieces are as long as the part
    that can take least allows, and a row has room for the largest of any part.
    """

    def __init__(self, dials: objectives.AnyObjective, vocabulary: Vocabulary, row_length: int) -> None:
        singles = objectives.mixture_members(dials)
        self.parts: list[Objective] = [
            OBJECTIVES[single.kind](single, vocabulary, row_length) for single in singles
        ]
        self.labels = objectives.member_labels(dials)
        self.longest = min(part.longest for part in self.parts)
        self.capacity = RowCapacity(
            *map(max, zip(*(part.room(self.longest) for part in self.parts), strict=True))
        )
        self.bounds = np.cumsum([single.weight for single in singles]) / sum(
            single.weight for single in singles
        )

    def chunks(self, lengths: np.ndarray) -> Chunks:
        """The pieces that a block's documents of `lengths` text tokens make, and their sizes."""
        document, start, stop = chunk_documents(lengths + self.parts[0].marks.count, self.longest)
        part_of = self.part_of(document, start)
        tokens, second, capped = np.zeros_like(start), np.zeros_like(start), 0
        for number, part in enumerate(self.parts):
            here = part_of == number
            sizes = part.sizes(lengths[document[here]], start[here], stop[here])
            tokens[here], second[here], capped = sizes.tokens, sizes.second, capped + sizes.capped
        return Chunks(document, start, stop, tokens, second, capped)

    def part_of(self, document: np.ndarray, start: np.ndarray) -> np.ndarray:
        """The part (N,) of the pieces that begin at `start` of these documents of a block."""
        if len(self.parts) == 1:
            return np.zeros(len(document), np.int64)
        share = keyed_random.nth_random(keyed_random.hash64(document.astype(np.uint64)), start) / 2.0**64
        return np.searchsorted(self.bounds[:-1], share, side="right")

    def segments(self, part_of: np.ndarray, pieces: Sequence[Chunk], keys: np.ndarray) -> list[SegmentGroup]:
        """Pieces as segments, those of a part together; `keys` (N,) decide all that is left to chance."""
        made = []
        for number, part in enumerate(self.parts):
            its = (part_of == number).nonzero()[0]
            if len(its):
                made.append(SegmentGroup(number, its, part.segments([pieces[i] for i in its], keys[its])))
        return made
