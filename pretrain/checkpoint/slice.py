"""A rank's share of a parameter, on its way to and from a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# (parameter, start, stop) -> the elements [start, stop) of {"fp32", moments...}, each flat
ReadSlice = Callable[[str, int, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Slice:
    """The elements [start, start + n) of a flattened parameter, as flat host copies of n elements under each
    key: "fp32", its moments unless it is frozen, and "ema" where averaged weights are kept.

    ZeRO puts all parameters into one flat buffer and gives each rank an equal part of it. With a parameter
    `a` of 3 elements, `b` of shape (3, 4), and two ranks, the buffer has 15 elements and one of padding, 8
    for each rank: rank 0 saves a: Slice(start=0, shape=(3,)) and b: Slice(start=0, shape=(3, 4)) with 5
    elements, and rank 1 saves b: Slice(start=5, shape=(3, 4)) with the other 7.
    """

    start: int
    shape: tuple[int, ...]  # of the full parameter
    tensors: dict[str, Tensor]
