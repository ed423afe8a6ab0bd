import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pretrain.data.small_corpus import FIRST, SmallVocabulary
from trifold.modeling.batch import IGNORE
from trifold.modeling.errors import UserError
from trifold.pretrain.config.objectives import AnyObjective as Config
from trifold.pretrain.config.objectives import (
    CausalConfig,
    ContinuationConfig,
    FimConfig,
    InfillingConfig,
    MaskedConfig,
    MixtureConfig,
    PrefixConfig,
    SpansConfig,
    mixture_members,
)
from trifold.pretrain.data import keyed_random
from trifold.pretrain.data.objectives import Chunk, ObjectiveMixture
from trifold.pretrain.data.objectives.masked import _pick_words
from trifold.pretrain.data.packing import Chunks

VOCABULARY = SmallVocabulary(2000)
DOCUMENTS = st.lists(
    st.sampled_from([0, 1, 2, 29, 30, 31, 32, 33, 100, 1000]) | st.integers(0, 200), min_size=1, max_size=5
)


class Made(NamedTuple):
    """A piece's share of a row; `picked` are places in its tokens."""

    tokens: np.ndarray
    targets: np.ndarray
    source: np.ndarray | None
    picked: np.ndarray | None
    part: int


def segments_of(
    config: Config,
    row_length: int,
    lengths: list[int],
    seed: int = 0,
    vocabulary: SmallVocabulary = VOCABULARY,
) -> list[tuple[int, Made]]:
    """(document, segment) of each piece of documents whose text tokens count up from FIRST; sizes are as
    foretold.
    """
    goal = ObjectiveMixture(config, vocabulary, row_length)
    pieces, member_of, given = pieces_of(goal, lengths)
    made = []
    for i, segment in enumerate(made_of(goal, member_of, given, keys_of(seed, len(given)))):
        assert len(segment.tokens) == len(segment.targets) == pieces.tokens[i] <= goal.capacity.tokens
        if segment.source is not None:
            assert len(segment.source) == pieces.source_or_picked_tokens[i] <= goal.capacity.source
        if segment.picked is not None:
            whole_words = getattr(mixture_members(config)[segment.part], "whole_words", False)
            assert len(segment.picked) <= pieces.source_or_picked_tokens[i] <= goal.capacity.picked
            assert whole_words or len(segment.picked) == pieces.source_or_picked_tokens[i]
        made.append((int(pieces.document[i]), segment))
    return made


def keys_of(seed: int, number: int) -> np.ndarray:
    return keyed_random.nth_random(np.full(number, seed, np.uint64), np.arange(number))


def made_of(
    goal: ObjectiveMixture, member_of: np.ndarray, given: list[Chunk], keys: np.ndarray
) -> list[Made]:
    """The pieces' segments, made together and taken apart again."""
    made = {}
    for part, pieces, joined in goal.segments(member_of, given, keys):

        def split(array: np.ndarray, sizes: np.ndarray, n: int = len(pieces)) -> list[Any]:
            return np.split(array, sizes.cumsum()[:-1]) if len(sizes) else [None] * n

        sides = [split(array, joined.sizes) for array in (joined.tokens, joined.targets)]
        sides += [split(joined.source, joined.source_sizes), split(joined.picked, joined.picked_sizes)]
        for i, begin, *its, picked in zip(
            pieces.tolist(), joined.sizes.cumsum() - joined.sizes, *sides, strict=True
        ):
            tokens, targets, source = its
            made[i] = Made(tokens, targets, source, None if picked is None else picked - begin, part)
    return [made[i] for i in range(len(given))]


def pieces_of(goal: ObjectiveMixture, lengths: list[int]) -> tuple[Chunks, np.ndarray, list[Chunk]]:
    """Their sizes, their parts, and the pieces themselves, of documents whose text tokens count up from
    FIRST.
    """
    pieces = goal.chunks(np.array(lengths))
    texts = [FIRST + np.arange(lengths[document], dtype=np.uint16) for document in pieces.document]
    given = [Chunk(*piece) for piece in zip(texts, pieces.start.tolist(), pieces.stop.tolist(), strict=True)]
    return pieces, goal.member_of(pieces.document, pieces.start), given


