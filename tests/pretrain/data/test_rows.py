from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pretrain.data.small_corpus import FIRST, SmallCorpus, SmallVocabulary, recipe
from trifold.modeling.batch import IGNORE
from trifold.modeling.errors import UserError
from trifold.pretrain.config.objectives import (
    ContinuationConfig,
    FimConfig,
    InfillingConfig,
    MixtureConfig,
    PrefixConfig,
)
from trifold.pretrain.config.pretraining import (
    CausalConfig,
    MaskedConfig,
    SourceConfig,
    SpansConfig,
    TokenizerConfig,
)
from trifold.pretrain.data import packing
from trifold.pretrain.data import row_order as order
from trifold.pretrain.data.collate import Row, assemble, stack
from trifold.pretrain.data.objectives import Segment
from trifold.pretrain.data.packing import RowCapacity
from trifold.pretrain.data.prepare import prepare
from trifold.pretrain.data.rows import Rows
from trifold.pretrain.data.tokenizer.tokenizer import train

VOCABULARY = SmallVocabulary()
MIXTURE = MixtureConfig(
    parts=(SpansConfig(), ContinuationConfig(weight=0.5), SpansConfig(density=0.5, mode="X"))
)
KINDS = pytest.mark.parametrize(
    "dials", [CausalConfig(), MaskedConfig(), SpansConfig(), MIXTURE], ids=lambda dials: dials.kind
)
GOLDEN = {  # row hashes under FORMAT 2
    1978182555: CausalConfig(),
    1056641154: PrefixConfig(),
    2864735385: FimConfig(),
    872412476: MaskedConfig(),
    231624547: MaskedConfig(whole_words=True),
    3983195541: SpansConfig(),
    2600479083: ContinuationConfig(),
    2204084479: InfillingConfig(),
    2545528604: MIXTURE,
}
ROW_LENGTHS = st.sampled_from([8, 32])
LENGTHS = [0, 1, 30, 31, 32, 33, 500, *np.random.default_rng(0).integers(1, 60, 150).tolist()]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 200)
    monkeypatch.setattr(order, "WINDOW", 5)
    monkeypatch.setattr(order, "PERIOD", 64)


def rows_of(dials, corpora=None, split="train", **choices) -> Rows:
    make = Rows.for_training if split == "train" else Rows.heldout
    return make(recipe(dials, **choices), VOCABULARY, corpora or [SmallCorpus(LENGTHS)])


def text_of(row: Row, document: int) -> list[int]:
    """A segment's text tokens, as its targets and its visible tokens tell them."""
    here = row.segments == document
    if row.source is None:
        tokens = np.where(row.targets == IGNORE, row.tokens, row.targets)[here]
    else:
        tokens = np.concatenate([row.source[row.source_segments == document], row.targets[here]])
    return sorted(tokens[tokens >= FIRST].tolist())


def documents_of(row: Row) -> list[list[int]]:
    return [text_of(row, number) for number in range(1, row.segments.max() + 1)]


@KINDS
def test_every_token_of_every_document_comes_once_per_epoch(dials):
    rows = rows_of(dials)
    assert len(rows.streams[0].table) > 15
    everything = Counter(SmallCorpus(LENGTHS).tokens.tolist())
    orders = []
    for epoch in range(3):
        epoch_rows = [rows.row(epoch * rows.num_rows + i) for i in range(rows.num_rows)]
        seen = [text for row in epoch_rows for text in documents_of(row)]
        assert Counter(token for text in seen for token in text) == everything
        orders.append(seen)
        if dials.kind == "causal":
            predicted = Counter(
                token for row in epoch_rows for token in row.targets[row.targets != IGNORE].tolist()
            )
            assert predicted == everything + Counter({VOCABULARY.eos: len(LENGTHS)})
    assert orders[0] != orders[1] != orders[2]


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from([0, 1, 30, 31, 32, 33, 64, 500]) | st.integers(0, 70), max_size=40).map(
        lambda some: [*some, 3]
    ),
    ROW_LENGTHS,
)
@KINDS
def test_random_documents_lose_nothing_and_stay_apart(dials, lengths, row_length):
    corpus = SmallCorpus(lengths)
    rows = Rows.for_training(recipe(dials, row_length), VOCABULARY, [corpus])
    seen: Counter[int] = Counter()
    for i in range(rows.num_rows):
        row = rows.row(i)
        assert len(row.tokens) == len(row.segments) == len(row.targets) == rows.capacity.tokens
        for text in documents_of(row):  # a segment is one run of one document
            assert text == list(range(text[0], text[0] + len(text))) if text else True
            assert len(set(np.searchsorted(corpus.ends, np.array(text, int) - FIRST, side="right"))) <= 1
            seen.update(text)
        used = row.segments > 0
        assert (np.diff(row.segments[used]) >= 0).all() and not used[used.sum() :].any()
        assert (row.tokens[~used] == VOCABULARY.pad).all() and (row.targets[~used] == IGNORE).all()
        if row.source is not None:
            assert set(row.source_segments) - {0} == set(row.segments) - {0}
    assert seen == Counter(corpus.tokens.tolist())


