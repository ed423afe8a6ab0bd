"""Attention: queries, keys, values and a description of who may attend to whom; the kernel is chosen here.

Unpacked rows take SDPA's own causal kernel. Packed and windowed rows take a mask that is made once per
forward: a dense one on the CPU (FlexAttention has no CPU backward), FlexAttention's block mask on CUDA. Both
are made from one predicate, `Visibility.allowed`. Shapes: B rows, Q queries, K keys, N heads, G key/value
heads, H head dim.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# On an H200, causal, T 1024, the first two reach 186 and 141 TFLOP/s. A kernel that does not support its
# inputs is skipped.
KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

# SDPA's backward in bf16 is slow on the CPU. Forward and backward of 8 rows, 8 heads of 32, on one core with
# AMX, by explicit matrix products and by SDPA: 16 and 33 ms at T 256, 71 and 90 ms at 512, equal at 1,024.
EXPLICIT_MAX_KEYS = 512
EXPLICIT_MAX_SCORES = 2**22  # the scores that exist at a time, 8 MB: they stay in the cache


@dataclass(frozen=True, eq=False)
class Visibility:
    """Who may attend to whom. One object serves all layers of a kind, so that its mask is made once.

    Segments number the documents of a row; 0 is padding. None: each row is one document (a window, a bias or
    a `query_start` requires segments). `window` > 0 limits the distance. Query i is at position `query_start
    + i` of its row, key j at position j. `bias` (1, N, Q, K) is added to the scores.
    """

    causal: bool
    query_segments: Tensor | None = None  # (B, Q) int64
    key_segments: Tensor | None = None  # (B, K) int64
    window: int = 0
    query_start: int = 0
    bias: Tensor | None = None
    mask: Any = field(init=False)  # the kernel's argument: None, a dense mask, or FlexAttention's BlockMask
    _bf16_mask: tuple[Tensor, Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", self._mask())

    def allowed(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether query q of row b may attend to key k, for indices that broadcast.

        Padding attends to padding. In cross-attention a query may have no key at all: the kernels then return
        zeros, never NaN.
        """
        assert self.query_segments is not None and self.key_segments is not None
        allowed = self.query_segments[b, q] == self.key_segments[b, k]
        position = q + self.query_start
        if self.causal:
            allowed = allowed & (position >= k)
        if self.window:
            allowed = allowed & ((position - k).abs() <= self.window)
        return allowed

    def dense(self) -> Tensor:
        """The predicate on every pair, (B, 1, Q, K) bool; with a bias, scores to add, (B, N, Q, K)."""
        assert self.query_segments is not None and self.key_segments is not None
        (rows, queries), keys = self.query_segments.shape, self.key_segments.shape[1]
        b, q, k = (torch.arange(n, device=self.query_segments.device) for n in (rows, queries, keys))
        allowed = self.allowed(b[:, None, None, None], q[:, None], k)
        return allowed if self.bias is None else self.bias.masked_fill(~allowed, float("-inf"))

    def blocks(self) -> Any:
        """The predicate as FlexAttention's BlockMask: 128 x 128 blocks without an allowed pair are free.

        Smaller blocks, which would suit a narrow window, have no backward on Hopper (torch 2.11).
        """
        assert self.query_segments is not None and self.key_segments is not None
        (rows, queries), keys = self.query_segments.shape, self.key_segments.shape[1]

        # FlexAttention counts the arguments of its predicate, and those of a bound method differ.
        def allowed(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return self.allowed(b, q, k)

        _, create_block_mask = _flex()
        return create_block_mask(allowed, rows, None, queries, keys, device=self.query_segments.device)

    def additive_bf16_mask(self) -> tuple[Tensor, Tensor]:
        """The dense predicate for bf16 arithmetic.

        Returns what is added to the scores, (B, 1 or N, Q, K), and which queries have a key, (B, 1, Q, 1).
        """
        # No cached_property: in Python 3.11 it takes a lock, which breaks a compiled graph.
        if self._bf16_mask is not None:
            return self._bf16_mask
        mask: Tensor = self.mask
        if mask.dtype == torch.bool:
            allowed, scores = mask, torch.zeros_like(mask, dtype=torch.bfloat16)
        else:
            allowed, scores = mask > float("-inf"), mask.bfloat16()
        added = scores.masked_fill(~allowed, torch.finfo(torch.bfloat16).min)
        result = added, allowed.any(-1, keepdim=True)
        # Not while compiling: the first block that is compiled by itself would have another graph than the
        # rest.
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "_bf16_mask", result)
        return result

    def _mask(self) -> Any:
        if self.query_segments is None:
            return None
        flex = self.query_segments.is_cuda and self.query_segments.shape[1] >= 128 and self.bias is None
        return self.blocks() if flex else self.dense()


