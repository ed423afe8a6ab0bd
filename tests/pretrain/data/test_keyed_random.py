import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trifold.pretrain.data import keyed_random

MANY = 2**17


def keys_of(number: int) -> np.ndarray:
    return keyed_random.nth_random(np.zeros(number, np.uint64), np.arange(number))


def chi_square(counts: np.ndarray, expected: np.ndarray | float) -> float:
    """In standard deviations from what chance would give."""
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def test_the_numbers_under_a_key_are_those_of_splitmix64():
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = keyed_random.nth_random(np.full(5, 1234567, np.uint64), np.arange(5))
    assert found.tolist() == published
    mask, state, plain = (
        2**64 - 1,
        2**64 - 3,
        [],
    )  # Steele et al. 2014, in Python's own integers, where the state overflows
    for _ in range(100):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        plain.append(z ^ (z >> 31))
    assert keyed_random.nth_random(np.full(100, 2**64 - 3, np.uint64), np.arange(100)).tolist() == plain


def test_shares_are_uniform_and_those_of_neighbouring_keys_and_uses_independent():
    keys = keys_of(MANY)
    one, other = (keyed_random.uniform(use, np.ones(MANY, int)) for use in keyed_random.split(keys, 2))
    within = keyed_random.uniform(keys, np.full(MANY, 2)).reshape(-1, 2)
    for left, right in ((one, other), (one[1:], one[:-1]), within.T, (one, within[:, 0])):
        both = np.histogram2d(left, right, 32, [[0, 1], [0, 1]])[0]
        assert abs(chi_square(both, len(left) / 1024)) < 5
    assert 0 <= one.min() < 1e-3 and 1 - 1e-3 < one.max() < 1


def test_every_order_and_every_choice_is_as_likely():
    keys = keys_of(MANY)
    orders = keyed_random.shuffled(keys, np.full(MANY, 5)).reshape(-1, 5) @ 5 ** np.arange(5)
    assert abs(chi_square(np.unique(orders, return_counts=True)[1], MANY / math.factorial(5))) < 5
    choices = np.sort(
        keyed_random.sample_without_replacement(keys, np.full(MANY, 8), np.full(MANY, 3)).reshape(-1, 3)
    ) @ 8 ** np.arange(3)
    found = np.unique(choices, return_counts=True)[1]
    assert len(found) == math.comb(8, 3) and abs(chi_square(found, MANY / len(found))) < 5


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0, 1)), max_size=20))
def test_what_a_key_gives_does_not_depend_on_the_others(lists):
    sizes = np.array([size for size, _ in lists], np.int64)
    counts = np.array([int(size * share) for size, share in lists], np.int64)
    keys = keys_of(len(lists))
    together = [
        np.split(all_of, its.cumsum()[:-1])
        for all_of, its in (
            (keyed_random.uniform(keys, sizes), sizes),
            (keyed_random.shuffled(keys, sizes), sizes),
            (keyed_random.sample_without_replacement(keys, sizes, counts), counts),
        )
    ]
    for i in range(len(lists)):
        one = slice(i, i + 1)
        order = keyed_random.shuffled(keys[one], sizes[one]).tolist()
        assert sorted(order) == list(range(sizes[i]))
        assert [part[i].tolist() for part in together] == [
            keyed_random.uniform(keys[one], sizes[one]).tolist(),
            order,
            order[: counts[i]],
        ]
