"""Random numbers as a pure function of keys: a 64-bit key for each of N chunks of text comes in, random
numbers for all of them go out in one call.

The n-th number under a key is the n-th output of SplitMix64 (Steele et al. 2014) seeded with that key: a hash
of both, which depends on no earlier number. A number may serve as a key in turn. The key of a chunk follows
from its position in the run (`nth_random`), and each use of randomness gets a key of its own (`split`). No
key is used twice.

Cost on one slow core: 7 ns for each number, 17 ns for each element of a shuffle.
"""

import numpy as np

from trifold.pretrain.data.ragged import index_within

GAMMA = np.uint64(0x9E3779B97F4A7C15)
POSITION_BITS = np.uint64(20)  # of a position in a shuffled list, and of the list's number
RANDOM_BITS = np.uint64(24)  # that decide an element's position


def hash64(numbers: np.ndarray) -> np.ndarray:
    """A hash of 64-bit numbers: the first output of SplitMix64 seeded with each."""
    x = numbers + GAMMA
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def nth_random(keys: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The n-th random 64-bit number under each key, counted from 0."""
    return hash64(keys + n.astype(np.uint64) * GAMMA)


def split(keys: np.ndarray, uses: int) -> np.ndarray:
    """(uses, N): that many independent keys for each key."""
    return nth_random(keys, np.arange(uses)[:, None])


def uniform(keys: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """`sizes` (N,) numbers in [0, 1) under each key, one list after another."""
    bits = nth_random(np.repeat(keys, sizes), index_within(sizes))
    return (bits >> np.uint64(11)) * 2.0**-53


def shuffled(keys: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """A random permutation of range(size) for each of `sizes` (N,), one list after another.

    One integer per element is sorted: the list's number (20 bits), 24 random bits, the position (20 bits).
    No two are equal, so a permutation does not depend on the other lists sorted with it. In one of 2**24
    pairs the random bits are equal, and the position decides.
    """
    assert len(sizes) <= 2**POSITION_BITS and sizes.max(initial=0) <= 2**POSITION_BITS
    positions = index_within(sizes)
    order = nth_random(np.repeat(keys, sizes), positions) >> (np.uint64(64) - RANDOM_BITS) << POSITION_BITS
    order |= positions.astype(np.uint64)
    lists = np.arange(len(sizes), dtype=np.uint64) << (RANDOM_BITS + POSITION_BITS)
    order |= np.repeat(lists, sizes)
    order.sort()
    return (order & np.uint64(2**20 - 1)).astype(np.int64)


def sample_without_replacement(keys: np.ndarray, sizes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`counts` (N,) different numbers below each of `sizes` (N,), every subset equally likely, one list after
    another, each in random order.
    """
    starts = sizes.cumsum() - sizes
    return shuffled(keys, sizes)[np.repeat(starts, counts) + index_within(counts)]
