"""RoBERTa (Liu et al. 2019): BERT's body under other names, positions that count from the padding token's id
+ 1, and a head that always uses gelu. Stock class: transformers/models/roberta.
"""

from collections.abc import Mapping
from typing import Any

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface import bert
from trifold.modeling.huggingface.fields import label_fields, labels
from trifold.modeling.huggingface.tables import Architecture

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
TOKENS = bert.TOKENS.replace("bert.", "roberta.")
SPANS = bert.SPANS.replace("bert.", "roberta.")


def write(config: ModelConfig, special: Mapping[str, int]) -> dict[str, Any]:
    return {**bert.write(config, special), "architectures": ["RobertaForMaskedLM"], "model_type": "roberta"}


def complete(hf: dict[str, Any]) -> dict[str, Any]:
    return {"pad_token_id": 1, **bert.complete(hf)}


def read(hf: dict[str, Any]) -> dict[str, Any]:
    if hf["hidden_act"] != "gelu":
        raise UserError(
            f"config.json sets hidden_act = {hf['hidden_act']!r}; RoBERTa's head uses gelu all the same,"
            " which Trifold does not have"
        )
    offset = hf["pad_token_id"] + 1
    return {
        **bert.read(hf),
        "max_positions": hf["max_position_embeddings"] - offset,
        "position_offset": offset,
    }


def write_tokens(config: ModelConfig, special: Mapping[str, int]) -> dict[str, Any]:
    return {
        **write(config, special),
        "architectures": ["RobertaForTokenClassification"],
        **label_fields(config),
    }


def read_tokens(hf: dict[str, Any]) -> dict[str, Any]:
    return {**read(hf), "labels": labels(hf)}


def write_spans(config: ModelConfig, special: Mapping[str, int]) -> dict[str, Any]:
    return {
        **write(config, special),
        "architectures": ["RobertaForQuestionAnswering"],
        **label_fields(config),
    }


def read_spans(hf: dict[str, Any]) -> dict[str, Any]:
    return {**read(hf), "spans": True}


ROBERTA = Architecture(
    "RobertaForMaskedLM", "roberta", TABLE, write, complete, read, also=("RobertaModel",), prefix="roberta."
)
ROBERTA_TOKENS = Architecture(
    "RobertaForTokenClassification", "roberta", TOKENS, write_tokens, complete, read_tokens
)
ROBERTA_SPANS = Architecture(
    "RobertaForQuestionAnswering", "roberta", SPANS, write_spans, complete, read_spans
)
