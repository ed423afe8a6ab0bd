"""Small models of each family and each way of position, and packed batches for them: what the tests of
modeling/ share.
"""

from typing import Any

import torch
from torch import Tensor

from trifold.modeling.batch import IGNORE, Batch
from trifold.modeling.config import ModelConfig

SIZES: dict[str, Any] = dict(
    vocab_size=61,
    dim=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    mlp_dim=48,
    max_positions=32,
    init_std=0.2,
)
CONFIGS = {
    "llama": ModelConfig(family="decoder", **SIZES | {"num_kv_heads": 2}),
    "gpt2": ModelConfig(
        family="decoder",
        norm="layer",
        bias=True,
        position="learned",
        gated=False,
        activation="gelu_tanh",
        **SIZES,
    ),
    "local decoder": ModelConfig(
        family="decoder", local_window=3, global_every=2, tie_embeddings=False, **SIZES
    ),
    "modernbert": ModelConfig(
        family="encoder",
        norm="layer",
        activation="gelu",
        embed_norm=True,
        first_attention_norm=False,
        head_dense=True,
        logit_bias=True,
        local_window=3,
        global_every=3,
        rope_theta=160_000.0,
        **SIZES,
    ),
    "bert": ModelConfig(
        family="encoder",
        norm="layer",
        bias=True,
        norm_places=("post",),
        position="learned",
        embed_norm=True,
        final_norm=False,
        gated=False,
        activation="gelu",
        **SIZES,
    ),
    "t5gemma": ModelConfig(
        family="encoder-decoder",
        activation="gelu_tanh",
        norm_places=("pre", "inner"),
        embed_scale=32**0.5,
        **SIZES,
    ),
    "t5": ModelConfig(
        family="encoder-decoder",
        position="relative",
        attention_scale=1.0,
        logit_scale=32**-0.5,
        activation="gelu_tanh",
        **SIZES,
    ),
    "nllb": ModelConfig(
        family="encoder-decoder",
        norm="layer",
        bias=True,
        position="sinusoidal",
        position_offset=2,
        gated=False,
        activation="relu",
        embed_scale=32**0.5,
        tie_embeddings=False,
        **SIZES,
    ),
}
_RECURRENT: dict[str, Any] = dict(vocab_size=61, dim=32, num_layers=2, max_positions=32, init_std=0.2)
RECURRENT = {
    "lstm decoder": ModelConfig(family="decoder", cell="lstm", **_RECURRENT),
    "gru decoder": ModelConfig(family="decoder", cell="gru", **_RECURRENT),
    "rnn encoder": ModelConfig(family="encoder", cell="rnn", head_dense=True, **_RECURRENT),
    "lstm encoder": ModelConfig(family="encoder", cell="lstm", **_RECURRENT),
    "rnn fixed vector": ModelConfig(family="encoder-decoder", cell="rnn", **_RECURRENT),
    "lstm additive": ModelConfig(family="encoder-decoder", cell="lstm", alignment="additive", **_RECURRENT),
    "gru multiplicative": ModelConfig(
        family="encoder-decoder", cell="gru", alignment="multiplicative", tie_embeddings=False, **_RECURRENT
    ),
    "gru hard": ModelConfig(family="encoder-decoder", cell="gru", alignment="hard", **_RECURRENT),
}


def documents(config: ModelConfig, lengths: list[tuple[int, int]], seed: int = 0) -> list[Batch]:
    """One unpadded, unpacked batch of one row per document, of (target, source) lengths."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> Tensor:
        return torch.randint(0, config.vocab_size, (1, n), generator=draw)

    both = config.family == "encoder-decoder"
    return [
        Batch(
            tokens(t),
            torch.ones(1, t, dtype=torch.long),
            tokens(t),
            *(_source(tokens(s)) if both else (None, None)),
        )
        for t, s in lengths
    ]


def packed(singles: list[Batch], length: int, source_length: int) -> Batch:
    """The documents in one row, then padding whose tokens are no padding token: they must have no influence
    whatever they are.
    """

    def row(name: str, n: int, fill: int) -> Tensor:
        x = torch.cat([getattr(document, name) for document in singles], dim=1)
        return torch.cat([x, x.new_full((1, n - x.shape[1]), fill)], dim=1)

    def numbers(name: str, n: int) -> Tensor:
        x = torch.cat(
            [torch.full_like(getattr(document, name), i + 1) for i, document in enumerate(singles)], dim=1
        )
        return torch.cat([x, x.new_zeros(1, n - x.shape[1])], dim=1)

    both = singles[0].source is not None
    source = (row("source", source_length, 7), numbers("source", source_length)) if both else (None, None)
    return Batch(row("tokens", length, 5), numbers("tokens", length), row("targets", length, IGNORE), *source)


def _source(tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens, torch.ones_like(tokens)
