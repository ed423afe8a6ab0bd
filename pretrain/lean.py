"""ZeRO-1 in bf16 with fp32 accumulation in few passes over memory: DeepSpeed's BF16_Optimizer, its step done on flat tensors.

In: DeepSpeed's engine and optimizer. Out: the same optimizer, whose gradients are gathered, reduced, measured and clipped group by group
instead of parameter by parameter: by count about half the bytes that DeepSpeed 0.19 moves after the backward, and no launch of a kernel
for each parameter but the one that gathers it. Whether the step may be applied is decided on the device, which so never waits for the
host. All of this leans on private parts of DeepSpeed; tests/pretrain/test_lean.py sets a step beside theirs.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from pretrain.spikes import Limits


class Lean(BF16_Optimizer):
    """`outcome` (2,) float64: the last step's gradient norm, infinite where that is not finite or its loss was bad already, and 1 where
    it was not applied."""

    outcome: Tensor
    accumulates = False  # the fp32 gradients hold those of earlier micro batches of the step

    def backward_prologue(self) -> None:
        self.clear_lp_grads(set_to_none=True)  # a gradient that is not there is taken over, not added to

    @torch.no_grad()
    def update_hp_grads(self, clear_lp_grads: bool = False) -> None:
        """A step's first micro batch overwrites the fp32 gradients, so nobody has to clear them."""
        pairs = [
            (lp, hp) for lps, hps in zip(self.bf16_groups, self.fp32_groups_gradients, strict=True) for lp, hp in zip(lps, hps, strict=True)
        ]
        given = [(hp, lp.grad.flatten()) for lp, hp in pairs if lp.grad is not None]
        accumulate = torch._foreach_add_ if self.accumulates else torch._foreach_copy_
        accumulate([hp for hp, _ in given], [grad for _, grad in given])
        if not self.accumulates:
            for hp in (hp for lp, hp in pairs if lp.grad is None):
                hp.zero_()
        self.accumulates = True

    def clear_hp_grads(self) -> None:
        self.accumulates = False

    def reduce(self, *_: Any, **__: Any) -> None:
        """This rank's share of the mean of the gradients over all ranks; the others' are left as they are."""
        if (world := dist.get_world_size()) > 1:
            for flat, mine in zip(self.fp32_groups_gradients_flat, self.fp32_groups_gradient_flat_partition, strict=True):
                share = torch.empty_like(mine)
                dist.reduce_scatter_tensor(share, flat)
                mine.copy_(share.div_(world))

    def expect(self, loss: Tensor, limits: Limits) -> None:
        """Before the step: its loss, on the device."""
        self.loss, self.limits = loss, limits

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """torch's fused AdamW and Muon divide gradients by `grad_scale` while they read them, and do nothing where `found_inf` is 1."""
        norm = self._norm()
        known = self.loss.isfinite() & (self.loss <= self.limits.loss) & norm.isfinite()
        refused = ~(known & (norm <= self.limits.grad_norm))
        self.outcome = torch.stack([norm.double().where(known, math.inf), refused.double()])
        self.optimizer.grad_scale = ((norm + 1e-6) / self.clip_grad).clamp(min=1) if self.clip_grad else None
        self.optimizer.found_inf = refused.float()
        for master, gradient in zip(self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition, strict=True):
            master.grad = gradient
        self.optimizer.step()
        self.update_lp_params()
        self.clear_hp_grads()

    def _norm(self) -> Tensor:
        """Of the whole gradient, on every rank."""
        norm = torch.nn.utils.get_total_norm(self.fp32_groups_gradient_flat_partition)
        if dist.get_world_size() > 1:
            dist.all_reduce(norm.square_())
            norm.sqrt_()
        return norm


def lean(engine: Any, zero: BF16_Optimizer) -> None:
    """Make DeepSpeed's engine and optimizer take their steps so."""
    zero.__class__, zero.overflow = Lean, False
    engine.buffered_allreduce_fallback = zero.reduce
