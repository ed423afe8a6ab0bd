"""Low-rank adapters in PEFT's format: an adapted model's state -> adapter_config.json and the tensors of
adapter_model.safetensors.

Names come from the architecture's own table. Where the stock class fuses projections, their adapters become
one of the summed rank, each in its own rows of B. A task's head is saved whole (modules_to_save).
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
    """(adapter_config, tensors) over the published folder `base`. Raises UserError where a stock weight lies
    transposed.
    """
    architecture, _ = express(config, special)
    plain = {name: tensor for name, tensor in state.items() if not name.endswith((".a", ".b"))}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    whole = []
    for line in lines(architecture.table, config, plain):
        module, _, leaf = line.stock.rpartition(".")
        if any(source.removesuffix(".weight") + ".a" in state for source in line.sources):
            if line.op:
                raise UserError(
                    f"{line.stock} lies otherwise than our weight ({line.op}), which PEFT's format cannot"
                    " say: publish it merged."
                )
            a, b = _joined(line, state)
            tensors |= {f"{_PREFIX}{module}.lora_A.weight": a, f"{_PREFIX}{module}.lora_B.weight": b}
            ranks[module] = len(a)
        elif config.outputs and line.sources[:1] in (("head.labels.weight",), ("head.labels.bias",)):
            tensors[f"{_PREFIX}{module}.{leaf}"] = state[line.sources[0]]
            whole.append(module.partition(".")[0])
    other = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    writes = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM", "encoder": None}[config.family]
    task = "QUESTION_ANS" if config.spans else "TOKEN_CLS" if config.labels else writes
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(set(whole)) or None,
        "rank_pattern": other,
        "alpha_pattern": {module: lora.scale * rank for module, rank in other.items()},
    }, tensors


def _joined(line: Line, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The adapters of a stock weight that is made of several of ours: A's below each other, B's on a diagonal
    of blocks.
    """
    parts, rows = [], []
    for source in line.sources:
        name, size = source.removesuffix(".weight"), len(state[source])
        has = f"{name}.a" in state
        parts += [state[f"{name}.a"]] if has else []
        rows.append(state[f"{name}.b"] if has else state[source].new_zeros(size, 0))
    return torch.cat(parts).contiguous(), torch.block_diag(*rows).contiguous()
