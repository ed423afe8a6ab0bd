"""The documents of packed rows, side by side: step t takes the t-th token of every document.

That is the order of torch's PackedSequence: a recurrent kernel runs over all documents of a batch at once,
each from its own first state, and computes nothing for padding between documents. A CRF runs over its chains
in the same way. Shapes: B rows, T tokens, P = B * T, N documents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Documents, longest first; of equal length in the order of the rows.

    Positions count through all rows: row * T + position in the row. Rows [[1, 1, 2], [1, 1, 1]] have the
    documents of row 1, row 0 and row 0, with `first_N` [3, 0, 2], `length_N` [3, 2, 1], `position_P` [3, 0,
    2, 4, 1, 5] and `sizes_T` [3, 2, 1].
    """

    shape: torch.Size  # (B, T)
    row_N: Tensor
    segment_N: Tensor
    first_N: Tensor  # the position of each document's first token
    length_N: Tensor
    position_P: Tensor  # of each token, step by step
    sizes_T: Tensor  # how many documents each step has; on the CPU, as PackedSequence requires

    def take(self, x_BTD: Tensor) -> Tensor:
        """(B, T, ...) as (P, ...), step by step."""
        return x_BTD.flatten(0, 1)[self.position_P]

    def put(self, x_PD: Tensor) -> Tensor:
        """(P, ...) back at their positions in the rows, (B, T, ...)."""
        return torch.empty_like(x_PD).index_copy(0, self.position_P, x_PD).unflatten(0, self.shape)

    def table(self) -> tuple[Tensor, Tensor]:
        """The positions (N, longest) of every document's tokens, and which entries are tokens, bool.

        The other entries hold the document's first position.
        """
        steps = torch.arange(len(self.sizes_T), device=self.first_N.device)
        is_token = steps < self.length_N[:, None]
        return self.first_N[:, None] + steps * is_token, is_token

    def at_row_ends(self) -> Tensor:
        """The document with which each row ends, (B,)."""
        ends = ((self.first_N + self.length_N) % self.shape[1] == 0).nonzero()[:, 0]
        return ends[self.row_N[ends].argsort()]


def split_documents(segments_BT: Tensor) -> Documents:
    """Each run of one segment is a document, and each position of padding (segment 0) is one of length 1."""
    width = segments_BT.shape[1]
    starts = torch.ones_like(segments_BT, dtype=torch.bool)
    starts[:, 1:] = (segments_BT[:, 1:] != segments_BT[:, :-1]) | (segments_BT[:, 1:] == 0)
    first_N = starts.flatten().nonzero()[:, 0]
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
        position_P=first_N[document] + step,
        sizes_T=step.bincount().cpu(),
    )
