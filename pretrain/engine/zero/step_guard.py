"""Keeps DeepSpeed from applying a step that is not allowed: in, a step's loss and its limits; out, a step
that no rank applied.

DeepSpeed skips a step where the norm of the reduced gradients is not finite, or where an earlier check says
so: on all ranks alike, before anything is changed. The earlier check is ours, for the loss, and a norm beyond
its limit is shown to DeepSpeed as NaN (lean.py judges its steps itself). All of this leans on private parts
of DeepSpeed 0.19; tests/pretrain/engine/test_engine.py covers each stage and precision.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trifold.pretrain.engine.spikes import StepLimits


class StepGuard:
    """`norm`: that of the last step's gradients, where it was measured here, else infinite."""

    def __init__(self, zero: Any, stage: int) -> None:
        """`zero`: DeepSpeed's optimizer."""
        self.limits, self.loss_allowed, self.norm = StepLimits(), True, math.inf

        def early(*_: Any, **__: Any) -> bool:
            zero.overflow = not self.loss_allowed
            return zero.overflow

        if stage == 3:
            norms = zero._get_norm_groups
            zero._overflow_check_and_loss_scale_update = early
            zero._get_norm_groups = lambda: self._mask_if_over_limit(norms())
        else:
            norm = zero.scaled_global_norm
            zero.check_grad_overflow, zero.check_overflow = True, early
            zero.scaled_global_norm = lambda: self._mask_if_over_limit([norm()])[0]

    def set_loss_and_limits(self, loss: float, limits: StepLimits) -> None:
        """Before the optimizer's step."""
        self.limits, self.norm = limits, math.inf
        self.loss_allowed = math.isfinite(loss) and loss <= limits.loss

    def _mask_if_over_limit(self, norms: list[Tensor]) -> list[Tensor]:
        """Norms of the gradient's parts as they are, or NaN where the whole is beyond the limit."""
        return norms if self._allows(lambda: norms) else [norm * torch.nan for norm in norms]

    def _allows(self, norms: Callable[[], list[Tensor]]) -> bool:
        """Without a limit nothing is looked at: that would wait for the device once more. DeepSpeed says -1
        for what is not finite.
        """
        if self.limits.grad_norm == math.inf:
            return True
        parts = [float(norm) for norm in norms()]
        self.norm = math.hypot(*parts) if min(parts) >= 0 else math.inf
        return self.norm <= self.limits.grad_norm