@KINDS
def test_a_row_is_the_same_in_any_order_of_access_together_and_from_a_fresh_object(dials):
    rows = rows_of(dials)
    asked = np.random.default_rng(1).permutation(3 * rows.num_rows)[:150].tolist()
    hashes = {i: rows.row(i).hash for i in asked}
    assert {i: rows_of(dials).row(i).hash for i in sorted(asked)[:20]} == {
        i: hashes[i] for i in sorted(asked)[:20]
    }
    fresh = rows_of(dials)
    assert {i: fresh.row(i).hash for i in sorted(asked)} == hashes
    assert {i: row.hash for i, row in zip(asked, fresh.rows(asked), strict=True)} == hashes
    other = rows_of(dials, seed=1)
    assert sum(other.row(i).hash == hashes[i] for i in asked) < 10


def test_each_epoch_draws_anew():
    rows = rows_of(MaskedConfig(), [SmallCorpus([30])])
    assert rows.num_rows == 1
    assert len({tuple(rows.row(epoch).picked.tolist()) for epoch in range(20)}) > 15


def test_picked_lists_the_places_of_all_targets():
    rows = rows_of(MaskedConfig())
    for i in range(20):
        row = rows.row(i)
        picked = row.picked[row.picked >= 0]
        assert picked.tolist() == np.flatnonzero(row.targets != IGNORE).tolist()
        assert (row.picked[len(picked) :] == -1).all()


@KINDS
def test_waste_is_the_share_of_padding_in_an_epoch(dials):
    corpora = [SmallCorpus(LENGTHS), SmallCorpus(LENGTHS[:60], fingerprint="other")]
    rows = rows_of(dials, corpora[:1])
    room = rows.num_rows * (rows.capacity.tokens + rows.capacity.source)
    assert rows.padding_fraction == pytest.approx(
        1 - sum(rows.row(i).num_tokens for i in range(rows.num_rows)) / room
    )
    heldout = rows_of(dials, corpora, "heldout")
    room = heldout.num_rows * (heldout.capacity.tokens + heldout.capacity.source)
    assert heldout.padding_fraction == pytest.approx(
        1 - sum(heldout.row(i).num_tokens for i in range(heldout.num_rows)) / room
    )


@KINDS
def test_heldout_rows_come_in_order_and_do_not_know_the_seed(dials):
    corpora = [SmallCorpus(LENGTHS), SmallCorpus(LENGTHS[:60], first=FIRST + 20_000, fingerprint="other")]
    rows, other = (rows_of(dials, corpora, "heldout", seed=seed) for seed in (0, 1))
    assert [rows.row(i).hash for i in range(rows.num_rows)] == [
        other.row(i).hash for i in range(rows.num_rows)
    ]
    firsts = [
        min(map(min, filter(None, documents_of(rows.row(i)))))
        for i in range(rows.num_rows)
        if any(documents_of(rows.row(i)))
    ]
    assert np.diff(firsts).min() >= -500  # the longest document
    seen = Counter(
        token for i in range(rows.num_rows) for text in documents_of(rows.row(i)) for token in text
    )
    assert seen == Counter([token for corpus in corpora for token in corpus.tokens.tolist()])
    assert rows.num_bytes == 4 * sum(corpus.num_tokens for corpus in corpora)
    with pytest.raises(AssertionError):
        rows.row(rows.num_rows)


