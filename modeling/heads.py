"""Output heads and their losses, computed in chunks so that the full logits never exist.

A head takes hidden states (B, P, D) of the positions that have targets and computes logits over the
vocabulary, over labels, or for the start and end of a span; or the losses of targets. Shapes: B rows, P
positions, D model, V vocabulary or labels.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifold.modeling.batch import IGNORE
from trifold.modeling.block import ACTIVATIONS, make_norm
from trifold.modeling.config import ModelConfig
from trifold.modeling.recurrent.crf import CRF

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**28}  # the most logits that exist at a time


class Losses(NamedTuple):
    """The losses of a batch's targets, in nats and fp32. Positions without a target have loss 0."""

    total: Tensor  # their sum, a scalar, and the only one of the three that has a gradient
    nll: Tensor  # of each position, (B, P), without label smoothing
    # Whether the most likely output is the target, (B, P) bool. None while gradients are recorded: it costs a
    # pass over all logits that training does not need.
    correct: Tensor | None


class Head(nn.Module):
    """The vocabulary head, tied to the embeddings or not, or a task's head (labels or spans).

    An optional dense layer with activation and norm comes first.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.logit_scale = config.logit_scale
        self.smoothing = config.label_smoothing
        self.spans = config.spans
        dense = config.head_dense and (config.task_dense or not config.outputs)
        self.dense = nn.Linear(config.dim, config.dim, config.bias) if dense else None
        self.act = ACTIVATIONS[config.activation]
        self.norm = make_norm(config, dense)
        self.labels = nn.Linear(config.dim, config.outputs) if config.outputs else None
        self.crf = CRF(config.outputs) if config.crf else None
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if self.labels is None and not config.tie_embeddings:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        if self.labels is None and config.logit_bias:
            trained = config.logit_bias != "fixed"
            self.bias = nn.Parameter(torch.empty(config.vocab_size), requires_grad=trained)

    def logits(self, h_BPD: Tensor, embed: nn.Embedding) -> Tensor:
        """Logits (B, P, V)."""
        logits: Tensor = self(h_BPD, embed, F.linear)
        return logits

    def losses(
        self, h_BPD: Tensor, embed: nn.Embedding, targets_BP: Tensor, segments_BP: Tensor | None
    ) -> Losses:
        """The losses of the targets. Spans and CRF chains are found by the segments."""
        compute = partial(self._losses, targets_BP=targets_BP, segments_BP=segments_BP)
        losses: Losses = self(h_BPD, embed, compute)
        return losses

    def forward(
        self, h_BPD: Tensor, embed: nn.Embedding, compute: Callable[[Tensor, Tensor, Tensor | None], Any]
    ) -> Any:
        """`compute(hidden states, weight, bias)` of the output layer.

        The weight (tied: of `embed`) is read inside this call, so that ZeRO-3 gathers it here and only here.
        """
        if self.dense is not None:
            h_BPD = self.norm(self.act(self.dense(h_BPD)))
        if self.labels is not None:
            return compute(h_BPD, self.labels.weight, self.labels.bias)
        weight = embed.weight if self.weight is None else self.weight
        return compute(h_BPD * self.logit_scale, weight, self.bias)

    def _losses(
        self,
        h_BPD: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets_BP: Tensor,
        segments_BP: Tensor | None,
    ) -> Losses:
        if self.spans:
            assert segments_BP is not None
            nll, correct = span_losses(F.linear(h_BPD, weight, bias), segments_BP, targets_BP)
            return Losses(nll.sum(), nll.detach(), correct)
        if self.crf is not None:
            return self._chain_losses(self.crf, F.linear(h_BPD, weight, bias), targets_BP, segments_BP)

        h, targets = h_BPD.flatten(0, 1), targets_BP.flatten()
        if torch.is_grad_enabled():
            total, nll = loss_sum(h, weight, bias, targets, self.smoothing)
            return Losses(total, nll.view_as(targets_BP), None)
        nll, correct = token_losses(h, weight, bias, targets)
        return Losses(nll.sum(), nll.view_as(targets_BP), correct.view_as(targets_BP))

    def _chain_losses(
        self, crf: CRF, scores: Tensor, targets_BP: Tensor, segments_BP: Tensor | None
    ) -> Losses:
        nll = crf(scores, targets_BP, segments_BP)
        if torch.is_grad_enabled():
            return Losses(nll.sum(), nll.detach(), None)
        best = crf(scores, targets_BP, segments_BP, best=True)
        return Losses(nll.sum(), nll, best.argmax(-1) == targets_BP)


def span_losses(logits_BP2: Tensor, segments_BP: Tensor, targets_BP: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of a span's start and end, each a choice among the positions of one segment.

    A segment's first two targets are the positions of the span's first and last token, counted from the
    segment's first position; all others are IGNORE, so a segment counts as two targets. Returns losses (B, P)
    fp32 and whether the most likely position is the target, (B, P) bool.
    """
    logits = logits_BP2.float()
    rows, length = segments_BP.shape
    position_BP = torch.arange(length, device=segments_BP.device).expand_as(segments_BP)
    # Segments are numbered from 1, and a row has at most as many as it has positions.
    per_segment = (rows, length + 1)
    index = segments_BP[..., None].expand(-1, -1, 2)

    # What belongs to a segment (first position, largest logit, sum of exponentials), at each of its
    # positions.
    first = position_BP.new_full(per_segment, length + 1)
    first = first.scatter_reduce(1, segments_BP, position_BP, "amin").gather(1, segments_BP)
    top = logits.detach().new_full((*per_segment, 2), float("-inf"))
    top = top.scatter_reduce(1, index, logits.detach(), "amax").gather(1, index)
    total = logits.new_zeros(*per_segment, 2)
    total = total.scatter_add(1, index, (logits - top).exp()).gather(1, index)

    valid = targets_BP != IGNORE
    target_BP = (first + targets_BP).where(valid, 0)
    which = (position_BP > first).long()[..., None]  # 0 (start) at a segment's first position, else 1 (end)
    target_logits = logits.gather(1, target_BP[..., None].expand(-1, -1, 2)).gather(2, which)[..., 0]
    best = top.gather(2, which)[..., 0]
    log_total = (top + total.log()).gather(2, which)[..., 0]
    return (log_total - target_logits) * valid, (target_logits >= best) & valid


