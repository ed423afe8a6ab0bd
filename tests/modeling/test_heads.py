"""The chunked loss against F.cross_entropy, in value and in every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trifold.modeling import heads
from trifold.modeling.batch import IGNORE
from trifold.modeling.heads import loss_sum, token_losses


def _case(dtype: torch.dtype, positions: int = 300, words: int = 37) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    h, weight, bias = (
        torch.randn(shape, generator=draw).to(dtype).requires_grad_()
        for shape in ((positions, 16), (words, 16), (words,))
    )
    targets = torch.randint(0, words, (positions,), generator=draw)
    targets[torch.rand(positions, generator=draw) < 0.3] = IGNORE
    return h, weight, bias, targets


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        heads.CHUNK_LOGITS, "cpu", 37 * 128
    )  # 300 positions: two whole chunks and a part of one


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients_equal_cross_entropy(
    dtype: torch.dtype, tolerance: float, with_bias: bool
) -> None:
    h, weight, bias, targets = _case(dtype)
    given = (h, weight, bias) if with_bias else (h, weight)
    expected = F.cross_entropy(F.linear(h, weight, bias if with_bias else None), targets, reduction="sum")
    ours, _ = loss_sum(h, weight, bias if with_bias else None, targets)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(
        torch.autograd.grad(ours * 0.7, given), torch.autograd.grad(expected * 0.7, given), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_no_valid_target_gives_zero_and_zero_gradients() -> None:
    h, weight, bias, targets = _case(torch.float32)
    loss, _ = loss_sum(h, weight, bias, torch.full_like(targets, IGNORE))
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (h, weight, bias)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_frozen_inputs_get_no_gradient_and_the_others_keep_theirs() -> None:
    h, weight, bias, targets = _case(torch.float64)
    expected = torch.autograd.grad(loss_sum(h, weight, bias, targets)[0], h)[0]
    loss_sum(h, weight.detach(), bias.detach(), targets)[0].backward()
    assert h.grad is not None and torch.equal(h.grad, expected)


@pytest.mark.parametrize("mode", ["bf16", "autocast"])
def test_low_precision_follows_the_exact_gradients(mode: str) -> None:
    h, weight, bias, targets = _case(torch.bfloat16 if mode == "bf16" else torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (h, weight, bias)]
    expected = torch.autograd.grad(F.cross_entropy(F.linear(*exact), targets, reduction="sum"), exact)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        loss, _ = loss_sum(h, weight, bias, targets)
    assert loss.dtype == torch.float32
    for ours, given, reference in zip(
        torch.autograd.grad(loss, (h, weight, bias)), (h, weight, bias), expected, strict=True
    ):
        assert ours.dtype == given.dtype
        assert (ours.double() - reference).norm() < 0.02 * reference.norm()


def test_token_losses_are_those_of_cross_entropy_and_right_where_the_best_guess_is() -> None:
    h, weight, bias, targets = _case(torch.float32)
    logits = F.linear(h, weight, bias)
    targets[:50] = logits[:50].argmax(-1)
    nll, right = token_losses(h, weight, bias, targets)
    torch.testing.assert_close(nll, F.cross_entropy(logits, targets, reduction="none"))
    assert right[:50].all() and torch.equal(right, logits.argmax(-1) == targets)
    assert not nll.requires_grad


def test_beside_the_sum_each_targets_loss_is_returned_without_a_gradient() -> None:
    h, weight, bias, targets = _case(torch.float32)
    total, nll = loss_sum(h, weight, bias, targets)
    torch.testing.assert_close(nll, token_losses(h, weight, bias, targets)[0])
    assert total.requires_grad and not nll.requires_grad