def test_targets_per_byte_is_what_the_causal_rows_predict():
    rows = rows_of(CausalConfig(), split="heldout")
    assert (
        rows.targets_per_byte == sum(rows.row(i).num_targets for i in range(rows.num_rows)) / rows.num_bytes
    )
    assert rows_of(SpansConfig(), split="heldout").targets_per_byte is None


def test_sources_take_turns_by_weight_and_each_has_its_own_epochs():
    small, large = SmallCorpus([20] * 10), SmallCorpus([20] * 3000, first=FIRST + 20_000, fingerprint="large")
    rows = rows_of(CausalConfig(), [small, large], weights=(3, 1))
    drawn = [rows.row(i) for i in range(400)]
    is_small = np.array([row.tokens[1] < FIRST + 20_000 for row in drawn])
    assert np.abs(np.cumsum(is_small) - 0.75 * np.arange(1, 401)).max() <= 1
    times = Counter(token for row in drawn for text in documents_of(row) for token in text)
    seen_small = [times[token] for token in small.tokens.tolist()]
    assert max(seen_small) - min(seen_small) <= 1 and min(seen_small) == 300 // rows.streams[0].order.num_rows
    assert max(times[token] for token in large.tokens.tolist()) == 1


def test_the_fingerprint_covers_all_that_decides_a_row_but_the_seed():
    def fingerprint(dials=None, corpus="corpus", vocabulary="vocabulary", weights=(1.0, 1.0), **choices):
        corpora = [SmallCorpus([9, 9], fingerprint=corpus), SmallCorpus([9], fingerprint="second")]
        config = recipe(dials or MaskedConfig(), weights=weights, **choices)
        return Rows.for_training(config, SmallVocabulary(fingerprint=vocabulary), corpora).fingerprint

    assert fingerprint() == fingerprint(seed=1) == fingerprint(MaskedConfig(weight=2))
    others = [
        fingerprint(),
        fingerprint(MaskedConfig(rate=0.2)),
        fingerprint(MixtureConfig(parts=(MaskedConfig(), MaskedConfig(rate=0.2)))),
        fingerprint(MixtureConfig(parts=(MaskedConfig(), MaskedConfig(rate=0.2, weight=2)))),
        fingerprint(CausalConfig()),
        fingerprint(corpus="another"),
        fingerprint(vocabulary="another"),
        fingerprint(row_length=64),
        fingerprint(weights=(1.0, 2.0)),
    ]
    assert len(set(others)) == len(others)


