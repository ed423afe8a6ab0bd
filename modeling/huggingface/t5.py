"""T5 (Raffel et al. 2020), 1.0 and 1.1: encoder-decoders with relative biases.

Stock class: transformers/models/t5. Attention is not scaled. 1.0 has relu, no gate, a tied head and scaled
logits; 1.1 has a gate, an untied head and plain logits. transformers 5 ties by the weights themselves and
always writes `tie_word_embeddings: true`; `scale_decoder_outputs` then tells whether logits are scaled.
"""

from collections.abc import Mapping
from typing import Any

from trifold.modeling.config import ModelConfig
from trifold.modeling.huggingface.fields import ACTIVATIONS, activation, token_ids
from trifold.modeling.huggingface.tables import Architecture

STACK = """
<s>.block.0.layer.0.SelfAttention.relative_attention_bias.weight = <s>.position.table.weight
<s>.block.{i}.layer.0.layer_norm.weight = <s>.blocks.{i}.attn.pre.weight
<s>.block.{i}.layer.0.SelfAttention.q.weight = <s>.blocks.{i}.attn.f.q.weight
<s>.block.{i}.layer.0.SelfAttention.k.weight = <s>.blocks.{i}.attn.f.k.weight
<s>.block.{i}.layer.0.SelfAttention.v.weight = <s>.blocks.{i}.attn.f.v.weight
<s>.block.{i}.layer.0.SelfAttention.o.weight = <s>.blocks.{i}.attn.f.o.weight
<s>.block.{i}.layer.<m>.layer_norm.weight = <s>.blocks.{i}.mlp.pre.weight
<s>.block.{i}.layer.<m>.DenseReluDense.wi_0.weight? = <s>.blocks.{i}.mlp.f.gate.weight
<s>.block.{i}.layer.<m>.DenseReluDense.wi_1.weight?<s>.blocks.{i}.mlp.f.gate.weight =
    <s>.blocks.{i}.mlp.f.up.weight
<s>.block.{i}.layer.<m>.DenseReluDense.wi.weight?!<s>.blocks.{i}.mlp.f.gate.weight =
    <s>.blocks.{i}.mlp.f.up.weight
<s>.block.{i}.layer.<m>.DenseReluDense.wo.weight = <s>.blocks.{i}.mlp.f.down.weight
<s>.final_layer_norm.weight = <s>.norm.weight
<s>.embed_tokens.weight~ = embed.weight
"""
CROSS = """
decoder.block.{i}.layer.1.layer_norm.weight = decoder.blocks.{i}.cross.pre.weight
decoder.block.{i}.layer.1.EncDecAttention.q.weight = decoder.blocks.{i}.cross.f.q.weight
decoder.block.{i}.layer.1.EncDecAttention.k.weight = decoder.blocks.{i}.cross.f.k.weight
decoder.block.{i}.layer.1.EncDecAttention.v.weight = decoder.blocks.{i}.cross.f.v.weight
decoder.block.{i}.layer.1.EncDecAttention.o.weight = decoder.blocks.{i}.cross.f.o.weight
decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight~ = nothing
"""
TABLE = (
    "shared.weight = embed.weight"
    + STACK.replace("<s>", "encoder").replace("<m>", "1")
    + STACK.replace("<s>", "decoder").replace("<m>", "2")
    + CROSS
    + """
lm_head.weight? = head.weight
lm_head.weight~ = embed.weight
"""
)


def write(config: ModelConfig, special: Mapping[str, int]) -> dict[str, Any]:
    name = "gelu_new" if config.activation == "gelu_tanh" else ACTIVATIONS[config.activation]
    gated = "gated-gelu" if name == "gelu_new" else f"gated-{name}"  # "gated-gelu" has always meant gelu_new
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "is_decoder": False,
        "vocab_size": config.vocab_size,
        "d_model": config.dim,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "feed_forward_proj": gated if config.gated else name,
        "layer_norm_epsilon": config.norm_eps,
        "n_positions": config.max_positions,  # the stock class has no limit
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.logit_scale != 1,
        "dropout_rate": config.dropout,
        "classifier_dropout": 0.0,
        "initializer_factor": 1.0,
        "use_cache": True,
        **token_ids(special),
        "decoder_start_token_id": special.get("start", special["bos"]),
    }


def complete(hf: dict[str, Any]) -> dict[str, Any]:
    derived = ("dense_act_fn", "is_gated_act")  # from feed_forward_proj
    hf = {name: value for name, value in hf.items() if name not in derived and value is not None}
    feed_forward = hf.get("feed_forward_proj", "relu")
    return {
        "is_encoder_decoder": True,
        "is_decoder": False,
        "num_decoder_layers": hf["num_layers"],
        "layer_norm_epsilon": 1e-6,
        "n_positions": 512,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "tie_word_embeddings": True,
        "scale_decoder_outputs": hf.get("tie_word_embeddings", True),
        **hf,
        "feed_forward_proj": "gated-gelu" if feed_forward == "gated-gelu_new" else feed_forward,
    }


def read(hf: dict[str, Any]) -> dict[str, Any]:
    gate, _, function = hf["feed_forward_proj"].rpartition("-")
    if gate and function == "gelu":
        function = "gelu_new"
    return {
        "family": "encoder-decoder",
        "vocab_size": hf["vocab_size"],
        "dim": hf["d_model"],
        "num_layers": hf["num_layers"],
        "num_heads": hf["num_heads"],
        "num_kv_heads": hf["num_heads"],
        "head_dim": hf["d_kv"],
        "mlp_dim": hf["d_ff"],
        "activation": activation({"feed_forward_proj": function}, "feed_forward_proj"),
        "gated": gate == "gated",
        "norm_eps": float(hf["layer_norm_epsilon"]),
        "position": "relative",
        "max_positions": hf["n_positions"],
        "attention_scale": 1.0,
        "logit_scale": hf["d_model"] ** -0.5 if hf["scale_decoder_outputs"] else 1.0,
        "tie_embeddings": hf["tie_word_embeddings"],
        "dropout": hf.get("dropout_rate", 0.1),
    }


T5 = Architecture(
    "T5ForConditionalGeneration",
    "t5",
    TABLE,
    write,
    complete,
    read,
    also=("T5Model",),
    dropout=("dropout_rate",),
)
