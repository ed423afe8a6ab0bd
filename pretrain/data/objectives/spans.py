"""Objectives of an encoder-decoder: spans of a chunk are hidden from the encoder, and the decoder writes
them, or the full text again.

The encoder reads a document with the special tokens of the published tokenizer, which are never hidden. The
decoder begins with the tokenizer's start token. How much is hidden, and in how many spans, follows from a
chunk's length alone; positions and lengths of spans are random. UL2's modes (Tay et al. 2022) are a token
before everything else: R, S, X are the last three sentinels, so that T5's tokenizers and ours need no new
tokens.
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

MODES = {"R": -1, "S": -2, "X": -3}  # indices of the sentinels


class SpanCorruption:
    """Span corruption (T5, Raffel et al. 2020): of a chunk's n text tokens round(density * n), at least 1,
    are hidden in round(hidden / mean_length) spans, at least 1 and at most the number of sentinels (spans
    are longer then, and the chunk counts in `num_over_sentinel_limit`).

    The source is the chunk with a sentinel in place of each span; the target is sentinel, span, sentinel,
    span, ..., EOS. Spans never touch each other. Lengths of spans, and of the text between them, are uniform
    over all ways to make the sums, as in T5; but T5 always hides the last token and never the first, here
    both may be. `row_length` is the source's; the target's capacity is that of the longest chunk that such a
    source can stand for.

    Example: BOS 1, EOS 2, the text 20 21 ... 29, sentinels 5 and 6, and two spans that hide 21 22 23 and 27:

        source   1  20  5  24 25 26  6  28 29  2
        targets     5  21 22 23  6  27  2
        tokens   start  5  21 22 23  6  27
    """

    def __init__(
        self,
        config: objectives.SpansConfig | objectives.ContinuationConfig,
        vocabulary: Vocabulary,
        row_length: int,
    ) -> None:
        self.start, self.eos = vocabulary.start, vocabulary.eos
        self.specials = DocumentWithSpecials(vocabulary.before, vocabulary.after)
        sentinels = np.array(required_sentinels(vocabulary, 1 + len(MODES), config.kind), np.int64)
        self.mode = sentinels[[MODES[config.mode]]] if config.mode else sentinels[:0]
        self.sentinels = sentinels[: -len(MODES)] if config.mode else sentinels
        self.row_length = row_length

        # by the number n of text tokens, beyond what any source of row_length can stand for
        n = np.arange(int((row_length + 1) / (1 - config.density)) + 4)
        self.num_hidden = _count_hidden(config.density, n)
        wanted = self._count_spans(config, n)
        self.num_spans = np.minimum(wanted, len(self.sentinels))
        self.over_limit = wanted > self.num_spans
        # how much shorter the source is than the chunk
        self.shrinks = self.num_hidden - self.num_spans - len(self.mode)

        source_sizes = []
        for num_specials in range(self.specials.count + 1):
            source_sizes.append(n - self.shrinks[np.maximum(n - num_specials, 0)])
        self.max_chunk_length = int(np.argmax(np.max(source_sizes, axis=0) > row_length)) - 1

    def _count_spans(
        self, config: objectives.SpansConfig | objectives.ContinuationConfig, n: np.ndarray
    ) -> np.ndarray:
        """The spans of chunks of n text tokens if there were sentinels enough."""
        if isinstance(config, objectives.ContinuationConfig):
            return np.minimum(n, 1)
        return _count_spans(config.mean_length, self.num_hidden, n)

    def _target_size(self, text: np.ndarray) -> np.ndarray:
        return self.num_hidden[text] + self.num_spans[text] + 1

    def capacity(self, chunk_length: int) -> RowCapacity:
        target = int(self._target_size(np.arange(chunk_length + 1)).max())
        return RowCapacity(round_up_to_8(target), source=self.row_length)

    def sizes(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> ChunkSizes:
        text = self.specials.count_text(lengths, start, stop)
        source = stop - start - self.shrinks[text]
        return ChunkSizes(self._target_size(text), source, int(self.over_limit[text].sum()))

    def _sample_spans(self, text: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For chunks of `text` tokens (N,), in any order: where in a chunk's hidden tokens each span except
        the first begins, and how many visible tokens come before each span.

        In the example of the class: spans begin at [3] of the 4 hidden tokens, after [1, 4] of the 6 visible.
        """
        hidden, spans = self.num_hidden[text], self.num_spans[text]
        length_keys, position_keys = keyed_random.split(keys, 2)
        sizes, counts = np.maximum(hidden - 1, 0), np.maximum(spans - 1, 0)
        hidden_starts = keyed_random.sample_without_replacement(length_keys, sizes, counts) + 1
        visible_before = keyed_random.sample_without_replacement(position_keys, text - hidden + 1, spans)
        return hidden_starts, visible_before

    def segments(self, chunks: Sequence[Chunk], keys: np.ndarray) -> Segments:
        tokens, begin, text_begin, text_end, end = self.specials.concatenate(chunks, self.mode)
        text = text_end - text_begin
        hidden, spans = self.num_hidden[text], self.num_spans[text]
        hidden_starts, begins = self._locate_spans(text_begin, text, keys)

        is_hidden = ragged_arange(begins, np.diff(hidden_starts, append=hidden.sum()))
        hidden_tokens = tokens[is_hidden]
        sentinels = np.concatenate([self.sentinels[:number] for number in spans.tolist()])

        # the source: a sentinel at the first token of each span, the rest of the span removed
        tokens[begins] = sentinels
        in_source = mask_except(len(tokens), is_hidden)
        in_source[begins] = True

        # the targets: hidden tokens one after another, a sentinel before each span, EOS after each chunk
        sizes = hidden + spans + 1
        stops = sizes.cumsum()
        chunks_before = np.repeat(np.arange(len(spans)), spans)  # each has an EOS
        sentinel_positions = hidden_starts + np.arange(len(hidden_starts)) + chunks_before
        targets = np.empty(stops[-1], np.int64)
        targets[mask_except(len(targets), sentinel_positions, stops - 1)] = hidden_tokens
        targets[sentinel_positions] = sentinels
        targets[stops - 1] = self.eos

        return Segments(
            tokens=_decoder_inputs(targets, stops - sizes, self.start),
            targets=targets,
            sizes=sizes,
            source=tokens[in_source],
            source_sizes=end - begin - hidden + spans,
        )

    def _locate_spans(
        self, text_begin: np.ndarray, text: np.ndarray, keys: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Each span's start among the hidden tokens of all chunks, and its start among all tokens, which is
        the hidden plus the visible tokens before it. Both are sorted: the spans of a chunk stay together.
        """
        hidden, spans = self.num_hidden[text], self.num_spans[text]
        hidden_before = hidden.cumsum() - hidden
        starts_in_chunk, visible_in_chunk = self._sample_spans(text, keys)

        first_starts = hidden_before[spans > 0]
        later_starts = starts_in_chunk + np.repeat(hidden_before, np.maximum(spans - 1, 0))
        hidden_starts = np.concatenate([first_starts, later_starts])
        hidden_starts.sort()

        visible_before = visible_in_chunk + np.repeat(text_begin - hidden_before, spans)
        visible_before.sort()
        return hidden_starts, hidden_starts + visible_before


class Continuation(SpanCorruption):
    """UL2's S-denoiser: one span, which reaches to the end of the text."""

    def _sample_spans(self, text: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return EMPTY, np.repeat(text - self.num_hidden[text], self.num_spans[text])


class Infilling:
    """Text infilling and sentence permutation (BART, Lewis et al. 2020): the decoder writes the original
    chunk, special tokens included.

    Of n text tokens round(density * n), at least 1, are hidden in round(hidden / mean_length) spans, at
    least 1, and one mask stands for each. Lengths are those of independent Poisson numbers given their sum,
    which is the multinomial law: 0 is among them, and such a mask stands for nothing. Masks never touch each
    other. Spans are of tokens where fairseq's are of words. Sentences end after a token that the tokenizer
    marks as the end of one; all of a chunk's are shuffled first. `row_length` is the target's.
    """

    def __init__(self, config: objectives.InfillingConfig, vocabulary: Vocabulary, row_length: int) -> None:
        self.permutes = config.permute_sentences
        self.specials = DocumentWithSpecials(vocabulary.before, vocabulary.after)
        self.sentence_ends = vocabulary.sentence_ends
        self.mask, self.start = required_mask(vocabulary, config.kind), vocabulary.start
        # BART's start token is EOS; where it is BOS, it comes once
        self.starts_with_bos = self.specials.before[:1].tolist() == [self.start]
        self.max_chunk_length = row_length
        n = np.arange(row_length + 1)
        self.num_hidden = _count_hidden(config.density, n)
        self.num_spans = _count_spans(config.mean_length, self.num_hidden, n)

    def capacity(self, chunk_length: int) -> RowCapacity:
        n = np.arange(chunk_length + 1)
        shrinks = self.num_hidden - self.num_spans
        source_sizes = []
        for num_specials in range(self.specials.count + 1):
            source_sizes.append(n - shrinks[np.maximum(n - num_specials, 0)])
        return RowCapacity(chunk_length, source=round_up_to_8(int(np.max(source_sizes))))

    def sizes(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> ChunkSizes:
        text = self.specials.count_text(lengths, start, stop)
        target = stop - start - (self.starts_with_bos & (start == 0))
        return ChunkSizes(target, stop - start - self.num_hidden[text] + self.num_spans[text])

    def segments(self, chunks: Sequence[Chunk], keys: np.ndarray) -> Segments:
        original, begin, text_begin, text_end, end = self.specials.concatenate(chunks)
        text = text_end - text_begin
        hidden, spans = self.num_hidden[text], self.num_spans[text]
        order_keys, length_keys, position_keys = keyed_random.split(keys, 3)

        # lengths: each hidden token falls into a random span of its chunk
        spans_before = spans.cumsum() - spans
        span_in_chunk = (keyed_random.uniform(length_keys, hidden) * np.repeat(spans, hidden)).astype(
            np.int64
        )
        span_of = span_in_chunk + np.repeat(spans_before, hidden)
        lengths = np.bincount(span_of, minlength=spans.sum())

        # positions: how many visible tokens come before each span
        visible_before = keyed_random.sample_without_replacement(position_keys, text - hidden + 1, spans)
        visible_before += np.repeat(text_begin - (hidden.cumsum() - hidden), spans)
        visible_before.sort()
        is_hidden = ragged_arange(visible_before + lengths.cumsum() - lengths, lengths)

        # the source: the visible tokens, and a mask for each span
        shuffled = (
            self._permute_sentences(original, text_begin, text, order_keys) if self.permutes else original
        )
        visible = shuffled[mask_except(len(original), is_hidden)]
        source = np.full(len(visible) + len(visible_before), self.mask)
        mask_positions = visible_before + np.arange(len(visible_before))
        source[mask_except(len(source), mask_positions)] = visible

        # the target: the original, without a BOS that is the start token already
        drops_first = np.array([self.starts_with_bos and chunk.start == 0 for chunk in chunks], bool)
        is_target = mask_except(len(original), begin[drops_first])
        inputs = _decoder_inputs(original, begin[begin < end], self.start)
        return Segments(
            tokens=inputs[is_target],
            targets=original[is_target],
            sizes=end - begin - drops_first,
            source=source,
            source_sizes=end - begin - hidden + spans,
        )

    def _permute_sentences(
        self, tokens: np.ndarray, text_begin: np.ndarray, text: np.ndarray, keys: np.ndarray
    ) -> np.ndarray:
        """`tokens`, with the sentences of each of the texts of `text` tokens that begin at `text_begin` in
        random order.
        """
        positions = ragged_arange(text_begin, text)
        begins_sentence = self.sentence_ends[tokens[positions - 1]]
        starts, sizes, counts = split_runs(begins_sentence, text)
        order = keyed_random.shuffled(keys, counts) + np.repeat(counts.cumsum() - counts, counts)
        permuted = tokens.copy()
        permuted[positions] = tokens[ragged_arange(positions[starts[order]], sizes[order])]
        return permuted


def _count_hidden(density: float, n: np.ndarray) -> np.ndarray:
    """How many of n text tokens are hidden: at least 1 where there are any."""
    return np.where(n > 0, np.maximum(np.rint(density * n), 1), 0).astype(np.int64)


def _count_spans(mean_length: float, hidden: np.ndarray, n: np.ndarray) -> np.ndarray:
    """In how many spans: at least 1 where there is text, and visible tokens between any two."""
    spans = np.maximum(np.rint(hidden / mean_length), n > 0)
    return np.minimum(spans, n - hidden + 1).astype(np.int64)


def _decoder_inputs(targets: np.ndarray, begin: np.ndarray, start: int) -> np.ndarray:
    """What the decoder reads to predict the targets of chunks that start at `begin`: the start token, then
    the targets before.
    """
    tokens = np.empty_like(targets)
    tokens[1:] = targets[:-1]
    tokens[begin] = start
    return tokens