def with_marks(length: int) -> list[int]:
    return [VOCABULARY.bos, *range(FIRST, FIRST + length), VOCABULARY.eos]


def joined(parts: list[tuple[int, list[int]]], documents: int) -> list[list[int]]:
    return [[token for d, part in parts if d == document for token in part] for document in range(documents)]


@given(DOCUMENTS)
def test_causal_predicts_every_token_but_the_first_mark_once(lengths):
    made = segments_of(CausalConfig(), 32, lengths)
    for document, segment in made:
        assert segment.tokens[1:].tolist() == segment.targets[:-1].tolist()
        assert document < len(lengths)
    assert joined([(d, s.tokens.tolist()) for d, s in made], len(lengths)) == [
        with_marks(n)[:-1] for n in lengths
    ]
    assert joined([(d, s.targets.tolist()) for d, s in made], len(lengths)) == [
        with_marks(n)[1:] for n in lengths
    ]


@given(DOCUMENTS, st.booleans(), st.integers(0, 99))
def test_masked_hides_no_mark_and_loses_no_token(lengths, whole_words, seed):
    made = segments_of(MaskedConfig(whole_words=whole_words), 32, lengths, seed)
    original = []
    for document, segment in made:
        at = np.flatnonzero(segment.targets != IGNORE)
        assert at.tolist() == segment.picked.tolist()
        assert (segment.targets[at] >= FIRST).all()
        text = int((~np.isin(segment.tokens, [VOCABULARY.bos, VOCABULARY.eos])).sum())
        if not whole_words:
            assert len(at) == (max(round(0.3 * text), 1) if text else 0)
        original.append(
            (document, np.where(segment.targets == IGNORE, segment.tokens, segment.targets).tolist())
        )
    assert joined(original, len(lengths)) == [with_marks(n) for n in lengths]


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_of_a_million_tokens_the_stated_shares_are_masked_replaced_and_kept(rate):
    made = [s for _, s in segments_of(MaskedConfig(rate=rate), 512, [700, 300, 40] * 1000)]
    tokens, targets = (np.concatenate([getattr(s, name) for s in made]) for name in ("tokens", "targets"))
    picked = targets != IGNORE
    text = len(tokens) - 2 * 3000
    assert abs(picked.sum() / text - rate) < 0.001  # rounding of each piece, no chance in it
    masked, kept = tokens[picked] == VOCABULARY.mask, tokens[picked] == targets[picked]
    replaced = ~masked & ~kept
    for share, wanted in ((masked, 0.8), (kept, 0.1), (replaced, 0.1)):
        assert abs(share.mean() - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / picked.sum())
    others = tokens[picked][replaced]
    assert others.min() >= FIRST and others.max() < VOCABULARY.vocab_size
    middle = (FIRST + VOCABULARY.vocab_size) / 2  # uniform over ordinary tokens
    assert abs(others.mean() - middle) < 4 * (VOCABULARY.vocab_size - FIRST) / np.sqrt(12 * len(others))
    by_place = np.zeros(300)  # every place of a document is as likely
    for segment in made[2::4]:
        assert len(segment.tokens) == 302
        by_place += segment.targets[1:-1] != IGNORE
    assert np.abs(by_place / 1000 - rate).max() < 5 * np.sqrt(rate * (1 - rate) / 1000)


def test_whole_words_are_hidden_completely_and_as_often_as_asked():
    made = [s for _, s in segments_of(MaskedConfig(whole_words=True), 512, [700, 300, 40] * 300)]
    picked = total = 0
    for segment in made:
        original = np.where(segment.targets == IGNORE, segment.tokens, segment.targets)
        text = original >= FIRST
        words = np.split(
            segment.targets[text] != IGNORE, np.flatnonzero(VOCABULARY.word_starts[original[text]])
        )
        assert all(word.all() or not word.any() for word in words)
        picked, total = picked + len(segment.picked), total + int(text.sum())
    assert 0.29 < picked / total <= 0.301


