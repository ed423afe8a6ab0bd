"""Recurrent models have no stock class: their folders have our own names, which only Trifold reads.

config.json names the architecture TrifoldRecurrent and the model type trifold_recurrent, which no other
library knows.
"""

from collections.abc import Mapping
from typing import Any

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface.fields import token_ids
from trifold.modeling.huggingface.tables import Architecture

FIELDS = [name for name in ModelConfig.model_fields if name != "label_smoothing"]  # that one is of a run
_CELLS = [
    f"cells.{parameter}_{side}_l{{i}}{direction}"
    for parameter in ("weight", "bias")
    for side in ("ih", "hh")
    for direction in ("", "_reverse")
]
_NAMES = (
    "embed.weight",
    *(f"encoder.{name}" for name in _CELLS),
    *(f"decoder.{name}" for name in _CELLS),
    "decoder.bridge.weight",
    "decoder.bridge.bias",
    "decoder.combine.weight",
    "decoder.combine.bias",
    "decoder.align.score.query.weight",
    "decoder.align.score.key.weight",
    "decoder.align.score.v.weight",
    "head.weight",
    "head.bias",
    "head.dense.weight",
    "head.dense.bias",
    "head.norm.weight",
    "head.norm.bias",
    "head.labels.weight",
    "head.labels.bias",
    "head.crf.between",
)
TABLE = "\n".join(f"{name}? = {name}" for name in _NAMES)


def write(config: ModelConfig, special: Mapping[str, int]) -> dict[str, Any]:
    if config.cell == "attention":
        raise UserError("its layers are recurrent")
    return {
        "architectures": ["TrifoldRecurrent"],
        "model_type": "trifold_recurrent",
        "is_encoder_decoder": config.family == "encoder-decoder",  # generation settings are read by it
        **config.model_dump(mode="json", include=set(FIELDS)),
        **token_ids(special),
    }


def complete(hf: dict[str, Any]) -> dict[str, Any]:
    fields = {name: ModelConfig.model_fields[name] for name in FIELDS}
    defaults = {name: field.default for name, field in fields.items() if not field.is_required()}
    return defaults | hf


def read(hf: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(hf[name]) if isinstance(hf[name], list) else hf[name] for name in FIELDS}


RECURRENT = Architecture(
    "TrifoldRecurrent", "trifold_recurrent", TABLE, write, complete, read, dropout=("dropout",)
)