def test_the_table_is_kept_beside_the_shards_and_gives_the_same_rows(tmp_path, monkeypatch):
    first = Rows.for_training(recipe(SpansConfig()), VOCABULARY, [SmallCorpus(LENGTHS)], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(packing, "_pack_blocks", None)
    again = Rows.for_training(recipe(SpansConfig()), VOCABULARY, [SmallCorpus(LENGTHS)], cache=tmp_path)
    assert [first.row(i).hash for i in range(50)] == [again.row(i).hash for i in range(50)]


@pytest.mark.parametrize(("expected", "dials"), GOLDEN.items())
def test_rows_are_those_of_format_2(expected, dials):
    """When this fails for a good reason, raise FORMAT in batches.py with it: old runs must not go on with
    other rows.
    """
    rows = rows_of(dials)
    assert sum(rows.row(i).hash for i in range(300)) % 2**32 == expected


@pytest.mark.parametrize(
    "dials",
    [PrefixConfig(), FimConfig(), InfillingConfig(), MixtureConfig(parts=(CausalConfig(), FimConfig()))],
    ids=lambda dials: dials.kind,
)
def test_documents_stay_apart_under_every_objective(dials):
    corpus = SmallCorpus(LENGTHS)
    rows = Rows.for_training(recipe(dials, 32), VOCABULARY, [corpus])
    seen: set[int] = set()
    for row in (rows.row(i) for i in range(rows.num_rows)):
        for number in range(1, row.segments.max() + 1):
            here = row.segments == number
            tokens = [
                row.tokens[here],
                row.targets[here],
                *([] if row.source is None else [row.source[row.source_segments == number]]),
            ]
            text = [int(t) for t in np.concatenate(tokens) if t >= FIRST]
            assert len(set(np.searchsorted(corpus.ends, np.array(text, int) - FIRST, side="right"))) <= 1
            seen.update(text)
    assert seen == set(corpus.tokens.tolist())


def test_a_row_says_which_part_of_a_mixture_each_segment_belongs_to():
    rows = rows_of(MIXTURE)
    assert rows.member_names == ["spans", "continuation", "X"]
    found = set()
    for row in (rows.row(i) for i in range(60)):
        assert (row.parts[row.segments == 0] == 0).all()
        for number in range(1, row.segments.max() + 1):
            [part] = set(row.parts[row.segments == number].tolist())
            assert (VOCABULARY.sentinels[-3] in row.source[row.source_segments == number]) == (part == 2)
            found.add(part)
    assert found == {0, 1, 2}


def test_an_empty_row_has_no_targets_and_the_shape_of_the_others():
    for dials in (CausalConfig(), MaskedConfig(), SpansConfig(), MIXTURE):
        rows = rows_of(dials)
        empty, real = rows.empty_row(), rows.row(0)
        assert empty.num_targets == empty.num_tokens == 0
        assert {name: array.shape for name, array in empty.arrays.items()} == {
            name: array.shape for name, array in real.arrays.items()
        }
        batch = stack([real, empty])
        assert (batch.segments[1] == 0).all() and batch.tokens.shape == (2, rows.capacity.tokens)
        assert (batch.source is None) == (dials.kind not in ("spans", "mixture")) and (
            batch.picked is None
        ) == (dials.kind != "masked")


def test_pairs_of_source_and_target_share_rows_as_text_does():
    segments = [Segment(np.arange(n), np.arange(n), source=np.arange(2 * n)) for n in (2, 3)]
    [row] = assemble([segments], RowCapacity(8, source=12), pad=9)
    assert row.segments.tolist() == [1, 1, 2, 2, 2, 0, 0, 0]
    assert row.source_segments.tolist() == [1] * 4 + [2] * 6 + [0, 0]
    assert row.source.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 9, 9]
    assert row.targets.tolist() == [0, 1, 0, 1, 2, IGNORE, IGNORE, IGNORE]


def test_a_corpus_without_text_is_refused():
    with pytest.raises(UserError, match="corpus 1 of the train data has 0 tokens in 2 documents"):
        rows_of(CausalConfig(), [SmallCorpus([3]), SmallCorpus([0, 0])], weights=(1.0, 1.0))


def test_rows_of_real_shards_spell_the_text(tmp_path):
    texts = [f"Document {i} speaks of {' and '.join(str(n * i) for n in range(i % 30))}." for i in range(200)]
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    vocabulary = train(iter(texts), TokenizerConfig(), 400, tmp_path / "tokenizer")
    shards, _ = prepare(SourceConfig(path=str(tmp_path / "text.txt")), vocabulary, tmp_path / "shards")
    rows = Rows.for_training(recipe(CausalConfig(), 512), vocabulary, [shards], cache=tmp_path / "shards")
    spelled = []
    for row in (rows.row(i) for i in range(rows.num_rows)):
        for number in range(1, row.segments.max() + 1):
            here = row.segments == number
            assert row.tokens[here][0] == vocabulary.bos and row.targets[here][-1] == vocabulary.eos
            spelled.append(vocabulary.decode(row.targets[here][:-1]))
    assert sorted(spelled) == sorted(texts)


def test_a_rank_whose_share_of_a_round_is_no_row_gets_none():
    assert assemble([], RowCapacity(8, 4, 4), pad=0) == []
