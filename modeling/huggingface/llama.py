"""Llama (Touvron et al. 2023): our decoders. Stock class: transformers/models/llama."""

from collections.abc import Mapping
from typing import Any

from trifold.modeling.config import ModelConfig
from trifold.modeling.huggingface.fields import ACTIVATIONS, activation, check_heads, rope, token_ids
from trifold.modeling.huggingface.tables import Architecture
from trifold.modeling.huggingface.task_heads import with_task_head

BODY = """
model.embed_tokens.weight = embed.weight
model.layers.{i}.input_layernorm.weight = decoder.blocks.{i}.attn.pre.weight
model.layers.{i}.self_attn.q_proj.{p} = decoder.blocks.{i}.attn.f.q.{p}
model.layers.{i}.self_attn.k_proj.{p} = decoder.blocks.{i}.attn.f.k.{p}
model.layers.{i}.self_attn.v_proj.{p} = decoder.blocks.{i}.attn.f.v.{p}
model.layers.{i}.self_attn.o_proj.{p} = decoder.blocks.{i}.attn.f.o.{p}
model.layers.{i}.post_attention_layernorm.weight = decoder.blocks.{i}.mlp.pre.weight
model.layers.{i}.mlp.gate_proj.{p} = decoder.blocks.{i}.mlp.f.gate.{p}
model.layers.{i}.mlp.up_proj.{p} = decoder.blocks.{i}.mlp.f.up.{p}
model.layers.{i}.mlp.down_proj.{p} = decoder.blocks.{i}.mlp.f.down.{p}
model.norm.weight = decoder.norm.weight
model.layers.{i}.self_attn.rotary_emb.inv_freq~ = nothing    # buffers of 2023
model.rotary_emb.inv_freq~ = nothing
"""

TABLE = (
    BODY
    + """
lm_head.weight? = head.weight
lm_head.weight~ = embed.weight
"""
)


def write(config: ModelConfig, special: Mapping[str, int]) -> dict[str, Any]:
    check_heads(config)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "hidden_act": ACTIVATIONS[config.activation],
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "rope_parameters": rope(config.rope_theta),
        "rope_theta": config.rope_theta,  # for transformers 4 and other runtimes
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": config.init_std,
        "use_cache": True,
        **token_ids(special),
    }


def complete(hf: dict[str, Any]) -> dict[str, Any]:
    theta = (hf.get("rope_parameters") or hf).get("rope_theta", 10_000.0)
    return {
        "num_key_value_heads": hf["num_attention_heads"],
        "head_dim": hf["hidden_size"] // hf["num_attention_heads"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rope_parameters": rope(theta),
        "rope_theta": theta,
        **{name: value for name, value in hf.items() if value is not None},
    }


def read(hf: dict[str, Any]) -> dict[str, Any]:
    return {
        "family": "decoder",
        "vocab_size": hf["vocab_size"],
        "dim": hf["hidden_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": hf["num_attention_heads"],
        "num_kv_heads": hf["num_key_value_heads"],
        "head_dim": hf["head_dim"],
        "mlp_dim": hf["intermediate_size"],
        "activation": activation(hf, "hidden_act"),
        "bias": hf["attention_bias"],
        "norm_eps": float(hf["rms_norm_eps"]),
        "max_positions": hf["max_position_embeddings"],
        "rope_theta": float(hf["rope_parameters"]["rope_theta"]),
        "tie_embeddings": hf["tie_word_embeddings"],
        "init_std": hf.get("initializer_range", 0.02),
    }


LLAMA = Architecture("LlamaForCausalLM", "llama", TABLE, write, complete, read)
LLAMA_TOKENS = with_task_head(
    LLAMA,
    "LlamaForTokenClassification",
    "labels",
    body=BODY,
    module="score",
    settings={"classifier_dropout": 0.0},
)
LLAMA_SPANS = with_task_head(
    LLAMA,
    "LlamaForQuestionAnswering",
    "spans",
    body=BODY.replace("model.", "transformer."),
    module="qa_outputs",
)
