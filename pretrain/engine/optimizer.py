"""Who is updated how, and how fast: parameter groups, Muon, and the learning rate as a function of the step.

In: a model and the recipe's Optimizer and Schedule. Out: a torch optimizer that ZeRO can shard, and pure
functions. Weight decay applies to every matrix, embeddings included, and to no norm or bias (nanoGPT's rule,
model.py: configure_optimizers).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from trifold.modeling.errors import UserError
from trifold.pretrain.config.training import OptimizerConfig, ScheduleConfig
from trifold.pretrain.engine.muon import Muon


def make_optimizer(model: nn.Module, config: OptimizerConfig, muon_dtype: torch.dtype) -> torch.optim.AdamW:
    """AdamW, or Muon for the matrices inside blocks. Groups carry `base_lr`, the rate at factor 1; frozen
    parameters are in none.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = {name for name, p in trained if config.kind == "muon" and _in_block(name, p)}
    if config.kind == "muon" and not matrices:
        raise UserError(
            "optimizer.kind muon is for matrices inside blocks, and none are trained here: take adamw."
        )
    adam = {"lr": config.lr, "base_lr": config.lr}
    muon = {"lr": config.muon_lr, "base_lr": config.muon_lr, "momentum": config.muon_momentum}
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in trained if n in matrices], "weight_decay": config.weight_decay, **muon},
        {
            "params": [p for n, p in trained if n not in matrices and p.ndim >= 2],
            "weight_decay": config.weight_decay,
            **adam,
        },
        {"params": [p for n, p in trained if n not in matrices and p.ndim < 2], "weight_decay": 0.0, **adam},
    ]
    groups = [
        part for group in groups if group["params"] for part in _by_depth(model, group, config.layer_decay)
    ]
    settings: dict[str, Any] = {
        "betas": config.betas,
        "eps": config.eps,
        "fused": True,
    }  # on one CPU core 9 times the speed of the default
    return Muon(groups, muon_dtype, **settings) if matrices else torch.optim.AdamW(groups, **settings)


def initial_state(flat: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """What torch's optimizer would make in its first step for `flat`; a resumed run needs it before."""
    zeros = torch.zeros_like(flat, requires_grad=False)
    if "momentum" in group:
        return {"momentum": zeros}
    return {
        "step": torch.zeros((), dtype=torch.float32, device=flat.device),
        "exp_avg": zeros,
        "exp_avg_sq": zeros.clone(),
    }


def _by_depth(model: nn.Module, group: dict[str, Any], decay: float) -> list[dict[str, Any]]:
    """The group, or where layers learn at rates of their own (Clark et al. 2020, ELECTRA) one for each depth
    below the head.
    """
    if decay == 1:
        return [group]
    depths = {parameter: _depth(model, name) for name, parameter in model.named_parameters()}
    parts = []
    for depth in sorted({depths[p] for p in group["params"]}):
        rate = group["base_lr"] * decay**depth
        parts.append(
            {
                **group,
                "params": [p for p in group["params"] if depths[p] == depth],
                "lr": rate,
                "base_lr": rate,
            }
        )
    return parts


def _depth(model: nn.Module, name: str) -> int:
    """Layers above a parameter, itself included: none for heads and final norms, one more than there are for
    what stands before them.
    """
    blocks = {
        f"{stack}.": len(list(module.children()))
        for stack, module in model.named_modules()
        if stack.endswith("blocks")
    }
    for stack, size in blocks.items():
        if name.startswith(stack):
            return size - int(name.removeprefix(stack).split(".")[0])
    before = name.startswith("embed.") or ".position." in name or ".embed_norm." in name
    return max(blocks.values(), default=0) + 1 if before else 0


def _in_block(name: str, p: nn.Parameter) -> bool:
    """A matrix of a numbered layer. Embeddings, heads and position tables stand outside: they map no hidden
    states to hidden states.
    """
    return p.ndim == 2 and any(part.isdigit() for part in name.split("."))


def lr_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The factor of all learning rates at step 0 <= step < steps, in [0, 1].

    Rises linearly to 1 at step `warmup_steps`, and reaches `final` at the last step. cosine: Loshchilov and
    Hutter 2017; wsd: 1 until the last `decay_steps`, then linear (Hu et al. 2024; with decay_steps 0 it stays
    1); inverse_sqrt: Raffel et al. 2020, scaled so that it ends at `final`.
    """
    warmup, last = schedule.warmup_steps, steps - 1
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return schedule.final + (1 - schedule.final) * _HEIGHT[schedule.kind](
        schedule, step, max(last, warmup + 1)
    )


def _cosine(schedule: ScheduleConfig, step: int, last: int) -> float:
    return (1 + math.cos(math.pi * (step - schedule.warmup_steps) / (last - schedule.warmup_steps))) / 2


def _wsd(schedule: ScheduleConfig, step: int, last: int) -> float:
    return min(1.0, (last - step) / schedule.decay_steps) if schedule.decay_steps else 1.0


def _inverse_sqrt(schedule: ScheduleConfig, step: int, last: int) -> float:
    top = schedule.warmup_steps + 1
    lowest = math.sqrt(top / (last + 1))
    return (math.sqrt(top / (step + 1)) - lowest) / (1 - lowest)


_HEIGHT = {
    "cosine": _cosine,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
}  # 1 at the end of the warm-up, 0 at the last step