@given(
    st.lists(st.tuples(st.lists(st.integers(1, 9), max_size=12), st.floats(0, 1)), min_size=1, max_size=6),
    st.integers(0, 99),
)
def test_of_words_in_random_order_each_is_hidden_that_still_fits(texts, seed):
    """Beside the same law word by word (BERT's create_pretraining_data), in the same order."""
    text = np.array([sum(words) for words, _ in texts])
    most = np.array([int(share * size) for (_, share), size in zip(texts, text, strict=True)])
    keys = keys_of(seed, len(texts))
    begins = np.zeros(text.sum(), bool)
    expected: list[int] = []
    for i, (words, _) in enumerate(texts):
        edges = text[:i].sum() + np.cumsum([0, *words])
        begins[edges[1:-1]] = True  # at a text's first token a word begins whatever the tokenizer says
        left = most[i]
        for word in keyed_random.shuffled(keys[i : i + 1], np.array([len(words)])):
            if words[word] <= left:
                expected += range(edges[word], edges[word + 1])
                left -= words[word]
    assert _pick_words(begins, text, most, keys).tolist() == sorted(expected)


def test_words_of_one_size_are_hidden_as_often_wherever_they_stand():
    begins, documents = np.tile(np.arange(200) % 2 == 0, 4000), 4000
    places = _pick_words(begins, np.full(documents, 200), np.full(documents, 61), keys_of(0, documents))
    by_word = np.bincount(places % 200 // 2, minlength=100) / 2 / documents
    assert by_word.sum() == pytest.approx(30) and np.abs(by_word - 0.3).max() < 5 * np.sqrt(
        0.3 * 0.7 / documents
    )


def spans_of(segment: Made) -> list[list[int]]:
    """The hidden spans of a target, checking its grammar: sentinels in order from the first, EOS at the
    end.
    """
    assert segment.tokens.tolist() == [VOCABULARY.bos, *segment.targets[:-1].tolist()]
    assert segment.targets[-1] == VOCABULARY.eos
    spans: list[list[int]] = []
    for token in segment.targets[:-1].tolist():
        if token < FIRST:
            assert token == VOCABULARY.sentinels[len(spans)]
            spans.append([])
        else:
            spans[-1].append(token)
    return spans


def original_of(segment: Made) -> list[int]:
    spans = spans_of(segment)
    named = dict(zip(VOCABULARY.sentinels, spans, strict=False))
    assert [t for t in segment.source.tolist() if t in named] == VOCABULARY.sentinels[: len(spans)]
    return [token for t in segment.source.tolist() for token in named.get(t, [t])]


@settings(deadline=None)
@given(
    DOCUMENTS,
    st.sampled_from([(0.15, 3.0), (0.5, 3.0), (0.5, 1.0), (0.9, 1.0), (0.15, 32.0)]),
    st.integers(0, 99),
)
def test_source_and_target_spell_every_document_exactly(lengths, config, seed):
    density, mean_length = config
    made = segments_of(SpansConfig(density=density, mean_length=mean_length), 32, lengths, seed)
    assert joined([(d, original_of(s)) for d, s in made], len(lengths)) == [with_marks(n) for n in lengths]
    for _, segment in made:
        named = np.isin(segment.source, VOCABULARY.sentinels)
        assert not (named[1:] & named[:-1]).any()  # spans never touch


@pytest.mark.parametrize("config", [(0.15, 3.0), (0.15, 8.0), (0.5, 8.0), (0.5, 64.0)])
def test_the_spans_of_every_denoiser_are_any_way_to_make_its_sums(config):
    """UL2's: how much is hidden, in how many spans, and the law of a span's length and of what is shown
    before it.
    """
    length, documents = 400, 1000
    density, mean_length = config
    made = [
        s
        for _, s in segments_of(
            SpansConfig(density=density, mean_length=mean_length), 512, [length] * documents
        )
    ]
    hidden, number = round(length * density), round(length * density / mean_length)
    lengths = np.array([[len(span) for span in spans_of(s)] for s in made])
    assert lengths.shape == (documents, number) and (lengths.sum(1) == hidden).all()
    shown = [np.split(s.source, np.isin(s.source, VOCABULARY.sentinels).nonzero()[0])[0] for s in made]
    first = np.array([len(part) - 1 for part in shown])  # without BOS; 0 where the text begins with a span
    # the first span ends, and begins, at the least of so many different places, of which all choices are as
    # likely
    for found, places, chosen in (
        (lengths[:, 0] - 1, hidden - 1, number - 1),
        (first, length - hidden + 1, number),
    ):
        below = np.cumsum(
            [
                math.comb(places - 1 - n, chosen - 1) / math.comb(places, chosen)
                for n in range(places - chosen + 1)
            ]
        )
        assert below[-1] == pytest.approx(1)
        reached = np.searchsorted(np.sort(found), np.arange(len(below)), side="right") / documents
        assert np.abs(reached - below).max() < 1.95 / np.sqrt(
            documents
        )  # Kolmogorov and Smirnov's, once in a thousand


def test_of_a_million_tokens_the_stated_share_is_hidden_in_spans_of_the_stated_length():
    length, documents = 400, 2500
    made = [s for _, s in segments_of(SpansConfig(), 512, [length] * documents)]
    spans = [spans_of(s) for s in made]
    assert {len(s) for s in spans} == {20}  # round(400 * 0.15 / 3)
    lengths = np.array([len(span) for s in spans for span in s])
    assert lengths.sum() == 60 * documents
    assert abs((lengths == 1).mean() - 19 / 59) < 5 * np.sqrt(
        0.32 * 0.68 / len(lengths)
    )  # of all ways to cut 60 in 20 parts
    assert abs((lengths == 2).mean() - 19 / 59 * 40 / 58) < 5 * np.sqrt(0.22 * 0.78 / len(lengths))
    hidden = np.zeros(length)
    for s in spans:
        hidden[np.concatenate([np.array(span) for span in s]) - FIRST] += 1
    assert np.abs(hidden[20:-20] / documents - 0.151).max() < 5 * np.sqrt(
        0.15 * 0.85 / documents
    )  # every place is as likely ...
    assert (
        0.04 < hidden[0] / documents < 0.08 and 0.04 < hidden[-1] / documents < 0.08
    )  # ... towards the ends less, on both alike


def test_spans_beyond_the_sentinels_are_capped_and_counted():
    goal = ObjectiveMixture(SpansConfig(density=0.5), VOCABULARY, 1024)
    pieces = goal.chunks(np.array([599, 603, 604, 900, 10_000]))
    made = [s for _, s in segments_of(SpansConfig(density=0.5), 1024, [599, 603, 604, 900, 10_000])]
    numbers = [len(spans_of(s)) for s in made]
    assert numbers[:4] == [100, 100, 100, 100] and max(numbers) == 100
    assert pieces.num_over_sentinel_limit == sum(sum(map(len, spans_of(s))) / 3 > 100.5 for s in made) > 4
    assert sum(map(len, spans_of(made[3]))) == 450  # as much is hidden, in longer spans


@settings(deadline=None, max_examples=40)
@given(st.integers(8, 300), st.floats(0.02, 0.9), st.floats(1, 20))
def test_the_longest_piece_is_as_long_as_the_source_room_allows(row_length, density, mean_length):
    goal = ObjectiveMixture(SpansConfig(density=density, mean_length=mean_length), VOCABULARY, row_length)
    pieces = goal.chunks(
        np.arange(3 * goal.max_chunk_length)
    )  # pieces of every length, with 0, 1 and 2 marks
    assert pieces.source_or_picked_tokens.max() <= row_length and pieces.tokens.max() <= goal.capacity.tokens
    assert goal.capacity.tokens % 8 == 0 and goal.capacity.tokens - pieces.tokens.max() < 8
    goal.max_chunk_length += 1
    assert goal.chunks(np.arange(3 * goal.max_chunk_length)).source_or_picked_tokens.max() > row_length


def test_a_prefix_ends_anywhere_and_the_rest_is_predicted_as_a_causal_model_does():
    made = segments_of(PrefixConfig(), 64, [50, 200, 3, 0] * 500)
    plain = segments_of(CausalConfig(), 64, [50, 200, 3, 0] * 500)
    shares = []
    for (_, segment), (_, whole) in zip(made, plain, strict=True):
        assert segment.tokens.tolist() == whole.tokens.tolist()
        skipped = int((segment.targets == IGNORE).sum())
        assert skipped < len(segment.targets)
        assert segment.targets[skipped:].tolist() == whole.targets[skipped:].tolist()
        if len(segment.targets) == 51:
            shares.append(skipped)
    counts = np.bincount(shares, minlength=51)  # uniform over the 51 places where the prefix may end
    assert len(counts) == 51 and abs(np.mean(shares) - 25) < 4 * 51 / np.sqrt(12 * len(shares))
    assert np.abs(counts - len(shares) / 51).max() < 5 * np.sqrt(len(shares) / 51)


def moved(segment: Made) -> list[list[int]]:
    """What stands behind PRE, SUF and MID, checking the grammar. Both orders spell the text as first, third,
    second of these.
    """
    whole = [*segment.tokens.tolist(), int(segment.targets[-1])]
    assert segment.targets.tolist() == whole[1:] and whole[-1] == VOCABULARY.eos
    at = [whole.index(sentinel) for sentinel in VOCABULARY.sentinels[:3]]
    assert at == sorted(at) and at[0] == (whole[0] == VOCABULARY.bos)
    return [whole[first + 1 : last] for first, last in itertools.pairwise([*at, len(whole) - 1])]


@settings(deadline=None)
@given(DOCUMENTS, st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 99))
def test_the_middle_put_back_spells_every_document(lengths, suffix_first, seed):
    made = [
        (document, moved(s))
        for document, s in segments_of(FimConfig(suffix_first=suffix_first), 32, lengths, seed)
    ]
    assert joined([(d, [*pre, *mid, *suf]) for d, (pre, suf, mid) in made], len(lengths)) == [
        with_marks(n)[1:-1] for n in lengths
    ]


