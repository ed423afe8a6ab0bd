"""Closed forms: how many parameters a configuration has, and what training on a row costs, before anything is built."""

from modeling.config import ModelConfig
from modeling.position import Relative


def num_parameters(config: ModelConfig) -> int:
    """Parameters of `build(config)`; a tied table counts once."""
    stacks = _stack(config, cross=False) if config.family != "decoder" else 0
    if config.family != "encoder":
        stacks += _stack(config, cross=config.family == "encoder-decoder")
    return config.vocab_size * config.dim + stacks + _head(config)


def train_flops_per_row(config: ModelConfig, tokens: int, source_tokens: int = 0) -> float:
    """Floating-point operations of forward and backward for one row: per token 6 N + 12 L D T (PaLM, appendix B).

    N leaves out position tables and counts a tied table once, as the head. An encoder-decoder adds up its two stacks, each
    over its own tokens, without an untied input table (as bench/gpu_peers.py counts T5): decoder tokens attend to T + S.
    """
    width = 12 * config.num_layers * config.num_heads * config.head_dim
    embed = config.vocab_size * config.dim
    if config.family != "encoder-decoder":
        n = num_parameters(config) - _position(config)
        return tokens * (6.0 * n + width * tokens)
    encoder = _stack(config, cross=False) - _position(config)
    decoder = _stack(config, cross=True) - _position(config) + _head(config) + (embed if config.tie_embeddings else 0)
    return source_tokens * (6.0 * encoder + width * source_tokens) + tokens * (6.0 * decoder + width * (tokens + source_tokens))


def _stack(config: ModelConfig, cross: bool) -> int:
    places = len(config.norm_places) * _norm(config)
    attention = _attention(config) + places
    layer = attention * (2 if cross else 1) + _mlp(config) + places
    no_first = 0 if config.first_attention_norm or "pre" not in config.norm_places else _norm(config)
    around = (config.embed_norm + config.final_norm) * _norm(config)
    return config.num_layers * layer - no_first + around + _position(config)


def _attention(config: ModelConfig) -> int:
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return 2 * config.dim * (queries + keys) + config.bias * (queries + 2 * keys + config.dim)


def _mlp(config: ModelConfig) -> int:
    into = 2 if config.gated else 1
    return (into + 1) * config.dim * config.mlp_dim + config.bias * (into * config.mlp_dim + config.dim)


def _norm(config: ModelConfig) -> int:
    return config.dim * (2 if config.norm == "layer" and config.bias else 1)


def _position(config: ModelConfig) -> int:
    rows = config.position_offset + config.max_positions + config.token_types
    tables = {"learned": rows * config.dim, "relative": Relative.buckets * config.num_heads}
    return tables.get(config.position, 0)


def _head(config: ModelConfig) -> int:
    has_dense = config.head_dense and (config.task_dense or not config.outputs)
    dense = config.dim * (config.dim + config.bias) + _norm(config) if has_dense else 0
    if config.outputs:
        return dense + config.outputs * (config.dim + 1)
    table = 0 if config.tie_embeddings else config.vocab_size * config.dim
    return dense + table + config.vocab_size * bool(config.logit_bias)
