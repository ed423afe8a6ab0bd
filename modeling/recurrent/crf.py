"""A linear-chain CRF on a label head (Lafferty et al. 2001; on a BiLSTM: Huang et al. 2015): a sequence of
labels is scored as a whole.

In: each position's scores (B, T, C) and which positions have targets: those of one segment are a chain,
whatever stands between them. Out: losses whose sum over a chain is -log p(labels), or scores whose best label
at each position is that of the chain's best sequence. Cost: a step per position of the longest chain, each N
* C * C. Shapes: B rows, T positions, P = B * T, N chains, C labels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trifold.modeling.batch import IGNORE
from trifold.modeling.recurrent.documents import Documents, split_documents


class CRF(nn.Module):
    """Scores of neighbours: `between[y, z]` of label z after y; the last row is a chain's begin, the last
    column its end.
    """

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.between = nn.Parameter(torch.empty(labels + 1, labels + 1))

    def forward(
        self, scores_BTC: Tensor, targets_BT: Tensor, segments_BT: Tensor | None, best: bool = False
    ) -> Tensor:
        """Each target's loss (B, T), nats: -log p(its label | those before it, and the text). `best`: (B, T,
        C), the score of the best sequence that has this label here, whose argmax is Viterbi's. Positions
        without targets are chains of their own.
        """
        exact = torch.promote_types(scores_BTC.dtype, torch.float32)
        scores_BTC, between = scores_BTC.to(exact), self.between.to(exact)
        order_P, chains = _chains(targets_BT, segments_BT)
        scores_PC = scores_BTC.flatten(0, 1)[order_P][chains.place_P]
        made = (
            _best(scores_PC, between, chains)
            if best
            else _losses(scores_PC, between, chains, targets_BT.flatten()[order_P])
        )
        rows = (
            torch.empty_like(made).index_copy(0, order_P[chains.place_P], made).unflatten(0, targets_BT.shape)
        )
        return rows if best else rows * (targets_BT != IGNORE)


def _chains(targets_BT: Tensor, segments_BT: Tensor | None) -> tuple[Tensor, Documents]:
    """The positions with their chains' together, then all others; and the chains as documents in that one
    row.
    """
    valid_P = (targets_BT != IGNORE).flatten()
    row_P = torch.arange(len(targets_BT), device=targets_BT.device).repeat_interleave(targets_BT.shape[1])
    segment_P = torch.ones_like(row_P) if segments_BT is None else segments_BT.flatten()
    number_P = (1 + row_P * (1 + int(segment_P.max())) + segment_P) * valid_P
    order_P = (~valid_P).int().argsort(stable=True)
    return order_P, split_documents(number_P[order_P][None])


def _losses(scores_PC: Tensor, between: Tensor, chains: Documents, targets_P: Tensor) -> Tensor:
    """-log p(y_t | y_<t) = rest_{t-1}(y_{t-1}) - between(y_{t-1}, y_t) - score_t(y_t) - rest_t(y_t), where
    rest sums over what follows.
    """
    steps, rests = _log_partitions(scores_PC, between, chains, torch.logsumexp)
    labels = targets_P.clamp(min=0)[chains.place_P].split(chains.sizes_T.tolist())
    losses, C = [], scores_PC.shape[1]
    for t, (scores_NC, rest_NC, label_N) in enumerate(zip(steps, rests, labels, strict=True)):
        said_NC = (
            scores_NC
            + rest_NC
            + (between[C, :C] if t == 0 else between[:C, :C][labels[t - 1][: len(label_N)]])
        )
        losses.append(torch.logsumexp(said_NC, 1) - said_NC.gather(1, label_N[:, None])[:, 0])
    return torch.cat(losses)


def _best(scores_PC: Tensor, between: Tensor, chains: Documents) -> Tensor:
    """Viterbi's messages from both sides, added where they meet."""
    steps, rests = _log_partitions(scores_PC, between, chains, torch.amax)
    C, through = scores_PC.shape[1], []
    before_NC = between[C, :C].expand_as(steps[0])
    for scores_NC, rest_NC in zip(steps, rests, strict=True):
        here_NC = before_NC[: len(scores_NC)] + scores_NC
        through.append(here_NC + rest_NC)
        before_NC = torch.amax(here_NC[:, :, None] + between[:C, :C], 1)
    return torch.cat(through)


def _log_partitions(
    scores_PC: Tensor, between: Tensor, chains: Documents, over: Callable[[Tensor, int], Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The scores of each step, and for each label there what can follow it in its chain, put together by
    `over`.
    """
    steps, C = list(scores_PC.split(chains.sizes_T.tolist())), scores_PC.shape[1]
    end_C, rests = between[:C, C], [between[:C, C].expand_as(steps[-1])]
    for here_NC, next_NC in zip(reversed(steps[:-1]), reversed(steps[1:]), strict=True):
        on_NC = over(between[:C, :C] + (next_NC + rests[-1])[:, None, :], 2)
        rests.append(
            torch.cat([on_NC, end_C.expand(len(here_NC) - len(next_NC), -1)])
        )  # the shorter chains end here
    return steps, rests[::-1]
