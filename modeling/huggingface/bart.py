"""BART (Lewis et al. 2020): post-norm encoder-decoders with learned positions from 2.

Stock class: transformers/models/bart. The bias of its logits is a buffer, never trained. Norms have an eps of
1e-5 that no config can change. An untied stock model has three embedding tables: Trifold reads it where they
are equal. mBART and M2M-100 (their own files) share most of this.
"""

from collections.abc import Mapping
from typing import Any

from trifold.modeling.config import ModelConfig
from trifold.modeling.huggingface.fields import ACTIVATIONS, activation, check_heads, token_ids
from trifold.modeling.huggingface.tables import Architecture

STACK = """
model.<s>.embed_tokens.weight?head.weight = embed.weight
model.<s>.layers.{i}.self_attn.q_proj.{p} = <s>.blocks.{i}.attn.f.q.{p}
model.<s>.layers.{i}.self_attn.k_proj.{p} = <s>.blocks.{i}.attn.f.k.{p}
model.<s>.layers.{i}.self_attn.v_proj.{p} = <s>.blocks.{i}.attn.f.v.{p}
model.<s>.layers.{i}.self_attn.out_proj.{p} = <s>.blocks.{i}.attn.f.o.{p}
model.<s>.layers.{i}.self_attn_layer_norm.{p} = <s>.blocks.{i}.attn.<n>.{p}
model.<s>.layers.{i}.fc1.{p} = <s>.blocks.{i}.mlp.f.up.{p}
model.<s>.layers.{i}.fc2.{p} = <s>.blocks.{i}.mlp.f.down.{p}
model.<s>.layers.{i}.final_layer_norm.{p} = <s>.blocks.{i}.mlp.<n>.{p}
"""
CROSS = """
model.decoder.layers.{i}.encoder_attn.q_proj.{p} = decoder.blocks.{i}.cross.f.q.{p}
model.decoder.layers.{i}.encoder_attn.k_proj.{p} = decoder.blocks.{i}.cross.f.k.{p}
model.decoder.layers.{i}.encoder_attn.v_proj.{p} = decoder.blocks.{i}.cross.f.v.{p}
model.decoder.layers.{i}.encoder_attn.out_proj.{p} = decoder.blocks.{i}.cross.f.o.{p}
model.decoder.layers.{i}.encoder_attn_layer_norm.{p} = decoder.blocks.{i}.cross.<n>.{p}
"""
HEAD = """
lm_head.weight? = head.weight
lm_head.weight~ = embed.weight
"""
LEARNED = """
model.<s>.embed_positions.weight = <s>.position.weight
model.<s>.layernorm_embedding.{p} = <s>.embed_norm.{p}
"""
BIAS = "final_logits_bias = head.bias | row\n"


def table(norm: str, ends: str, head: str) -> str:
    """The table of BART or a relative: the place of its norms, the ends of each stack, its head."""
    stacks = "".join((STACK + ends).replace("<s>", stack) for stack in ("encoder", "decoder"))
    return f"model.shared.weight = embed.weight{(stacks + CROSS).replace('<n>', norm)}{head}{HEAD}"


# Variants of fairseq's models, which the stock class does not read.
FAIRSEQ = (
    "add_bias_logits",
    "add_final_layer_norm",
    "normalize_before",
    "normalize_embedding",
    "static_position_embeddings",
    "extra_pos_embeddings",
    "is_decoder",
)


def write(config: ModelConfig, special: Mapping[str, int]) -> dict[str, Any]:
    check_heads(config)
    stack = {
        "layers": config.num_layers,
        "attention_heads": config.num_heads,
        "ffn_dim": config.mlp_dim,
        "layerdrop": 0.0,
    }
    return {
        "architectures": ["BartForConditionalGeneration"],
        "model_type": "bart",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.dim,
        **{f"encoder_{field}": value for field, value in stack.items()},
        **{f"decoder_{field}": value for field, value in stack.items()},
        "num_hidden_layers": config.num_layers,
        "activation_function": ACTIVATIONS[config.activation],
        "max_position_embeddings": config.max_positions,
        "scale_embedding": config.embed_scale != 1,
        "tie_word_embeddings": config.tie_embeddings,
        "dropout": config.dropout,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "classifier_dropout": 0.0,
        "init_std": config.init_std,
        "use_cache": True,
        **token_ids(special),
        "decoder_start_token_id": special.get("start", special["bos"]),
        "forced_eos_token_id": None,  # the stock default forces an end at max_length
    }


def complete(hf: dict[str, Any]) -> dict[str, Any]:
    return {
        "is_encoder_decoder": True,
        "activation_function": "gelu",
        "scale_embedding": False,
        "tie_word_embeddings": True,
        **{name: value for name, value in hf.items() if name not in FAIRSEQ},
        "num_hidden_layers": hf["encoder_layers"],
    }


def read(hf: dict[str, Any]) -> dict[str, Any]:
    return {
        "family": "encoder-decoder",
        "vocab_size": hf["vocab_size"],
        "dim": hf["d_model"],
        "num_layers": hf["encoder_layers"],
        "num_heads": hf["encoder_attention_heads"],
        "num_kv_heads": hf["encoder_attention_heads"],
        "head_dim": hf["d_model"] // hf["encoder_attention_heads"],
        "mlp_dim": hf["encoder_ffn_dim"],
        "activation": activation(hf, "activation_function"),
        "gated": False,
        "bias": True,
        "norm": "layer",
        "norm_places": ("post",),
        "norm_eps": 1e-5,
        "embed_norm": True,
        "final_norm": False,
        "position": "learned",
        "position_offset": 2,
        "max_positions": hf["max_position_embeddings"],
        "embed_scale": hf["d_model"] ** 0.5 if hf["scale_embedding"] else 1.0,
        "logit_bias": "fixed",
        "tie_embeddings": hf["tie_word_embeddings"],
        "dropout": hf.get("dropout", 0.1),
        "init_std": hf.get("init_std", 0.02),
    }


TABLE = table("post", LEARNED, BIAS)
BART = Architecture(
    "BartForConditionalGeneration",
    "bart",
    TABLE,
    write,
    complete,
    read,
    also=("BartModel",),
    prefix="model.",
    dropout=("dropout",),
)
