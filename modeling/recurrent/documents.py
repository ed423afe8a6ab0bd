"""The documents of packed rows, side by side: in, segments; out, where each token stands when step t takes
the t-th token of every one.

That is the order of torch's PackedSequence, so that a recurrent kernel runs over all documents of a batch at
once, each from a first state of its own, and no position is wasted; a CRF runs over its chains in the same
way. Shapes: B rows, T tokens, P = B * T, N documents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Documents, longest first; of equals those that come first in the rows."""

    shape: torch.Size  # (B, T)
    row_N: Tensor
    segment_N: Tensor
    first_N: Tensor  # places count through all rows
    length_N: Tensor
    place_P: Tensor  # of each token, step by step
    sizes_T: Tensor  # how many documents each step has; on the CPU, as PackedSequence wants it

    def take(self, x_BTD: Tensor) -> Tensor:
        """(B, T, ...) as (P, ...), step by step."""
        return x_BTD.flatten(0, 1)[self.place_P]

    def put(self, x_PD: Tensor) -> Tensor:
        """(P, ...) back to their places in the rows, (B, T, ...)."""
        return torch.empty_like(x_PD).index_copy(0, self.place_P, x_PD).unflatten(0, self.shape)

    def table(self) -> tuple[Tensor, Tensor]:
        """The places (N, longest) of every document's tokens, and where there is one, bool; elsewhere stands
        its first place.
        """
        there = torch.arange(len(self.sizes_T), device=self.first_N.device) < self.length_N[:, None]
        return self.first_N[:, None] + torch.arange(there.shape[1], device=there.device) * there, there

    def at_row_ends(self) -> Tensor:
        """The document that each row ends with, (B,)."""
        ends = ((self.first_N + self.length_N) % self.shape[1] == 0).nonzero()[:, 0]
        return ends[self.row_N[ends].argsort()]


def split_documents(segments_BT: Tensor) -> Documents:
    """Each run of one segment is a document; each place of padding (segment 0) is one by itself, so that it
    makes no step longer.
    """
    width = segments_BT.shape[1]
    begins = torch.ones_like(segments_BT, dtype=torch.bool)
    begins[:, 1:] = (segments_BT[:, 1:] != segments_BT[:, :-1]) | (segments_BT[:, 1:] == 0)
    first_N = begins.flatten().nonzero()[:, 0]
    length_N = torch.diff(first_N, append=first_N.new_tensor([segments_BT.numel()]))
    length_N, order = length_N.sort(descending=True, stable=True)
    first_N = first_N[order]
    steps = torch.arange(int(length_N[0]), device=first_N.device)
    step, document = (length_N > steps[:, None]).nonzero(as_tuple=True)
    return Documents(
        shape=segments_BT.shape,
        row_N=first_N // width,
        segment_N=segments_BT.flatten()[first_N],
        first_N=first_N,
        length_N=length_N,
        place_P=first_N[document] + step,
        sizes_T=step.bincount().cpu(),
    )
