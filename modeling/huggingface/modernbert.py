"""ModernBERT (Warner et al. 2024): Trifold's encoders. Stock class: transformers/models/modernbert.

Local layers attend to keys within local_attention // 2 and have their own rotary theta; the first layer has
no norm before attention.
"""

from collections.abc import Mapping
from typing import Any

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface.fields import ACTIVATIONS, activation, check_heads, rope, token_ids
from trifold.modeling.huggingface.tables import Architecture
from trifold.modeling.huggingface.task_heads import with_task_head

BODY = """
model.embeddings.tok_embeddings.weight = embed.weight
model.embeddings.norm.{p} = encoder.embed_norm.{p}
model.layers.{i}.attn_norm.{p}? = encoder.blocks.{i}.attn.pre.{p}
model.layers.{i}.attn.Wqkv.{p} =
    encoder.blocks.{i}.attn.f.q.{p}, encoder.blocks.{i}.attn.f.k.{p}, encoder.blocks.{i}.attn.f.v.{p}
model.layers.{i}.attn.Wo.{p} = encoder.blocks.{i}.attn.f.o.{p}
model.layers.{i}.mlp_norm.{p} = encoder.blocks.{i}.mlp.pre.{p}
model.layers.{i}.mlp.Wi.{p} = encoder.blocks.{i}.mlp.f.gate.{p}, encoder.blocks.{i}.mlp.f.up.{p}
model.layers.{i}.mlp.Wo.{p} = encoder.blocks.{i}.mlp.f.down.{p}
model.final_norm.{p} = encoder.norm.{p}
head.dense.{p} = head.dense.{p}
head.norm.{p} = head.norm.{p}
"""

TABLE = (
    BODY
    + """
decoder.weight? = head.weight
decoder.weight~ = embed.weight
decoder.bias? = head.bias
"""
)


def write(config: ModelConfig, special: Mapping[str, int]) -> dict[str, Any]:
    check_heads(config)
    every = config.global_every if config.local_window else 1
    return {
        "architectures": ["ModernBertForMaskedLM"],
        "model_type": "modernbert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_activation": ACTIVATIONS[config.activation],
        "classifier_activation": ACTIVATIONS[config.activation],
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "norm_bias": config.bias,
        "classifier_bias": config.bias,
        "decoder_bias": config.logit_bias,
        "norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "local_attention": 2 * config.local_window,
        "layer_types": _layer_types(config.num_layers, every),
        "rope_parameters": {
            "full_attention": rope(config.rope_theta),
            "sliding_attention": rope(config.local_rope_theta),
        },
        # For transformers 4 and other runtimes, the last two settings once more:
        "global_attn_every_n_layers": every,
        "global_rope_theta": config.rope_theta,
        "local_rope_theta": config.local_rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "mlp_dropout": 0.0,
        "classifier_dropout": 0.0,
        "initializer_range": config.init_std,
        **token_ids(special),
        "cls_token_id": special["bos"],
        "sep_token_id": special["eos"],
    }


def complete(hf: dict[str, Any]) -> dict[str, Any]:
    layers = hf["num_hidden_layers"]
    types = hf.get("layer_types") or _layer_types(layers, hf.get("global_attn_every_n_layers", 3))
    fitting = [every for every in range(1, layers + 1) if _layer_types(layers, every) == types]
    if not fitting:
        raise UserError(
            f"config.json sets layer_types = {types}; Trifold has every n-th layer full, from the first on"
        )
    ropes = hf.get("rope_parameters") or {}
    thetas = {
        "full_attention": ropes.get("full_attention") or rope(hf.get("global_rope_theta", 160_000.0)),
        "sliding_attention": ropes.get("sliding_attention") or rope(hf.get("local_rope_theta", 10_000.0)),
    }
    return {
        "tie_word_embeddings": True,
        **hf,
        "layer_types": types,
        "global_attn_every_n_layers": fitting[0],
        "rope_parameters": thetas,
        "global_rope_theta": thetas["full_attention"]["rope_theta"],
        "local_rope_theta": thetas["sliding_attention"]["rope_theta"],
    }


def read(hf: dict[str, Any]) -> dict[str, Any]:
    return {
        "family": "encoder",
        "vocab_size": hf["vocab_size"],
        "dim": hf["hidden_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": hf["num_attention_heads"],
        "num_kv_heads": hf["num_attention_heads"],
        "head_dim": hf["hidden_size"] // hf["num_attention_heads"],
        "mlp_dim": hf["intermediate_size"],
        "activation": activation(hf, "hidden_activation"),
        "bias": hf["attention_bias"],
        "norm": "layer",
        "norm_eps": float(hf["norm_eps"]),
        "first_attention_norm": False,
        "embed_norm": True,
        "max_positions": hf["max_position_embeddings"],
        "rope_theta": float(hf["global_rope_theta"]),
        "local_window": hf["local_attention"] // 2,
        "global_every": hf["global_attn_every_n_layers"],
        "local_rope_theta": float(hf["local_rope_theta"]),
        "head_dense": True,
        "logit_bias": hf["decoder_bias"],
        "tie_embeddings": hf["tie_word_embeddings"],
        "init_std": hf.get("initializer_range", 0.02),
    }


def _layer_types(layers: int, every: int) -> list[str]:
    return ["sliding_attention" if i % every else "full_attention" for i in range(layers)]


MODERNBERT = Architecture("ModernBertForMaskedLM", "modernbert", TABLE, write, complete, read)
MODERNBERT_TOKENS = with_task_head(
    MODERNBERT, "ModernBertForTokenClassification", "labels", body=BODY, module="classifier"
)
MODERNBERT_SPANS = with_task_head(
    MODERNBERT, "ModernBertForQuestionAnswering", "spans", body=BODY, module="classifier"
)
