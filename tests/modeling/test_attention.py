"""attend and Visibility against a plain softmax over an explicit mask."""

import pytest
import torch
from torch import Tensor

from trifold.modeling import attention
from trifold.modeling.attention import Cache, Visibility, attend

SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]])


def _qkv(rows: int, queries: int, keys: int, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = (rows, 4, queries, 8), (rows, groups, keys, 8), (rows, groups, keys, 8)
    q, k, v = (
        torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes
    )
    return q, k, v


def _plain_softmax(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """By the formula, in loops over rows, heads and queries; a query that sees nothing gives zeros."""
    y = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            g = n * k.shape[1] // q.shape[1]
            for i in range(q.shape[2]):
                at = seen[b, i].nonzero()[:, 0]
                if len(at):
                    y[b, n, i] = (q[b, n, i] @ k[b, g, at].T * scale).softmax(-1) @ v[b, g, at]
    return y


def _seen(segments_q: Tensor, segments_k: Tensor, causal: bool, window: int, start: int = 0) -> Tensor:
    """Who sees whom, pair by pair, from the words of the docstring."""
    rows, queries = segments_q.shape
    seen = torch.zeros(rows, queries, segments_k.shape[1], dtype=torch.bool)
    for b in range(rows):
        for i in range(queries):
            for j in range(segments_k.shape[1]):
                near = window == 0 or abs(start + i - j) <= window
                seen[b, i, j] = (
                    bool(segments_q[b, i] == segments_k[b, j]) and near and (not causal or j <= start + i)
                )
    return seen


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_a_packed_row_attends_as_described(causal: bool, window: int) -> None:
    visibility = Visibility(causal, SEGMENTS, SEGMENTS, window)
    q, k, v = _qkv(2, 8, 8)
    expected = _plain_softmax(q, k, v, _seen(SEGMENTS, SEGMENTS, causal, window), 0.3)
    torch.testing.assert_close(attend(q, k, v, visibility, 0.3), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_a_row_without_segments_is_one_document(causal: bool) -> None:
    q, k, v = _qkv(2, 8, 8)
    ones = torch.ones_like(SEGMENTS)
    expected = attend(q, k, v, Visibility(causal, ones, ones), 0.3)
    assert Visibility(causal).mask is None
    torch.testing.assert_close(attend(q, k, v, Visibility(causal), 0.3), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_kernel_of_the_gpu_sees_what_the_dense_mask_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention itself, uncompiled and forward only, which is what it can do on the CPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    monkeypatch.setattr(attention, "_flex", lambda: (flex_attention, create_block_mask))
    sources = torch.tensor([[1, 1, 2, 0, 3], [2, 1, 1, 1, 0]])
    for visibility in (
        Visibility(False, SEGMENTS, sources),
        Visibility(True, SEGMENTS[:, 3:], SEGMENTS, window=2, query_start=3),
    ):
        assert visibility.query_segments is not None and visibility.key_segments is not None
        q, k, v = (
            x.detach() for x in _qkv(2, visibility.query_segments.shape[1], visibility.key_segments.shape[1])
        )
        expected = attend(q, k, v, visibility, 0.3)
        object.__setattr__(visibility, "mask", visibility.blocks())
        torch.testing.assert_close(attend(q, k, v, visibility, 0.3), expected)


def test_later_queries_attend_as_the_end_of_the_whole_row() -> None:
    q, k, v = _qkv(2, 8, 8)
    for window in (0, 2):
        full = attend(q, k, v, Visibility(True, SEGMENTS, SEGMENTS, window), 0.3)
        tail = attend(
            q[:, :, 6:], k, v, Visibility(True, SEGMENTS[:, 6:], SEGMENTS, window, query_start=6), 0.3
        )
        torch.testing.assert_close(tail, full[:, :, 6:])


def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients() -> None:
    sources = torch.tensor([[1, 1, 2, 3], [1, 1, 1, 1]])  # no padding here for the padding of SEGMENTS to see
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in _qkv(2, 8, 4))
        y = attend(q, k, v, Visibility(False, SEGMENTS, sources), 0.3)
        y.sum().backward()
        assert torch.equal(y[0, :, 6:], torch.zeros_like(y[0, :, 6:]))
        for x in (q, k, v):
            assert x.grad is not None and x.grad.isfinite().all()


def test_a_bias_is_added_to_the_scores() -> None:
    q, k, v = _qkv(2, 8, 8, groups=4)
    bias = torch.randn(1, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    scores = (q @ k.transpose(2, 3) * 0.3 + bias).masked_fill(
        ~_seen(SEGMENTS, SEGMENTS, True, 0)[:, None], float("-inf")
    )
    y = attend(q, k, v, Visibility(True, SEGMENTS, SEGMENTS, bias=bias), 0.3)
    torch.testing.assert_close(y, scores.softmax(-1) @ v)
    y.square().sum().backward()
    assert bias.grad is not None and bias.grad.isfinite().all() and bias.grad.abs().max() > 0


@pytest.mark.parametrize(("groups", "window", "causal"), [(4, 0, True), (2, 2, False), (1, 0, False)])
def test_bf16_training_on_the_cpu_agrees_with_exact_arithmetic(
    groups: int, window: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The explicit path, in chunks of one row, forward and backward."""
    monkeypatch.setattr(attention, "EXPLICIT_MAX_SCORES", 1)
    exact = _qkv(2, 8, 8, groups)
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    visibility = Visibility(causal, SEGMENTS, SEGMENTS, window)
    expected = _plain_softmax(*exact, _seen(SEGMENTS, SEGMENTS, causal, window), 0.3)
    q, k, v = rounded
    y = attend(q, k, v, visibility, 0.3)
    assert y.grad_fn is not None
    assert "Cat" in type(y.grad_fn.next_functions[0][0]).__name__  # the path under test was taken
    torch.testing.assert_close(y.double(), expected, rtol=0.03, atol=0.03)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (y.double() * weights).sum().backward()
    (expected * weights).sum().backward()
    for x, r in zip(exact, rounded, strict=True):
        assert r.grad is not None
        torch.testing.assert_close(r.grad.double(), x.grad, rtol=0.05, atol=0.05)


def test_a_cache_returns_everything_so_far_and_rejects_more_than_its_length() -> None:
    _, k, v = _qkv(2, 8, 8)
    cache = Cache(8)
    for begin, end in ((0, 3), (3, 4), (4, 8)):
        so_far = cache.extend(k[:, :, begin:end].detach(), v[:, :, begin:end].detach())
        assert torch.equal(so_far[0], k[:, :, :end]) and torch.equal(so_far[1], v[:, :, :end])
    with pytest.raises(AssertionError):
        cache.extend(k[:, :, :1], v[:, :, :1])
