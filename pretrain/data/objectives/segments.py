"""What all objectives share: what they need of a tokenizer, the Segment they make, and a document's positions
with its special tokens.
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
    before: list[
        int
    ]  # special tokens around a text that an encoder reads, as the published tokenizer adds them
    after: list[int]
    special: Sequence[int]  # all tokens that are no text
    sentinels: Sequence[int]
    word_starts: np.ndarray  # (V,) bool
    sentence_ends: np.ndarray  # (V,) bool
    vocab_size: int
    fingerprint: str


class Chunk(NamedTuple):
    """The positions from `start` to `stop` of a document with its special tokens."""

    document: np.ndarray  # its text tokens
    start: int
    stop: int


class Segment(NamedTuple):
    """One example of a row: tokens and targets (T,) int64, and a source (S,) for a decoder that reads one."""

    tokens: np.ndarray
    targets: np.ndarray
    source: np.ndarray | None = None
    types: np.ndarray | None = None  # (T,) token types; None: 0 everywhere


class Segments(NamedTuple):
    """N segments one after another in each array, with the `sizes` (N,) of their tokens and targets, of their
    sources, and of their picked positions, which count in `tokens`. Arrays of a side that there is not are
    empty.
    """

    tokens: np.ndarray
    targets: np.ndarray
    sizes: np.ndarray
    source: np.ndarray = EMPTY
    source_sizes: np.ndarray = EMPTY
    picked: np.ndarray = EMPTY
    picked_sizes: np.ndarray = EMPTY


class ConcatenatedChunks(NamedTuple):
    """The tokens of N chunks one after another; where each begins and ends (N,), and where its text does."""

    tokens: np.ndarray
    begin: np.ndarray
    text_begin: np.ndarray
    text_end: np.ndarray
    end: np.ndarray


class ChunkSizes(NamedTuple):
    """The capacity that chunks (N,) need: positions of tokens, and of source or picked positions; and how
    many chunks should have more sentinels than there are.
    """

    tokens: np.ndarray
    source_or_picked_tokens: np.ndarray
    num_over_sentinel_limit: int = 0


class Objective(Protocol):
    """One objective. Pure: the same chunk and the same key give the same Segment, of exactly its `sizes`
    (picked positions: at most), whatever other chunks are made together with it. Many are made together,
    because numpy's calls cost more than their work.
    """

    specials: "DocumentWithSpecials"
    max_chunk_length: int  # positions of the longest chunk that fits into a row

    def capacity(self, chunk_length: int) -> RowCapacity:
        """What a row must hold for chunks of at most `chunk_length` positions."""
        ...

    def sizes(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> ChunkSizes:
        """The sizes of the chunks (N,) from `start` to `stop` of documents of `lengths` text tokens, before
        any text is read.
        """
        ...

    def segments(self, chunks: Sequence[Chunk], keys: np.ndarray) -> Segments:
        """The segments of at least one chunk. All random choices follow from the keys (keyed_random.py)."""
        ...


class DocumentWithSpecials:
    """A document's positions: special tokens, its text, special tokens. A chunk is a range of them.

    Example: before [1], after [2], a document of the text tokens 7, 8, 9. Its five positions are 1 7 8 9 2;
    the chunk from 0 to 2 is 1 7, the chunk from 2 to 5 is 8 9 2, and their text counts are 1 and 2.
    """

    def __init__(self, before: Sequence[int], after: Sequence[int]) -> None:
        self.before, self.after = np.array(before, np.int64), np.array(after, np.int64)
        self.count = len(before) + len(after)

    def concatenate(self, chunks: Sequence[Chunk], lead: np.ndarray = EMPTY) -> ConcatenatedChunks:
        """The tokens of chunks, as a new array, with `lead` before each chunk."""
        shift = len(self.before)
        arrays: list[np.ndarray] = []
        for document, start, stop in chunks:
            low, high = max(start - shift, 0), max(stop - shift, 0)
            after_low, after_high = max(low - len(document), 0), max(high - len(document), 0)
            text = document[low:high]
            arrays += (lead, self.before[start:stop], text, self.after[after_low:after_high])

        starts = np.array([chunk.start for chunk in chunks])
        stops = np.array([chunk.stop for chunk in chunks])
        text_stops = np.array([len(chunk.document) for chunk in chunks]) + shift
        ends = (stops - starts + len(lead)).cumsum()
        offsets = ends - stops  # from positions in the document to positions here
        return ConcatenatedChunks(
            tokens=np.concatenate(arrays, dtype=np.int64),
            begin=offsets + starts - len(lead),
            text_begin=offsets + np.minimum(np.maximum(shift, starts), stops),
            text_end=offsets + np.minimum(np.maximum(text_stops, starts), stops),
            end=ends,
        )

    def count_text(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """How many of the positions of chunks (N,) are text."""
        shift = len(self.before)
        return np.maximum(np.minimum(stop, lengths + shift) - np.maximum(start, shift), 0)


def required_mask(vocabulary: Vocabulary, objective: str) -> int:
    """The mask token. Raises UserError where the tokenizer has none."""
    if vocabulary.mask is None:
        raise UserError(
            f"the {objective} objective needs a tokenizer with a mask token, and this one has none: choose"
            " another tokenizer or objective."
        )
    return vocabulary.mask


def required_sentinels(vocabulary: Vocabulary, number: int, objective: str) -> Sequence[int]:
    """All sentinels, at least `number` of them. Raises UserError where the tokenizer has fewer."""
    if len(vocabulary.sentinels) < number:
        raise UserError(
            f"the {objective} objective needs a tokenizer with {number} sentinels or more (<extra_id_0>,"
            f" ...), and this one has {len(vocabulary.sentinels)}: choose another tokenizer or objective."
        )
    return vocabulary.sentinels
