"""What is asked of a piece of text: in, a document's tokens and a generator of random numbers; out, a Segment, the piece's share of a row.

Three objectives answer the same questions: `room` (what a row holds), `pieces(lengths)` (the pieces that documents make, with their
sizes in closed form, before any text is read) and `segment(document, start, stop, rng)`. A document's marks are BOS and EOS, and
positions of pieces count them: BOS is position 0, EOS the last. Marks are never hidden.

Cost of a piece of 300 tokens on one slow core: causal 3 us, masked 26 us (whole words 50), spans 60 us.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from modeling.batch import IGNORE
from modeling.config import Refused
from pretrain import config
from pretrain.packing import Pieces, Room, cut


class Vocabulary(Protocol):
    """What an objective needs of a tokenizer."""

    bos: int
    eos: int
    pad: int
    unk: int
    mask: int
    vocab_size: int
    fingerprint: str

    @property
    def sentinels(self) -> Sequence[int]: ...
    @property
    def word_starts(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Segment:
    """A piece ready to stand in a row: tokens and targets (T,) int64, source (S,) for spans, picked (P,) places in tokens for masked."""

    tokens: np.ndarray
    targets: np.ndarray
    source: np.ndarray | None = None
    picked: np.ndarray | None = None


class Objective(Protocol):
    """Pure: the same piece and the same generator state give the same Segment, of exactly the sizes that `pieces` said (picks: at most)."""

    @property
    def room(self) -> Room: ...
    def pieces(self, lengths: np.ndarray) -> Pieces: ...
    def segment(self, document: np.ndarray, start: int, stop: int, rng: np.random.Generator) -> Segment: ...


class NextToken:
    """Causal: each position predicts the next token. Positions are those of BOS text, so a document of n tokens makes n + 1
    predictions, in pieces of `row_length`, and every token but BOS is predicted exactly once."""

    def __init__(self, dials: config.Causal, vocabulary: Vocabulary, row_length: int) -> None:
        self.vocabulary, self.room = vocabulary, Room(row_length)

    def pieces(self, lengths: np.ndarray) -> Pieces:
        document, start, stop = cut(lengths + 1, self.room.tokens)
        return Pieces(document, start, stop, stop - start, np.zeros_like(start))

    def segment(self, document: np.ndarray, start: int, stop: int, rng: np.random.Generator) -> Segment:
        tokens = _marked(document, start, stop + 1, self.vocabulary)
        return Segment(tokens[:-1], tokens[1:])


class HiddenTokens:
    """Masked (BERT, Devlin et al. 2019): of a piece's n text tokens round(rate * n), at least 1, are picked and predicted; `mask` of the
    picked become the mask, `random` any ordinary token, the rest stay.

    Whole words: words are drawn until none fits the number any more, so it can be a little smaller. Never is a word hidden in part.
    """

    def __init__(self, dials: config.Masked, vocabulary: Vocabulary, row_length: int) -> None:
        self.dials, self.vocabulary = dials, vocabulary
        n = np.arange(row_length + 1)
        self.picks = np.where(n > 0, np.maximum(np.rint(dials.rate * n), 1), 0).astype(np.int64)
        self.room = Room(row_length, picked=_eights(int(self.picks[-1])))
        marks = [vocabulary.pad, vocabulary.bos, vocabulary.eos, vocabulary.unk, vocabulary.mask, *vocabulary.sentinels]
        self.ordinary = np.setdiff1d(np.arange(vocabulary.vocab_size), marks)

    def pieces(self, lengths: np.ndarray) -> Pieces:
        document, start, stop = cut(lengths + 2, self.room.tokens)
        return Pieces(document, start, stop, stop - start, self.picks[_text_tokens(lengths[document], start, stop)])

    def segment(self, document: np.ndarray, start: int, stop: int, rng: np.random.Generator) -> Segment:
        tokens = _marked(document, start, stop, self.vocabulary)
        text = int(_text_tokens(len(document), start, stop))
        first = int(start == 0)
        if self.dials.whole_words:
            places = _whole_words(self.vocabulary.word_starts[tokens[first : first + text]], int(self.picks[text]), rng)
        else:
            places = rng.permutation(text)[: self.picks[text]]
        picked = first + np.sort(places)
        targets = np.full_like(tokens, IGNORE)
        targets[picked] = tokens[picked]
        draw = rng.random(len(picked))
        randoms = rng.integers(len(self.ordinary), size=len(picked))
        masked, replaced = draw < self.dials.mask, draw < self.dials.mask + self.dials.random
        tokens[picked] = np.where(masked, self.vocabulary.mask, np.where(replaced, self.ordinary[randoms], tokens[picked]))
        return Segment(tokens, targets, picked=picked)


class HiddenSpans:
    """Span corruption (T5, Raffel et al. 2020): of a piece's n text tokens round(density * n), at least 1, are hidden in
    round(hidden / mean_length) spans, at least 1 and at most the sentinels there are (longer spans then, counted as `capped`).

    The source is the piece with a sentinel in place of each span; the target is sentinel, span, sentinel, span, ..., EOS, and
    the decoder reads BOS and then the target. Spans never touch each other. Lengths of spans, and of what lies between them,
    are uniform over all ways to make the sums, as in T5; but T5 always hides the last token and never the first, here both may be.
    Room: `row_length` is the source's; the target's is that of the longest piece that such a source can stand for.
    """

    def __init__(self, dials: config.Spans, vocabulary: Vocabulary, row_length: int) -> None:
        if not vocabulary.sentinels:
            raise Refused("the spans objective needs a tokenizer with sentinels (<extra_id_0>, ...), and this one has none")
        self.vocabulary, self.sentinels = vocabulary, np.array(vocabulary.sentinels)
        n = np.arange(int((row_length + 1) / (1 - dials.density)) + 4)  # beyond what any source of row_length can stand for
        self.hidden = np.where(n > 0, np.maximum(np.rint(dials.density * n), 1), 0).astype(np.int64)
        wanted = np.minimum(np.maximum(np.rint(self.hidden / dials.mean_length), n > 0), n - self.hidden + 1).astype(np.int64)
        self.spans = np.minimum(wanted, len(self.sentinels))
        self.too_many = wanted > self.spans
        self.shrinks = self.hidden - self.spans  # how much shorter the source is than the piece
        sources = [n - self.shrinks[np.maximum(n - marks, 0)] for marks in (0, 1, 2)]
        self.longest = int(np.argmax(np.max(sources, axis=0) > row_length)) - 1
        self.room = Room(_eights(int(self._target(n[: self.longest + 1]).max())), source=row_length)

    def _target(self, text: np.ndarray) -> np.ndarray:
        return self.hidden[text] + self.spans[text] + 1

    def pieces(self, lengths: np.ndarray) -> Pieces:
        document, start, stop = cut(lengths + 2, self.longest)
        text = _text_tokens(lengths[document], start, stop)
        sizes = self._target(text), stop - start - self.shrinks[text]
        return Pieces(document, start, stop, *sizes, capped=int(self.too_many[text].sum()))

    def segment(self, document: np.ndarray, start: int, stop: int, rng: np.random.Generator) -> Segment:
        marked = _marked(document, start, stop, self.vocabulary)
        text = int(_text_tokens(len(document), start, stop))
        hidden, spans = int(self.hidden[text]), int(self.spans[text])
        lengths = _parts(hidden, spans, rng)
        gaps = _parts(text - hidden + 2, spans + 1, rng)  # the outer two may be empty: one more each here, one less below
        begins = int(start == 0) - 1 + np.cumsum(gaps[:-1]) + np.cumsum(lengths) - lengths
        change = np.zeros(len(marked) + 1, np.int64)
        change[begins] = 1
        change[begins + lengths] = -1
        is_hidden = np.cumsum(change[:-1]).astype(bool)
        target = np.empty(hidden + spans + 1, np.int64)
        names = np.cumsum(lengths) - lengths + np.arange(spans)
        is_text = np.ones(len(target), bool)
        is_text[names] = is_text[-1] = False
        target[is_text] = marked[is_hidden]
        target[names] = marked[begins] = self.sentinels[:spans]
        target[-1] = self.vocabulary.eos
        is_hidden[begins] = False
        tokens = np.concatenate([[self.vocabulary.bos], target[:-1]])
        return Segment(tokens, target, source=marked[~is_hidden])


OBJECTIVES = {"causal": NextToken, "masked": HiddenTokens, "spans": HiddenSpans}


def objective(dials: config.Objective, vocabulary: Vocabulary, row_length: int) -> Objective:
    """The objective that a recipe names, for rows of `row_length` positions (of the source, for spans)."""
    return OBJECTIVES[dials.kind](dials, vocabulary, row_length)


def _marked(document: np.ndarray, start: int, stop: int, vocabulary: Vocabulary) -> np.ndarray:
    """Positions start to stop of BOS text EOS, as a new array."""
    tokens = np.empty(stop - start, np.int64)
    text = document[max(start - 1, 0) : stop - 1]
    first = int(start == 0)
    tokens[first : first + len(text)] = text
    if first:
        tokens[0] = vocabulary.bos
    if stop == len(document) + 2:
        tokens[-1] = vocabulary.eos
    return tokens


def _text_tokens(lengths: np.ndarray | int, start: np.ndarray | int, stop: np.ndarray | int) -> np.ndarray:
    """How many of a piece's positions are no marks."""
    return np.minimum(stop, lengths + 1) - np.maximum(start, 1)


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


def _parts(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` positive numbers that sum to `total`, uniform over all ways to do so."""
    if count == 0:
        return np.empty(0, np.int64)
    return np.diff(np.sort(rng.permutation(total - 1)[: count - 1]) + 1, prepend=0, append=total)


def _eights(size: int) -> int:
    """Rounded up to a multiple of 8, which matrix units like."""
    return -(-size // 8) * 8
