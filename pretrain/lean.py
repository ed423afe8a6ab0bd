"""ZeRO-1 in bf16 with fp32 accumulation in few passes over memory: DeepSpeed's BF16_Optimizer, its step done on flat tensors.

In: DeepSpeed's engine and optimizer. Out: the same optimizer, whose gradients are gathered, reduced, measured and clipped group by group
instead of parameter by parameter: of the 94 bytes a parameter that DeepSpeed 0.19 moves in a step after the backward, 48 are left, and of
its 8 launches of a kernel a parameter one. All of this leans on private parts of DeepSpeed; tests/pretrain/test_engine.py covers it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer


class Lean(BF16_Optimizer):
    """`allows`: whether a step with this gradient norm may be applied (veto.py)."""

    allows: Callable[[float], bool]
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
        """The mean of the gradients over all ranks, in place."""
        if (world := dist.get_world_size()) > 1:
            for flat in self.fp32_groups_gradients_flat:
                dist.all_reduce(flat)
                flat.div_(world)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        norm = float(torch.nn.utils.get_total_norm(self.fp32_groups_gradients_flat))
        self.overflow = not (math.isfinite(norm) and self.allows(norm))
        self._global_grad_norm = math.inf if self.overflow else norm
        if not self.overflow:
            self._apply(self.clip_grad / (norm + 1e-6) if 0 < self.clip_grad < norm else 1.0)
        self.clear_hp_grads()

    def _apply(self, factor: float) -> None:
        """torch's fused AdamW scales gradients while it reads them; Muon's matrices are scaled beforehand."""
        flats = zip(self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition, self.optimizer.param_groups, strict=True)
        for master, gradient, group in flats:
            master.grad = gradient.mul_(factor) if "momentum" in group and factor != 1 else gradient
        self.optimizer.grad_scale = None if factor == 1 else torch.full((), 1 / factor, device=master.device)
        self.optimizer.step()
        self.update_lp_params()


def lean(engine: Any, zero: BF16_Optimizer) -> None:
    """Make DeepSpeed's engine and optimizer take their steps so."""
    zero.__class__ = Lean
    engine.buffered_allreduce_fallback = zero.reduce
