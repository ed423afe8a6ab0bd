"""Objectives of an encoder-decoder: spans of a piece are hidden from the encoder, and the decoder writes
them, or the whole text again.

The encoder reads a document as the published tokenizer marks it; marks are never hidden. The decoder begins
with the tokenizer's start token. How much is hidden, and in how many spans, follows from a piece's length
alone; where and how long each is gets drawn. UL2's modes (Tay et al. 2022) are told by a token before
everything else: R, S, X are the last three sentinels, so that T5's tokenizers and ours need no new ones.
"""

from collections.abc import Sequence

import numpy as np

from trifold.pretrain.config import objectives
from trifold.pretrain.data import keyed_random
from trifold.pretrain.data.objectives.segments import (
    Chunk,
    ChunkSizes,
    DocumentWithSpecials,
    Segments,
    Vocabulary,
    required_mask,
    required_sentinels,
)
from trifold.pretrain.data.packing import RowCapacity
from trifold.pretrain.data.ragged import EMPTY, mask_except, ragged_arange, round_up_to_8, split_runs

MODES = {"R": -1, "S": -2, "X": -3}  # places among the sentinels


class SpanCorruption:
    """Span corruption (T5, Raffel et al. 2020): of a piece's n text tokens round(density * n), at least 1,
    are hidden in round(hidden / mean_length) spans, at least 1 and at most the sentinels there are (longer
    spans then, counted as `capped`).

    The source is the piece with a sentinel in place of each span; the target is sentinel, span, sentinel,
    span, ..., EOS. Spans never touch each other. Lengths of spans, and of what lies between them, are uniform
    over all ways to make the sums, as in T5; but T5 always hides the last token and never the first, here
    both may be. Room: `row_length` is the source's; the target's is that of the longest piece that such a
    source can stand for.
    """

    def __init__(
        self,
        dials: objectives.SpansConfig | objectives.ContinuationConfig,
        vocabulary: Vocabulary,
        row_length: int,
    ) -> None:
        self.start, self.eos = vocabulary.start, vocabulary.eos
        self.marks = DocumentWithSpecials(vocabulary.before, vocabulary.after)
        sentinels = np.array(required_sentinels(vocabulary, 1 + len(MODES), dials.kind), np.int64)
        self.mode = sentinels[[MODES[dials.mode]]] if dials.mode else sentinels[:0]
        self.sentinels = sentinels[: -len(MODES)] if dials.mode else sentinels
        self.numbers = np.arange(len(self.sentinels))
        self.row_length = row_length
        n = np.arange(
            int((row_length + 1) / (1 - dials.density)) + 4
        )  # beyond what any source of row_length can stand for
        self.hidden = np.where(n > 0, np.maximum(np.rint(dials.density * n), 1), 0).astype(np.int64)
        wanted = self._count_spans(dials, n)
        self.spans = np.minimum(wanted, len(self.sentinels))
        self.too_many = wanted > self.spans
        self.shrinks = (
            self.hidden - self.spans - len(self.mode)
        )  # how much shorter the source is than the piece
        sources = [n - self.shrinks[np.maximum(n - marks, 0)] for marks in range(self.marks.count + 1)]
        self.longest = int(np.argmax(np.max(sources, axis=0) > row_length)) - 1

    def _count_spans(
        self, dials: objectives.SpansConfig | objectives.ContinuationConfig, n: np.ndarray
    ) -> np.ndarray:
        """The spans of pieces of n text tokens, were there sentinels enough."""
        if isinstance(dials, objectives.ContinuationConfig):
            return np.minimum(n, 1)
        return np.minimum(
            np.maximum(np.rint(self.hidden / dials.mean_length), n > 0), n - self.hidden + 1
        ).astype(np.int64)

    def _target(self, text: np.ndarray) -> np.ndarray:
        return self.hidden[text] + self.spans[text] + 1

    def room(self, longest: int) -> RowCapacity:
        return RowCapacity(
            round_up_to_8(int(self._target(np.arange(longest + 1)).max())), source=self.row_length
        )

    def sizes(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> ChunkSizes:
        text = self.marks.text(lengths, start, stop)
        return ChunkSizes(
            self._target(text), stop - start - self.shrinks[text], capped=int(self.too_many[text].sum())
        )

    def _sample_spans(self, text: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of pieces of `text` tokens (N,), in any order: where in the hidden text each span but the first
        begins; how much of the text is shown before each span.
        """
        hidden, spans = self.hidden[text], self.spans[text]
        inner, outer = keyed_random.split(keys, 2)
        cuts = np.maximum(hidden - 1, 0), np.maximum(spans - 1, 0)
        return keyed_random.sample_without_replacement(
            inner, *cuts
        ) + 1, keyed_random.sample_without_replacement(outer, text - hidden + 1, spans)

    def segments(self, pieces: Sequence[Chunk], keys: np.ndarray) -> Segments:
        marked, begin, first, last, end = self.marks.joined(pieces, self.mode)
        hidden, spans = self.hidden[last - first], self.spans[last - first]
        before = hidden.cumsum() - hidden
        inner, outer = self._sample_spans(last - first, keys)
        # Spans stand between hidden tokens and shown ones, both counted over all pieces: sorted, those of a
        # piece stay together.
        unseen = np.concatenate([before[spans > 0], inner + np.repeat(before, np.maximum(spans - 1, 0))])
        shown = outer + np.repeat(first - before, spans)
        unseen.sort()
        shown.sort()
        begins = unseen + shown
        covered = ragged_arange(begins, np.diff(unseen, append=hidden.sum()))
        text, names = marked[covered], np.concatenate([self.sentinels[:number] for number in spans.tolist()])
        marked[begins] = names
        is_source = mask_except(len(marked), covered)
        is_source[begins] = True
        sizes = hidden + spans + 1
        stops = sizes.cumsum()
        at = unseen + np.arange(len(unseen)) + np.repeat(np.arange(len(spans)), spans)
        targets = np.empty(stops[-1], np.int64)
        targets[mask_except(len(targets), at, stops - 1)] = text
        targets[at], targets[stops - 1] = names, self.eos
        return Segments(
            _read(targets, stops - sizes, self.start),
            targets,
            sizes,
            marked[is_source],
            end - begin - hidden + spans,
        )


class Continuation(SpanCorruption):
    """UL2's S-denoiser: one span, which reaches to the end of the text."""

    def _sample_spans(self, text: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return EMPTY, np.repeat(text - self.hidden[text], self.spans[text])


class Infilling:
    """Text infilling and sentence permutation (BART, Lewis et al. 2020): the decoder writes the piece as it
    was, its marks included.

    Of n text tokens round(density * n), at least 1, are hidden in round(hidden / mean_length) spans, at least
    1, and one mask stands for each. Lengths are those of independent Poisson numbers given their sum, which
    is the multinomial law: 0 is among them, and such a mask stands for nothing. Masks never touch each other.
    Spans are of tokens where fairseq's are of words. Sentences end behind a token that the tokenizer says
    ends one; all of a piece's are shuffled first. Room: `row_length` is the target's.
    """

    def __init__(self, dials: objectives.InfillingConfig, vocabulary: Vocabulary, row_length: int) -> None:
        self.dials, self.marks, self.sentence_ends = (
            dials,
            DocumentWithSpecials(vocabulary.before, vocabulary.after),
            vocabulary.sentence_ends,
        )
        self.mask, self.start = required_mask(vocabulary, dials.kind), vocabulary.start
        self.repeats = self.marks.before[:1].tolist() == [
            self.start
        ]  # BART's own start is EOS; where it is BOS, it comes once
        self.longest = row_length
        n = np.arange(row_length + 1)
        self.hidden = np.where(n > 0, np.maximum(np.rint(dials.density * n), 1), 0).astype(np.int64)
        self.spans = np.minimum(
            np.maximum(np.rint(self.hidden / dials.mean_length), n > 0), n - self.hidden + 1
        ).astype(np.int64)

    def room(self, longest: int) -> RowCapacity:
        n = np.arange(longest + 1)
        sources = [
            n - (self.hidden - self.spans)[np.maximum(n - marks, 0)] for marks in range(self.marks.count + 1)
        ]
        return RowCapacity(longest, source=round_up_to_8(int(np.max(sources))))

    def sizes(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> ChunkSizes:
        text = self.marks.text(lengths, start, stop)
        return ChunkSizes(
            stop - start - (self.repeats & (start == 0)), stop - start - self.hidden[text] + self.spans[text]
        )

    def segments(self, pieces: Sequence[Chunk], keys: np.ndarray) -> Segments:
        whole, begin, first, last, end = self.marks.joined(pieces)
        hidden, spans = self.hidden[last - first], self.spans[last - first]
        orders, bins, outer = keyed_random.split(keys, 3)
        span_of = (keyed_random.uniform(bins, hidden) * np.repeat(spans, hidden)).astype(
            np.int64
        )  # each hidden token falls into some span
        lengths = np.bincount(span_of + np.repeat(spans.cumsum() - spans, hidden), minlength=spans.sum())
        shown = keyed_random.sample_without_replacement(outer, last - first - hidden + 1, spans) + np.repeat(
            first - (hidden.cumsum() - hidden), spans
        )
        shown.sort()
        covered = ragged_arange(shown + lengths.cumsum() - lengths, lengths)
        told = self._permuted(whole, first, last - first, orders) if self.dials.permute_sentences else whole
        kept = told[mask_except(len(whole), covered)]
        source = np.full(len(kept) + len(shown), self.mask)
        source[mask_except(len(source), shown + np.arange(len(shown)))] = kept
        repeats = np.array([self.repeats and piece.start == 0 for piece in pieces], bool)
        given = mask_except(len(whole), begin[repeats])
        tokens = _read(whole, begin[begin < end], self.start)[given]
        sizes = end - begin - repeats
        return Segments(tokens, whole[given], sizes, source, end - begin - hidden + spans)

    def _permuted(
        self, whole: np.ndarray, first: np.ndarray, text: np.ndarray, keys: np.ndarray
    ) -> np.ndarray:
        """`whole`, with the sentences of each of the texts of `text` tokens that begin at `first` in random
        order.
        """
        at = ragged_arange(first, text)
        starts, sizes, counts = split_runs(self.sentence_ends[whole[at - 1]], text)
        order = keyed_random.shuffled(keys, counts) + np.repeat(counts.cumsum() - counts, counts)
        permuted = whole.copy()
        permuted[at] = whole[ragged_arange(at[starts[order]], sizes[order])]
        return permuted


def _read(targets: np.ndarray, begin: np.ndarray, start: int) -> np.ndarray:
    """What the decoder reads to predict the targets of pieces from `begin` on: the start token, then what it
    should have written.
    """
    tokens = np.empty_like(targets)
    tokens[1:] = targets[:-1]
    tokens[begin] = start
    return tokens