def attend(q_BNQH: Tensor, k_BGKH: Tensor, v_BGKH: Tensor, visibility: Visibility, scale: float) -> Tensor:
    """softmax(scale * q k^T) v over the visible keys: (B, N, Q, H).

    Query head n reads key/value head n * G // N.

    There is no attention dropout: no fast kernel supports it, and on the CPU it costs three times the
    attention.
    """
    mask, gqa = visibility.mask, q_BNQH.shape[1] != k_BGKH.shape[1]
    if mask is not None and not isinstance(mask, Tensor):
        flex_attention, _ = _flex()
        return flex_attention(q_BNQH, k_BGKH, v_BGKH, block_mask=mask, scale=scale, enable_gqa=gqa)

    bf16_on_cpu = q_BNQH.dtype == torch.bfloat16 and q_BNQH.device.type == "cpu"
    small = bf16_on_cpu and k_BGKH.shape[2] <= EXPLICIT_MAX_KEYS
    if mask is not None and small and q_BNQH.requires_grad:
        return _attend_explicit(q_BNQH, k_BGKH, v_BGKH, visibility, scale)

    if mask is not None and visibility.bias is not None:
        mask = mask.to(q_BNQH.dtype)
    causal = visibility.causal and mask is None
    # The CPU has one kernel, and choosing among kernels takes time.
    with sdpa_kernel(KERNELS, set_priority=True) if q_BNQH.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(
            q_BNQH, k_BGKH, v_BGKH, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
        )


def _attend_explicit(
    q_BNQH: Tensor, k_BGKH: Tensor, v_BGKH: Tensor, visibility: Visibility, scale: float
) -> Tensor:
    """Attention by explicit matrix products, a few rows at a time."""
    added_B1QK, has_key_B1Q1 = visibility.additive_bf16_mask()
    heads, groups = q_BNQH.shape[1], k_BGKH.shape[1]
    k_BNKH, v_BNKH = k_BGKH, v_BGKH
    if heads != groups:
        k_BNKH = k_BGKH.repeat_interleave(heads // groups, dim=1)
        v_BNKH = v_BGKH.repeat_interleave(heads // groups, dim=1)

    rows = max(1, EXPLICIT_MAX_SCORES // (heads * q_BNQH.shape[2] * k_BNKH.shape[2]))
    inputs = ((q_BNQH * scale), k_BNKH, v_BNKH, added_B1QK)
    chunks = zip(*(x.split(rows) for x in inputs), strict=True)
    outputs = [(q @ k.mT + added).softmax(-1) @ v for q, k, v, added in chunks]
    return torch.cat(outputs) * has_key_B1Q1


@cache
def _flex() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """FlexAttention and `create_block_mask`, compiled: uncompiled they materialise the score matrices.

    Imported on CUDA only.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), torch.compile(create_block_mask)


class Cache:
    """Keys and values of one attention layer during generation, allocated for `length` positions."""

    def __init__(self, length: int) -> None:
        self.length, self.used = length, 0

    def extend(self, k_BGTH: Tensor, v_BGTH: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of T new positions; returns all so far."""
        if not self.used:
            shape = (*k_BGTH.shape[:2], self.length, k_BGTH.shape[3])
            self.k, self.v = k_BGTH.new_empty(shape), v_BGTH.new_empty(shape)
        start, self.used = self.used, self.used + k_BGTH.shape[2]
        assert self.used <= self.length
        self.k[:, :, start : self.used] = k_BGTH
        self.v[:, :, start : self.used] = v_BGTH
        return self.filled()

    def repeat(self, times: int) -> None:
        """Copy each row `times` times; the copies are adjacent."""
        if self.used:
            self.k, self.v = (x.repeat_interleave(times, dim=0) for x in (self.k, self.v))

    def reorder(self, rows_B: Tensor, start: int) -> None:
        """Select these rows, in this order. They must be equal before `start`: that is not copied."""
        for x in (self.k, self.v):
            x[:, :, start : self.used] = x[rows_B, :, start : self.used]

    def filled(self) -> tuple[Tensor, Tensor]:
        """The keys and values so far."""
        return self.k[:, :, : self.used], self.v[:, :, : self.used]
