"""Uniform diffusion's losses against the papers' forms."""

import math

import pytest
import torch
from oracles import law, point
from torch import Tensor

from dlcore.process import uniform


def generator_kl(p: Tensor, z: Tensor, x: Tensor, alpha: Tensor, dalpha: Tensor) -> Tensor:
    """(β/V)·{Σ_{y≠z} (r_θ - r) + Σ_{y≠z} r·log(r/r_θ)}, with β = -α'/α."""
    vocab = p.shape[-1]
    a = alpha.unsqueeze(-1)
    true, model = vocab * a * point(x, vocab) + 1 - a, vocab * a * p + 1 - a
    r, r_model = true / true.gather(-1, z.unsqueeze(-1)), model / model.gather(-1, z.unsqueeze(-1))
    each = (r_model - r + r * (r / r_model).log()) * (1 - point(z, vocab))
    return -dalpha / alpha / vocab * each.sum(-1)


def duo_form(p: Tensor, z: Tensor, x: Tensor, alpha: Tensor, dalpha: Tensor) -> Tensor:
    """α'/(Vα)·[V/x̄_z - V/x̄θ_z - Σ_j (x̄_j/x̄_z)·log(x̄θ_z·x̄_j / (x̄θ_j·x̄_z))], x̄ = Vαx + 1-α (2506.10892)."""
    vocab = p.shape[-1]
    a = alpha.unsqueeze(-1)
    true, model = vocab * a * point(x, vocab) + 1 - a, vocab * a * p + 1 - a
    at, at_model = true.gather(-1, z.unsqueeze(-1)), model.gather(-1, z.unsqueeze(-1))
    total = (true / at * (at_model * true / (model * at)).log()).sum(-1)
    return dalpha / (vocab * alpha) * (vocab / at.squeeze(-1) - vocab / at_model.squeeze(-1) - total)


def sedd_form(log_score: Tensor, z: Tensor, x: Tensor, alpha: Tensor, dalpha: Tensor) -> Tensor:
    """σ'·score entropy under uniform noise, α = e^-σ (SEDD, arXiv 2310.16834)."""
    vocab, odds = log_score.shape[-1], alpha / (1 - alpha)
    rho = 1 / (1 + vocab * odds)
    others = 1 - point(z, vocab)
    positive = (log_score.exp() * others).sum(-1) / vocab
    mean = (log_score * others).sum(-1) / vocab
    same = positive - rho * mean + rho * (rho.log() - 1) * (vocab - 1) / vocab
    at_x = log_score.gather(-1, x.unsqueeze(-1)).squeeze(-1)
    other = positive - at_x * odds - mean + ((-rho.log() - 1) / rho - (vocab - 2)) / vocab
    return -dalpha / alpha * torch.where(z == x, same, other)


@pytest.mark.parametrize("vocab", [2, 3, 50])
def test_nelbo_is_the_generator_kl(vocab: int) -> None:
    g = torch.Generator().manual_seed(18)
    p, z, x = (
        law((40, vocab), seed=19),
        torch.randint(vocab, (40,), generator=g),
        torch.randint(vocab, (40,), generator=g),
    )
    z = torch.where(torch.arange(40) % 2 == 0, x, z)
    alpha = torch.rand(40, generator=g, dtype=torch.float64) * 0.98 + 0.01
    dalpha = -torch.rand(40, generator=g, dtype=torch.float64) - 0.1
    loss = uniform.nelbo(p.log(), z, x, alpha, dalpha)
    for form in (generator_kl, duo_form):
        torch.testing.assert_close(loss, form(p, z, x, alpha, dalpha), rtol=1e-9, atol=1e-9)
    score = uniform.loo_to_log_score(p.log(), z, alpha)
    torch.testing.assert_close(loss, sedd_form(score, z, x, alpha, dalpha), rtol=1e-9, atol=1e-9)
    denoiser = uniform.loo_to_denoiser(p.log(), z, alpha)
    other = uniform.nelbo(denoiser, z, x, alpha, dalpha, parameterization="denoiser")
    torch.testing.assert_close(loss, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("parameterization", ["loo", "denoiser"])
def test_loss_gradients(parameterization: str) -> None:
    logits = law((3, 4), seed=20).log().requires_grad_()
    z, x = torch.tensor([0, 3, 1]), torch.tensor([0, 1, 1])
    alpha = torch.tensor([0.2, 0.7, 0.95], dtype=torch.float64)
    options = {"parameterization": parameterization}
    assert torch.autograd.gradcheck(lambda a: uniform.nelbo(a, z, x, alpha, -1.0, **options), (logits,))
    assert torch.autograd.gradcheck(lambda a: uniform.cross_entropy(a, z, x, alpha, **options), (logits,))


def test_cross_entropy_is_that_of_the_denoiser() -> None:
    p, z = law((6, 4), seed=21), torch.tensor([0, 1, 2, 3, 0, 1])
    x = torch.tensor([0, 2, 2, 1, 3, 1])
    for alpha in (0.0, 0.3, 1 - 1e-9):
        denoiser = uniform.loo_to_denoiser(p.log(), z, alpha)
        wanted = -denoiser.gather(-1, x.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(uniform.cross_entropy(p.log(), z, x, alpha), wanted)
        found = uniform.cross_entropy(denoiser, z, x, alpha, parameterization="denoiser")
        torch.testing.assert_close(found, wanted)
    clean = uniform.cross_entropy(torch.full((6, 4), torch.nan), z, x, 1.0)
    assert clean.tolist() == [
        0.0 if a == b else math.inf for a, b in zip(z.tolist(), x.tolist(), strict=True)
    ]
