"""What a model sees: Batch, the same for every family, objective and task.

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

    `segments` numbers the documents of a row from 1; 0 is padding. Positions see each other only within one
    segment; the source segment n belongs to the target segment n. `targets` are IGNORE where nothing is
    predicted. Where ranks share rows (sharing.py), T and S are a slice's, but for the segments. `picked`
    (masked LM) lists the only positions whose targets count, per row, padded with -1 (or less): logits are
    made for these alone.
    """

    tokens: Tensor  # (B, T) int64
    segments: Tensor | None  # (B, T) int64; None: each row is one whole document (the source too)
    targets: Tensor  # (B, T) int64
    source: Tensor | None = None  # (B, S) int64
    source_segments: Tensor | None = None  # (B, S) int64
    picked: Tensor | None = None  # (B, P) int64
    parts: Tensor | None = (
        None  # (B, T) int64: the part of a mixture of objectives, from 0, that each position belongs to
    )

    types: Tensor | None = None  # (B, T) int64: token types (BERT's second text is 1); None: 0 everywhere

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device; copies do not block where the memory is pinned."""
        return Batch(**{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})

    def by_part(self, nll_BT: Tensor, num_parts: int) -> Tensor:
        """(2, parts) float64: the sum of the losses of each part's targets, and how many targets those
        are.
        """
        assert self.parts is not None
        valid = self.targets != IGNORE
        values = torch.stack([nll_BT[valid].double(), torch.ones_like(nll_BT[valid], dtype=torch.float64)])
        return values.new_zeros(2, num_parts).index_add_(1, self.parts[valid], values)


def _moved(tensor: Tensor | None, device: torch.device | str) -> Any:
    return None if tensor is None else tensor.to(device, non_blocking=True)
