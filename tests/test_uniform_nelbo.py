"""The NELBO's kernel over vocabularies, noise levels, dtypes and ISA levels: values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import dlcore
from dlcore import LinearLogits
from dlcore.process import uniform

ROWS = 8
# c = Vα/(1-α) from far below 1 to far above 2^31: eight, four and one factor share a logarithm.
ALPHAS = [1e-3, 0.1, 0.5, 0.99, 0.9999, 1 - 1e-7, 1 - 1e-12]


def case(vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(ROWS, vocab, generator=generator)).to(dtype)
    z, x = torch.randint(0, vocab, (2, ROWS), generator=generator)
    return logits, z, torch.where(torch.arange(ROWS) % 2 == 0, z, x)


def value_and_gradient(
    logits: Tensor, z: Tensor, x: Tensor, alpha: float, kind: str
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = uniform.nelbo(leaf, z, x, torch.tensor(alpha, dtype=torch.float64), -1.0, parameterization=kind)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def eager(a: Tensor, z: Tensor, x: Tensor, alpha: float) -> Tensor:
    """The closed form as written, in the logits' own dtype; dalpha = -1."""
    vocab = a.shape[-1]
    c, n = vocab * alpha / (1 - alpha), vocab / (1 - alpha)
    ell, bound = torch.log1p(c * a.softmax(-1)), math.log1p(c)
    at_z, at_x = (ell.gather(-1, i.unsqueeze(-1)).squeeze(-1) for i in (z, x))
    left = vocab * at_z - ell.sum(-1)
    same = (left - (vocab - 1) * bound) / (1 + c) - n * (1 / (1 + c) - (-at_z).exp())
    other = (1 + c) * bound + c * (at_z - at_x) + left - n * (1 - (-at_z).exp())
    return torch.where(z == x, same, other) / (vocab * alpha)


def error(got: Tensor, exact: Tensor) -> float:
    """The largest error relative to the largest entry of its row."""
    got, exact = (t.reshape(ROWS, -1).double() for t in (got, exact))
    return float(((got - exact).abs() / exact.abs().amax(-1, keepdim=True)).max())


@pytest.mark.parametrize("vocab", [17, 255, 1000, 66_000])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_parity(vocab, alpha, level, poisoned):
    """At most twice the error of the eager formula in float32, both against float64."""
    logits, z, x = case(vocab, torch.float32)
    loss, gradient = value_and_gradient(logits, z, x, alpha, "loo")
    assert dlcore.last_backend("uniform.nelbo") != "reference"
    leaf = logits.clone().requires_grad_()
    own = eager(leaf, z, x, alpha)
    own.sum().backward()
    assert leaf.grad is not None
    with dlcore.use_backend("reference"):
        exact, exact_gradient = value_and_gradient(logits.double(), z, x, alpha, "loo")
    assert error(loss, exact) <= max(2 * error(own.detach(), exact), 3e-7)
    assert error(gradient, exact_gradient) <= max(2 * error(leaf.grad, exact_gradient), 2e-6)


@pytest.mark.parametrize("alpha", ALPHAS[1:-1])
def test_a_denoiser_is_shifted_to_leave_one_out(alpha):
    logits, z, x = case(1000, torch.float32)
    loss, gradient = value_and_gradient(logits, z, x, alpha, "denoiser")
    with dlcore.use_backend("reference"):
        exact, exact_gradient = value_and_gradient(logits.double(), z, x, alpha, "denoiser")
    assert error(loss, exact) < 1e-6
    assert error(gradient, exact_gradient) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_directly(dtype):
    logits, z, x = case(5000, dtype)
    loss, gradient = value_and_gradient(logits, z, x, 0.4, "loo")
    wide, wide_gradient = value_and_gradient(logits.float(), z, x, 0.4, "loo")
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss, wide, rtol=1e-6, atol=1e-6)
    # Even and odd entries are summed apart, so the last bit before rounding may differ.
    torch.testing.assert_close(gradient, wide_gradient.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_hostile_rows_give_nan_and_leave_the_others():
    logits, z, x = case(700, torch.float32)
    clean, clean_gradient = value_and_gradient(logits, z, x, 0.4, "loo")
    logits[3, 600] = torch.nan
    loss, gradient = value_and_gradient(logits, z, x, 0.4, "loo")
    others = torch.arange(ROWS) != 3
    assert loss[3].isnan()
    assert gradient[3].isnan().all()
    assert torch.equal(loss[others], clean[others])
    assert torch.equal(gradient[others], clean_gradient[others])


def test_parity_notices_a_wrong_formula():
    """The injected bug: a denoiser's logits taken for leave-one-out ones."""
    logits, z, x = case(1000, torch.float32)
    right = uniform.nelbo(logits, z, x, 0.4, -1.0, parameterization="denoiser")
    wrong = uniform.nelbo(logits, z, x, 0.4, -1.0)
    assert ((right - wrong).abs() / right.abs()).max() > 1e-2


def test_through_a_linear_head():
    generator = torch.Generator().manual_seed(0)
    head = LinearLogits(
        torch.randn(ROWS, 16, generator=generator), torch.randn(9000, 16, generator=generator)
    )
    z, x = torch.randint(0, 9000, (2, ROWS), generator=generator)
    whole = uniform.nelbo(head.materialize(), z, x, 0.4, -1.0)
    torch.testing.assert_close(uniform.nelbo(head, z, x, 0.4, -1.0), whole, rtol=1e-6, atol=1e-5)
