"""The one block of all three families: `x = post(x + inner(sublayer(pre(x))))`, any of the three norms
absent.

Pre-norm, sandwich and post-norm are settings, not branches. In: hidden states and what the layers of a
forward share (View). Out: hidden states. Shapes: B rows, T tokens, S memory, D model, N heads, G key/value
heads, H head dim.
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
    """What the attention layers of one kind (global, local or cross) share in one forward."""

    visibility: Visibility
    rotation: Rotation | None = None
    memory_BSD: Tensor | None = None  # what keys and values are made of; None: the row itself
    shared: SequenceShard | None = (
        None  # who else has the rows, which are slices then; visibility is of whole ones
    )


@dataclass(frozen=True)
class AttentionContexts:
    """The views of one forward through a stack."""

    whole: AttentionContext
    local: AttentionContext
    cross: AttentionContext | None


Caches = tuple[Cache, Cache]  # one block's: of the row itself, and of the memory


def is_local(config: ModelConfig, layer: int) -> bool:
    """Whether a layer attends within the window alone."""
    return config.local_window > 0 and layer % config.global_every != 0


class Block(nn.Module):
    """Self-attention, cross-attention where there is a memory to read, and a feed-forward layer."""

    def __init__(self, config: ModelConfig, layer: int, cross: bool) -> None:
        super().__init__()
        self.local = is_local(config, layer)
        self.attn = Residual(config, Attention(config), pre=layer > 0 or config.first_attention_norm)
        self.cross = Residual(config, Attention(config)) if cross else None
        self.mlp = Residual(config, MLP(config))

    def forward(
        self, x_BTD: Tensor, views: AttentionContexts, caches: Caches | tuple[None, None] = (None, None)
    ) -> Tensor:
        x_BTD = self.attn(x_BTD, views.local if self.local else views.whole, caches[0])
        if self.cross is not None:
            x_BTD = self.cross(x_BTD, views.cross, caches[1])
        return self.mlp(x_BTD)


class Residual(nn.Module):
    """A sublayer `f` with its norms and its dropout around it."""

    def __init__(self, config: ModelConfig, f: nn.Module, pre: bool = True) -> None:
        super().__init__()
        places = config.norm_places
        self.pre = make_norm(config, "pre" in places and pre)
        self.f = f
        self.inner = make_norm(config, "inner" in places)
        self.post = make_norm(config, "post" in places)
        self.dropout = config.dropout

    def forward(self, x_BTD: Tensor, *shared: object) -> Tensor:
        y_BTD = self.inner(self.f(self.pre(x_BTD), *shared))
        return self.post(x_BTD + F.dropout(y_BTD, self.dropout, self.training))


class Attention(nn.Module):
    """Heads of attention, to the row itself or to a memory."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.attention_scale or config.head_dim**-0.5
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = nn.Linear(config.dim, queries, config.bias)
        self.k = nn.Linear(config.dim, keys, config.bias)
        self.v = nn.Linear(config.dim, keys, config.bias)
        self.o = nn.Linear(queries, config.dim, config.bias)

    def forward(self, x_BTD: Tensor, view: AttentionContext, cache: Cache | None = None) -> Tensor:
        q_BNTH = self._rotated_heads(self.q(x_BTD), view)
        if cache is not None and cache.used and view.memory_BSD is not None:  # a memory never grows
            k, v = cache.kept()
        else:
            source = x_BTD if view.memory_BSD is None else view.memory_BSD
            k, v = self._rotated_heads(self.k(source), view), self._heads(self.v(source))
            k, v = (k, v) if cache is None else cache.extend(k, v)
        if view.shared is None:
            y_BNTH = attend(q_BNTH, k, v, view.visibility, self.scale)
        else:
            q, k, v = (view.shared.gather(x) for x in (q_BNTH, k, v))
            y_BNTH = view.shared.slice(attend(q, k, v, view.visibility, self.scale))
        return self.o(y_BNTH.transpose(1, 2).flatten(2))

    def weights(self, x_BTD: Tensor, view: AttentionContext) -> Tensor:
        """Where each head looks, (B, N, T, K): what the kernels never make, for pictures. The view's rows
        need segments.
        """
        q_BNTH, k = (
            self._rotated_heads(f(x), view)
            for f, x in ((self.q, x_BTD), (self.k, x_BTD if view.memory_BSD is None else view.memory_BSD))
        )
        scores = self.scale * q_BNTH @ k.repeat_interleave(q_BNTH.shape[1] // k.shape[1], dim=1).mT
        seen = view.visibility.dense()
        return (
            scores.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else scores + seen
        ).softmax(-1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _rotated_heads(self, x: Tensor, view: AttentionContext) -> Tensor:
        return self._heads(x) if view.rotation is None else rotate(self._heads(x), view.rotation)


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
    """x / rms(x) * weight (Zhang and Sennrich 2019), in fp32 inside."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _RMS.apply(x, self.weight, self.eps)
        h = x.float()
        return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()).type_as(
            x
        )


class _RMS(torch.autograd.Function):
    """The same for eager training, whose derivative autograd would take in twice as many passes over memory;
    a compiler fuses them.

    On one core with AVX2 1.7 ms instead of 3.0 for 2,048 x 256 in fp32, there and back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        scale = (
            x.float().square().mean(-1, keepdim=True) + eps
        ).rsqrt()  # rounded as the stock classes round it
        ctx.save_for_backward(x, scale, weight_D)
        return (x * scale).mul_(weight_D).type_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, scale, weight_D) = grad_outputs, ctx.saved_tensors
        normed = x * scale
        product, weight = grad * normed, weight_D.to(normed.dtype)
        along = (product @ weight)[..., None] / x.shape[
            -1
        ]  # the part of the gradient that would only lengthen x
        grad_x = torch.addcmul(grad * weight, normed, along, value=-1).mul_(scale)
        return grad_x.type_as(x), product.flatten(0, -2).sum(0).type_as(weight_D), None


def make_norm(config: ModelConfig, present: bool = True) -> nn.Module:
    """The family's norm, or where it is absent a module without parameters that changes nothing."""
    if not present:
        return nn.Identity()
    if config.norm == "rms":
        return RMSNorm(config.dim, config.norm_eps)
    return nn.LayerNorm(config.dim, config.norm_eps, bias=config.bias)
