"""Objectives of an encoder-decoder: spans of a piece are hidden from the encoder, and the decoder writes them, or the whole text again.

The encoder reads a document as the published tokenizer marks it; marks are never hidden. The decoder begins with the tokenizer's start
token. How much is hidden, and in how many spans, follows from a piece's length alone; where and how long each is gets drawn.
UL2's modes (Tay et al. 2022) are told by a token before everything else: R, S, X are the last three sentinels, so that T5's tokenizers
and ours need no new ones.
"""

import numpy as np

from pretrain.objectives import config
from pretrain.objectives.piece import Marks, Segment, Sizes, Vocabulary, eights, needed_mask, needed_sentinels, parts_of
from pretrain.packing import Room

MODES = {"R": -1, "S": -2, "X": -3}  # places among the sentinels


class HiddenSpans:
    """Span corruption (T5, Raffel et al. 2020): of a piece's n text tokens round(density * n), at least 1, are hidden in
    round(hidden / mean_length) spans, at least 1 and at most the sentinels there are (longer spans then, counted as `capped`).

    The source is the piece with a sentinel in place of each span; the target is sentinel, span, sentinel, span, ..., EOS.
    Spans never touch each other. Lengths of spans, and of what lies between them, are uniform over all ways to make the sums, as in T5;
    but T5 always hides the last token and never the first, here both may be.
    Room: `row_length` is the source's; the target's is that of the longest piece that such a source can stand for.
    """

    def __init__(self, dials: config.Spans | config.Continuation, vocabulary: Vocabulary, row_length: int) -> None:
        self.start, self.eos = vocabulary.start, vocabulary.eos
        self.marks = Marks(vocabulary.before, vocabulary.after)
        sentinels = np.array(needed_sentinels(vocabulary, 1 + len(MODES), dials.kind), np.int64)
        self.mode = sentinels[[MODES[dials.mode]]] if dials.mode else sentinels[:0]
        self.sentinels = sentinels[: -len(MODES)] if dials.mode else sentinels
        self.numbers = np.arange(len(self.sentinels))
        self.row_length = row_length
        n = np.arange(int((row_length + 1) / (1 - dials.density)) + 4)  # beyond what any source of row_length can stand for
        self.hidden = np.where(n > 0, np.maximum(np.rint(dials.density * n), 1), 0).astype(np.int64)
        wanted = self._wanted(dials, n)
        self.spans = np.minimum(wanted, len(self.sentinels))
        self.too_many = wanted > self.spans
        self.shrinks = self.hidden - self.spans - len(self.mode)  # how much shorter the source is than the piece
        sources = [n - self.shrinks[np.maximum(n - marks, 0)] for marks in range(self.marks.count + 1)]
        self.longest = int(np.argmax(np.max(sources, axis=0) > row_length)) - 1

    def _wanted(self, dials: config.Spans | config.Continuation, n: np.ndarray) -> np.ndarray:
        """The spans of pieces of n text tokens, were there sentinels enough."""
        if isinstance(dials, config.Continuation):
            return np.minimum(n, 1)
        return np.minimum(np.maximum(np.rint(self.hidden / dials.mean_length), n > 0), n - self.hidden + 1).astype(np.int64)

    def _target(self, text: np.ndarray) -> np.ndarray:
        return self.hidden[text] + self.spans[text] + 1

    def room(self, longest: int) -> Room:
        return Room(eights(int(self._target(np.arange(longest + 1)).max())), source=self.row_length)

    def sizes(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Sizes:
        text = self.marks.text(lengths, start, stop)
        return Sizes(self._target(text), stop - start - self.shrinks[text], capped=int(self.too_many[text].sum()))

    def segment(self, document: np.ndarray, start: int, stop: int, rng: np.random.Generator) -> Segment:
        marked, first, last = self.marks.marked(document, start, stop)
        text = last - first
        hidden, spans = int(self.hidden[text]), int(self.spans[text])
        lengths, gaps = self._drawn(text, hidden, spans, rng)
        before = lengths.cumsum() - lengths  # hidden tokens before each span
        begins = gaps.cumsum() + before + first
        is_hidden = _covered(len(marked), begins, begins + lengths)
        written = np.empty(hidden + spans + 2, np.int64)
        written[0], written[-1] = self.start, self.eos
        target, names = written[1:], before + self.numbers[:spans]
        is_text = np.ones(len(target), bool)
        is_text[names] = is_text[-1] = False
        target[is_text] = marked[is_hidden]
        target[names] = marked[begins] = self.sentinels[:spans]
        is_hidden[begins] = False
        return Segment(written[:-1], target, source=np.concatenate([self.mode, marked[~is_hidden]]))

    def _drawn(self, text: int, hidden: int, spans: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The spans' lengths, and the text tokens before each that are not hidden."""
        lengths = parts_of(hidden, spans, rng)
        gaps = parts_of(text - hidden + 2, spans + 1, rng)[:-1]  # the outer two may be empty: one more each, and one less of the first
        gaps[:1] -= 1
        return lengths, gaps


class Continuation(HiddenSpans):
    """UL2's S-denoiser: one span, which reaches to the end of the text."""

    def _drawn(self, text: int, hidden: int, spans: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return np.array([hidden] * spans, np.int64), np.array([text - hidden] * spans, np.int64)


class Infilling:
    """Text infilling and sentence permutation (BART, Lewis et al. 2020): the decoder writes the piece as it was, its marks included.

    Of n text tokens round(density * n), at least 1, are hidden in round(hidden / mean_length) spans, at least 1, and one mask stands for
    each. Lengths are those of independent Poisson numbers given their sum, which is the multinomial law: 0 is among them, and such a
    mask stands for nothing. Masks never touch each other. Spans are of tokens where fairseq's are of words. Sentences end behind a
    token that the tokenizer says ends one; all of a piece's are shuffled first.
    Room: `row_length` is the target's.
    """

    def __init__(self, dials: config.Infilling, vocabulary: Vocabulary, row_length: int) -> None:
        self.dials, self.marks, self.sentence_ends = dials, Marks(vocabulary.before, vocabulary.after), vocabulary.sentence_ends
        self.mask, self.start = needed_mask(vocabulary, dials.kind), vocabulary.start
        self.repeats = int(self.marks.before[:1].tolist() == [self.start])  # BART's own start is EOS; where it is BOS, it comes once
        self.longest = row_length
        n = np.arange(row_length + 1)
        self.hidden = np.where(n > 0, np.maximum(np.rint(dials.density * n), 1), 0).astype(np.int64)
        self.spans = np.minimum(np.maximum(np.rint(self.hidden / dials.mean_length), n > 0), n - self.hidden + 1).astype(np.int64)

    def room(self, longest: int) -> Room:
        n = np.arange(longest + 1)
        sources = [n - (self.hidden - self.spans)[np.maximum(n - marks, 0)] for marks in range(self.marks.count + 1)]
        return Room(longest, source=eights(int(np.max(sources))))

    def sizes(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Sizes:
        text = self.marks.text(lengths, start, stop)
        return Sizes(stop - start - self.repeats * (start == 0), stop - start - self.hidden[text] + self.spans[text])

    def segment(self, document: np.ndarray, start: int, stop: int, rng: np.random.Generator) -> Segment:
        whole, first, last = self.marks.marked(document, start, stop)
        shown = whole.copy()
        if self.dials.permute_sentences and last > first:
            shown[first:last] = _shuffled(whole[first:last], self.sentence_ends, rng)
        hidden, spans = int(self.hidden[last - first]), int(self.spans[last - first])
        lengths = rng.multinomial(hidden, np.full(spans, 1 / spans)) if spans else np.empty(0, np.int64)
        gaps = parts_of(last - first - hidden + 2, spans + 1, rng)[:-1]
        gaps[:1] -= 1
        before = gaps.cumsum() + first  # tokens shown before each mask
        begins = before + lengths.cumsum() - lengths
        kept = shown[~_covered(len(shown), begins, begins + lengths)]
        source = np.full(len(kept) + spans, self.mask)
        is_text = np.ones(len(source), bool)
        is_text[before + np.arange(spans)] = False
        source[is_text] = kept
        written = np.empty(len(whole) + 1, np.int64)
        written[0], written[1:] = self.start, whole
        begin = self.repeats * (start == 0)
        return Segment(written[begin:-1], written[begin + 1 :], source=source)


def _covered(size: int, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Which of `size` places lie in a span; spans go up and never touch, and one may be empty."""
    change = np.zeros(size + 1, np.int8)
    change[begins] += 1
    change[ends] -= 1
    return change[:-1].cumsum(dtype=np.int8).view(bool)


def _shuffled(text: np.ndarray, ends: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The sentences of a text in another order; a sentence ends behind a token that ends one and where the text does."""
    edges = [0, *(ends[text[:-1]].nonzero()[0] + 1).tolist(), len(text)]
    return np.concatenate([text[edges[i] : edges[i + 1]] for i in rng.permutation(len(edges) - 1).tolist()])
