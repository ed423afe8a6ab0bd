"""Counting the operations that a model runs, and a batch to run it on."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.modeling.families import CONFIGS, documents, packed
from trifold.modeling.batch import Batch


class Calls(TorchDispatchMode):
    """While inside, counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def batch(name: str, seed: int) -> Batch:
    """One row of three documents, whose lengths and tokens change with the seed and whose shape does not."""
    lengths = [(3 + seed % 4, 4), (5, 2 + seed % 3), (7, 6)]
    created = packed(documents(CONFIGS[name], lengths, seed), 24, 24)
    picked = torch.arange(8)[None] if name == "modernbert" else None
    return Batch(
        created.tokens, created.segments, created.targets, created.source, created.source_segments, picked
    )
