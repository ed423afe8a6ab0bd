import os
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pretrain.data.small_corpus import SmallVocabulary
from trifold.pretrain.config.pretraining import CausalConfig, MaskedConfig, SpansConfig
from trifold.pretrain.data import packing
from trifold.pretrain.data.objectives import ObjectiveMixture
from trifold.pretrain.data.packing import (
    Chunks,
    RowCapacity,
    block_starts,
    block_table,
    chunk_documents,
    pack_chunks,
)


def pieces_of(sizes: list[tuple[int, int]]) -> Chunks:
    tokens, second = np.array(sizes, np.int64).reshape(-1, 2).T
    number = np.arange(len(sizes))
    return Chunks(number, number, number, tokens, second)


@given(st.lists(st.integers(1, 100), max_size=30), st.integers(1, 40))
def test_pieces_cover_every_position_of_every_document_once(extents, longest):
    document, start, stop = chunk_documents(np.array(extents, np.int64), longest)
    assert (stop - start <= longest).all()
    covered = [
        (d, p) for d, first, last in zip(document, start, stop, strict=True) for p in range(first, last)
    ]
    assert covered == [(d, p) for d, extent in enumerate(extents) for p in range(extent)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 16)), max_size=120))
def test_every_piece_is_in_one_row_and_no_row_overflows(sizes):
    packed = pack_chunks(pieces_of(sizes), RowCapacity(40, source=16))
    assert sorted(packed.document.tolist()) == list(range(len(sizes)))
    for first, stop in pairwise(packed.offsets):
        assert stop > first
        here = [sizes[i] for i in packed.document[first:stop]]
        assert sum(tokens for tokens, _ in here) <= 40
        assert sum(second for _, second in here) <= 16


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=100))
def test_rows_are_as_few_as_plain_best_fit_decreasing_makes_them(sizes):
    rows: list[int] = []  # room left, by a search through all rows
    for size in sorted(sizes, reverse=True):
        fits = [row for row, left in enumerate(rows) if left >= size]
        if not fits:
            rows.append(40)
            fits = [len(rows) - 1]
        best = min(fits, key=lambda row: rows[row])
        rows[best] -= size
    assert len(pack_chunks(pieces_of([(size, 0) for size in sizes]), RowCapacity(40)).offsets) - 1 == len(
        rows
    )


def _tiny_and_long(rng):
    return ObjectiveMixture(MaskedConfig(rate=0.15), SmallVocabulary(), 1024).chunks(
        np.where(rng.random(5000) < 0.8, rng.integers(0, 6, 5000), rng.integers(100, 900, 5000))
    )


def _pairs(rng, ratio, spread):
    target = rng.integers(5, 60, 5000)
    return pieces_of(
        np.stack([target, np.clip(target * rng.lognormal(ratio, spread, 5000), 1, 1024)], axis=1)
        .astype(int)
        .tolist()
    )


@pytest.mark.parametrize(
    ("pieces", "room", "spare"),
    [
        (
            _tiny_and_long,
            RowCapacity(1024, picked=160),
            1.02,
        ),  # where picks run out before tokens do, as in rows of tiny documents
        (
            lambda rng: _pairs(rng, 0, 0.3),
            RowCapacity(512, source=512),
            1.07,
        ),  # translations: neither side is the scarce one
        (lambda rng: _pairs(rng, 1.8, 0.5), RowCapacity(256, source=1024), 1.02),  # summaries: the source is
        (lambda rng: _pairs(rng, -1, 0.5), RowCapacity(512, source=512), 1.02),  # the target is
    ],
)
def test_rows_are_nearly_as_few_as_the_scarcer_room_allows(pieces, room, spare):
    made = pieces(np.random.default_rng(0))
    bound = max(
        made.tokens.sum() / room.tokens, made.source_or_picked_tokens.sum() / (room.source or room.picked)
    )
    assert len(pack_chunks(made, room).offsets) - 1 <= spare * bound + 1


def test_a_piece_larger_than_a_row_is_our_own_error():
    with pytest.raises(AssertionError, match="larger than a row"):
        pack_chunks(pieces_of([(41, 0)]), RowCapacity(40))


@pytest.mark.parametrize("at_once", [1, 7, 2**24])
def test_blocks_are_consecutive_documents_of_about_the_block_size(monkeypatch, at_once):
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 100)
    monkeypatch.setattr(packing, "DOCUMENTS_AT_ONCE", at_once)
    lengths = np.array([0] * 70 + [30] * 20 + [1000] + [3] * 10 + [99, 1, 0])
    starts = block_starts(lengths)
    assert starts[0] == 0 and starts[-1] == len(lengths) and (np.diff(starts) > 0).all()
    sizes = [int((lengths[first:stop] + 2).sum()) for first, stop in pairwise(starts)]
    assert all(size <= 100 + lengths.max() for size in sizes)
    assert len(starts) - 1 <= sum(sizes) / 100 + 1
    assert starts.tolist() == _starts_one_by_one(lengths)


def _starts_one_by_one(lengths):
    starts, before, last = [], 0, -1
    for i, length in enumerate(lengths):
        if before // 100 != last:
            starts.append(i)
            last = before // 100
        before += length + 2
    return [*starts, len(lengths)]


def test_the_table_is_the_same_from_many_processes_and_from_its_file(monkeypatch, tmp_path):
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 100)
    monkeypatch.setattr(packing, "BLOCKS_AT_ONCE", 16)
    lengths = np.random.default_rng(0).integers(0, 60, 200)
    starts = block_starts(lengths)
    assert len(starts) > 40
    cutter = ObjectiveMixture(SpansConfig(), SmallVocabulary(), 64)
    alone = block_table(lengths, starts, cutter)
    for b, (first, stop) in enumerate(pairwise(starts)):
        pieces = cutter.chunks(lengths[first:stop])
        assert alone[b].tolist() == [
            len(pack_chunks(pieces, cutter.capacity).offsets) - 1,
            pieces.tokens.sum(),
            pieces.source_or_picked_tokens.sum(),
            0,
        ]
    file = tmp_path / "cache" / "rows.npy"
    assert (block_table(lengths, starts, cutter, file, processes=2) == alone).all()
    assert [path.name for path in file.parent.iterdir()] == ["rows.npy"]
    intact = file.read_bytes()
    changed = bytearray(intact)
    changed[len(intact) // 2] ^= 1  # the same size, and a count that is possible
    for damaged in (b"", intact[:30], intact[:200], bytes(changed), bytes(len(intact)), intact + b"more"):
        file.write_bytes(damaged)
        assert (block_table(lengths, starts, cutter, file) == alone).all()
    monkeypatch.setattr(packing, "pack_chunks", None)  # from here on only the file can answer
    assert (block_table(lengths, starts, cutter, file) == alone).all()


def test_an_interrupted_table_leaves_no_file_under_its_name(monkeypatch, tmp_path):
    def fails(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        block_table(
            np.array([3, 4]),
            np.array([0, 2]),
            ObjectiveMixture(CausalConfig(), SmallVocabulary(), 8),
            tmp_path / "rows.npy",
        )
    assert not list(tmp_path.iterdir())
