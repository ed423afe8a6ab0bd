"""M2M-100 (Fan et al. 2020) and NLLB: mBART with sinusoidal positions, and no norm on the embeddings.

Positions count from the padding token's id + 1. Stock class: transformers/models/m2m_100.
"""

from collections.abc import Mapping
from typing import Any

from trifold.modeling.config import ModelConfig
from trifold.modeling.huggingface import bart, mbart
from trifold.modeling.huggingface.tables import Architecture

WAVES = """
model.<s>.embed_positions.weight~ = nothing    # both sides compute them
model.<s>.embed_positions.weights~ = nothing
"""


def write(config: ModelConfig, special: Mapping[str, int]) -> dict[str, Any]:
    hf = {
        **bart.write(config, special),
        "architectures": ["M2M100ForConditionalGeneration"],
        "model_type": "m2m_100",
    }
    return {
        name: value for name, value in hf.items() if name not in ("classifier_dropout", "forced_eos_token_id")
    }


def complete(hf: dict[str, Any]) -> dict[str, Any]:
    return bart.complete({"activation_function": "relu", "scale_embedding": True, "pad_token_id": 1, **hf})


def read(hf: dict[str, Any]) -> dict[str, Any]:
    return {
        **mbart.read(hf),
        "position": "sinusoidal",
        "position_offset": hf["pad_token_id"] + 1,
        "embed_norm": False,
        "logit_bias": False,
    }


TABLE = bart.table("pre", mbart.FINAL_NORM + WAVES, head="")
M2M100 = Architecture(
    "M2M100ForConditionalGeneration",
    "m2m_100",
    TABLE,
    write,
    complete,
    read,
    also=("M2M100Model",),
    prefix="model.",
    dropout=bart.BART.dropout,
)
