"""GPT-2 (Radford et al. 2019): pre-norm decoders with learned positions.

Stock class: transformers/models/gpt2. Its projections are Conv1D, which are transposed, and q, k and v are
one tensor.
"""

from collections.abc import Mapping
from typing import Any

from trifold.modeling.config import ModelConfig
from trifold.modeling.huggingface.fields import ACTIVATIONS, activation, check_heads, token_ids
from trifold.modeling.huggingface.tables import Architecture
from trifold.modeling.huggingface.task_heads import with_task_head

BODY = """
transformer.wte.weight = embed.weight
transformer.wpe.weight = decoder.position.weight
transformer.h.{i}.ln_1.{p} = decoder.blocks.{i}.attn.pre.{p}
transformer.h.{i}.attn.c_attn.{p} =
    decoder.blocks.{i}.attn.f.q.{p}, decoder.blocks.{i}.attn.f.k.{p}, decoder.blocks.{i}.attn.f.v.{p} | t
transformer.h.{i}.attn.c_proj.{p} = decoder.blocks.{i}.attn.f.o.{p} | t
transformer.h.{i}.ln_2.{p} = decoder.blocks.{i}.mlp.pre.{p}
transformer.h.{i}.mlp.c_fc.{p} = decoder.blocks.{i}.mlp.f.up.{p} | t
transformer.h.{i}.mlp.c_proj.{p} = decoder.blocks.{i}.mlp.f.down.{p} | t
transformer.ln_f.{p} = decoder.norm.{p}
transformer.h.{i}.attn.bias~ = nothing
transformer.h.{i}.attn.masked_bias~ = nothing
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
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_dim,
        "n_positions": config.max_positions,
        "n_ctx": config.max_positions,  # for older runtimes
        "activation_function": "gelu_new"
        if config.activation == "gelu_tanh"
        else ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.attention_scale != 1,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": config.tie_embeddings,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "initializer_range": config.init_std,
        "use_cache": True,
        **token_ids(special),
    }


def complete(hf: dict[str, Any]) -> dict[str, Any]:
    defaults = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    }
    return {
        **defaults,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        **hf,
        "n_inner": hf.get("n_inner") or 4 * hf["n_embd"],
        "n_ctx": hf["n_positions"],
    }


def read(hf: dict[str, Any]) -> dict[str, Any]:
    return {
        "family": "decoder",
        "vocab_size": hf["vocab_size"],
        "dim": hf["n_embd"],
        "num_layers": hf["n_layer"],
        "num_heads": hf["n_head"],
        "num_kv_heads": hf["n_head"],
        "head_dim": hf["n_embd"] // hf["n_head"],
        "mlp_dim": hf["n_inner"],
        "activation": activation(hf, "activation_function"),
        "gated": False,
        "bias": True,
        "norm": "layer",
        "norm_eps": float(hf["layer_norm_epsilon"]),
        "position": "learned",
        "max_positions": hf["n_positions"],
        "attention_scale": None if hf["scale_attn_weights"] else 1.0,
        "tie_embeddings": hf["tie_word_embeddings"],
        "dropout": hf.get("resid_pdrop", 0.1),
        "init_std": hf.get("initializer_range", 0.02),
    }


GPT2 = Architecture(
    "GPT2LMHeadModel",
    "gpt2",
    TABLE,
    write,
    complete,
    read,
    also=("GPT2Model",),
    prefix="transformer.",
    dropout=("resid_pdrop", "embd_pdrop"),
)
GPT2_TOKENS = with_task_head(
    GPT2,
    "GPT2ForTokenClassification",
    "labels",
    body=BODY,
    module="classifier",
    settings={"classifier_dropout": 0.0},
)
GPT2_SPANS = with_task_head(GPT2, "GPT2ForQuestionAnswering", "spans", body=BODY, module="qa_outputs")
