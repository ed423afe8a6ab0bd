"""Keeps DeepSpeed's own step from being applied where the loss or the gradient norm exceeds a limit.

DeepSpeed skips a step where the norm of the reduced gradients is not finite, or where an earlier check says
so: on all ranks alike, before anything is changed. `StepGuard` replaces the earlier check by one of the
loss, and shows DeepSpeed a norm beyond its limit as NaN. (The fused ZeRO-1 step, zero1_step.py, decides by
itself.) Private attributes of DeepSpeed 0.19 are used; tests/pretrain/engine/test_engine.py covers each
stage and precision.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trifold.pretrain.engine.spikes import StepLimits


class StepGuard:
    """`norm` is the last step's gradient norm, infinite where it was not measured."""

    def __init__(self, zero: Any, stage: int) -> None:
        """`zero`: DeepSpeed's optimizer."""
        self.limits, self.loss_allowed, self.norm = StepLimits(), True, math.inf

        def check_loss(*_: Any, **__: Any) -> bool:
            zero.overflow = not self.loss_allowed
            return zero.overflow

        if stage == 3:
            norms = zero._get_norm_groups
            zero._overflow_check_and_loss_scale_update = check_loss
            zero._get_norm_groups = lambda: self._mask_if_over_limit(norms())
        else:
            norm = zero.scaled_global_norm
            zero.check_grad_overflow, zero.check_overflow = True, check_loss
            zero.scaled_global_norm = lambda: self._mask_if_over_limit([norm()])[0]

    def set_loss_and_limits(self, loss: float, limits: StepLimits) -> None:
        """Before the optimizer's step."""
        self.limits, self.norm = limits, math.inf
        self.loss_allowed = math.isfinite(loss) and loss <= limits.loss

    def _mask_if_over_limit(self, norms: list[Tensor]) -> list[Tensor]:
        """The norms of the gradient's groups, or NaN where the total exceeds the limit."""
        return norms if self._allows(lambda: norms) else [norm * torch.nan for norm in norms]

    def _allows(self, norms: Callable[[], list[Tensor]]) -> bool:
        """Whether the total norm keeps the limit. Without a limit it is not measured, because that would wait
        for the device once more.
        """
        if self.limits.grad_norm == math.inf:
            return True
        group_norms = [float(norm) for norm in norms()]
        finite = min(group_norms) >= 0  # DeepSpeed gives -1 for a norm that is not finite
        self.norm = math.hypot(*group_norms) if finite else math.inf
        return self.norm <= self.limits.grad_norm