def test_a_document_is_cut_at_two_uniform_points_and_the_suffix_comes_first_as_often_as_asked():
    length, documents = 300, 3000
    sizes = np.array(
        [
            [len(part) for part in moved(s)]
            for _, s in segments_of(FimConfig(suffix_first=0), 512, [length] * documents)
        ]
    )
    # two uniform points leave each part a third on average, with the deviation of Beta(1, 2)
    assert np.abs(sizes.mean(0) - length / 3).max() < 5 * length / np.sqrt(18 * documents)
    assert abs((sizes[:, 2] > length / 2).mean() - 1 / 4) < 5 * np.sqrt(3 / 16 / documents)
    swapped = np.array(
        [
            [len(part) for part in moved(s)]
            for _, s in segments_of(FimConfig(suffix_first=0.25), 512, [length] * documents)
        ]
    )
    assert abs((swapped[:, 0] == 0).mean() - 0.25 - 0.75 / (length / 2)) < 5 * np.sqrt(3 / 16 / documents)


def filled(segment: Made) -> list[list[int]]:
    """What each mask of an infilled source stands for, where its tokens are in order."""
    visible = [t for t in segment.source.tolist() if t not in (VOCABULARY.bos, VOCABULARY.eos)]
    text = segment.targets[segment.targets >= FIRST].tolist()
    bounds = [text[0] - 1, *visible, text[-1] + 1]
    return [
        list(range(bounds[i - 1] + 1, bounds[i + 1])) for i, t in enumerate(bounds) if t == VOCABULARY.mask
    ]


