"""Batch: what a model takes, the same for every family, objective and task.

Shapes: B rows, T tokens of the stack that predicts, S source tokens (encoder-decoder only), P picked
positions.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from trifold.modeling.config import IGNORE as IGNORE


@dataclass(frozen=True)
class Batch:
    """One micro batch of packed rows.

    `segments` numbers the documents of a row from 1; 0 is padding. Positions attend only within their
    segment, and target segment n attends to source segment n. `targets` are IGNORE where nothing is
    predicted. Where ranks share rows (sequence_parallel.py), T and S are the lengths of a slice, except in
    the segments. `picked` (masked LM) lists, per row, the only positions that have targets, padded with -1
    (or less): logits are computed for these.
    """

    tokens: Tensor  # (B, T) int64
    segments: Tensor | None  # (B, T) int64; None: each row (and each row of the source) is one document
    targets: Tensor  # (B, T) int64
    source: Tensor | None = None  # (B, S) int64
    source_segments: Tensor | None = None  # (B, S) int64
    picked: Tensor | None = None  # (B, P) int64
    parts: Tensor | None = (
        None  # (B, T) int64: the index, in a mixture of objectives, of each position's member
    )

    types: Tensor | None = None  # (B, T) int64: token types (BERT's second text is 1); None: 0 everywhere

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on another device; copies from pinned memory do not block."""
        return Batch(**{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})

    def by_part(self, nll_BT: Tensor, num_parts: int) -> Tensor:
        """(2, num_parts) float64: the sum of losses and the target count of each member of the mixture."""
        assert self.parts is not None
        valid = self.targets != IGNORE
        losses = nll_BT[valid].double()
        values = torch.stack([losses, torch.ones_like(losses)])
        return values.new_zeros(2, num_parts).index_add_(1, self.parts[valid], values)


def _moved(tensor: Tensor | None, device: torch.device | str) -> Any:
    return None if tensor is None else tensor.to(device, non_blocking=True)
