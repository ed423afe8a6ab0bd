"""What stands on the hidden states: logits over the vocabulary or over labels, and the loss, without all
logits at once.

In: hidden states (B, P, D) of the positions that count. Out: the sum of cross-entropies, or each position's,
or logits. Shapes: B rows, P positions, D model, V vocabulary or labels.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifold.modeling.batch import IGNORE
from trifold.modeling.block import ACTIVATIONS, make_norm
from trifold.modeling.config import ModelConfig
from trifold.modeling.recurrent.crf import CRF

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**28}  # logits that exist at a time


class Head(nn.Module):
    """The vocabulary head, tied to the embeddings or not, or a task's head (labels, spans); each after an
    optional dense transform.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.logit_scale, self.smoothing, self.spans = (
            config.logit_scale,
            config.label_smoothing,
            config.spans,
        )
        dense = config.head_dense and (config.task_dense or not config.outputs)
        self.dense = nn.Linear(config.dim, config.dim, config.bias) if dense else None
        self.act, self.norm = ACTIVATIONS[config.activation], make_norm(config, dense)
        self.labels = nn.Linear(config.dim, config.outputs) if config.outputs else None
        self.crf = CRF(config.outputs) if config.crf else None
        words = self.labels is None
        untied = words and not config.tie_embeddings
        self.weight: nn.Parameter | None = (
            nn.Parameter(torch.empty(config.vocab_size, config.dim)) if untied else None
        )
        self.bias: nn.Parameter | None = None
        if words and config.logit_bias:
            self.bias = nn.Parameter(
                torch.empty(config.vocab_size), requires_grad=config.logit_bias != "fixed"
            )

    def forward(
        self,
        h_BPD: Tensor,
        embed: nn.Embedding,
        targets_BP: Tensor | None = None,
        segments_BP: Tensor | None = None,
        per_token: bool = False,
        each: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Without targets: logits (B, P, V). With them: their summed loss, fp32; `per_token`: each loss, and
        whether it is right; `each`: the sum, which alone has a gradient, and each loss (the vocabulary's and
        labels' heads).

        A tied weight is read from `embed` in here, so that ZeRO-3 gathers it for this call alone. Spans and
        chains need the segments.
        """
        if self.dense is not None:
            h_BPD = self.norm(self.act(self.dense(h_BPD)))
        weight, bias = self._table(embed)
        if self.labels is None:
            h_BPD = h_BPD * self.logit_scale
        if targets_BP is None:
            return F.linear(h_BPD, weight, bias)
        if self.crf is not None:
            scores = F.linear(h_BPD, weight, bias)
            nll = self.crf(scores, targets_BP, segments_BP)
            return (
                (nll, self.crf(scores, targets_BP, segments_BP, best=True).argmax(-1) == targets_BP)
                if per_token
                else nll.sum()
            )
        if self.spans:
            assert segments_BP is not None
            nll, correct = span_losses(F.linear(h_BPD, weight, bias), segments_BP, targets_BP)
            return (nll, correct) if per_token else nll.sum()
        h, targets = h_BPD.flatten(0, 1), targets_BP.flatten()
        if per_token:
            nll, correct = token_losses(h, weight, bias, targets)
            return nll.view_as(targets_BP), correct.view_as(targets_BP)
        total, nll = losses(h, weight, bias, targets, self.smoothing)
        return (total, nll.view_as(targets_BP)) if each else total

    def _table(self, embed: nn.Embedding) -> tuple[Tensor, Tensor | None]:
        if self.labels is not None:
            return self.labels.weight, self.labels.bias
        return embed.weight if self.weight is None else self.weight, self.bias


def span_losses(logits_BP2: Tensor, segments_BP: Tensor, targets_BP: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of an answer's start and end, each a choice among the positions of one segment: (B, P) fp32
    and whether right, bool.

    A segment's first two targets are where the answer starts and where its last token stands, counted from
    the segment's first position; all others are IGNORE. So a segment counts as two targets.
    """
    logits, at = (
        logits_BP2.float(),
        torch.arange(segments_BP.shape[1], device=segments_BP.device).expand_as(segments_BP),
    )
    room = (
        len(logits),
        segments_BP.shape[1] + 1,
    )  # a row has at most as many segments as positions, numbered from 1
    first = at.new_full(room, room[1]).scatter_reduce(1, segments_BP, at, "amin").gather(1, segments_BP)
    index = segments_BP[..., None].expand(-1, -1, 2)
    top = (
        logits.detach()
        .new_full((*room, 2), float("-inf"))
        .scatter_reduce(1, index, logits.detach(), "amax")
        .gather(1, index)
    )
    total = logits.new_zeros(*room, 2).scatter_add(1, index, (logits - top).exp()).gather(1, index)
    valid = targets_BP != IGNORE
    answer, which = (
        (first + targets_BP).where(valid, 0),
        (at > first).long()[..., None],
    )  # 0 at a segment's first position, else 1

    def chosen(x_BP2: Tensor) -> Tensor:
        return x_BP2.gather(1, answer[..., None].expand(-1, -1, 2)).gather(2, which)[..., 0]

    best = top.gather(2, which)[..., 0]
    log_total = (top + total.log()).gather(2, which)[..., 0]
    return (log_total - chosen(logits)) * valid, (chosen(logits) >= best) & valid


def loss_sum(
    h_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_P: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Sum of cross-entropies in nats over the targets that are not IGNORE: an fp32 scalar, 0 where there is
    none.

    `smoothing` spreads that share of each target over all V (Szegedy et al. 2016); without gradient the loss
    is the plain one.
    """
    return losses(h_PD, weight_VD, bias_V, targets_P, smoothing)[0]


def losses(
    h_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_P: Tensor, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`loss_sum`, and beside it each target's plain loss (P,) fp32, without a gradient of its own."""
    if not torch.is_grad_enabled():
        nll = token_losses(h_PD, weight_VD, bias_V, targets_P)[0]
        return nll.sum(), nll
    return _LossSum.apply(h_PD, weight_VD, bias_V, targets_P, smoothing)


@torch.no_grad()
def token_losses(
    h_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_P: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (P,) fp32 and whether the best guess is right (P,) bool; zero and False where the target
    is IGNORE.
    """
    nll, right = [], []
    for h, weight, bias, targets in _chunks(h_PD, weight_VD, bias_V, targets_P):
        logp = _log_softmax(h, weight, bias)
        nll.append(_nll(logp, targets))
        right.append(logp.argmax(-1) == targets)
    return torch.cat(nll), torch.cat(right)


class _LossSum(torch.autograd.Function):
    """Makes the gradients in forward, chunk by chunk, while the logits are at hand: nothing is computed
    twice.

    IGNORE positions are computed too, with weight 0: shapes stay fixed for the compiler. What is kept for
    backward is the size of h and of the weight. The weight's gradient adds up in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, h_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_P: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(weight_VD.dtype, torch.float32)
        grad_h, each, spread = [], [], []
        grad_weight = torch.zeros_like(weight_VD, dtype=exact) if ctx.needs_input_grad[1] else None
        grad_bias = (
            torch.zeros_like(bias_V, dtype=exact) if bias_V is not None and ctx.needs_input_grad[2] else None
        )
        for h, weight, bias, targets in _chunks(h_PD, weight_VD, bias_V, targets_P):
            logp = _log_softmax(h, weight, bias)
            valid = (targets != IGNORE)[:, None]
            each.append(_nll(logp, targets))
            if smoothing:
                spread.append((logp.mean(-1, keepdim=True) * valid).sum())
            grad = _softmax_minus_onehot(logp, targets, 1 - smoothing)
            grad = (grad - smoothing / logp.shape[1] if smoothing else grad).to(h.dtype)
            grad_h.append((grad @ weight * valid).to(h_PD.dtype))
            if grad_weight is not None:
                grad_weight += grad.T @ (h * valid)
            if grad_bias is not None:
                grad_bias += (grad * valid).sum(0)
        ctx.save_for_backward(torch.cat(grad_h), grad_weight, grad_bias)
        ctx.dtype = weight_VD.dtype
        nll = torch.cat(each)
        total = nll.sum()  # not added up in place: torch 2.11, compiled, loses the gradient of that
        if smoothing:
            total = (1 - smoothing) * total - smoothing * torch.stack(spread).sum()
        ctx.mark_non_differentiable(nll)
        return total, nll

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_weight, grad_bias = ctx.saved_tensors
        scale = grad_outputs[0]
        return (
            grad_h * scale.to(grad_h.dtype),
            None if grad_weight is None else (grad_weight * scale).to(ctx.dtype),
            None if grad_bias is None else (grad_bias * scale).to(ctx.dtype),
            None,
            None,
        )


def _chunks(
    h_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_P: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """Positions in chunks of CHUNK_LOGITS logits, with the weight in the precision of the arithmetic, cast
    once.
    """
    device = h_PD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
    size = max(128, CHUNK_LOGITS[device] // len(weight_VD) // 128 * 128)  # whole tiles of a matrix product
    weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
    for h, targets in zip(h_PD.to(dtype).split(size), targets_P.split(size), strict=True):
        yield h, weight, bias, targets


def _log_softmax(h_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    logits = F.linear(h_PD, weight_VD, bias_V)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _softmax_minus_onehot(logp_PV: Tensor, targets_P: Tensor, hit: float) -> Tensor:
    """Probabilities, `hit` less at the targets; takes `logp_PV` over. A compiler fuses the comparison into
    what follows, and would have to write all of them out for a scatter; without one the scatter touches
    least.
    """
    if torch.compiler.is_compiling():
        return logp_PV.exp() - hit * (
            torch.arange(logp_PV.shape[1], device=logp_PV.device) == targets_P[:, None]
        )
    return logp_PV.exp_().scatter_add_(
        1, targets_P.clamp(min=0)[:, None], logp_PV.new_full((len(logp_PV), 1), -hit)
    )


def _nll(logp_PV: Tensor, targets_P: Tensor) -> Tensor:
    return -logp_PV.gather(1, targets_P.clamp(min=0)[:, None])[:, 0] * (targets_P != IGNORE)
