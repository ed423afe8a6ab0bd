"""RoBERTa (Liu et al. 2019): BERT under other names, and a head that always uses gelu.

Its positions count from the padding token's id + 1. Stock class: transformers/models/roberta.
"""

from collections.abc import Mapping
from typing import Any

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface import bert
from trifold.modeling.huggingface.tables import Architecture
from trifold.modeling.huggingface.task_heads import with_task_head

BODY = bert.BODY.replace("bert.", "roberta.")
TABLE = (
    BODY
    + """
lm_head.dense.{p} = head.dense.{p}
lm_head.layer_norm.{p} = head.norm.{p}
lm_head.bias = head.bias
lm_head.decoder.weight? = head.weight
lm_head.decoder.weight~ = embed.weight
lm_head.decoder.bias?head.weight = head.bias
"""
)


def write(config: ModelConfig, special: Mapping[str, int]) -> dict[str, Any]:
    return {**bert.write(config, special), "architectures": ["RobertaForMaskedLM"], "model_type": "roberta"}


def complete(hf: dict[str, Any]) -> dict[str, Any]:
    return {"pad_token_id": 1, **bert.complete(hf)}


def read(hf: dict[str, Any]) -> dict[str, Any]:
    if hf["hidden_act"] != "gelu":
        raise UserError(
            f"config.json sets hidden_act = {hf['hidden_act']!r}; RoBERTa's head uses gelu whatever that"
            " is, and Trifold has one activation for both"
        )
    offset = hf["pad_token_id"] + 1
    return {
        **bert.read(hf),
        "max_positions": hf["max_position_embeddings"] - offset,
        "position_offset": offset,
    }


ROBERTA = Architecture(
    "RobertaForMaskedLM",
    "roberta",
    TABLE,
    write,
    complete,
    read,
    also=("RobertaModel",),
    prefix="roberta.",
    dropout=bert.BERT.dropout,
)
ROBERTA_TOKENS = with_task_head(
    ROBERTA, "RobertaForTokenClassification", "labels", body=BODY, module="classifier"
)
ROBERTA_SPANS = with_task_head(
    ROBERTA, "RobertaForQuestionAnswering", "spans", body=BODY, module="qa_outputs"
)
