from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trifold.pretrain.data import row_order as order
from trifold.pretrain.data.row_order import PERIOD, RowOrder, mixture_schedule, row_at_cursor


@pytest.fixture
def rows(monkeypatch) -> np.ndarray:
    monkeypatch.setattr(order, "WINDOW", 3)
    return np.random.default_rng(0).integers(1, 9, 20)


@pytest.mark.parametrize("key", [None, (5, 0)])
def test_every_row_comes_once_in_every_epoch(rows, key):
    every_row = [(block, row) for block, size in enumerate(rows) for row in range(size)]
    placed = RowOrder(rows, key)
    epochs = [[placed.locate(e * placed.num_rows + i) for i in range(placed.num_rows)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert [(e, place) for e, place, _, _ in epoch] == [(number, i) for i in range(placed.num_rows)]
        assert sorted((block, row) for _, _, block, row in epoch) == every_row
    orders = [[located[2:] for located in epoch] for epoch in epochs]
    assert (orders[0] == every_row) == (key is None)
    assert (orders[0] == orders[1]) == (key is None)
    first_blocks = [{block for block, _ in epoch[:8]} for epoch in orders]
    assert (first_blocks[0] == first_blocks[1]) == (
        key is None
    )  # not only are the rows of a window drawn anew, its blocks are too


def test_rows_of_at_most_one_window_of_blocks_mix(rows):
    placed = RowOrder(rows, (1,))
    blocks = [placed.locate(i)[2] for i in range(placed.num_rows)]
    assert (
        np.mean(np.diff(blocks) != 0) > 0.4
    )  # of three blocks, a neighbour is from another one two times in three
    for i in range(0, len(blocks)):
        assert len(set(blocks[i : i + 3])) <= 6


def test_other_rows_of_the_same_blocks_go_on_at_the_window_that_was_not_finished(rows):
    shorter, longer = RowOrder(3 * rows, (5, 0)), RowOrder(rows, (5, 0))
    for index in range(0, 2 * shorter.num_rows, 7):
        epoch = index // shorter.num_rows
        begin = longer.continue_index(shorter, index)
        read = {shorter.locate(i)[2] for i in range(epoch * shorter.num_rows, index)}
        rest = Counter(longer.locate(i)[2] for i in range(begin, (epoch + 1) * longer.num_rows))
        assert rest == {
            block: rows[block] for block in rest
        }  # whole blocks, from here to the end of the same epoch
        assert read | set(rest) == set(range(len(rows))) and shorter.locate(index)[2] in rest
        assert len(read & set(rest)) <= 3  # one window


def test_the_place_of_a_row_depends_on_nothing_that_was_asked_before(rows):
    asked = np.random.default_rng(1).integers(0, 5 * rows.sum(), 200).tolist()
    placed = RowOrder(rows, (3,))
    assert [placed.locate(i) for i in asked] == [RowOrder(rows, (3,)).locate(i) for i in asked]
    assert [placed.locate(i) for i in asked] != [RowOrder(rows, (4,)).locate(i) for i in asked]


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=12))
def test_every_prefix_of_a_mixture_has_its_shares_to_within_one_row(weights):
    streams, before, counts = mixture_schedule(weights)
    assert counts.sum() == PERIOD and (counts > 0).all()
    wanted = np.array(weights) / sum(weights)
    assert np.abs(counts / PERIOD - wanted).max() <= len(weights) / PERIOD
    had = np.cumsum(streams[:, None] == np.arange(len(weights)), axis=0)
    assert np.abs(had - np.arange(1, PERIOD + 1)[:, None] * counts / PERIOD).max() < 1
    assert (before == had[np.arange(PERIOD), streams] - 1).all()


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=6))
def test_skipped_rows_are_left_out_and_all_others_come_in_order(ranges):
    skips = [(first, first + more) for first, more in ranges]
    left = [row for row in range(200) if not any(first <= row <= last for first, last in skips)]
    assert [row_at_cursor(cursor, skips) for cursor in range(60)] == left[:60]
