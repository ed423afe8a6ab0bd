"""T5Gemma (Zhang et al. 2025): Trifold's encoder-decoders. Stock class: transformers/models/t5gemma.

The stock class has an embedding table per stack and never ties them: our one table is written twice. Its
norms multiply by (1 + w). Settings left out of its config are on by default (softcapping, sliding layers),
which short inputs do not show.
"""

from collections.abc import Mapping
from typing import Any

from trifold.modeling.config import ModelConfig
from trifold.modeling.huggingface.fields import ACTIVATIONS, activation, check_heads, rope, token_ids
from trifold.modeling.huggingface.tables import Architecture
from trifold.modeling.huggingface.task_heads import with_task_head

STACK = """
model.<s>.embed_tokens.weight = embed.weight
model.<s>.layers.{i}.pre_self_attn_layernorm.weight = <s>.blocks.{i}.attn.pre.weight | minus1
model.<s>.layers.{i}.self_attn.q_proj.weight = <s>.blocks.{i}.attn.f.q.weight
model.<s>.layers.{i}.self_attn.k_proj.weight = <s>.blocks.{i}.attn.f.k.weight
model.<s>.layers.{i}.self_attn.v_proj.weight = <s>.blocks.{i}.attn.f.v.weight
model.<s>.layers.{i}.self_attn.o_proj.weight = <s>.blocks.{i}.attn.f.o.weight
model.<s>.layers.{i}.post_self_attn_layernorm.weight = <s>.blocks.{i}.attn.inner.weight | minus1
model.<s>.layers.{i}.pre_feedforward_layernorm.weight = <s>.blocks.{i}.mlp.pre.weight | minus1
model.<s>.layers.{i}.mlp.gate_proj.weight = <s>.blocks.{i}.mlp.f.gate.weight
model.<s>.layers.{i}.mlp.up_proj.weight = <s>.blocks.{i}.mlp.f.up.weight
model.<s>.layers.{i}.mlp.down_proj.weight = <s>.blocks.{i}.mlp.f.down.weight
model.<s>.layers.{i}.post_feedforward_layernorm.weight = <s>.blocks.{i}.mlp.inner.weight | minus1
model.<s>.norm.weight = <s>.norm.weight | minus1
"""
CROSS = """
model.decoder.layers.{i}.pre_cross_attn_layernorm.weight = decoder.blocks.{i}.cross.pre.weight | minus1
model.decoder.layers.{i}.cross_attn.q_proj.weight = decoder.blocks.{i}.cross.f.q.weight
model.decoder.layers.{i}.cross_attn.k_proj.weight = decoder.blocks.{i}.cross.f.k.weight
model.decoder.layers.{i}.cross_attn.v_proj.weight = decoder.blocks.{i}.cross.f.v.weight
model.decoder.layers.{i}.cross_attn.o_proj.weight = decoder.blocks.{i}.cross.f.o.weight
model.decoder.layers.{i}.post_cross_attn_layernorm.weight = decoder.blocks.{i}.cross.inner.weight | minus1
"""
HEAD = """
lm_head.out_proj.weight? = head.weight
lm_head.out_proj.weight~ = embed.weight
"""
ENCODER = STACK.replace("<s>", "encoder")
TABLE = ENCODER + STACK.replace("<s>", "decoder") + CROSS + HEAD


def write(config: ModelConfig, special: Mapping[str, int]) -> dict[str, Any]:
    check_heads(config)
    return {
        "architectures": ["T5GemmaForConditionalGeneration"],
        "model_type": "t5gemma",
        "is_encoder_decoder": True,
        "encoder": _write_stack(config, special, is_decoder=False),
        "decoder": {
            **_write_stack(config, special, is_decoder=True),
            "cross_attention_hidden_size": config.dim,
        },
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "dropout_rate": config.dropout,
        "classifier_dropout_rate": 0.0,
        "initializer_range": config.init_std,
        **token_ids(special),
        "decoder_start_token_id": special.get("start", special["bos"]),
    }


def _write_stack(config: ModelConfig, special: Mapping[str, int], is_decoder: bool) -> dict[str, Any]:
    scale = config.attention_scale or config.head_dim**-0.5
    return {
        "model_type": "t5_gemma_module",
        "is_decoder": is_decoder,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "hidden_activation": ACTIVATIONS[config.activation],
        "attention_bias": False,
        "rms_norm_eps": config.norm_eps,
        "query_pre_attn_scalar": round(scale**-2),  # an int in the stock class
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": ["full_attention"] * config.num_layers,
        # unused without sliding layers, but the stock mask code requires a number
        "sliding_window": config.max_positions,
        "max_position_embeddings": config.max_positions,
        "rope_parameters": rope(config.rope_theta),
        "rope_theta": config.rope_theta,  # for transformers 4 and other runtimes
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "dropout_rate": config.dropout,
        "initializer_range": config.init_std,
        "use_cache": True,
        **token_ids(special),
    }


def complete(hf: dict[str, Any]) -> dict[str, Any]:
    filled = {
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "vocab_size": hf["decoder"]["vocab_size"],
        **hf,
    }
    for name in ("encoder", "decoder"):
        filled[name] = _complete_stack(hf[name], filled["tie_word_embeddings"])
    return filled


def _complete_stack(stack: dict[str, Any], tied: bool) -> dict[str, Any]:
    theta = (stack.get("rope_parameters") or stack).get("rope_theta", 10_000.0)
    filled = {
        "attention_bias": False,
        "rope_parameters": rope(theta),
        "rope_theta": theta,
        **stack,
        "tie_word_embeddings": tied,
    }
    if "sliding_attention" not in filled["layer_types"]:
        filled["sliding_window"] = filled["max_position_embeddings"]  # unused
    return filled


def read(hf: dict[str, Any]) -> dict[str, Any]:
    stack = hf["decoder"]
    return {
        "family": "encoder-decoder",
        "vocab_size": stack["vocab_size"],
        "dim": stack["hidden_size"],
        "num_layers": stack["num_hidden_layers"],
        "num_heads": stack["num_attention_heads"],
        "num_kv_heads": stack["num_key_value_heads"],
        "head_dim": stack["head_dim"],
        "mlp_dim": stack["intermediate_size"],
        "activation": activation(stack, "hidden_activation"),
        "norm_places": ("pre", "inner"),
        "norm_eps": float(stack["rms_norm_eps"]),
        "max_positions": stack["max_position_embeddings"],
        "rope_theta": float(stack["rope_theta"]),
        "attention_scale": None
        if stack["query_pre_attn_scalar"] == stack["head_dim"]
        else stack["query_pre_attn_scalar"] ** -0.5,
        "embed_scale": stack["hidden_size"] ** 0.5,
        "tie_embeddings": hf["tie_word_embeddings"],
        "dropout": hf.get("dropout_rate", 0.0),
        "init_std": stack.get("initializer_range", 0.02),
    }


T5GEMMA = Architecture(
    "T5GemmaForConditionalGeneration",
    "t5gemma",
    TABLE,
    write,
    complete,
    read,
    dropout=("dropout_rate", "encoder.dropout_rate", "decoder.dropout_rate"),
)
# The encoder alone; the stock config has a decoder all the same.
T5GEMMA_TOKENS = with_task_head(
    T5GEMMA,
    "T5GemmaForTokenClassification",
    "labels",
    body=ENCODER,
    module="score.out_proj",
    settings={"is_encoder_decoder": False},
    fields={"family": "encoder"},
)
