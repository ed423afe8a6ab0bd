"""Which parameters the optimizer updates, how, and how fast: parameter groups, Muon, and the learning rate
as a function of the step.

`make_optimizer` returns a torch optimizer that ZeRO can shard. Weight decay applies to every matrix,
embeddings included, and to no norm or bias (nanoGPT's rule, model.py: configure_optimizers).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from trifold.modeling.errors import UserError
from trifold.pretrain.config.training import OptimizerConfig, ScheduleConfig
from trifold.pretrain.engine.muon import Muon


def make_optimizer(model: nn.Module, config: OptimizerConfig, muon_dtype: torch.dtype) -> torch.optim.AdamW:
    """AdamW, or Muon for the matrices inside blocks with AdamW for everything else.

    Groups have a `base_lr`, the rate at factor 1. Frozen parameters are in no group. Raises UserError where
    Muon has no matrix to train.
    """
    muon_matrices, matrices, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if config.kind == "muon" and _in_block(name, parameter):
            muon_matrices.append(parameter)
        elif parameter.ndim >= 2:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    if config.kind == "muon" and not muon_matrices:
        raise UserError(
            "optimizer.kind muon updates matrices inside blocks, and none of them is trained here: set it to"
            " adamw."
        )

    adam = {"lr": config.lr, "base_lr": config.lr}
    muon = {"lr": config.muon_lr, "base_lr": config.muon_lr, "momentum": config.muon_momentum}
    groups: list[dict[str, Any]] = [
        {"params": muon_matrices, "weight_decay": config.weight_decay, **muon},
        {"params": matrices, "weight_decay": config.weight_decay, **adam},
        {"params": vectors, "weight_decay": 0.0, **adam},
    ]
    split: list[dict[str, Any]] = []
    for group in groups:
        if group["params"]:
            split += _split_by_depth(model, group, config.layer_decay)

    # fused: on one CPU core 9 times the speed of the default
    settings: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "fused": True}
    return Muon(split, muon_dtype, **settings) if muon_matrices else torch.optim.AdamW(split, **settings)


def initial_state(flat: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The state that torch's optimizer would make for `flat` in its first step; a resumed run needs it
    before.
    """
    zeros = torch.zeros_like(flat, requires_grad=False)
    if "momentum" in group:
        return {"momentum": zeros}
    return {
        "step": torch.zeros((), dtype=torch.float32, device=flat.device),
        "exp_avg": zeros,
        "exp_avg_sq": zeros.clone(),
    }


def _split_by_depth(model: nn.Module, group: dict[str, Any], layer_decay: float) -> list[dict[str, Any]]:
    """The group, or with layer_decay < 1 one group for each depth below the head, whose rate is
    layer_decay^depth (Clark et al. 2020, ELECTRA).
    """
    if layer_decay == 1:
        return [group]
    depths = {parameter: _depth(model, name) for name, parameter in model.named_parameters()}
    groups = []
    for depth in sorted({depths[p] for p in group["params"]}):
        lr = group["base_lr"] * layer_decay**depth
        parameters = [p for p in group["params"] if depths[p] == depth]
        groups.append({**group, "params": parameters, "lr": lr, "base_lr": lr})
    return groups


def _depth(model: nn.Module, name: str) -> int:
    """The number of layers from a parameter's own to the last. 0 for heads and final norms, one more than
    there are layers for embeddings and position tables.
    """
    num_layers = {
        f"{stack}.": len(list(module.children()))
        for stack, module in model.named_modules()
        if stack.endswith("blocks")
    }
    for stack, layers in num_layers.items():
        if name.startswith(stack):
            return layers - int(name.removeprefix(stack).split(".")[0])
    before_blocks = name.startswith("embed.") or ".position." in name or ".embed_norm." in name
    return max(num_layers.values(), default=0) + 1 if before_blocks else 0


def _in_block(name: str, p: nn.Parameter) -> bool:
    """Whether it is a matrix of a numbered layer. Embeddings, heads and position tables are not: they do not
    map hidden states to hidden states.
    """
    return p.ndim == 2 and any(component.isdigit() for component in name.split("."))


def lr_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The factor of all learning rates at step 0 <= step < steps, in [0, 1].

    Rises linearly to 1 at step `warmup_steps`, and reaches `final` at the last step. cosine: Loshchilov and
    Hutter 2017; wsd: 1 until the last `decay_steps`, then linear (Hu et al. 2024; with decay_steps 0 it stays
    1); inverse_sqrt: Raffel et al. 2020, scaled so that it ends at `final`.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    last = max(steps - 1, schedule.warmup_steps + 1)
    return schedule.final + (1 - schedule.final) * _DECAY[schedule.kind](schedule, step, last)


def _cosine(schedule: ScheduleConfig, step: int, last: int) -> float:
    return (1 + math.cos(math.pi * (step - schedule.warmup_steps) / (last - schedule.warmup_steps))) / 2


def _wsd(schedule: ScheduleConfig, step: int, last: int) -> float:
    return min(1.0, (last - step) / schedule.decay_steps) if schedule.decay_steps else 1.0


def _inverse_sqrt(schedule: ScheduleConfig, step: int, last: int) -> float:
    highest_at = schedule.warmup_steps + 1
    lowest = math.sqrt(highest_at / (last + 1))
    return (math.sqrt(highest_at / (step + 1)) - lowest) / (1 - lowest)


# 1 at the end of the warm-up, 0 at the last step
_DECAY = {"cosine": _cosine, "wsd": _wsd, "inverse_sqrt": _inverse_sqrt}
