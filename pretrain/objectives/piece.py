"""What all objectives share: what they ask of a tokenizer, the Segment they make, and a document's positions with its marks."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from modeling.config import Refused
from pretrain.packing import Room


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


class Segment(NamedTuple):
    """A piece ready to stand in a row: tokens and targets (T,) int64, source (S,) for a decoder that reads one, picked (P,) places in
    tokens for masked."""

    tokens: np.ndarray
    targets: np.ndarray
    source: np.ndarray | None = None
    picked: np.ndarray | None = None
    part: int = 0  # of a mixture


class Sizes(NamedTuple):
    """The room that pieces (N,) take: positions of tokens, and of source or picks; and how many deserved more sentinels than there are."""

    tokens: np.ndarray
    second: np.ndarray
    capped: int = 0


class Part(Protocol):
    """One objective. Pure: the same piece and the same generator state give the same Segment, of exactly its `sizes` (picks: at most)."""

    marks: "Marks"
    longest: int  # positions of the longest piece that fits into a row

    def room(self, longest: int) -> Room:
        """What a row must hold for pieces of at most `longest` positions."""
        ...

    def sizes(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Sizes:
        """The sizes of the pieces (N,) from `start` to `stop` of documents of `lengths` text tokens, before any text is read."""
        ...

    def segment(self, document: np.ndarray, start: int, stop: int, rng: np.random.Generator) -> Segment: ...


class Marks:
    """A document's positions: what stands before its text, the text, what stands after it. A piece is some of them in a row."""

    def __init__(self, before: Sequence[int], after: Sequence[int]) -> None:
        self.before, self.after = np.array(before, np.int64), np.array(after, np.int64)
        self.count = len(before) + len(after)

    def marked(self, document: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, int, int]:
        """The tokens of positions start to stop, as a new array, and which of its places hold text: from, up to."""
        shift, length = len(self.before), len(document)
        tokens = np.empty(stop - start, np.int64)
        first = min(max(shift - start, 0), stop - start)
        last = max(min(shift + length, stop) - start, first)
        tokens[:first] = self.before[start : start + first]
        tokens[first:last] = document[start + first - shift : start + last - shift]
        tokens[last:] = self.after[start + last - shift - length : stop - shift - length]
        return tokens, first, last

    def text(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """How many of the positions of pieces (N,) are no marks."""
        shift = len(self.before)
        return np.maximum(np.minimum(stop, lengths + shift) - np.maximum(start, shift), 0)


def needed_mask(vocabulary: Vocabulary, objective: str) -> int:
    """The mask token. Raises Refused where the tokenizer has none."""
    if vocabulary.mask is None:
        raise Refused(f"the {objective} objective needs a tokenizer with a mask token, and this one has none: take another of the two.")
    return vocabulary.mask


def needed_sentinels(vocabulary: Vocabulary, number: int, objective: str) -> Sequence[int]:
    """All sentinels, at least `number` of them. Raises Refused where the tokenizer has fewer."""
    if len(vocabulary.sentinels) < number:
        found = len(vocabulary.sentinels)
        raise Refused(
            f"the {objective} objective needs a tokenizer with {number} sentinels or more (<extra_id_0>, ...), and this one has {found}:"
            " take another of the two."
        )
    return vocabulary.sentinels


def parts_of(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` positive numbers that sum to `total`, uniform over all ways to do so."""
    cuts = np.empty(count + 1, np.int64)
    if count:
        cuts[0], cuts[-1] = -1, total - 1
        cuts[1:-1] = rng.permutation(total - 1)[: count - 1]
        cuts.sort()
    return cuts[1:] - cuts[:-1]


def eights(size: int) -> int:
    """Rounded up to a multiple of 8, which matrix units like."""
    return -(-size // 8) * 8
