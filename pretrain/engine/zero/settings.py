"""DeepSpeed's own configuration: in, a recipe, its model and the kind of device; out, what
`deepspeed.initialize` takes.
"""

from typing import Any

from trifold.modeling.transformer import Transformer
from trifold.pretrain.config.training import TrainingConfig

BUCKET = 500_000_000  # elements: the most that DeepSpeed reduces at a time


def deepspeed_config(config: TrainingConfig, model: Transformer, device: str) -> dict[str, Any]:
    """What DeepSpeed is started with. Accumulation is ours (set_gradient_accumulation_boundary), hence 1
    here.
    """
    bucket = min(
        BUCKET, 2 * sum(p.numel() for p in model.parameters())
    )  # DeepSpeed allocates it in every backward
    zero: dict[str, Any] = {
        "stage": config.engine.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if (
        model.config.cell != "attention"
    ):  # gathered once for all its steps: ranks take unequally many, and must gather equally often
        zero["leaf_module"] = {"classes": ["RecurrentStack"]}
    elif config.engine.compile:  # a block's graph wants all its weights (compile.py)
        zero["leaf_module"] = {"classes": ["Block"]}
    if config.engine.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device == "cuda"}
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip,
        "steps_per_print": 2**62,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device before every micro batch
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # Muon is ours
        # offload: DeepSpeed's Adam would have to be compiled; torch's fused one does
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.engine.precision == "bf16":
        found |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return found