@settings(deadline=None)
@given(DOCUMENTS, st.sampled_from([(0.3, 3.0), (0.5, 1.0), (0.9, 1.5)]), st.booleans(), st.integers(0, 99))
def test_infilling_writes_every_document_and_shows_the_rest_of_it(lengths, config, permute, seed):
    density, mean_length = config
    made = segments_of(
        InfillingConfig(density=density, mean_length=mean_length, permute_sentences=permute),
        32,
        lengths,
        seed,
    )
    written = [
        (d, [*([VOCABULARY.bos] if i == 0 else []), *s.targets.tolist()])
        for d, group in by_document(made)
        for i, s in enumerate(group)
    ]
    assert joined(written, len(lengths)) == [with_marks(n) for n in lengths]
    for _, segment in made:
        assert segment.tokens.tolist() == [VOCABULARY.bos, *segment.targets[:-1].tolist()]
        text, masks = segment.targets[segment.targets >= FIRST], segment.source == VOCABULARY.mask
        shown = segment.source[segment.source >= FIRST]
        assert len(np.unique(shown)) == len(shown) and np.isin(shown, text).all()
        assert len(text) - len(shown) == (max(round(density * len(text)), 1) if len(text) else 0)
        assert not (masks[1:] & masks[:-1]).any()
        if not permute:
            assert (np.diff(shown) > 0).all()


