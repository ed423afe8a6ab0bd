"""The block of all three families: `x = post(x + dropout(inner(f(pre(x)))))`; any norm may be absent.

Pre-norm, sandwich norm and post-norm are settings of the config, not branches in the code. A block takes
hidden states and the attention contexts that all layers of one forward share, and returns hidden states.
Shapes: B rows, T tokens, S encoder states, D model, N heads, G key/value heads, K keys, H head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trifold.modeling.attention import Cache, Visibility, attend
from trifold.modeling.config import ModelConfig
from trifold.modeling.position import Rotation, rotate
from trifold.modeling.sequence_parallel import SequenceShard


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
}


@dataclass(frozen=True)
class AttentionContext:
    """What the attention layers of one kind (full, local or cross) share in one forward."""

    visibility: Visibility
    rotation: Rotation | None = None
    # Encoder states, from which cross-attention takes keys and values. None: self-attention.
    memory_BSD: Tensor | None = None
    # Set where ranks share rows: hidden states are then slices, but `visibility` describes complete rows.
    shard: SequenceShard | None = None


@dataclass(frozen=True)
class AttentionContexts:
    """The contexts of one forward through a stack: full layers, local (windowed) layers, cross-attention."""

    full: AttentionContext
    local: AttentionContext
    cross: AttentionContext | None


# The key/value caches of one block: self-attention, cross-attention.
Caches = tuple[Cache, Cache]


def is_local(config: ModelConfig, layer: int) -> bool:
    """Whether a layer attends only within the window."""
    return config.local_window > 0 and layer % config.global_every != 0


class Block(nn.Module):
    """Self-attention, cross-attention in the decoder of an encoder-decoder, and a feed-forward layer."""

    def __init__(self, config: ModelConfig, layer: int, cross: bool) -> None:
        super().__init__()
        self.local = is_local(config, layer)
        self.attn = Residual(config, Attention(config), pre=layer > 0 or config.first_attention_norm)
        self.cross = Residual(config, Attention(config)) if cross else None
        self.mlp = Residual(config, MLP(config))

    def forward(
        self, x_BTD: Tensor, contexts: AttentionContexts, caches: Caches | tuple[None, None] = (None, None)
    ) -> Tensor:
        x_BTD = self.attn(x_BTD, contexts.local if self.local else contexts.full, caches[0])
        if self.cross is not None:
            x_BTD = self.cross(x_BTD, contexts.cross, caches[1])
        return self.mlp(x_BTD)


class Residual(nn.Module):
    """A sublayer f in its residual connection: `x = post(x + dropout(inner(f(pre(x)))))`.

    `f` is part of every parameter's name (`blocks.0.attn.f.q.weight`), and initial values are keyed by that
    name.
    """

    def __init__(self, config: ModelConfig, f: "Attention | MLP", pre: bool = True) -> None:
        super().__init__()
        self.pre = make_norm(config, pre and "pre" in config.norm_places)
        self.f = f
        self.inner = make_norm(config, "inner" in config.norm_places)
        self.post = make_norm(config, "post" in config.norm_places)
        self.dropout = config.dropout

    def forward(
        self, x_BTD: Tensor, context: AttentionContext | None = None, cache: Cache | None = None
    ) -> Tensor:
        """`context` and `cache` are those of an attention sublayer; a feed-forward sublayer takes neither."""
        h_BTD = self.pre(x_BTD)
        y_BTD = self.f(h_BTD) if context is None else self.f(h_BTD, context, cache)
        return self.post(x_BTD + F.dropout(self.inner(y_BTD), self.dropout, self.training))


class Attention(nn.Module):
    """Attention with grouped key/value heads (Ainslie et al. 2023), over the row or encoder states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.attention_scale or config.head_dim**-0.5
        query_dim = config.num_heads * config.head_dim
        key_dim = config.num_kv_heads * config.head_dim
        self.q = nn.Linear(config.dim, query_dim, config.bias)
        self.k = nn.Linear(config.dim, key_dim, config.bias)
        self.v = nn.Linear(config.dim, key_dim, config.bias)
        self.o = nn.Linear(query_dim, config.dim, config.bias)

    def forward(self, x_BTD: Tensor, context: AttentionContext, cache: Cache | None = None) -> Tensor:
        q_BNTH = self._rotated_heads(self.q(x_BTD), context)
        if cache is not None and cache.used and context.memory_BSD is not None:
            k, v = cache.filled()  # encoder states never grow
        else:
            source = x_BTD if context.memory_BSD is None else context.memory_BSD
            k = self._rotated_heads(self.k(source), context)
            v = self._heads(self.v(source))
            if cache is not None:
                k, v = cache.extend(k, v)

        shard = context.shard
        if shard is None:
            y_BNTH = attend(q_BNTH, k, v, context.visibility, self.scale)
        else:
            q, k, v = shard.gather(q_BNTH), shard.gather(k), shard.gather(v)
            y_BNTH = shard.slice(attend(q, k, v, context.visibility, self.scale))
        return self.o(y_BNTH.transpose(1, 2).flatten(2))

    def weights(self, x_BTD: Tensor, context: AttentionContext) -> Tensor:
        """Attention probabilities (B, N, T, K), which the kernels never materialise: for figures.

        The context's visibility must have segments.
        """
        source = x_BTD if context.memory_BSD is None else context.memory_BSD
        q_BNTH = self._rotated_heads(self.q(x_BTD), context)
        k = self._rotated_heads(self.k(source), context)
        k_BNKH = k.repeat_interleave(q_BNTH.shape[1] // k.shape[1], dim=1)
        scores = self.scale * q_BNTH @ k_BNKH.mT

        mask = context.visibility.dense()
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return (scores + mask).softmax(-1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _rotated_heads(self, x: Tensor, context: AttentionContext) -> Tensor:
        heads = self._heads(x)
        return heads if context.rotation is None else rotate(heads, context.rotation)


class MLP(nn.Module):
    """down(act(up(x))), or gated down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.activation]
        self.gate = nn.Linear(config.dim, config.mlp_dim, config.bias) if config.gated else None
        self.up = nn.Linear(config.dim, config.mlp_dim, config.bias)
        self.down = nn.Linear(config.mlp_dim, config.dim, config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.act(self.up(x_BTD)))
        return self.down(self.act(self.gate(x_BTD)) * self.up(x_BTD))


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019), computed in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _RMSNormFn.apply(x, self.weight, self.eps)
        h = x.float()
        scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (h * scale * self.weight.float()).type_as(x)


class _RMSNormFn(torch.autograd.Function):
    """RMSNorm for eager training, with half of the memory passes that autograd's derivative takes.

    Forward and backward of 2,048 x 256 in fp32 on one core with AVX2: 1.7 ms instead of 3.0. A compiler fuses
    the plain formula by itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()  # rounds as the stock classes do
        ctx.save_for_backward(x, scale, weight_D)
        return (x * scale).mul_(weight_D).type_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, scale, weight_D = ctx.saved_tensors
        normed = x * scale
        product = grad * normed
        weight = weight_D.to(normed.dtype)
        # The component of the gradient along x, which the norm removes.
        along = (product @ weight)[..., None] / x.shape[-1]
        grad_x = torch.addcmul(grad * weight, normed, along, value=-1).mul_(scale)
        grad_weight = product.flatten(0, -2).sum(0)
        return grad_x.type_as(x), grad_weight.type_as(weight_D), None


def make_norm(config: ModelConfig, present: bool = True) -> nn.Module:
    """The config's norm; where `present` is false, an identity without parameters."""
    if not present:
        return nn.Identity()
    if config.norm == "rms":
        return RMSNorm(config.dim, config.norm_eps)
    return nn.LayerNorm(config.dim, config.norm_eps, bias=config.bias)
