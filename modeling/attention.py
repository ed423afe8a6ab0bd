"""Attention: queries, keys, values and a description of who may attend go in, mixed values come out; the
kernel is chosen here.

Plain rows take SDPA's own causal kernel. Packed and windowed rows take a mask that is made once per forward:
dense on the CPU (FlexAttention has no backward there), in blocks for FlexAttention on CUDA. Both come from
one predicate, `Visibility.allowed`. Shapes: B rows, Q queries, K keys, N heads, G key/value heads, H head dim.
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

# Measured on an H200, causal, T 1024: 186, 141 TFLOP/s for the first two; a kernel that cannot is passed
# over.
KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

# SDPA's backward in bf16 is slow on the CPU. Forward and backward of 8 rows, 8 heads of 32, written out and
# by SDPA, one core with AMX: 16 and 33 ms at T 256, 71 and 90 ms at 512; at 1,024 they are even.
EXPLICIT_MAX_KEYS = 512
EXPLICIT_MAX_SCORES = 2**22  # scores that exist at a time and stay in the cache: one 8 MB chunk


@dataclass(frozen=True, eq=False)
class Visibility:
    """Who may attend to whom. One object serves all layers of a kind, so that its mask is made once.

    Segments number the documents of a row, 0 is padding. None: each row is one whole document; a window, a
    bias or a `query_start` needs them. `window` > 0 limits the distance. Query i stands at position
    `query_start + i` of its row, key j at j. `bias` (1, N, Q, K) is added to the scores.
    """

    causal: bool
    query_segments: Tensor | None = None  # (B, Q) int64
    key_segments: Tensor | None = None  # (B, K) int64
    window: int = 0
    query_start: int = 0
    bias: Tensor | None = None
    mask: Any = field(init=False)  # what the kernel takes: None, a dense mask, or FlexAttention's BlockMask
    _added: tuple[Tensor, Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", self._mask())

    def allowed(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether query q of row b sees key k: indices that broadcast.

        Padding sees padding. In cross-attention a query may see no key at all: the kernels then give zeros,
        never NaN.
        """
        assert self.query_segments is not None and self.key_segments is not None
        seen = self.query_segments[b, q] == self.key_segments[b, k]
        at = q + self.query_start
        if self.causal:
            seen = seen & (at >= k)
        if self.window:
            seen = seen & ((at - k).abs() <= self.window)
        return seen

    def dense(self) -> Tensor:
        """The predicate on every pair, (B, 1, Q, K) bool; with a bias, scores to add, (B, N, Q, K)."""
        assert self.query_segments is not None and self.key_segments is not None
        (rows, queries), keys = self.query_segments.shape, self.key_segments.shape[1]
        b, q, k = (torch.arange(n, device=self.query_segments.device) for n in (rows, queries, keys))
        seen = self.allowed(b[:, None, None, None], q[:, None], k)
        return seen if self.bias is None else self.bias.masked_fill(~seen, float("-inf"))

    def blocks(self) -> Any:
        """The predicate as FlexAttention's BlockMask: blocks of 128 x 128 pairs that see nothing cost
        nothing.

        Smaller blocks, which a narrow window would like, have no backward on Hopper (torch 2.11).
        """
        assert self.query_segments is not None and self.key_segments is not None
        (rows, queries), keys = self.query_segments.shape, self.key_segments.shape[1]

        def allowed(
            b: Tensor, head: Tensor, q: Tensor, k: Tensor
        ) -> Tensor:  # flex counts arguments: a method has one too many
            return self.allowed(b, q, k)

        return _flex()[1](allowed, rows, None, queries, keys, device=self.query_segments.device)

    def additive_bf16_mask(self) -> tuple[Tensor, Tensor]:
        """The dense predicate for bf16 arithmetic: what is added to the scores (B, 1 or N, Q, K); which
        queries (B, 1, Q, 1) see a key.
        """
        if (
            self._added is not None
        ):  # no cached_property: in Python 3.11 it takes a lock, and a compiler stops there
            return self._added
        mask: Tensor = self.mask
        seen = mask if mask.dtype == torch.bool else mask > float("-inf")
        scores = torch.zeros_like(mask, dtype=torch.bfloat16) if mask.dtype == torch.bool else mask.bfloat16()
        added = scores.masked_fill(~seen, torch.finfo(torch.bfloat16).min), seen.any(-1, keepdim=True)
        if (
            not torch.compiler.is_compiling()
        ):  # else the first block that is compiled by itself would have another graph than the rest
            object.__setattr__(self, "_added", added)
        return added

    def _mask(self) -> Any:
        if self.query_segments is None:
            return None
        flex = self.query_segments.is_cuda and self.query_segments.shape[1] >= 128 and self.bias is None
        return self.blocks() if flex else self.dense()


