"""Recipes of the three families for ranks that share rows."""

from typing import Any

from tests.modeling.families import CONFIGS
from trifold.pretrain.config import pretraining as dials
from trifold.pretrain.config import training
from trifold.pretrain.config.pretraining import PretrainConfig

CASES: dict[str, Any] = {
    "llama": dials.CausalConfig(),
    "modernbert": dials.MaskedConfig(),
    "t5gemma": dials.SpansConfig(),
}


def of_family(name: str, stage: Any, sharing: int) -> PretrainConfig:
    model = CONFIGS[name].model_copy(update={"vocab_size": 301, "max_positions": 64})
    return PretrainConfig(
        run="unused",
        model=model,
        data=dials.DataConfig(
            sources=(dials.SourceConfig(path="unused"),), heldout_fraction=0.1, row_length=64
        ),
        objective=CASES[name],
        optimizer=training.OptimizerConfig(lr=1e-2, clip=0.0),
        engine=training.EngineConfig(zero_stage=stage, sequence_parallel=sharing),
        steps=10,
        step_rows=8,
        micro_rows=4,
    )
