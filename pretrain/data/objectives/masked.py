"""The objective of an encoder: some tokens are masked, and predicted (BERT, Devlin et al. 2019)."""

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
    required_mask,
)
from trifold.pretrain.data.packing import RowCapacity
from trifold.pretrain.data.ragged import ragged_arange, round_up_to_8, split_runs


class MaskedLM:
    """Of a chunk's n text tokens round(rate * n), at least 1, are picked and predicted. A fraction `mask` of
    the picked becomes the mask token, a fraction `random` any ordinary token, the rest stays. Special tokens
    are never picked.

    Whole words: words are drawn until none fits into the number any more, so the number can be a little
    smaller. A word is never picked in part.
    """

    def __init__(self, config: objectives.MaskedConfig, vocabulary: Vocabulary, row_length: int) -> None:
        self.config = config
        self.specials = DocumentWithSpecials(vocabulary.before, vocabulary.after)
        self.max_chunk_length = row_length
        self.mask, self.word_starts = required_mask(vocabulary, config.kind), vocabulary.word_starts
        n = np.arange(row_length + 1)
        self.num_picked = np.where(n > 0, np.maximum(np.rint(config.rate * n), 1), 0).astype(np.int64)
        self.ordinary = np.setdiff1d(np.arange(vocabulary.vocab_size), vocabulary.special)

    def capacity(self, chunk_length: int) -> RowCapacity:
        return RowCapacity(chunk_length, picked=round_up_to_8(int(self.num_picked[chunk_length])))

    def sizes(self, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> ChunkSizes:
        return ChunkSizes(stop - start, self.num_picked[self.specials.count_text(lengths, start, stop)])

    def segments(self, chunks: Sequence[Chunk], keys: np.ndarray) -> Segments:
        tokens, begin, text_begin, text_end, end = self.specials.concatenate(chunks)
        position_keys, kind_keys, token_keys = keyed_random.split(keys, 3)
        text = text_end - text_begin
        counts = self.num_picked[text]

        if self.config.whole_words:
            text_positions = ragged_arange(text_begin, text)
            begins_word = self.word_starts[tokens[text_positions]]
            picked = text_positions[_pick_words(begins_word, text, counts, position_keys)]
            counts = np.diff(picked.searchsorted(end), prepend=0)
        else:
            picked = keyed_random.sample_without_replacement(position_keys, text, counts)
            picked += np.repeat(text_begin, counts)
            picked.sort()  # those of a chunk stay together

        originals = tokens[picked]
        targets = np.full(len(tokens), IGNORE)
        targets[picked] = originals

        kind = keyed_random.uniform(kind_keys, counts)  # below `mask`: masked; then random; then unchanged
        token = keyed_random.uniform(token_keys, counts)
        random_tokens = self.ordinary[(token * len(self.ordinary)).astype(np.int64)]
        unmasked = np.where(kind < self.config.mask + self.config.random, random_tokens, originals)
        tokens[picked] = np.where(kind < self.config.mask, self.mask, unmasked)
        return Segments(tokens, targets, end - begin, picked=picked, picked_sizes=counts)


def _pick_words(begins: np.ndarray, text: np.ndarray, limits: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Positions of whole words in texts of `text` tokens (N,), which lie one after another: each text's words
    in random order, those that still fit into its limit (N,). A word begins where `begins` (T,) is True, and
    at a text's first token.

    Works in rounds, for all texts at once. Of the words that fit by themselves, a round takes those that fit
    together with all before them; a word that does not fit by itself never will.

    Example: one text with words of 2, 3 and 1 tokens in the random order 3, 2, 1, and a limit of 4. The first
    round takes the 3 (3 <= 4), not the 2 (5 > 4), not the 1 (6 > 4). One position is left: the second round
    drops the 2 and takes the 1.
    """
    starts, sizes, words = split_runs(begins, text)
    text_of = np.repeat(np.arange(len(words)), words)
    candidates = keyed_random.shuffled(keys, words) + np.repeat(words.cumsum() - words, words)
    remaining, taken = limits.copy(), np.zeros(len(sizes), bool)

    while len(candidates):
        candidates = candidates[sizes[candidates] <= remaining[text_of[candidates]]]
        texts, candidate_sizes = text_of[candidates], sizes[candidates]
        before = candidate_sizes.cumsum() - candidate_sizes
        before_in_text = before - before[texts.searchsorted(texts)]
        fits = before_in_text + candidate_sizes <= remaining[texts]
        taken[candidates[fits]] = True
        used = np.bincount(texts[fits], candidate_sizes[fits], len(remaining))
        remaining -= used.astype(np.int64)
        candidates = candidates[~fits]
    return ragged_arange(starts[taken], sizes[taken])
