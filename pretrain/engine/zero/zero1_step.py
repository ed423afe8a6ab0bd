"""The fused ZeRO-1 step: DeepSpeed's optimizers, with gradients and weights stepped as flat tensors.

Gradients are gathered, reduced, measured and clipped group by group instead of parameter by parameter: by
count about half the bytes that DeepSpeed 0.19 moves after the backward, and no kernel launch for each
parameter but the one that gathers it. Whether the step is applied is decided on the device, which never
waits for the host.

Why we replace methods of DeepSpeed: its optimizers do all the rest that this needs (groups, padding,
partitions, the mapping that zero/slices.py reads, the update of low-precision weights), and have no hook
for the step alone. `install_fused_zero1_step` therefore gives DeepSpeed's own optimizer object a subclass
of its class. These are the private names, all of DeepSpeed 0.19;
tests/pretrain/engine/zero/test_zero1_step.py compares a step with DeepSpeed's, and fails where one of them
changes:

    BF16_Optimizer                        of bf16 weights
        bf16_groups                           the parameters of each group
        fp32_groups_flat_partition            this rank's shard of the fp32 masters
        fp32_groups_gradients_flat            all fp32 gradients of a group, flat
        fp32_groups_gradient_flat_partition   this rank's shard of them, a view
        fp32_groups_gradients                 the gradient of each parameter, views
        backward_prologue, update_hp_grads, clear_hp_grads, clear_lp_grads   called around each backward
    DeepSpeedZeroOptimizer                of fp32 weights, stage 1
        single_partition_of_fp32_groups       this rank's shard of the masters
        bit16_groups_flat                     all weights of a group, flat
        round_robin_bit16_groups, round_robin_bit16_offsets   its parameters, and where each begins
        _grad_acc_hooks                       the hooks that would copy gradients into buckets
        reduce_gradients                      called after the last backward of a step
    both
        optimizer, clip_grad, overflow, step, update_lp_params
    DeepSpeedEngine
        buffered_allreduce_fallback           would reduce the gradients of BF16_Optimizer
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


def install_fused_zero1_step(engine: Any, zero: BF16_Optimizer | DeepSpeedZeroOptimizer) -> None:
    """Make DeepSpeed's engine and ZeRO optimizer take fused steps."""
    zero.__class__ = FlatZero1StepBF16 if isinstance(zero, BF16_Optimizer) else FlatZero1StepFP32
    zero.attach(engine)


class FlatZero1Step:
    """`outcome` (2,) float64 is (gradient norm, rejected) of the last step: the norm is infinite where it
    is not finite or the loss was bad, and rejected is 1 where the step was not applied.
    """

    outcome: Tensor
    masters: Sequence[Tensor]  # of each group: this rank's shard of the fp32 weights, flat
    flat_grads: Sequence[Tensor]  # of each group: all gradients
    grad_shards: Sequence[Tensor]  # of each group: this rank's shard of `flat_grads`, as views

    def reduce(self, *_: Any, **__: Any) -> None:
        """Average the gradients over ranks into this rank's shards. The other ranks' shards stay as they
        are.
        """
        if (world := dist.get_world_size()) > 1:
            for flat, shard in zip(self.flat_grads, self.grad_shards, strict=True):
                total = torch.empty_like(shard)
                dist.reduce_scatter_tensor(total, flat)
                shard.copy_(total.div_(world))

    def set_loss_and_limits(self, loss: Tensor, limits: StepLimits) -> None:
        """Called before the step. `loss` is on the device."""
        self.loss, self.limits = loss, limits

    @torch.no_grad()
    def step(self: Any, closure: None = None) -> None:
        """torch's fused AdamW and Muon divide gradients by `grad_scale` while they read them, and do nothing
        where `found_inf` is 1.
        """
        norm = self._global_norm()
        valid = self.loss.isfinite() & (self.loss <= self.limits.loss) & norm.isfinite()
        rejected = ~(valid & (norm <= self.limits.grad_norm))
        self.outcome = torch.stack([norm.double().where(valid, math.inf), rejected.double()])

        self.optimizer.grad_scale = ((norm + 1e-6) / self.clip_grad).clamp(min=1) if self.clip_grad else None
        self.optimizer.found_inf = rejected.float()
        for master, gradient in zip(self.masters, self.grad_shards, strict=True):
            master.grad = gradient
        self.optimizer.step()
        self.update_lp_params()
        self.clear_hp_grads()

    def clear_hp_grads(self) -> None:
        """Nothing to do: the next step overwrites them."""

    def _global_norm(self) -> Tensor:
        """The norm of all gradients of all ranks."""
        norm = torch.nn.utils.get_total_norm(self.grad_shards)
        if dist.get_world_size() > 1:
            dist.all_reduce(norm.square_())
            norm.sqrt_()
        return norm


