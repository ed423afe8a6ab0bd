"""What all objectives share: what they ask of a tokenizer, the Segment they make, and a document's positions
with its marks.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from trifold.modeling.errors import UserError
from trifold.pretrain.data.packing import RowCapacity
from trifold.pretrain.data.ragged import EMPTY


class Vocabulary(Protocol):
    """What an objective needs of a tokenizer."""

    pad: int
    bos: int
    eos: int
    mask: int | None  # None where it has none
    start: int  # what a decoder reads first when it writes for an encoder
    before: list[int]  # what stands around a text that an encoder reads, as the published tokenizer puts it
    after: list[int]
    special: Sequence[int]  # all tokens that are no text
    sentinels: Sequence[int]
    word_starts: np.ndarray  # (V,) bool
    sentence_ends: np.ndarray  # (V,) bool
    vocab_size: int
    fingerprint: str


class Chunk(NamedTuple):
    """From position `start` to `stop` of a document with its marks."""

    document: np.ndarray  # its text tokens
    start: int
    stop: int


class Segment(NamedTuple):
    """Something ready to stand in a row: tokens and targets (T,) int64, and a source (S,) for a decoder that
    reads one.
    """

    tokens: np.ndarray
    targets: np.ndarray
    source: np.ndarray | None = None


class Segments(NamedTuple):
    """N segments one after another in each array, with the `sizes` (N,) of their tokens and targets, of their
    sources, and of their picks, which are places among these tokens. Without sources or picks those arrays
    are empty.
    """

    tokens: np.ndarray
    targets: np.ndarray
    sizes: np.ndarray
    source: np.ndarray = EMPTY
    source_sizes: np.ndarray = EMPTY
    picked: np.ndarray = EMPTY
    picked_sizes: np.ndarray = EMPTY


class ConcatenatedChunks(NamedTuple):
    """The tokens of N pieces one after another; where each begins and ends (N,), and its text does."""

    tokens: np.ndarray
    begin: np.ndarray
    first: np.ndarray
    last: np.ndarray
    end: np.ndarray


class ChunkSizes(NamedTuple):
    """The room that pieces (N,) take: positions of tokens, and of source or picks; and how many deserved more
    sentinels than there are.
    """

    tokens: np.ndarray
    second: np.ndarray
    capped: int = 0


class Objective(Protocol):
    """One objective. Pure: the same piece and the same key give the same Segment, of exactly its `sizes`
    (picks: at most), whatever it is made together with. Many are, as numpy's calls cost more than their
    work.
    """

    marks: "DocumentWithSpecials"
    longest: int  # positions of the longest piece that fits into a row

    def room(self, longest: int) -> RowCapacity:
        """What a row must hold for pieces of at most `longest` positions."""
        ...

    def sizes(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> ChunkSizes:
        """The sizes of the pieces (N,) from `start` to `stop` of documents of `lengths` text tokens, before
        any text is read.
        """
        ...

    def segments(self, pieces: Sequence[Chunk], keys: np.ndarray) -> Segments:
        """Of pieces, at least one; all that chance decides about each follows from its key (chance.py)."""
        ...


class DocumentWithSpecials:
    """A document's positions: what stands before its text, the text, what stands after it. A piece is some of
    them in a row.
    """

    def __init__(self, before: Sequence[int], after: Sequence[int]) -> None:
        self.before, self.after = np.array(before, np.int64), np.array(after, np.int64)
        self.count = len(before) + len(after)

    def joined(self, pieces: Sequence[Chunk], lead: np.ndarray = EMPTY) -> ConcatenatedChunks:
        """The tokens of pieces, as a new array, with `lead` before each piece."""
        chunks: list[np.ndarray] = []
        shift = len(self.before)
        for document, start, stop in pieces:
            low, high = max(start - shift, 0), max(stop - shift, 0)
            chunks += (
                lead,
                self.before[start:stop],
                document[low:high],
                self.after[max(low - len(document), 0) : max(high - len(document), 0)],
            )
        starts, stops = (
            np.array([piece.start for piece in pieces]),
            np.array([piece.stop for piece in pieces]),
        )
        text_ends = np.array([len(piece.document) for piece in pieces]) + shift
        ends = (stops - starts + len(lead)).cumsum()
        first, last = (np.minimum(np.maximum(edges, starts), stops) for edges in (shift, text_ends))
        moved = ends - stops  # from places in the document to places here
        return ConcatenatedChunks(
            np.concatenate(chunks, dtype=np.int64),
            moved + starts - len(lead),
            moved + first,
            moved + last,
            ends,
        )

    def text(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """How many of the positions of pieces (N,) are no marks."""
        shift = len(self.before)
        return np.maximum(np.minimum(stop, lengths + shift) - np.maximum(start, shift), 0)


def required_mask(vocabulary: Vocabulary, objective: str) -> int:
    """The mask token. Raises UserError where the tokenizer has none."""
    if vocabulary.mask is None:
        raise UserError(
            f"the {objective} objective needs a tokenizer with a mask token, and this one has none: take"
            " another of the two."
        )
    return vocabulary.mask


def required_sentinels(vocabulary: Vocabulary, number: int, objective: str) -> Sequence[int]:
    """All sentinels, at least `number` of them. Raises UserError where the tokenizer has fewer."""
    if len(vocabulary.sentinels) < number:
        found = len(vocabulary.sentinels)
        raise UserError(
            f"the {objective} objective needs a tokenizer with {number} sentinels or more (<extra_id_0>,"
            f" ...), and this one has {found}:"
            " take another of the two."
        )
    return vocabulary.sentinels
