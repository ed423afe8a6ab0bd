import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.batch import IGNORE
from modeling.config import Refused
from pretrain.config import Causal, Masked, Objective, Spans
from pretrain.objectives import HiddenSpans, HiddenTokens, Segment, objective
from tests.pretrain.small_corpus import FIRST, SmallVocabulary

VOCABULARY = SmallVocabulary(2000)
DOCUMENTS = st.lists(st.sampled_from([0, 1, 2, 29, 30, 31, 32, 33, 100, 1000]) | st.integers(0, 200), min_size=1, max_size=5)


def segments_of(dials: Objective, row_length: int, lengths: list[int], seed: int = 0) -> list[tuple[int, Segment]]:
    """(document, segment) of each piece of documents whose text tokens count up from FIRST; sizes are as foretold."""
    goal, rng = objective(dials, VOCABULARY, row_length), np.random.default_rng(seed)
    pieces = goal.pieces(np.array(lengths))
    made = []
    for i, document in enumerate(pieces.document):
        text = FIRST + np.arange(lengths[document], dtype=np.uint16)
        segment = goal.segment(text, int(pieces.start[i]), int(pieces.stop[i]), rng)
        assert len(segment.tokens) == len(segment.targets) == pieces.tokens[i] <= goal.room.tokens
        if segment.source is not None:
            assert len(segment.source) == pieces.second[i] <= goal.room.source
        if segment.picked is not None:
            whole_words = isinstance(dials, Masked) and dials.whole_words
            assert len(segment.picked) <= pieces.second[i] <= goal.room.picked
            assert whole_words or len(segment.picked) == pieces.second[i]
        made.append((int(document), segment))
    return made


def with_marks(length: int) -> list[int]:
    return [VOCABULARY.bos, *range(FIRST, FIRST + length), VOCABULARY.eos]


def joined(parts: list[tuple[int, list[int]]], documents: int) -> list[list[int]]:
    return [[token for d, part in parts if d == document for token in part] for document in range(documents)]


@given(DOCUMENTS)
def test_causal_predicts_every_token_but_the_first_mark_once(lengths):
    made = segments_of(Causal(), 32, lengths)
    for document, segment in made:
        assert segment.tokens[1:].tolist() == segment.targets[:-1].tolist()
        assert document < len(lengths)
    assert joined([(d, s.tokens.tolist()) for d, s in made], len(lengths)) == [with_marks(n)[:-1] for n in lengths]
    assert joined([(d, s.targets.tolist()) for d, s in made], len(lengths)) == [with_marks(n)[1:] for n in lengths]


@given(DOCUMENTS, st.booleans(), st.integers(0, 99))
def test_masked_hides_no_mark_and_loses_no_token(lengths, whole_words, seed):
    made = segments_of(Masked(whole_words=whole_words), 32, lengths, seed)
    original = []
    for document, segment in made:
        at = np.flatnonzero(segment.targets != IGNORE)
        assert at.tolist() == segment.picked.tolist()
        assert (segment.targets[at] >= FIRST).all()
        text = int((~np.isin(segment.tokens, [VOCABULARY.bos, VOCABULARY.eos])).sum())
        if not whole_words:
            assert len(at) == (max(round(0.3 * text), 1) if text else 0)
        original.append((document, np.where(segment.targets == IGNORE, segment.tokens, segment.targets).tolist()))
    assert joined(original, len(lengths)) == [with_marks(n) for n in lengths]


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_of_a_million_tokens_the_stated_shares_are_masked_replaced_and_kept(rate):
    made = [s for _, s in segments_of(Masked(rate=rate), 512, [700, 300, 40] * 1000)]
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


def test_whole_words_are_hidden_whole_and_as_often_as_asked():
    made = [s for _, s in segments_of(Masked(whole_words=True), 512, [700, 300, 40] * 300)]
    picked = total = 0
    for segment in made:
        original = np.where(segment.targets == IGNORE, segment.tokens, segment.targets)
        text = original >= FIRST
        words = np.split(segment.targets[text] != IGNORE, np.flatnonzero(VOCABULARY.word_starts[original[text]]))
        assert all(word.all() or not word.any() for word in words)
        picked, total = picked + len(segment.picked), total + int(text.sum())
    assert 0.29 < picked / total <= 0.301


def spans_of(segment: Segment) -> list[list[int]]:
    """The hidden spans of a target, checking its grammar: sentinels in order from the first, EOS at the end."""
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


def original_of(segment: Segment) -> list[int]:
    spans = spans_of(segment)
    named = dict(zip(VOCABULARY.sentinels, spans, strict=False))
    assert [t for t in segment.source.tolist() if t in named] == VOCABULARY.sentinels[: len(spans)]
    return [token for t in segment.source.tolist() for token in named.get(t, [t])]


