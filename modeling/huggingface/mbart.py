"""mBART (Liu et al. 2020): pre-norm BART with a final norm. Stock class: transformers/models/mbart."""

from collections.abc import Mapping
from typing import Any

from trifold.modeling.config import ModelConfig
from trifold.modeling.huggingface import bart
from trifold.modeling.huggingface.tables import Architecture

FINAL_NORM = "model.<s>.layer_norm.{p} = <s>.norm.{p}\n"


def write(config: ModelConfig, special: Mapping[str, int]) -> dict[str, Any]:
    return {
        **bart.write(config, special),
        "architectures": ["MBartForConditionalGeneration"],
        "model_type": "mbart",
    }


def read(hf: dict[str, Any]) -> dict[str, Any]:
    return {**bart.read(hf), "norm_places": ("pre",), "final_norm": True}


TABLE = bart.table("pre", bart.LEARNED + FINAL_NORM, bart.BIAS)
MBART = Architecture(
    "MBartForConditionalGeneration",
    "mbart",
    TABLE,
    write,
    bart.complete,
    read,
    also=("MBartModel",),
    prefix="model.",
    dropout=bart.BART.dropout,
)
