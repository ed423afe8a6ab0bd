"""Who is updated how, and how fast: parameter groups, Muon, and the learning rate as a function of the step.

In: a model and the recipe's Optimizer and Schedule. Out: a torch optimizer that ZeRO can shard, and pure functions. Weight decay applies to
every matrix, embeddings included, and to no norm or bias (nanoGPT's rule, model.py: configure_optimizers).
"""

import math

import torch
from torch import nn

from pretrain.config import Optimizer, Schedule


def make_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """AdamW whose groups carry `base_lr`, the learning rate at factor 1. Frozen parameters are in no group."""
    trained = [p for p in model.parameters() if p.requires_grad]
    shared = {"lr": config.lr, "base_lr": config.lr}
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay, **shared},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, **shared},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=config.betas, eps=config.eps)


def lr_factor(schedule: Schedule, step: int, steps: int) -> float:
    """The factor of all learning rates at step 0 <= step < steps, in [0, 1].

    Rises linearly to 1 at step `warmup_steps`, and reaches `final` at the last step. cosine: Loshchilov and Hutter 2017; wsd: 1 until the
    last `decay_steps`, then linear (Hu et al. 2024; with decay_steps 0 it stays 1); inverse_sqrt: Raffel et al. 2020, scaled so that it
    ends at `final`.
    """
    warmup, last = schedule.warmup_steps, steps - 1
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return schedule.final + (1 - schedule.final) * _HEIGHT[schedule.kind](schedule, step, max(last, warmup + 1))


def _cosine(schedule: Schedule, step: int, last: int) -> float:
    return (1 + math.cos(math.pi * (step - schedule.warmup_steps) / (last - schedule.warmup_steps))) / 2


def _wsd(schedule: Schedule, step: int, last: int) -> float:
    return min(1.0, (last - step) / schedule.decay_steps) if schedule.decay_steps else 1.0


def _inverse_sqrt(schedule: Schedule, step: int, last: int) -> float:
    top = schedule.warmup_steps + 1
    lowest = math.sqrt(top / (last + 1))
    return (math.sqrt(top / (step + 1)) - lowest) / (1 - lowest)


_HEIGHT = {"cosine": _cosine, "wsd": _wsd, "inverse_sqrt": _inverse_sqrt}  # 1 at the end of the warm-up, 0 at the last step