@settings(deadline=None)
@given(DOCUMENTS, st.sampled_from([(0.15, 3.0), (0.5, 3.0), (0.5, 1.0), (0.9, 1.0), (0.15, 32.0)]), st.integers(0, 99))
def test_source_and_target_spell_every_document_exactly(lengths, dials, seed):
    density, mean_length = dials
    made = segments_of(Spans(density=density, mean_length=mean_length), 32, lengths, seed)
    assert joined([(d, original_of(s)) for d, s in made], len(lengths)) == [with_marks(n) for n in lengths]
    for _, segment in made:
        named = np.isin(segment.source, VOCABULARY.sentinels)
        assert not (named[1:] & named[:-1]).any()  # spans never touch


def test_of_a_million_tokens_the_stated_share_is_hidden_in_spans_of_the_stated_length():
    length, documents = 400, 2500
    made = [s for _, s in segments_of(Spans(), 512, [length] * documents)]
    spans = [spans_of(s) for s in made]
    assert {len(s) for s in spans} == {20}  # round(400 * 0.15 / 3)
    lengths = np.array([len(span) for s in spans for span in s])
    assert lengths.sum() == 60 * documents
    assert abs((lengths == 1).mean() - 19 / 59) < 5 * np.sqrt(0.32 * 0.68 / len(lengths))  # of all ways to cut 60 in 20 parts
    assert abs((lengths == 2).mean() - 19 / 59 * 40 / 58) < 5 * np.sqrt(0.22 * 0.78 / len(lengths))
    hidden = np.zeros(length)
    for s in spans:
        hidden[np.concatenate([np.array(span) for span in s]) - FIRST] += 1
    assert np.abs(hidden[20:-20] / documents - 0.151).max() < 5 * np.sqrt(0.15 * 0.85 / documents)  # every place is as likely ...
    assert 0.04 < hidden[0] / documents < 0.08 and 0.04 < hidden[-1] / documents < 0.08  # ... towards the ends less, on both alike


def test_spans_beyond_the_sentinels_are_capped_and_counted():
    goal = objective(Spans(density=0.5), VOCABULARY, 1024)
    pieces = goal.pieces(np.array([599, 603, 604, 900, 10_000]))
    made = [s for _, s in segments_of(Spans(density=0.5), 1024, [599, 603, 604, 900, 10_000])]
    numbers = [len(spans_of(s)) for s in made]
    assert numbers[:4] == [100, 100, 100, 100] and max(numbers) == 100
    assert pieces.capped == sum(sum(map(len, spans_of(s))) / 3 > 100.5 for s in made) > 4
    assert sum(map(len, spans_of(made[3]))) == 450  # as much is hidden, in longer spans


@settings(deadline=None, max_examples=40)
@given(st.integers(8, 300), st.floats(0.02, 0.9), st.floats(1, 20))
def test_the_longest_piece_is_as_long_as_the_source_room_allows(row_length, density, mean_length):
    goal = HiddenSpans(Spans(density=density, mean_length=mean_length), VOCABULARY, row_length)
    pieces = goal.pieces(np.arange(3 * goal.longest))  # pieces of every length, with 0, 1 and 2 marks
    assert pieces.second.max() <= row_length and pieces.tokens.max() <= goal.room.tokens
    assert goal.room.tokens % 8 == 0 and goal.room.tokens - pieces.tokens.max() < 8
    goal.longest += 1
    assert goal.pieces(np.arange(3 * goal.longest)).second.max() > row_length


def test_an_objective_is_a_pure_function_of_piece_and_generator():
    for dials in (Causal(), Masked(), Masked(whole_words=True), Spans()):
        first, second, other = (segments_of(dials, 64, [50, 200], seed) for seed in (1, 1, 2))
        arrays = [[np.concatenate([a for _, s in made for a in vars(s).values() if a is not None]) for made in (first, second, other)]]
        for a, b, c in arrays:
            assert (a == b).all()
            assert dials.kind == "causal" or a.shape != c.shape or (a != c).any()


def test_spans_without_sentinels_are_refused():
    vocabulary = SmallVocabulary()
    vocabulary.sentinels = []
    with pytest.raises(Refused, match="sentinels"):
        objective(Spans(), vocabulary, 64)


def test_ordinary_tokens_are_all_but_the_marks():
    assert HiddenTokens(Masked(), VOCABULARY, 64).ordinary.tolist() == list(range(FIRST, VOCABULARY.vocab_size))
