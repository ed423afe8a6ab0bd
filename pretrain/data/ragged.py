"""Array helpers for ragged data: lists of different lengths that lie one after another in one flat array."""

import numpy as np

EMPTY = np.empty(0, np.int64)


def index_within(sizes: np.ndarray) -> np.ndarray:
    """The index of each element within its own list: sizes [2, 3] give [0, 1, 0, 1, 2]."""
    return np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)


def ragged_arange(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Ranges one after another: starts [10, 20] and sizes [2, 3] give [10, 11, 20, 21, 22]."""
    indices = np.repeat(starts - (sizes.cumsum() - sizes), sizes)
    indices += np.arange(len(indices))
    return indices


def split_runs(begins: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits lists of `sizes` (N,), which lie one after another, into runs. A run begins where the flat array
    `begins` (bool, written to) is True, and at each list's start.

    Returns the start of each run, its size, and the number of runs in each list (N,). Example: sizes [3, 2]
    and begins [0, 0, 1, 0, 0] give starts [0, 2, 3], sizes [2, 1, 2] and runs [2, 1].
    """
    ends = sizes.cumsum()
    begins[(ends - sizes)[sizes > 0]] = True
    starts = begins.nonzero()[0]
    run_sizes = np.diff(starts, append=len(begins))
    runs_per_list = np.diff(starts.searchsorted(ends), prepend=0)
    return starts, run_sizes, runs_per_list


def mask_except(size: int, *excluded: np.ndarray) -> np.ndarray:
    """(size,) bool: False at the excluded indices, True elsewhere."""
    mask = np.ones(size, bool)
    for indices in excluded:
        mask[indices] = False
    return mask


def round_up_to_8(size: int) -> int:
    """The next multiple of 8, a size that matrix units prefer."""
    return -(-size // 8) * 8