def by_document(made: list[tuple[int, Made]]) -> list[tuple[int, list[Made]]]:
    return [(d, [s for _, s in group]) for d, group in itertools.groupby(made, key=lambda item: item[0])]


def test_masks_stand_for_poisson_numbers_of_tokens_and_every_place_is_as_likely():
    length, documents = 400, 2500
    made = [
        filled(s) for _, s in segments_of(InfillingConfig(permute_sentences=False), 512, [length] * documents)
    ]
    assert {len(spans) for spans in made} == {40}  # round(400 * 0.3 / 3)
    sizes = np.array([len(span) for spans in made for span in spans])
    assert sizes.sum() == 120 * documents
    for size in range(
        8
    ):  # Poisson(3); that each piece's sum is kept makes it binomial, which 40 spans bring within 0.005
        law = 3**size * math.exp(-3) / math.factorial(size)
        exact = math.comb(120, size) * (1 / 40) ** size * (39 / 40) ** (120 - size)
        assert (
            abs((sizes == size).mean() - exact) < 5 * np.sqrt(exact / len(sizes)) and abs(exact - law) < 0.005
        )
    hidden = np.zeros(length)
    for spans in made:
        hidden[np.concatenate([np.array(span, int) for span in spans]) - FIRST] += 1
    assert np.abs(hidden[20:-20] / documents - 0.3).max() < 0.01 + 5 * np.sqrt(0.3 * 0.7 / documents)


def test_sentences_are_shown_whole_and_in_any_order():
    made = segments_of(InfillingConfig(density=0.001), 512, [200] * 2000)
    ends = VOCABULARY.sentence_ends[FIRST : FIRST + 199]
    sentences = np.split(np.arange(FIRST, FIRST + 200), np.flatnonzero(ends) + 1)
    firsts = np.zeros(len(sentences))
    for _, segment in made:
        text = segment.source[1:-1]
        hidden = np.setdiff1d(np.arange(FIRST, FIRST + 200), text)
        assert len(hidden) == 1
        spelled = np.where(text == VOCABULARY.mask, hidden[0], text)
        cuts = np.flatnonzero(np.isin(spelled, [s[-1] for s in sentences]))[:-1] + 1
        shown = np.split(spelled, cuts)
        assert sorted(map(tuple, shown)) == sorted(map(tuple, sentences))
        firsts[[s[0] for s in sentences].index(shown[0][0])] += 1
    assert len(sentences) > 10
    assert np.abs(firsts / 2000 - 1 / len(sentences)).max() < 5 / np.sqrt(2000 * len(sentences))


def test_a_continuation_is_the_last_quarter_behind_one_sentinel_and_modes_are_told_first():
    for config, sign in (
        (ContinuationConfig(), []),
        (ContinuationConfig(mode="S"), [VOCABULARY.sentinels[-2]]),
    ):
        [(_, segment)] = segments_of(config, 128, [100])
        first = VOCABULARY.sentinels[0]
        assert segment.source.tolist() == [
            *sign,
            VOCABULARY.bos,
            *range(FIRST, FIRST + 75),
            first,
            VOCABULARY.eos,
        ]
        assert segment.targets.tolist() == [first, *range(FIRST + 75, FIRST + 100), VOCABULARY.eos]
        assert segment.tokens.tolist() == [VOCABULARY.bos, *segment.targets[:-1].tolist()]
    modes: list[tuple[Any, int]] = [("R", -1), ("X", -3)]
    for mode, place in modes:
        made = segments_of(SpansConfig(density=0.5, mode=mode), 1024, [1000])
        assert {int(s.source[0]) for _, s in made} == {VOCABULARY.sentinels[place]}
        assert (
            max(int(np.isin(s.source, VOCABULARY.sentinels).sum()) for _, s in made) == 1 + 97
        )  # the modes' own name no span


