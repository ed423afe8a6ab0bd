"""TODO"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

ReadSlice = Callable[
    [str, int, int], dict[str, Tensor]
]  # (parameter, start, stop) -> that range of {"fp32", moments...}, each flat


@dataclass(frozen=True)
class Slice:
    """`tensors` are flat host copies of elements [start, start + numel) of a parameter: "fp32", and unless it
    is frozen its moments, and "ema" (the averaged weights) where that is kept.
    """

    start: int
    shape: tuple[int, ...]  # of the whole parameter
    tensors: dict[str, Tensor]