def loss_sum(
    h_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_P: Tensor, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The sum of cross-entropies (nats, fp32 scalar) over the targets that are not IGNORE, with its gradient.

    `smoothing` spreads that share of each target over all V (Szegedy et al. 2016). Also returns each target's
    loss without smoothing, (P,) fp32, which has no gradient.
    """
    total, nll = _LossSum.apply(h_PD, weight_VD, bias_V, targets_P, smoothing)
    return total, nll


@torch.no_grad()
def token_losses(
    h_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_P: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (P,) fp32 and whether the most likely token is the target, (P,) bool.

    Zero and False where the target is IGNORE.
    """
    losses, correct = [], []
    for h, weight, bias, targets in _chunks(h_PD, weight_VD, bias_V, targets_P):
        logp = _log_softmax(h, weight, bias)
        losses.append(_nll(logp, targets))
        correct.append(logp.argmax(-1) == targets)
    return torch.cat(losses), torch.cat(correct)


class _LossSum(torch.autograd.Function):
    """Computes the gradients in forward, chunk by chunk, while the logits exist: nothing is computed twice.

    IGNORE positions are computed too, with weight 0, which keeps shapes fixed for the compiler. Backward
    needs tensors of the size of h and of the weight. The weight's gradient is accumulated in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, h_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_P: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(weight_VD.dtype, torch.float32)
        grad_weight, grad_bias = None, None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight_VD, dtype=exact)
        if bias_V is not None and ctx.needs_input_grad[2]:
            grad_bias = torch.zeros_like(bias_V, dtype=exact)

        grad_h, losses, mean_logp = [], [], []
        for h, weight, bias, targets in _chunks(h_PD, weight_VD, bias_V, targets_P):
            logp = _log_softmax(h, weight, bias)
            valid = (targets != IGNORE)[:, None]
            losses.append(_nll(logp, targets))
            if smoothing:
                mean_logp.append((logp.mean(-1, keepdim=True) * valid).sum())

            grad = _softmax_minus_onehot(logp, targets, 1 - smoothing)
            if smoothing:
                grad = grad - smoothing / logp.shape[1]
            grad = grad.to(h.dtype)
            grad_h.append((grad @ weight * valid).to(h_PD.dtype))
            if grad_weight is not None:
                grad_weight += grad.T @ (h * valid)
            if grad_bias is not None:
                grad_bias += (grad * valid).sum(0)

        ctx.save_for_backward(torch.cat(grad_h), grad_weight, grad_bias)
        ctx.dtype = weight_VD.dtype
        nll = torch.cat(losses)
        total = nll.sum()  # not accumulated in place: torch 2.11, compiled, loses the gradient of that
        if smoothing:
            total = (1 - smoothing) * total - smoothing * torch.stack(mean_logp).sum()
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
    """Positions in chunks of CHUNK_LOGITS logits; weight and bias in the dtype of the arithmetic."""
    device = h_PD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
    size = max(128, CHUNK_LOGITS[device] // len(weight_VD) // 128 * 128)  # full tiles of a matrix product
    weight = weight_VD.to(dtype)
    bias = None if bias_V is None else bias_V.to(dtype)
    for h, targets in zip(h_PD.to(dtype).split(size), targets_P.split(size), strict=True):
        yield h, weight, bias, targets


def _log_softmax(h_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    logits = F.linear(h_PD, weight_VD, bias_V)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _softmax_minus_onehot(logp_PV: Tensor, targets_P: Tensor, target_weight: float) -> Tensor:
    """Probabilities minus `target_weight` at the targets. Overwrites `logp_PV`.

    A compiler fuses the comparison into what follows, where a scatter would make it write all probabilities
    out; without a compiler the scatter touches the least memory.
    """
    if torch.compiler.is_compiling():
        classes = torch.arange(logp_PV.shape[1], device=logp_PV.device)
        return logp_PV.exp() - target_weight * (classes == targets_P[:, None])
    index = targets_P.clamp(min=0)[:, None]
    return logp_PV.exp_().scatter_add_(1, index, logp_PV.new_full(index.shape, -target_weight))


def _nll(logp_PV: Tensor, targets_P: Tensor) -> Tensor:
    return -logp_PV.gather(1, targets_P.clamp(min=0)[:, None])[:, 0] * (targets_P != IGNORE)
