"""TODO"""

import numpy as np

EMPTY = np.empty(0, np.int64)


def ragged_arange(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Places one after another: `sizes` of them from each of `starts`."""
    places = np.repeat(starts - (sizes.cumsum() - sizes), sizes)
    places += np.arange(len(places))
    return places


def split_runs(begins: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texts of `sizes` (N,), one after another, cut before the tokens where `begins` says so: where each part
    begins, its size, and how many parts each text has (N,).
    """
    ends = sizes.cumsum()
    begins[(ends - sizes)[sizes > 0]] = True
    starts = begins.nonzero()[0]
    return starts, np.diff(starts, append=len(begins)), np.diff(starts.searchsorted(ends), prepend=0)


def mask_except(size: int, *places: np.ndarray) -> np.ndarray:
    """(size,) bool: False at `places`."""
    rest = np.ones(size, bool)
    for some in places:
        rest[some] = False
    return rest


def round_up_to_8(size: int) -> int:
    """Rounded up to a multiple of 8, which matrix units like."""
    return -(-size // 8) * 8
