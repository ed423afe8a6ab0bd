"""Recurrent models have no stock class: their folders hold our own names and dials, and Trifold alone reads
them back.

config.json names the architecture TrifoldRecurrent and the model type trifold_recurrent, which no other
library knows.
"""

from collections.abc import Mapping
from typing import Any

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface.fields import token_ids
from trifold.modeling.huggingface.tables import Architecture

DIALS = [
    name for name in ModelConfig.model_fields if name not in ("dropout", "label_smoothing")
]  # those two belong to training
_CELLS = [
    f"{part}_{side}_l{{i}}{way}"
    for part in ("weight", "bias")
    for side in ("ih", "hh")
    for way in ("", "_reverse")
]
_NAMES = (
    "embed.weight",
    *(f"{stack}.cells.{name}" for stack in ("encoder", "decoder") for name in _CELLS),
    *(f"decoder.{name}" for name in ("bridge.weight", "bridge.bias", "combine.weight", "combine.bias")),
    *(f"decoder.align.score.{name}.weight" for name in ("query", "key", "v")),
    *(
        "head.weight",
        "head.bias",
        "head.dense.weight",
        "head.dense.bias",
        "head.norm.weight",
        "head.norm.bias",
    ),
    *("head.labels.weight", "head.labels.bias", "head.crf.between"),
)
TABLE = "\n".join(f"{name}? = {name}" for name in _NAMES)


def write(config: ModelConfig, special: Mapping[str, int]) -> dict[str, Any]:
    if config.cell == "attention":
        raise UserError("its layers are recurrent")
    dials = config.model_dump(mode="json", include=set(DIALS))
    return {
        "architectures": ["TrifoldRecurrent"],
        "model_type": "trifold_recurrent",
        **dials,
        **token_ids(special),
    }


def complete(hf: dict[str, Any]) -> dict[str, Any]:
    return {
        name: field.default
        for name, field in ModelConfig.model_fields.items()
        if name in DIALS and not field.is_required()
    } | hf


def read(hf: dict[str, Any]) -> dict[str, Any]:
    return {dial: tuple(hf[dial]) if isinstance(hf[dial], list) else hf[dial] for dial in DIALS}


RECURRENT = Architecture("TrifoldRecurrent", "trifold_recurrent", TABLE, write, complete, read)
