"""Closed forms for a config's number of parameters and the FLOPs of training on a row."""

from trifold.modeling.config import ModelConfig
from trifold.modeling.position import Relative


def num_parameters(config: ModelConfig) -> int:
    """Parameters of `build(config)`; a tied table counts once."""
    stacks = _stack(config, causal=False) if config.family != "decoder" else 0
    if config.family != "encoder":
        stacks += _stack(config, causal=True)
    return config.vocab_size * config.dim + stacks + _head(config)


def train_flops_per_row(config: ModelConfig, tokens: int, source_tokens: int = 0) -> float:
    """FLOPs of forward and backward for one row: 6 N + 12 L D T per token (PaLM, appendix B).

    N leaves out position tables and counts a tied table once, as the head. For an encoder-decoder it is the
    sum over its two stacks, each over its own tokens, without an untied input table (as bench/gpu_peers.py
    counts T5); decoder tokens attend to T + S.
    """
    width = 12 * config.num_layers * config.num_heads * config.head_dim
    if config.alignment != "none":
        width = 12 * config.dim
    if config.family != "encoder-decoder":
        n = num_parameters(config) - _position(config)
        return tokens * (6.0 * n + width * tokens)

    encoder = _stack(config, causal=False) - _position(config)
    decoder = _stack(config, causal=True) - _position(config) + _head(config)
    if config.tie_embeddings:
        decoder += config.vocab_size * config.dim
    attends = config.cell == "attention"  # recurrent stacks attend to the source at most, never to themselves
    encoder_flops = source_tokens * (6.0 * encoder + attends * width * source_tokens)
    return encoder_flops + tokens * (6.0 * decoder + width * (attends * tokens + source_tokens))


def _stack(config: ModelConfig, causal: bool) -> int:
    if config.cell != "attention":
        return _recurrent_stack(config, causal)
    cross = causal and config.family == "encoder-decoder"
    norms = len(config.norm_places) * _norm(config)
    attention = _attention(config) + norms
    layer = attention * (2 if cross else 1) + _mlp(config) + norms
    total = config.num_layers * layer + _position(config)
    total += (config.embed_norm + config.final_norm) * _norm(config)
    if "pre" in config.norm_places and not config.first_attention_norm:
        total -= _norm(config)
    return total


def _recurrent_stack(config: ModelConfig, causal: bool) -> int:
    """Each gate maps input and state, with a bias each. Encoders have two directions of half the width."""
    gates, dim = {"rnn": 1, "gru": 3, "lstm": 4}[config.cell], config.dim
    width = dim if causal else dim // 2
    directions = dim // width
    cross = causal and config.family == "encoder-decoder"
    aligned = cross and config.alignment != "none"
    total = config.num_layers * directions * gates * width * (dim + width + 2)
    if cross:
        states = 2 if config.cell == "lstm" else 1
        total += (dim + 1) * config.num_layers * dim * states
    if aligned:
        scores = dim * dim if config.alignment == "multiplicative" else (2 * dim + 1) * dim
        total += gates * dim * dim + scores + (2 * dim + 1) * dim
    return total


def _attention(config: ModelConfig) -> int:
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return 2 * config.dim * (queries + keys) + config.bias * (queries + 2 * keys + config.dim)


def _mlp(config: ModelConfig) -> int:
    inputs = 2 if config.gated else 1  # gate and up
    return (inputs + 1) * config.dim * config.mlp_dim + config.bias * (inputs * config.mlp_dim + config.dim)


def _norm(config: ModelConfig) -> int:
    return config.dim * (2 if config.norm == "layer" and config.bias else 1)


def _position(config: ModelConfig) -> int:
    rows = config.position_offset + config.max_positions + config.token_types
    tables = {"learned": rows * config.dim, "relative": Relative.num_buckets * config.num_heads}
    return tables.get(config.position, 0)


def _head(config: ModelConfig) -> int:
    has_dense = config.head_dense and (config.task_dense or not config.outputs)
    dense = config.dim * (config.dim + config.bias) + _norm(config) if has_dense else 0
    if config.outputs:
        return dense + config.outputs * (config.dim + 1) + config.crf * (config.outputs + 1) ** 2
    table = 0 if config.tie_embeddings else config.vocab_size * config.dim
    return dense + table + config.vocab_size * bool(config.logit_bias)
