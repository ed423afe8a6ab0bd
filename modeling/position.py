"""Position schemes: rotary, learned, sinusoidal, relative. Each overrides one method of `Position`.

From positions (integers) they compute a term for the embeddings (learned, sinusoidal), a rotation of queries
and keys (rope), or a bias for the attention scores (relative), once per forward for all layers.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trifold.modeling.config import ModelConfig

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (T, H) fp32


class Position(nn.Module):
    """The interface of all schemes; each method here does nothing."""

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__()

    def forward(self, x_BTD: Tensor, segments_BT: Tensor) -> Tensor:
        """The embeddings with their positions added, counted from 0 in each document.

        The segments may begin before x, and end where it ends.
        """
        return x_BTD

    def rotation(self, positions_T: Tensor, local: bool) -> Rotation | None:
        """The rotation of queries and keys at these positions of the row, in local or in full layers."""
        return None

    def bias(self, positions_Q: Tensor, positions_K: Tensor) -> Tensor | None:
        """What is added to the attention scores, (1, N, Q, K)."""
        return None


class Rope(Position):
    """Rotary positions (Su et al. 2021), paired by halves as in Llama.

    Attention sees only distances, so positions need not restart in each document.
    """

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__(config, causal)
        self.head_dim = config.head_dim
        self.theta = config.rope_theta
        self.local_theta = config.local_rope_theta

    def rotation(self, positions_T: Tensor, local: bool) -> Rotation:
        compute = _opaque_cos_sin if torch.compiler.is_compiling() else cos_sin
        return compute(positions_T, self.head_dim, self.local_theta if local else self.theta)


def cos_sin(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (T, H) fp32 each, of the rotation angles at these positions."""
    exponents = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim
    angles = positions_T[:, None].float() / theta**exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


# A compiler would not keep the table but recompute it for each element that is rotated, in every layer: 17 of
# the 74 ms of a step of decoder-110m on an H200. It keeps the result of an operator that it cannot look into.
_opaque_cos_sin = torch.library.custom_op("trifold::waves", cos_sin, mutates_args=())


@_opaque_cos_sin.register_fake
def _(positions_T: Tensor, head_dim: int, theta: float) -> Rotation:
    cos = positions_T.new_empty(len(positions_T), head_dim, dtype=torch.float32)
    return cos, torch.empty_like(cos)


class Learned(Position):
    """A vector per position in the document (BERT, GPT-2, BART), and that of token type 0 (BERT)."""

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__(config, causal)
        self.offset = config.position_offset
        self.weight = nn.Parameter(torch.empty(config.max_positions + self.offset, config.dim))
        self.types = nn.Embedding(config.token_types, config.dim) if config.token_types else None

    def forward(self, x_BTD: Tensor, segments_BT: Tensor) -> Tensor:
        positions_BT = document_positions(segments_BT)[:, -x_BTD.shape[1] :]
        x_BTD = x_BTD + F.embedding(positions_BT + self.offset, self.weight)
        return x_BTD if self.types is None else x_BTD + self.types(torch.zeros_like(positions_BT))


class Sinusoidal(Position):
    """Fixed waves, sines in the first half and cosines in the second (fairseq: M2M-100, NLLB)."""

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__(config, causal)
        self.offset = config.position_offset

    def forward(self, x_BTD: Tensor, segments_BT: Tensor) -> Tensor:
        positions_BT = document_positions(segments_BT)[:, -x_BTD.shape[1] :]
        half = x_BTD.shape[-1] // 2
        rates = torch.exp(torch.arange(half, device=x_BTD.device) * (-math.log(10_000) / max(half - 1, 1)))
        angles = (positions_BT + self.offset)[..., None] * rates
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return x_BTD + F.pad(waves, (0, x_BTD.shape[-1] - 2 * half)).type_as(x_BTD)


class Relative(Position):
    """A learned bias per head and distance bucket (T5, Raffel et al. 2020).

    Small distances have a bucket each, larger ones share buckets on a logarithmic scale.
    """

    num_buckets, max_distance = 32, 128

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__(config, causal)
        self.causal = causal
        self.table = nn.Embedding(self.num_buckets, config.num_heads)

    def bias(self, positions_Q: Tensor, positions_K: Tensor) -> Tensor:
        buckets_QK = self.bucket(positions_K - positions_Q[:, None])
        return self.table(buckets_QK).permute(2, 0, 1)[None]

    def bucket(self, offset: Tensor) -> Tensor:
        """The bucket of a key that is `offset` positions after its query (negative: before it).

        Bidirectional stacks use half of the buckets for keys after the query.
        """
        if self.causal:
            side, distance, buckets = torch.zeros_like(offset), (-offset).clamp(min=0), self.num_buckets
        else:
            buckets = self.num_buckets // 2
            side, distance = (offset > 0) * buckets, offset.abs()
        exact = buckets // 2
        octaves = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        logarithmic = (exact + (octaves * (buckets - exact)).long()).clamp(max=buckets - 1)
        return side + torch.where(distance < exact, distance, logarithmic)


POSITION_SCHEMES = {"rope": Rope, "learned": Learned, "sinusoidal": Sinusoidal, "relative": Relative}


def rotate(x_BNTH: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the pairs (i, i + H/2) of each head, in fp32 whatever the precision of x."""
    cos, sin = rotation
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _RotateFn.apply(x_BNTH, cos, sin)
    first, second = x_BNTH.chunk(2, dim=-1)
    return (x_BNTH * cos + torch.cat([-second, first], dim=-1) * sin).type_as(x_BNTH)


class _RotateFn(torch.autograd.Function):
    """`rotate` for eager training, in fewer memory passes; its gradient is the inverse rotation.

    Forward and backward of 8 rows of 256, 8 heads of 32, in fp32 on one core with AVX2: 1.6 ms instead of
    2.6. A compiler fuses the plain formula by itself.
    """

    @staticmethod
    def forward(ctx: Any, x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x_BNTH, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad_outputs[0], cos, -sin), None, None


def _rotated(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x_first, x_second = x_BNTH.chunk(2, dim=-1)
    sin_first, sin_second = sin.chunk(2, dim=-1)
    rotated = x_BNTH * cos
    first, second = rotated.chunk(2, dim=-1)
    first.addcmul_(x_second, sin_first, value=-1)
    second.addcmul_(x_first, sin_second)
    return rotated.type_as(x_BNTH)


def document_positions(segments_BT: Tensor) -> Tensor:
    """Positions that count from 0 in each document; 0 for padding.

    Segments [1, 1, 1, 2, 2, 0] have the positions [0, 1, 2, 0, 1, 0].
    """
    position = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    previous = F.pad(segments_BT, (1, 0), value=-1)[:, :-1]
    start = torch.where(segments_BT != previous, position, 0).cummax(dim=1).values
    return torch.where(segments_BT > 0, position - start, 0)
