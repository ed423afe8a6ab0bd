"""The configuration that DeepSpeed is started with."""

from typing import Any

from trifold.modeling.transformer import Transformer
from trifold.pretrain.config.training import EngineConfig

BUCKET = 500_000_000  # elements: the most that DeepSpeed reduces at a time


def deepspeed_config(engine: EngineConfig, clip: float, model: Transformer, device: str) -> dict[str, Any]:
    """What `deepspeed.initialize` takes. `clip`: the largest gradient norm, 0 for none."""
    config: dict[str, Any] = {
        # micro batches are accumulated by the engine (set_gradient_accumulation_boundary)
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "steps_per_print": 2**62,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device before every micro batch
        "zero_optimization": _zero_config(engine, model, device),
        "zero_allow_untested_optimizer": True,  # Muon
        # offload: DeepSpeed's Adam would have to be compiled; torch's fused one does
        "zero_force_ds_cpu_optimizer": False,
    }
    if engine.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _zero_config(engine: EngineConfig, model: Transformer, device: str) -> dict[str, Any]:
    # DeepSpeed allocates a bucket in every backward
    bucket = min(BUCKET, 2 * sum(p.numel() for p in model.parameters()))
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if model.config.cell != "attention":
        # gathered once for all its steps: ranks take different numbers of them, and must gather equally often
        zero["leaf_module"] = {"classes": ["RecurrentStack"]}
    elif engine.compile:
        zero["leaf_module"] = {"classes": ["Block"]}  # a block's graph needs all its weights (compile.py)
    if engine.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device == "cuda"}
    return zero
