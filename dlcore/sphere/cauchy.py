"""The spherical Cauchy law: heavier tails than von Mises-Fisher's, and everything in closed form.

With q = d - 1, its density by area is ((1 - m²)^½/(1 - m⟨μ, x⟩))^q over the sphere's area, m = tanh a. It is
the uniform law moved by a conformal map of rapidity a, so that a draw needs no rejection; where tokens have
such emissions, the flow per unit of a is the projected posterior mean of their embeddings, without a weight.

κ stands on von Mises-Fisher's scale, κ = (q/2) sinh 2a: the m of Wood's envelope for the same κ. In Kato and
McCullagh's notation ρ = tanh(a/2). κ is ``float | Tensor`` and broadcasts to the leading dimensions.

Source: Kato and McCullagh, "Some properties of a Cauchy family on the sphere derived from the Möbius
transformations", Bernoulli 26 (2020).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore.reference import bessel
from dlcore.sphere import _laws
from dlcore.sphere._laws import concentration
from dlcore.sphere.geometry import dimension, vectors

__all__ = ["log_prob", "posterior_logits", "rapidity", "sample", "score"]


def _rest(kappa: Tensor, d: int) -> Tensor:
    """b = exp(-2a): m = (1 - b)/(1 + b), without a difference of large numbers."""
    q = d - 1
    return q / (2 * kappa + torch.sqrt(4 * kappa * kappa + q * q))


def rapidity(kappa: float | Tensor, d: int) -> Tensor:
    """a = ½ asinh(2κ/(d - 1)) >= 0, of κ's shape; float32 or wider, float64 for a Python number.

    Raises TypeError for other types, ValueError for κ or d out of range.

    Example:
        >>> import torch
        >>> from dlcore.sphere import cauchy
        >>> cauchy.rapidity(torch.tensor([0.0, 100.0]), 64)
        tensor([0.0000, 0.9361])
    """
    op = "cauchy.rapidity"
    checks.integer(op, "d", d)
    if d < 2:
        raise ValueError(f"{op}: d must be at least 2, got {d}")
    given = kappa if isinstance(kappa, Tensor) else torch.zeros((), dtype=torch.float64)
    wide = concentration(op, kappa, given.shape, given.device)
    return (torch.asinh(2 * wide / (d - 1)) / 2).to(torch.promote_types(given.dtype, torch.float32))


def sample(
    mean: Tensor,
    kappa: float | Tensor,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One exact draw per row, without rejection: points of mean's shape (..., d) and dtype.

    Arguments, errors and noise as `vmf.sample`. Not differentiable.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.sphere import cauchy
        >>> cauchy.sample(torch.ones(2, 3, 8), 10.0, key=dlcore.rng.key(7)).shape
        torch.Size([2, 3, 8])
    """
    return _laws.sample("cauchy.sample", mean, kappa, key, generator, reject=False)


def _facing(op: str, x: Tensor, mean: Tensor, kappa: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, mean, b and (1 + b)(1 - m⟨x, mean⟩) = 2b + (1 - b)‖x - mean‖²/2."""
    x, mean = vectors(op, x=x, mean=mean)
    k = concentration(op, kappa, x.shape[:-1], x.device)
    b, wide = _rest(k, dimension(op, x, "x")), torch.promote_types(x.dtype, torch.float32)
    apart = (x.to(wide) - mean.to(wide)).square().sum(-1)
    return x, mean, b, 2 * b + (1 - b) * apart.double() / 2


def log_prob(x: Tensor, mean: Tensor, kappa: float | Tensor) -> Tensor:
    """The log-density by area, nats (...), float32 or wider.

    x and mean are unit vectors (..., d) that broadcast. Differentiable in all three. Raises TypeError for
    dtypes, ValueError for shapes or kappa.

    Example:
        >>> import torch
        >>> from dlcore.sphere import cauchy
        >>> x = torch.tensor([0.0, 0.0, 1.0])
        >>> cauchy.log_prob(x, -x, 0.0).exp() * 4 * torch.pi
        tensor(1.0000)
    """
    x, mean, b, facing = _facing("cauchy.log_prob", x, mean, kappa)
    d = x.shape[-1]
    log_p = (d - 1) * torch.log(2 * torch.sqrt(b) / facing) + bessel.log_uniform(d)
    return log_p.to(torch.promote_types(x.dtype, torch.float32))


def posterior_logits(x: Tensor, table: Tensor, kappa: float | Tensor) -> Tensor:
    """What x says of which row of `table` it was drawn around: -(d - 1) ln(1 - m⟨x, e_k⟩), (..., V).

    The context-free posterior under a uniform prior is their softmax. Float32 or wider; differentiable.

    Args:
        x: (..., d) points. table: (V, d) unit vectors. kappa: as in `sample`.

    Raises:
        TypeError: dtypes. ValueError: shapes or kappa do not fit.

    Example:
        >>> import torch
        >>> from dlcore.sphere import cauchy
        >>> cauchy.posterior_logits(torch.tensor([1.0, 0.0]), torch.eye(2), 1.5).softmax(-1)
        tensor([0.7817, 0.2183])
    """
    op = "cauchy.posterior_logits"
    for name, value in (("x", x), ("table", table)):
        checks.floating(op, name, value)
    d = dimension(op, x, "x")
    if table.dim() != 2 or table.shape[1] != d:
        raise ValueError(f"{op}: table must be (V, {d}), got {tuple(table.shape)}")
    checks.on_device(op, "table", table, x.device)
    wide = torch.promote_types(torch.promote_types(x.dtype, table.dtype), torch.float32)
    b = _rest(concentration(op, kappa, x.shape[:-1], x.device), d)
    m, rest = ((1 - b) / (1 + b)).to(wide).unsqueeze(-1), (2 * b / (1 + b)).to(wide).unsqueeze(-1)
    cosine = x.to(wide) @ table.to(wide).mT
    return -(d - 1) * torch.log(rest + m * (1 - cosine).clamp(min=0))


def score(x: Tensor, mean: Tensor, kappa: float | Tensor) -> Tensor:
    """The Riemannian gradient of `log_prob` in x: (d - 1) m/(1 - m⟨x, μ⟩) times μ's part across x.

    A tangent at x (..., d) in x's dtype, differentiable in all three. Raises TypeError for dtypes, ValueError
    for shapes or kappa.

    Example:
        >>> import torch
        >>> from dlcore.sphere import cauchy
        >>> cauchy.score(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5 * torch.tensor(2.0).sinh())
        tensor([0.0000, 0.7616])
    """
    x, mean, b, facing = _facing("cauchy.score", x, mean, kappa)
    tangent = _laws.tangent(x, mean)
    pull = ((x.shape[-1] - 1) * (1 - b) / facing).to(tangent.dtype)
    return (pull.unsqueeze(-1) * tangent).to(x.dtype)
