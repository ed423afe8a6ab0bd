"""RMSNorm in training, whose derivative is ours, beside its formula in float64 and autograd's derivative of
that.
"""

import pytest
import torch
from torch import Tensor

from trifold.modeling.block import RMSNorm

EPS = 1e-6


def _inputs(dtype: torch.dtype) -> tuple[RMSNorm, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    norm, x, grad = (
        RMSNorm(48, EPS),
        torch.randn(3, 5, 48, generator=draw) * 3,
        torch.randn(3, 5, 48, generator=draw),
    )
    torch.nn.init.normal_(norm.weight, 1, 0.3, generator=draw)
    return norm.to(dtype), x.to(dtype).requires_grad_(), grad.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "distance"), [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_values_and_gradients_are_those_of_the_formula_in_every_precision(
    dtype: torch.dtype, distance: float
) -> None:
    norm, x, grad = _inputs(dtype)
    out = norm(x)
    out.backward(grad)
    exact, weight = (t.detach().double().requires_grad_() for t in (x, norm.weight))
    expected = exact * (exact.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight
    expected.backward(grad.double())
    for result, required in ((out, expected), (x.grad, exact.grad), (norm.weight.grad, weight.grad)):
        assert result is not None and required is not None and result.dtype == dtype
        assert (result.double() - required).abs().max() <= distance * required.abs().max()


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    norm, x, _ = _inputs(torch.float32)
    (first,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
