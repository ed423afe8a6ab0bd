"""Positions against the classes they follow, and the promise that they restart with each document."""

import math

import pytest
import torch
from torch import nn

from tests.modeling.families import CONFIGS, SIZES
from trifold.modeling.position import POSITION_SCHEMES, Relative, Rope, Sinusoidal, document_positions, rotate


def test_positions_count_from_zero_in_every_document_and_padding_stands_at_zero() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 2, 3, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]])
    expected = [[0, 1, 0, 1, 2, 0, 0, 0], [0, 0, 0, 0, 1, 2, 3, 4]]
    assert document_positions(segments).tolist() == expected


@pytest.mark.parametrize("causal", [False, True])
def test_relative_buckets_are_those_of_t5(causal: bool) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    ahead = torch.arange(-300, 301)
    expected = t5.T5Attention._relative_position_bucket(
        ahead, bidirectional=not causal, num_buckets=32, max_distance=128
    )
    assert torch.equal(Relative(CONFIGS["t5"], causal).bucket(ahead), expected)


def test_relative_bias_reads_the_bucket_of_key_minus_query() -> None:
    scheme = Relative(CONFIGS["t5"], causal=False)
    bias = scheme.bias(torch.arange(2, 5), torch.arange(5))
    assert bias.shape == (1, 4, 3, 5)
    assert torch.equal(bias[0, :, 1, 4], scheme.table.weight[scheme.bucket(torch.tensor(1))])


def test_sinusoidal_waves_are_those_of_m2m100() -> None:
    m2m = pytest.importorskip("transformers.models.m2m_100.modeling_m2m_100")
    stock = m2m.M2M100SinusoidalPositionalEmbedding(40, 32, padding_idx=1)
    ours = Sinusoidal(CONFIGS["nllb"], causal=False)(
        torch.zeros(1, 40, 32), torch.ones(1, 40, dtype=torch.int64)
    )
    torch.testing.assert_close(ours, stock(torch.full((1, 40), 9)))


def test_rotation_is_a_turn_by_position_times_frequency() -> None:
    """Against complex multiplication: the pair (i, i + H/2) is a complex number."""
    config = CONFIGS["modernbert"]
    at, half = torch.arange(11), config.head_dim // 2
    x = torch.randn(2, 4, 11, config.head_dim, dtype=torch.float64)
    for local, theta in ((False, config.rope_theta), (True, config.local_rope_theta)):
        cos, sin = Rope(config, causal=False).rotation(at, local)
        turns = (
            at[:, None].double()
            * torch.tensor([theta ** (-2 * i / config.head_dim) for i in range(half)]).double()
        )
        z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(turns), turns)
        torch.testing.assert_close(
            rotate(x, (cos, sin)), torch.cat([z.real, z.imag], dim=-1), rtol=1e-5, atol=1e-5
        )


def test_rotated_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8).unbind(0)

    def score(i: int, j: int) -> float:
        turn = Rope(CONFIGS["llama"], causal=True).rotation(torch.tensor([i, j]), local=False)
        return float((rotate(q, (turn[0][:1], turn[1][:1])) * rotate(k, (turn[0][1:], turn[1][1:]))).sum())

    assert math.isclose(score(5, 2), score(905, 902), abs_tol=1e-3)
    assert not math.isclose(score(5, 2), score(5, 3), abs_tol=1e-3)


def test_only_learned_and_relative_positions_have_parameters() -> None:
    names = {kind: [name for name, _ in _made(kind).named_parameters()] for kind in POSITION_SCHEMES}
    assert names == {"rope": [], "sinusoidal": [], "learned": ["weight"], "relative": ["table.weight"]}


def _made(kind: str) -> nn.Module:
    return POSITION_SCHEMES[kind](CONFIGS["llama"].model_copy(update={"position": kind, **SIZES}), True)
