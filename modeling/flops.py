"""Closed forms: how many parameters a configuration has, and what training on a row costs, before anything is
built.
"""

from trifold.modeling.config import ModelConfig
from trifold.modeling.position import Relative


def num_parameters(config: ModelConfig) -> int:
    """Parameters of `build(config)`; a tied table counts once."""
    stacks = _stack(config, causal=False) if config.family != "decoder" else 0
    if config.family != "encoder":
        stacks += _stack(config, causal=True)
    return config.vocab_size * config.dim + stacks + _head(config)


def train_flops_per_row(config: ModelConfig, tokens: int, source_tokens: int = 0) -> float:
    """Floating-point operations of forward and backward for one row: per token 6 N + 12 L D T (PaLM, appendix
    B).

    N leaves out position tables and counts a tied table once, as the head. An encoder-decoder adds up its two
    stacks, each over its own tokens, without an untied input table (as bench/gpu_peers.py counts T5): decoder
    tokens attend to T + S.
    """
    width = 12 * (
        config.dim if config.alignment != "none" else config.num_layers * config.num_heads * config.head_dim
    )
    embed = config.vocab_size * config.dim
    if config.family != "encoder-decoder":
        n = num_parameters(config) - _position(config)
        return tokens * (6.0 * n + width * tokens)
    encoder = _stack(config, causal=False) - _position(config)
    decoder = (
        _stack(config, causal=True)
        - _position(config)
        + _head(config)
        + (embed if config.tie_embeddings else 0)
    )
    own = config.cell == "attention"  # a recurrent stack looks at the source at most, never at itself
    reading = source_tokens * (6.0 * encoder + own * width * source_tokens)
    return reading + tokens * (6.0 * decoder + width * (own * tokens + source_tokens))


def _stack(config: ModelConfig, causal: bool) -> int:
    if config.cell != "attention":
        return _cells(config, causal)
    cross = causal and config.family == "encoder-decoder"
    places = len(config.norm_places) * _norm(config)
    attention = _attention(config) + places
    layer = attention * (2 if cross else 1) + _mlp(config) + places
    no_first = 0 if config.first_attention_norm or "pre" not in config.norm_places else _norm(config)
    around = (config.embed_norm + config.final_norm) * _norm(config)
    return config.num_layers * layer - no_first + around + _position(config)


def _cells(config: ModelConfig, causal: bool) -> int:
    """A gate maps what comes in and the state, with a bias each. An encoder has two directions of half the
    width in every layer.
    """
    gates, dim = {"rnn": 1, "gru": 3, "lstm": 4}[config.cell], config.dim
    width = dim if causal else dim // 2
    cross = causal and config.family == "encoder-decoder"
    aligned = cross and config.alignment != "none"
    layers = (
        config.num_layers * (dim // width) * gates * width * (dim + width + 2) + aligned * gates * dim * dim
    )
    bridge = cross * (dim + 1) * config.num_layers * dim * (2 if config.cell == "lstm" else 1)
    scores = dim * dim if config.alignment == "multiplicative" else (2 * dim + 1) * dim
    return layers + bridge + aligned * (scores + (2 * dim + 1) * dim)


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
        return dense + config.outputs * (config.dim + 1) + config.crf * (config.outputs + 1) ** 2
    table = 0 if config.tie_embeddings else config.vocab_size * config.dim
    return dense + table + config.vocab_size * bool(config.logit_bias)