class FlatZero1StepBF16(FlatZero1Step, BF16_Optimizer):
    """bf16 weights, whose gradients accumulate in fp32."""

    accumulates = False  # the fp32 gradients hold those of earlier micro batches of this step

    def attach(self, engine: Any) -> None:
        self.overflow = False
        self.masters = self.fp32_groups_flat_partition
        self.flat_grads = self.fp32_groups_gradients_flat
        self.grad_shards = self.fp32_groups_gradient_flat_partition
        engine.buffered_allreduce_fallback = self.reduce

    def backward_prologue(self) -> None:
        self.clear_lp_grads(set_to_none=True)  # autograd then sets a gradient instead of adding to one

    @torch.no_grad()
    def update_hp_grads(self, clear_lp_grads: bool = False) -> None:
        """A step's first micro batch overwrites the fp32 gradients, so they need not be cleared."""
        pairs: list[tuple[nn.Parameter, Tensor]] = []
        for parameters, gradients in zip(self.bf16_groups, self.fp32_groups_gradients, strict=True):
            pairs += zip(parameters, gradients, strict=True)
        _collect_gradients(pairs, self.accumulates)
        self.accumulates = True

    def clear_hp_grads(self) -> None:
        self.accumulates = False


class FlatZero1StepFP32(FlatZero1Step, DeepSpeedZeroOptimizer):
    """fp32 weights, whose gradients accumulate where autograd puts them and are gathered once a step."""

    def attach(self, engine: Any) -> None:
        for hook in self._grad_acc_hooks:
            hook.remove()
        self.overflow = False
        self.masters = self.single_partition_of_fp32_groups
        self.flat_grads = [torch.zeros_like(flat) for flat in self.bit16_groups_flat]
        rank, world = dist.get_rank(), dist.get_world_size()
        self.grad_shards = [flat.chunk(world)[rank] for flat in self.flat_grads]

        self.pairs: list[tuple[nn.Parameter, Tensor]] = []  # each parameter, and its range of `flat_grads`
        groups = zip(
            self.flat_grads, self.round_robin_bit16_groups, self.round_robin_bit16_offsets, strict=True
        )
        for flat, parameters, offsets in groups:
            for parameter, offset in zip(parameters, offsets, strict=True):
                self.pairs.append((parameter, flat[offset : offset + parameter.numel()]))

    @torch.no_grad()
    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Called after the backward of a step's last micro batch."""
        _collect_gradients(self.pairs)
        self.zero_grad()
        self.reduce()


def _collect_gradients(pairs: Iterable[tuple[nn.Parameter, Tensor]], add: bool = False) -> None:
    """Copy, or add, each parameter's gradient to the flat tensor beside it; a missing gradient is zero."""
    targets, gradients = [], []
    for parameter, flat in pairs:
        if parameter.grad is not None:
            targets.append(flat)
            gradients.append(parameter.grad.flatten())
        elif not add:
            flat.zero_()
    (torch._foreach_add_ if add else torch._foreach_copy_)(targets, gradients)
