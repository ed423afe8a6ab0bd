"""A linear-chain CRF on a label head (Lafferty et al. 2001; on a BiLSTM: Huang et al. 2015).

It takes each position's scores (B, T, C) and which positions have targets: those of one segment form a chain,
whatever is between them. It returns losses whose sum over a chain is -log p(labels), or scores whose largest
label at each position is that of the chain's best sequence. Cost: one step per position of the longest chain,
each N * C * C. Shapes: B rows, T positions, P = B * T, N chains, C labels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trifold.modeling.batch import IGNORE
from trifold.modeling.recurrent.documents import Documents, split_documents


class CRF(nn.Module):
    """`between[y, z]` scores label z after y; the last row starts a chain, the last column ends it."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.between = nn.Parameter(torch.empty(labels + 1, labels + 1))

    def forward(
        self, scores_BTC: Tensor, targets_BT: Tensor, segments_BT: Tensor | None, best: bool = False
    ) -> Tensor:
        """Each target's loss (B, T) in nats: -log p(its label | the labels before it, and the text).

        With `best`, (B, T, C): the score of the best sequence that has this label here, whose argmax is
        Viterbi's. Positions without targets are chains by themselves.
        """
        exact = torch.promote_types(scores_BTC.dtype, torch.float32)
        scores_BTC, between = scores_BTC.to(exact), self.between.to(exact)
        order_P, chains = _chains(targets_BT, segments_BT)
        scores_PC = scores_BTC.flatten(0, 1)[order_P][chains.position_P]
        if best:
            values = _best(scores_PC, between, chains)
        else:
            values = _losses(scores_PC, between, chains, targets_BT.flatten()[order_P])
        rows = torch.empty_like(values).index_copy(0, order_P[chains.position_P], values)
        rows = rows.unflatten(0, targets_BT.shape)
        return rows if best else rows * (targets_BT != IGNORE)


def _chains(targets_BT: Tensor, segments_BT: Tensor | None) -> tuple[Tensor, Documents]:
    """An order of positions that makes chains contiguous, and the chains as documents of that one row."""
    valid_P = (targets_BT != IGNORE).flatten()
    row_P = torch.arange(len(targets_BT), device=targets_BT.device).repeat_interleave(targets_BT.shape[1])
    segment_P = torch.ones_like(row_P) if segments_BT is None else segments_BT.flatten()
    number_P = (1 + row_P * (1 + int(segment_P.max())) + segment_P) * valid_P
    order_P = (~valid_P).int().argsort(stable=True)
    return order_P, split_documents(number_P[order_P][None])


def _losses(scores_PC: Tensor, between: Tensor, chains: Documents, targets_P: Tensor) -> Tensor:
    """-log p(y_t | y_<t) = rest_{t-1}(y_{t-1}) - between(y_{t-1}, y_t) - score_t(y_t) - rest_t(y_t).

    rest_t is the log of the sum over everything that can follow step t.
    """
    steps, rests = _messages_from_the_end(scores_PC, between, chains, torch.logsumexp)
    labels = targets_P.clamp(min=0)[chains.position_P].split(chains.sizes_T.tolist())
    losses, C = [], scores_PC.shape[1]
    for t, (scores_NC, rest_NC, label_N) in enumerate(zip(steps, rests, labels, strict=True)):
        previous = C if t == 0 else labels[t - 1][: len(label_N)]
        transition = between[previous, :C]
        joint_NC = scores_NC + rest_NC + transition
        losses.append(torch.logsumexp(joint_NC, 1) - joint_NC.gather(1, label_N[:, None])[:, 0])
    return torch.cat(losses)


def _best(scores_PC: Tensor, between: Tensor, chains: Documents) -> Tensor:
    """The sum of Viterbi's messages from the start and from the end."""
    steps, rests = _messages_from_the_end(scores_PC, between, chains, torch.amax)
    C, best = scores_PC.shape[1], []
    before_NC = between[C, :C].expand_as(steps[0])
    for scores_NC, rest_NC in zip(steps, rests, strict=True):
        here_NC = before_NC[: len(scores_NC)] + scores_NC
        best.append(here_NC + rest_NC)
        before_NC = torch.amax(here_NC[:, :, None] + between[:C, :C], 1)
    return torch.cat(best)


def _messages_from_the_end(
    scores_PC: Tensor, between: Tensor, chains: Documents, reduce: Callable[[Tensor, int], Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The scores of each step, and for each label `reduce` (logsumexp, amax) over what can follow it."""
    steps = list(scores_PC.split(chains.sizes_T.tolist()))
    C = scores_PC.shape[1]
    end_C = between[:C, C]
    rests = [end_C.expand_as(steps[-1])]
    for here_NC, next_NC in zip(reversed(steps[:-1]), reversed(steps[1:]), strict=True):
        rest_NC = reduce(between[:C, :C] + (next_NC + rests[-1])[:, None, :], 2)
        # Chains that are shorter than the next step's end here.
        ended_NC = end_C.expand(len(here_NC) - len(next_NC), -1)
        rests.append(torch.cat([rest_NC, ended_NC]))
    return steps, rests[::-1]