EVERY = (
    CausalConfig(),
    PrefixConfig(),
    FimConfig(),
    MaskedConfig(),
    MaskedConfig(whole_words=True),
    SpansConfig(),
    ContinuationConfig(),
    InfillingConfig(),
)
ENCODER_DECODER = MixtureConfig(
    parts=(
        SpansConfig(weight=3),
        SpansConfig(density=0.5, mode="X"),
        ContinuationConfig(mode="S", weight=2),
        InfillingConfig(weight=2),
    )
)
DECODER = MixtureConfig(parts=(CausalConfig(weight=2), PrefixConfig(), FimConfig()))
ENCODER = MixtureConfig(parts=(MaskedConfig(random=0), MaskedConfig(rate=0.15, random=0, whole_words=True)))


@settings(deadline=None)
@given(DOCUMENTS, st.sampled_from([ENCODER_DECODER, DECODER, ENCODER]), st.integers(0, 99))
def test_a_mixture_gives_each_piece_to_one_part_and_loses_no_token(lengths, config, seed):
    seen: list[tuple[int, list[int]]] = []
    for document, segment in segments_of(config, 32, lengths, seed):
        arrays = [segment.source if segment.source is not None else segment.tokens, segment.targets]
        seen.append((document, np.unique(np.concatenate(arrays)).tolist()))
        kind = config.parts[segment.part].kind
        assert (segment.source is not None) == (kind in ("spans", "continuation", "infilling"))
        assert VOCABULARY.mask not in segment.targets
    for document, tokens in enumerate(joined(seen, len(lengths))):
        assert {t for t in tokens if t >= FIRST} == set(range(FIRST, FIRST + lengths[document]))


def test_the_parts_of_a_mixture_have_the_pieces_that_their_weights_say():
    goal = ObjectiveMixture(ENCODER_DECODER, VOCABULARY, 64)
    pieces = goal.chunks(np.random.default_rng(0).integers(0, 400, 20_000))
    shares = np.bincount(goal.member_of(pieces.document, pieces.start)) / len(pieces.document)
    assert np.abs(shares - np.array([3, 1, 2, 2]) / 8).max() < 4 * 0.5 / np.sqrt(len(pieces.document))
    long = goal.member_of(
        np.zeros(4000, int), np.arange(4000) * goal.max_chunk_length
    )  # the pieces of one long document too
    assert np.abs(np.bincount(long) / 4000 - np.array([3, 1, 2, 2]) / 8).max() < 4 * 0.5 / np.sqrt(4000)
    assert goal.labels == ["spans", "X", "S", "infilling"]
    assert ObjectiveMixture(ENCODER, VOCABULARY, 64).labels == ["masked-1", "masked-2"]
    assert goal.chunks(np.array([50, 90])).tokens.tolist() == goal.chunks(np.array([50, 90])).tokens.tolist()


