"""Labels on words: a text and the spans of its words come in, windows of tokens with the position of each
word's first token go out; and labels of positions become tags of words.

A text that is longer than a row, or than the positions that a model has learned, is read in windows that
overlap by a quarter. Each word belongs to the window in whose middle it lies rather; only there it is trained
and predicted. A word of which the tokenizer leaves no token has no position, and stays outside.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trifold.finetune.examples.conll import iob2
from trifold.modeling.batch import IGNORE
from trifold.modeling.config import Family
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer

_NO_TOKEN = -1


@dataclass(frozen=True)
class TaggingWindow:
    """A window of a text's tokens, between the special tokens that a model of its family reads."""

    tokens: np.ndarray  # (T,)
    words: list[int]  # indices of the words that this window labels
    positions: list[int]  # of the first token of each

    def targets(
        self, labels: Sequence[int], outside: int, space: Sequence[int], inside: set[int]
    ) -> np.ndarray:
        """(T,) the label of each word at its first token, IGNORE elsewhere.

        A token that is only the space before a word carries a label too, because a stock pipeline takes it
        for a word: the word's own if that continues an entity (`inside`), else `outside`. A token that two
        words share carries the label of the first. A window without a word is labelled outside.
        """
        targets = np.full(len(self.tokens), IGNORE)
        for word, position in zip(self.words, self.positions, strict=True):
            if targets[position] != IGNORE:
                continue
            label = labels[word]
            targets[position] = label
            if position and self.tokens[position - 1] in space:
                targets[position - 1] = label if label in inside else outside
        if not self.words:
            targets[-1] = outside
        return targets


def first_tokens(
    tokenizer: Tokenizer, family: Family, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, list[int]]:
    """A text's tokens with their special tokens, and the position of the first token of each span; -1 where
    the tokenizer leaves none of its characters.
    """
    ids, offsets = tokenizer.offsets(text)
    before, after = tokenizer.special_prefix_suffix(family)
    ends = np.array([end for _, end in offsets], np.int64)
    candidates = np.searchsorted(ends, np.array([begin for begin, _ in spans], np.int64), side="right")
    positions = []
    for (begin, end), candidate in zip(spans, candidates.tolist(), strict=True):
        has_token = begin < end and candidate < len(ids) and _visible_start(text, *offsets[candidate]) < end
        positions.append(len(before) + candidate if has_token else _NO_TOKEN)
    return np.array([*before, *ids, *after], np.int64), positions


def tagging_windows(
    tokenizer: Tokenizer, family: Family, text: str, spans: Sequence[tuple[int, int]], length: int
) -> list[TaggingWindow]:
    """The windows of at most `length` tokens of a text, in order; one where all of it fits."""
    tokens, positions = first_tokens(tokenizer, family, text, spans)
    labelled = [(word, position) for word, position in enumerate(positions) if position != _NO_TOKEN]
    if len(tokens) <= length:
        return [TaggingWindow(tokens, [word for word, _ in labelled], [at for _, at in labelled])]

    before, after = tokenizer.special_prefix_suffix(family)
    body = tokens[len(before) : len(tokens) - len(after)]
    capacity = max(length - len(before) - len(after), 1)
    step = max(capacity - capacity // 4, 1)
    starts = [min(start, len(body) - capacity) for start in range(0, len(body) - capacity + step, step)]
    # A word belongs to the next window from the middle of the two windows' overlap on.
    bounds = [(start + capacity + following) // 2 for start, following in pairwise(starts)]
    owners = np.searchsorted(bounds, [at - len(before) for _, at in labelled], side="right")

    windows = []
    for number, start in enumerate(starts):
        own = [pair for pair, owner in zip(labelled, owners, strict=True) if owner == number]
        window = np.array([*before, *body[start : start + capacity], *after], np.int64)
        windows.append(TaggingWindow(window, [word for word, _ in own], [at - start for _, at in own]))
    return windows


def tags_of_words(
    windows: Sequence[TaggingWindow], labels: Sequence[Sequence[str]], num_words: int
) -> list[str | None]:
    """The tag of each word from the labels (T,) of each window's positions, before `iob2`; None for a word
    without a token. A word that shares its token with the one before continues that one's entity.
    """
    tags: list[str | None] = [None] * num_words
    for window, window_labels in zip(windows, labels, strict=True):
        before = _NO_TOKEN
        for word, position in zip(window.words, window.positions, strict=True):
            label = window_labels[position]
            shared = position == before and label != "O"
            tags[word] = f"I-{label[2:]}" if shared else label
            before = position
    return tags


def tags_in_iob2(tags: Sequence[str | None]) -> tuple[str, ...]:
    """Tags of words in IOB2; a word without a token is outside."""
    return tuple(iob2([tag or "O" for tag in tags]))


def _visible_start(text: str, begin: int, end: int) -> int:
    """Where the first character of text[begin:end] stands that is not a space or invisible."""
    for offset in range(begin, end):
        if not text[offset].isspace() and text[offset].isprintable():
            return offset
    return begin
