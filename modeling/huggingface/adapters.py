"""Low-rank adapters in PEFT's format: adapter_config.json and the tensors of adapter_model.safetensors.

Names come from the architecture's own table. Where the stock class fuses projections, their adapters become
one of the summed rank, each in its own rows of B. A task's head is saved in full (modules_to_save).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trifold.modeling.config import Lora, ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface import express
from trifold.modeling.huggingface.tables import Line, lines

_PREFIX = "base_model.model."


def adapters(
    config: ModelConfig, state: Mapping[str, Tensor], lora: Lora, special: Mapping[str, int], base: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config, tensors) on the published folder `base`.

    Raises UserError where a stock weight is transposed.
    """
    architecture, _ = express(config, special)
    plain = {name: tensor for name, tensor in state.items() if not name.endswith((".a", ".b"))}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    saved_modules = set()
    for line in lines(architecture.table, config, plain):
        module, _, leaf = line.stock.rpartition(".")
        if any(source.removesuffix(".weight") + ".a" in state for source in line.sources):
            if line.op:
                raise UserError(
                    f"{line.stock} is our weight transformed ({line.op}), which PEFT's format cannot express:"
                    " publish it merged."
                )
            a, b = _stacked(line, state)
            tensors |= {f"{_PREFIX}{module}.lora_A.weight": a, f"{_PREFIX}{module}.lora_B.weight": b}
            ranks[module] = len(a)
        elif config.outputs and line.sources[:1] in (("head.labels.weight",), ("head.labels.bias",)):
            tensors[f"{_PREFIX}{module}.{leaf}"] = state[line.sources[0]]
            saved_modules.add(module.partition(".")[0])
    other_ranks = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    return {
        "peft_type": "LORA",
        "task_type": _task_type(config),
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(saved_modules) or None,
        "rank_pattern": other_ranks,
        "alpha_pattern": {module: lora.scale * rank for module, rank in other_ranks.items()},
    }, tensors


def _task_type(config: ModelConfig) -> str | None:
    if config.spans:
        return "QUESTION_ANS"
    if config.labels:
        return "TOKEN_CLS"
    return {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM", "encoder": None}[config.family]


def _stacked(line: Line, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The adapter of a stock weight that stacks several of ours: A's stacked, B's block-diagonal."""
    a_matrices, b_matrices = [], []
    for source in line.sources:
        name, size = source.removesuffix(".weight"), len(state[source])
        if f"{name}.a" in state:
            a_matrices.append(state[f"{name}.a"])
            b_matrices.append(state[f"{name}.b"])
        else:
            b_matrices.append(state[source].new_zeros(size, 0))
    return torch.cat(a_matrices).contiguous(), torch.block_diag(*b_matrices).contiguous()