def attend(q_BNQH: Tensor, k_BGKH: Tensor, v_BGKH: Tensor, visibility: Visibility, scale: float) -> Tensor:
    """softmax(scale * q k^T) v over the visible keys: (B, N, Q, H). Query head n reads key/value head n * G
    // N.

    There is no dropout here: no fast kernel has it, and it costs the CPU three times the attention itself.
    """
    mask, gqa = visibility.mask, q_BNQH.shape[1] != k_BGKH.shape[1]
    if mask is not None and not isinstance(mask, Tensor):
        return _flex()[0](q_BNQH, k_BGKH, v_BGKH, block_mask=mask, scale=scale, enable_gqa=gqa)
    small = (
        q_BNQH.dtype == torch.bfloat16
        and q_BNQH.device.type == "cpu"
        and k_BGKH.shape[2] <= EXPLICIT_MAX_KEYS
    )
    if mask is not None and small and q_BNQH.requires_grad:
        return _attend_explicit(q_BNQH, k_BGKH, v_BGKH, visibility, scale)
    if mask is not None and visibility.bias is not None:
        mask = mask.to(q_BNQH.dtype)
    causal = visibility.causal and mask is None
    with (
        sdpa_kernel(KERNELS, set_priority=True) if q_BNQH.is_cuda else nullcontext()
    ):  # the CPU has one kernel, and choosing takes time
        return F.scaled_dot_product_attention(
            q_BNQH, k_BGKH, v_BGKH, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
        )


def _attend_explicit(
    q_BNQH: Tensor, k_BGKH: Tensor, v_BGKH: Tensor, visibility: Visibility, scale: float
) -> Tensor:
    """Attention as its formula, some rows at a time."""
    added_B1QK, sees_B1Q1 = visibility.additive_bf16_mask()
    heads = q_BNQH.shape[1]
    k_BNKH, v_BNKH = (
        x.repeat_interleave(heads // x.shape[1], dim=1) if heads != x.shape[1] else x
        for x in (k_BGKH, v_BGKH)
    )
    rows = max(1, EXPLICIT_MAX_SCORES // (heads * q_BNQH.shape[2] * k_BNKH.shape[2]))
    chunks = zip(
        (q_BNQH * scale).split(rows),
        k_BNKH.split(rows),
        v_BNKH.split(rows),
        added_B1QK.split(rows),
        strict=True,
    )
    return torch.cat([(q @ k.mT + added).softmax(-1) @ v for q, k, v, added in chunks]) * sees_B1Q1


@cache
def _flex() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """FlexAttention and its mask maker, compiled: uncompiled they hold whole score matrices. Imported on CUDA
    alone.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), torch.compile(create_block_mask)


class Cache:
    """Keys and values of one attention layer during generation, in space reserved for `length` positions."""

    def __init__(self, length: int) -> None:
        self.length, self.used = length, 0

    def extend(self, k_BGTH: Tensor, v_BGTH: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values of T new positions, and return all so far."""
        if not self.used:
            shape = (*k_BGTH.shape[:2], self.length, k_BGTH.shape[3])
            self.k, self.v = k_BGTH.new_empty(shape), v_BGTH.new_empty(shape)
        begin, self.used = self.used, self.used + k_BGTH.shape[2]
        assert self.used <= self.length
        self.k[:, :, begin : self.used] = k_BGTH
        self.v[:, :, begin : self.used] = v_BGTH
        return self.kept()

    def repeat(self, times: int) -> None:
        """Go on with as many copies of each row, side by side."""
        if self.used:
            self.k, self.v = (x.repeat_interleave(times, dim=0) for x in (self.k, self.v))

    def reorder(self, rows_B: Tensor, begin: int) -> None:
        """Go on with these rows, in this order, which are alike up to position `begin`."""
        for x in (self.k, self.v):
            x[:, :, begin : self.used] = x[rows_B, :, begin : self.used]

    def kept(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.used], self.v[:, :, : self.used]
