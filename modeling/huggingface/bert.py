"""BERT (Devlin et al. 2019): post-norm encoders with learned positions.

Stock class: transformers/models/bert. Its token types are one table of ours beside the positions: row 0 is
added everywhere, the other rows are kept for the way back. Task heads have no dense layer. Poolers and
next-sentence heads are dropped: no class that Trifold writes has them.
"""

from collections.abc import Mapping
from typing import Any

from trifold.modeling.config import ModelConfig
from trifold.modeling.huggingface.fields import ACTIVATIONS, activation, check_heads, token_ids
from trifold.modeling.huggingface.tables import Architecture
from trifold.modeling.huggingface.task_heads import with_task_head

BODY = """
bert.embeddings.word_embeddings.weight = embed.weight
bert.embeddings.position_embeddings.weight = encoder.position.weight
bert.embeddings.token_type_embeddings.weight = encoder.position.types.weight
bert.embeddings.LayerNorm.{p} = encoder.embed_norm.{p}
bert.encoder.layer.{i}.attention.self.query.{p} = encoder.blocks.{i}.attn.f.q.{p}
bert.encoder.layer.{i}.attention.self.key.{p} = encoder.blocks.{i}.attn.f.k.{p}
bert.encoder.layer.{i}.attention.self.value.{p} = encoder.blocks.{i}.attn.f.v.{p}
bert.encoder.layer.{i}.attention.output.dense.{p} = encoder.blocks.{i}.attn.f.o.{p}
bert.encoder.layer.{i}.attention.output.LayerNorm.{p} = encoder.blocks.{i}.attn.post.{p}
bert.encoder.layer.{i}.intermediate.dense.{p} = encoder.blocks.{i}.mlp.f.up.{p}
bert.encoder.layer.{i}.output.dense.{p} = encoder.blocks.{i}.mlp.f.down.{p}
bert.encoder.layer.{i}.output.LayerNorm.{p} = encoder.blocks.{i}.mlp.post.{p}
bert.embeddings.position_ids~ = nothing
bert.pooler.dense.{p}~ = nothing
"""
TABLE = (
    BODY
    + """
cls.predictions.transform.dense.{p} = head.dense.{p}
cls.predictions.transform.LayerNorm.{p} = head.norm.{p}
cls.predictions.bias = head.bias
cls.predictions.decoder.weight? = head.weight
cls.predictions.decoder.weight~ = embed.weight
cls.predictions.decoder.bias?head.weight = head.bias
cls.seq_relationship.{p}~ = nothing
"""
)


def write(config: ModelConfig, special: Mapping[str, int]) -> dict[str, Any]:
    check_heads(config)
    return {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions + config.position_offset,
        "position_embedding_type": "absolute",  # transformers 4 had others
        "type_vocab_size": config.token_types,
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": 0.0,
        "initializer_range": config.init_std,
        "use_cache": True,
        **token_ids(special),
    }


def complete(hf: dict[str, Any]) -> dict[str, Any]:
    defaults = {
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    return {**defaults, "layer_norm_eps": 1e-12, "type_vocab_size": 2, **hf}


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
        "activation": activation(hf, "hidden_act"),
        "gated": False,
        "bias": True,
        "norm": "layer",
        "norm_places": ("post",),
        "norm_eps": float(hf["layer_norm_eps"]),
        "embed_norm": True,
        "final_norm": False,
        "position": "learned",
        "max_positions": hf["max_position_embeddings"],
        "token_types": hf["type_vocab_size"],
        "head_dense": True,
        "task_dense": False,
        "logit_bias": True,
        "tie_embeddings": hf["tie_word_embeddings"],
        "dropout": hf.get("hidden_dropout_prob", 0.1),
        "init_std": hf.get("initializer_range", 0.02),
    }


BERT = Architecture(
    "BertForMaskedLM",
    "bert",
    TABLE,
    write,
    complete,
    read,
    also=("BertModel", "BertForPreTraining"),
    prefix="bert.",
    dropout=("hidden_dropout_prob",),
)
BERT_TOKENS = with_task_head(BERT, "BertForTokenClassification", "labels", body=BODY, module="classifier")
BERT_SPANS = with_task_head(BERT, "BertForQuestionAnswering", "spans", body=BODY, module="qa_outputs")
