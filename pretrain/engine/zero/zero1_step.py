"""ZeRO-1's step in few passes over memory: DeepSpeed's optimizers, whose step is done on flat tensors.

In: DeepSpeed's engine and optimizer. Out: the same optimizer, whose gradients are gathered, reduced, measured
and clipped group by group instead of parameter by parameter: by count about half the bytes that DeepSpeed
0.19 moves after the backward, and no launch of a kernel for each parameter but the one that gathers it.
Whether the step may be applied is decided on the device, which so never waits for the host. All of this leans
on private parts of DeepSpeed; tests/pretrain/engine/zero/test_zero1_step.py sets a step beside theirs.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from trifold.pretrain.engine.spikes import StepLimits


class FlatZero1Step:
    """`outcome` (2,) float64: the last step's gradient norm, infinite where that is not finite or its loss
    was bad already, and 1 where it was not applied.
    """

    outcome: Tensor
    masters: Sequence[Tensor]  # this rank's share of each group's fp32 weights, flat
    gradients: Sequence[Tensor]  # of the masters
    whole: Sequence[Tensor]  # the gradients of each group, of which `gradients` are this rank's parts

    def reduce(self, *_: Any, **__: Any) -> None:
        """This rank's share of the mean of the gradients over all ranks; the others' are left as they are."""
        if (world := dist.get_world_size()) > 1:
            for flat, mine in zip(self.whole, self.gradients, strict=True):
                share = torch.empty_like(mine)
                dist.reduce_scatter_tensor(share, flat)
                mine.copy_(share.div_(world))

    def set_loss_and_limits(self, loss: Tensor, limits: StepLimits) -> None:
        """Before the step: its loss, on the device."""
        self.loss, self.limits = loss, limits

    @torch.no_grad()
    def step(self: Any, closure: None = None) -> None:
        """torch's fused AdamW and Muon divide gradients by `grad_scale` while they read them, and do nothing
        where `found_inf` is 1.
        """
        norm = self._norm()
        known = self.loss.isfinite() & (self.loss <= self.limits.loss) & norm.isfinite()
        refused = ~(known & (norm <= self.limits.grad_norm))
        self.outcome = torch.stack([norm.double().where(known, math.inf), refused.double()])
        self.optimizer.grad_scale = ((norm + 1e-6) / self.clip_grad).clamp(min=1) if self.clip_grad else None
        self.optimizer.found_inf = refused.float()
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            master.grad = gradient
        self.optimizer.step()
        self.update_lp_params()
        self.clear_hp_grads()

    def clear_hp_grads(self) -> None:
        """They are overwritten."""

    def _norm(self) -> Tensor:
        """Of the whole gradient, on every rank."""
        norm = torch.nn.utils.get_total_norm(self.gradients)
        if dist.get_world_size() > 1:
            dist.all_reduce(norm.square_())
            norm.sqrt_()
        return norm


class FlatZero1StepBF16(FlatZero1Step, BF16_Optimizer):
    """bf16 weights, whose gradients add up in fp32."""

    accumulates = False  # the fp32 gradients hold those of earlier micro batches of the step

    def adopt(self, engine: Any) -> None:
        self.overflow, self.masters, self.whole = (
            False,
            self.fp32_groups_flat_partition,
            self.fp32_groups_gradients_flat,
        )
        self.gradients = self.fp32_groups_gradient_flat_partition
        engine.buffered_allreduce_fallback = self.reduce

    def backward_prologue(self) -> None:
        self.clear_lp_grads(set_to_none=True)  # a gradient that is not there is taken over, not added to

    @torch.no_grad()
    def update_hp_grads(self, clear_lp_grads: bool = False) -> None:
        """A step's first micro batch overwrites the fp32 gradients, so nobody has to clear them."""
        pairs = zip(self.bf16_groups, self.fp32_groups_gradients, strict=True)
        _collect_gradients(
            (pair for lps, hps in pairs for pair in zip(lps, hps, strict=True)), self.accumulates
        )
        self.accumulates = True

    def clear_hp_grads(self) -> None:
        self.accumulates = False


class FlatZero1StepFP32(FlatZero1Step, DeepSpeedZeroOptimizer):
    """fp32 weights, whose gradients add up where autograd puts them and are gathered once a step."""

    def adopt(self, engine: Any) -> None:
        for hook in self._grad_acc_hooks:  # would copy each gradient into a bucket
            hook.remove()
        self.overflow, self.masters = False, self.single_partition_of_fp32_groups
        self.whole = [torch.zeros_like(flat) for flat in self.bit16_groups_flat]
        self.gradients = [flat.chunk(dist.get_world_size())[dist.get_rank()] for flat in self.whole]
        groups = zip(self.whole, self.round_robin_bit16_groups, self.round_robin_bit16_offsets, strict=True)
        self.pairs = [
            (p, flat[at : at + p.numel()])
            for flat, ps, offsets in groups
            for p, at in zip(ps, offsets, strict=True)
        ]

    @torch.no_grad()
    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """After the backward of a step's last micro batch."""
        _collect_gradients(self.pairs)
        self.zero_grad()
        self.reduce()


def _collect_gradients(pairs: Iterable[tuple[nn.Parameter, Tensor]], add: bool = False) -> None:
    """Each parameter's gradient into, or onto, its flat place beside it."""
    pairs = list(pairs)
    given = [(flat, p.grad.flatten()) for p, flat in pairs if p.grad is not None]
    (torch._foreach_add_ if add else torch._foreach_copy_)(
        [flat for flat, _ in given], [grad for _, grad in given]
    )
    if not add:
        for flat in (flat for p, flat in pairs if p.grad is None):
            flat.zero_()


def install_fused_zero1_step(engine: Any, zero: BF16_Optimizer | DeepSpeedZeroOptimizer) -> None:
    """Make DeepSpeed's engine and optimizer take their steps so."""
    zero.__class__ = FlatZero1StepBF16 if isinstance(zero, BF16_Optimizer) else FlatZero1StepFP32
    zero.adopt(engine)