@pytest.mark.parametrize(
    "config",
    [SpansConfig(), ContinuationConfig(), InfillingConfig(), MaskedConfig(), ENCODER_DECODER],
    ids=lambda config: config.kind,
)
@pytest.mark.parametrize(
    ("before", "after", "start"), [([], [2], 0), ([50, 51], [2], 2), ([], [2, 50], 50), ([1], [2], 2)]
)
@settings(deadline=None, max_examples=20)
@given(lengths=DOCUMENTS)
def test_an_encoder_reads_the_marks_of_the_published_tokenizer(config, before, after, start, lengths):
    """Those of T5, NLLB, mBART and BART: none and two before a text, one and two after it, and decoders that
    start with any of them.
    """
    vocabulary = SmallVocabulary(2000)
    vocabulary.before, vocabulary.after, vocabulary.start = before, after, start
    vocabulary.sentinels = list(range(5, 45))
    made = segments_of(config, 32, lengths, vocabulary=vocabulary)
    for document, group in by_document(made):
        read = [(s.source if s.source is not None else s.tokens).tolist() for s in group]
        signs = {vocabulary.sentinels[place] for place in (-1, -2, -3)}
        read = [part[part[0] in signs :] for part in read]
        whole = [token for part in read for token in part]
        assert whole[: len(before)] == before and whole[len(whole) - len(after) :] == after
        assert not set(whole[len(before) : len(whole) - len(after)]) & {50, 51}
        for segment in group:
            if segment.source is not None:
                assert segment.tokens.tolist() == [start, *segment.targets[:-1].tolist()]
        if config.kind == "infilling":
            text = list(range(FIRST, FIRST + lengths[document]))
            written = [token for segment in group for token in segment.targets.tolist()]
            assert written == [*before[before[:1] == [start] :], *text, *after]


@settings(deadline=None, max_examples=20)
@given(DOCUMENTS, st.sampled_from([([1], [2]), ([], []), ([50, 51], [])]), st.integers(0, 99))
@pytest.mark.parametrize("config", [*EVERY, ENCODER_DECODER], ids=str)
def test_pieces_made_together_are_those_made_one_after_another(config, lengths, marks, seed):
    vocabulary = SmallVocabulary(2000)
    vocabulary.before, vocabulary.after = marks
    goal = ObjectiveMixture(config, vocabulary, 32)
    _, member_of, given = pieces_of(goal, lengths)
    keys = keys_of(seed, len(given))
    alone = [
        made_of(goal, member_of[i : i + 1], [piece], keys[i : i + 1])[0] for i, piece in enumerate(given)
    ]
    for one, other in zip(made_of(goal, member_of, given, keys), alone, strict=True):
        assert all(
            np.array_equal(a, b) for a, b in zip(tuple[Any, ...](one), tuple[Any, ...](other), strict=True)
        )


def test_an_objective_is_a_pure_function_of_piece_and_key():
    for config in (
        CausalConfig(),
        PrefixConfig(),
        FimConfig(),
        MaskedConfig(),
        MaskedConfig(whole_words=True),
        SpansConfig(),
        InfillingConfig(),
        ENCODER_DECODER,
    ):
        first, second, other = (segments_of(config, 64, [50, 200], seed) for seed in (1, 1, 2))
        arrays = [
            [
                np.concatenate([a for _, s in made for a in s if isinstance(a, np.ndarray)])
                for made in (first, second, other)
            ]
        ]
        for a, b, c in arrays:
            assert (a == b).all()
            assert config.kind == "causal" or a.shape != c.shape or (a != c).any()


def test_spans_without_sentinels_are_refused():
    vocabulary = SmallVocabulary()
    vocabulary.sentinels = []
    with pytest.raises(UserError, match="sentinels"):
        ObjectiveMixture(SpansConfig(), vocabulary, 64)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MaskedConfig(), "the masked objective needs .* a mask"),
        (InfillingConfig(), "the infilling .* a mask"),
    ],
)
def test_a_missing_mask_is_refused_by_the_objective_that_needs_it(config, message):
    vocabulary = SmallVocabulary()
    vocabulary.mask = None
    with pytest.raises(UserError, match=message):
        ObjectiveMixture(config, vocabulary, 64)
    ObjectiveMixture(SpansConfig(), vocabulary, 64)


def test_a_mixture_of_families_is_refused():
    with pytest.raises(ValueError, match="causal trains family decoder, spans trains family encoder-decoder"):
        MixtureConfig(parts=(CausalConfig(), SpansConfig()))


def test_ordinary_tokens_are_all_but_the_marks():
    masked: Any = ObjectiveMixture(MaskedConfig(), VOCABULARY, 64).members[0]
    assert masked.ordinary.tolist() == list(range(FIRST, VOCABULARY.vocab_size))
