"""Velocities, scores and context-free logits of the sphere's paths over a vocabulary of unit vectors.

x (..., d) is a state on the unit sphere, table (V, d) the tokens' unit vectors E_k, logits (..., V) those of
a network's posterior p = softmax(logits): a Tensor or a LinearLogits. P_x u = u - <x, u> x. A velocity and a
score keep nothing of size rows × V. Three paths lead from the uniform law to E_k:

- "slerp": great circles, x = slerp(E_k, z, s) from uniform noise z at the noise fraction s (S-FLM,
  arXiv 2605.11125);
- "vmf": von Mises-Fisher laws of concentration κ (Spherical Flows, arXiv 2605.05629);
- "cauchy": spherical Cauchy laws of rapidity artanh m.

Norms are read (not under torch.compile): ValueError where one is off 1 by more than 1%. float64 runs on the
reference, and then logits, x and table all are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import _registry  # noqa: F401  (stands the backends behind the ops)
from dlcore._ops.sphere_velocity import MAX_KAPPA
from dlcore.categorical import Head, head
from dlcore.linear_logits import LinearLogits
from dlcore.reference import sphere_velocity as formulas
from dlcore.reference.categorical import wide
from dlcore.sphere import cauchy
from dlcore.sphere.geometry import log_map

PATHS = ("slerp", "vmf", "cauchy")
#: Norms may be off 1 by what bfloat16 rounds away, and a little more.
TOLERANCE = 1e-2


def velocity(
    x: Tensor,
    logits: Tensor | LinearLogits,
    table: Tensor,
    *,
    path: str = "slerp",
    noise: float | Tensor | None = None,
    kappa: float | Tensor | None = None,
    top_k: int | None = None,
) -> Tensor:
    """The path's velocity under the posterior: P_x(Σ_k p_k g(<x, E_k>) E_k), (..., d).

    "slerp": g = ω / sin ω, the mean of the tokens' log maps; divided by `noise` s, the velocity per unit
    *decrease* of s. Where p is certain, `step` by s - s' lands on the circle's point at s', s' = 0 on E_k.
    "vmf": g solves (1 - μ²)(g' + κg) - (d-1)μg = A_d(κ) - μ; the velocity per unit of κ. "cauchy": g = 1; the
    velocity per unit of rapidity.

    Against float64, float32 errs by 1e-6 of Σ p_k g_k or less, whatever d and κ; with "slerp" where tokens
    that matter are less than π - 0.2 away. At an angle of π - δ a cosine's rounding weighs more, by up to
    0.5/δ. There g has no bound and is capped: a cosine below -1 + 2^-20 (δ < 1.4e-3), in any dtype, counts as
    that, so that the velocity is too short. `top_k=1` has neither limit.

    A row with NaN in x or logits, with +inf or nothing but -inf in logits gives NaN, and no other row.

    Differentiable, once, in x, logits (or hidden, weight and bias), table and noise; not in kappa. With top_k
    a gradient in table or weight is dense.

    Args:
        x: (..., d), d at least 2, floating, unit.
        logits: (..., V).
        table: (V, d), floating, unit rows.
        noise: s in (0, 1], "slerp" alone; without it the velocity times s.
        kappa: [0, 1e8], "vmf" alone.
        top_k: renormalise over so many largest logits, ties to the lowest id; their rows are gathered,
            (..., top_k, d), and no product with the whole table is taken. With "slerp",
            1 is the `log_map` to the argmax, over noise.

    Raises:
        ValueError: shapes that do not fit, vectors that are not unit, a parameter of another path.
        TypeError: dtypes. NotImplementedError: a gradient in kappa is asked for.

    Example:
        >>> import torch, dlcore
        >>> table = torch.eye(3)
        >>> v = dlcore.sphere.velocity(table[0], torch.tensor([-torch.inf, 0, -torch.inf]), table, noise=0.5)
        >>> v  # a right angle in half a unit of time
        tensor([0.0000, 3.1416, 0.0000])
        >>> dlcore.sphere.step(table[0], v, 0.5).round(decimals=4)
        tensor([0., 1., 0.])
    """
    op = "sphere.velocity"
    checks.option(op, "path", path, PATHS)
    h = _operands(op, x, logits, table)
    concentration = _kappa(op, kappa, path, h)
    fraction = _noise(op, noise, path, h)
    if top_k is not None:
        result = _of_largest(op, x, h, table, path, concentration, top_k)
    elif path == "cauchy":
        result = _project(wide(x), torch.ops.dlcore.categorical_expectation(*h, table, None, None, None)[0])
    else:
        result = torch.ops.dlcore.sphere_velocity(*h, x, table, concentration)[0]
    return result if fraction is None else result / fraction.to(result.dtype).unsqueeze(-1)


def posterior_score(x: Tensor, logits: Tensor | LinearLogits, table: Tensor, kappa: float | Tensor) -> Tensor:
    """κ Σ_k p_k P_x E_k, (..., d): the Riemannian score of the mixture of vMF laws with posterior p.

    With `posterior_logits` plus a log prior it is the gradient of ln Σ_k prior_k e^{κ <x, E_k>}
    (arXiv 2605.05629, eq. 19). One product with the table. Differentiable, once, in everything.

    Args:
        x, logits, table: as in `velocity`.
        kappa: at least 0, broadcast to the leading dimensions.

    Example:
        >>> import torch, dlcore
        >>> table = torch.eye(2)
        >>> dlcore.sphere.posterior_score(table[0], torch.zeros(2), table, kappa=4.0)
        tensor([0., 2.])
    """
    op = "sphere.posterior_score"
    h = _operands(op, x, logits, table)
    scale = checks.number(op, "kappa", kappa, h.lead, x.device, wide(x).dtype)
    checks.value_range(op, "kappa", scale, 0, torch.finfo(scale.dtype).max)
    mean = torch.ops.dlcore.categorical_expectation(*h, table, None, None, None)[0]
    return scale.unsqueeze(-1) * _project(wide(x), mean)


def posterior_logits(
    x: Tensor,
    table: Tensor,
    *,
    path: str = "slerp",
    noise: float | Tensor | None = None,
    kappa: float | Tensor | None = None,
) -> Tensor:
    """ln p(x | token k) up to a constant, (..., V): the posterior's logits without context or prior.

    "slerp": (d-2)·(ln sin(θ_k/s) - ln sin θ_k), -inf where θ_k >= sπ; "vmf": κ <x, E_k>; "cauchy":
    -(d-1)·ln(1 - m <x, E_k>) where m = 2κ/(d - 1 + √((d-1)² + 4κ²)), the tanh of the rapidity. Differentiable
    in x and table. This is a (..., V) tensor; the vMF path's is also `LinearLogits(kappa * x, table)`.

    Args:
        x, table: as in `velocity`.
        noise: s in (0, 1], "slerp" alone. kappa: at least 0, "vmf" and "cauchy".

    Example:
        >>> import torch, dlcore
        >>> table = torch.eye(3)
        >>> dlcore.sphere.posterior_logits(table[0], table, path="vmf", kappa=5.0)
        tensor([5., 0., 0.])
    """
    op = "sphere.posterior_logits"
    checks.option(op, "path", path, PATHS)
    own, other = ("noise", "kappa") if path == "slerp" else ("kappa", "noise")
    given = {"noise": noise, "kappa": kappa}
    if given[own] is None or given[other] is not None:
        raise ValueError(f"{op}: path={path!r} takes {own}, not {other}")
    _points(op, x, table)
    state = wide(x)
    level = checks.per_row(op, own, given[own], x.shape[:-1], x.device, state.dtype)
    assert level is not None
    limits = torch.finfo(state.dtype)
    checks.value_range(op, own, level, *((limits.tiny, 1) if path == "slerp" else (0, limits.max)))
    # Products in autocast's bfloat16 would cost the logits their digits.
    with torch.autocast(x.device.type, enabled=False):
        if path == "cauchy":
            return cauchy.posterior_logits(x, table, level)
        if path == "vmf":
            return level.unsqueeze(-1) * (state @ wide(table).mT)
        return formulas.slerp_logits(state, wide(table), level.unsqueeze(-1))


def radial_weight(
    cosine: Tensor, dim: int, *, path: str = "slerp", kappa: float | Tensor | None = None
) -> Tensor:
    """g(cosine), the weight of a token at this cosine in `velocity`; elementwise, differentiable in cosine.

    The vMF path's weight has no closed form beyond d = 3. It is a Chebyshev series whose coefficients solve a
    small linear system at each κ, in float64: a relative error below 1e-9 for d >= 2 and κ up to 1e5, and
    g(±1) = (1 ∓ A_d(κ)) / (d-1), g = 1/(d-1) at κ = 0.

    Args:
        cosine: (..., n), floating; bfloat16 and float16 give float32.
        dim: d, at least 2.
        path: as in `velocity`. kappa: [0, 1e8], broadcast to cosine.shape[:-1], "vmf" alone.

    Example:
        >>> import torch, dlcore
        >>> dlcore.sphere.radial_weight(torch.tensor([1.0, 0.0]), 768)
        tensor([1.0000, 1.5708])
    """
    op = "sphere.radial_weight"
    checks.option(op, "path", path, PATHS)
    checks.floating(op, "cosine", cosine)
    checks.integer(op, "dim", dim)
    if dim < 2:
        raise ValueError(f"{op}: dim must be at least 2, got {dim}")
    concentration = _kappa(op, kappa, path, Head(cosine, None, None))
    checks.value_range(op, "kappa", concentration, 0, MAX_KAPPA)
    if path == "cauchy":
        return torch.ones_like(wide(cosine))
    return formulas.radial_weight(wide(cosine), concentration, dim)


def _operands(op: str, x: Tensor, logits: Tensor | LinearLogits, table: Tensor) -> Head:
    """Check what every drift takes."""
    h = head(op, logits)
    _points(op, x, table)
    if table.shape[0] != h.vocab:
        raise ValueError(
            f"{op}: table must be ({h.vocab}, d) for logits (..., {h.vocab}), got {tuple(table.shape)}"
        )
    if x.shape[:-1] != h.lead:
        raise ValueError(f"{op}: x must be {(*h.lead, table.shape[1])}, got {tuple(x.shape)}")
    checks.on_device(op, "x", x, h.logits.device)
    if (x.dtype == torch.float64) != (h.logits.dtype == torch.float64):
        raise TypeError(
            f"{op}: x, logits and table must all be float64 or none, got {x.dtype}, {h.logits.dtype}"
        )
    return h


def _points(op: str, x: Tensor, table: Tensor) -> None:
    """Unit vectors of one dimension, on one device."""
    checks.floating(op, "x", x)
    checks.floating(op, "table", table)
    if table.dim() != 2 or table.shape[1] < 2 or x.shape[-1] != table.shape[1]:
        raise ValueError(
            f"{op}: table must be (V, d) for x (..., d), d >= 2, "
            f"got {tuple(table.shape)} and {tuple(x.shape)}"
        )
    if (x.dtype == torch.float64) != (table.dtype == torch.float64):
        raise TypeError(f"{op}: x and table must both be float64 or none, got {x.dtype} and {table.dtype}")
    checks.on_device(op, "table", table, x.device)
    _unit(op, "x", x)
    _unit(op, "table", table)


def _unit(op: str, name: str, x: Tensor) -> None:
    """Vectors of norm 1. Reads data; a row with NaN is let through."""
    if not checks.reads_data(x):
        return
    # In pieces: the cast copy that bfloat16 needs stays in the cache.
    for piece in x.detach().reshape(-1, x.shape[-1]).split(1024):
        norm = torch.linalg.vector_norm(wide(piece), dim=-1)
        wrong = (norm - 1).abs() > TOLERANCE
        if bool(wrong.any()):
            got = norm[wrong][0].item()
            raise ValueError(f"{op}: {name} must hold unit vectors, got one of norm {got:.6g}")


def _kappa(op: str, kappa: float | Tensor | None, path: str, h: Head) -> Tensor | None:
    if (kappa is None) == (path == "vmf"):
        state = "is needed" if kappa is None else "is a parameter of path='vmf' alone, not"
        raise ValueError(f"{op}: kappa {state} with path={path!r}")
    if isinstance(kappa, Tensor) and kappa.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{op}: has no gradient in kappa, detach it")
    return checks.per_row(op, "kappa", kappa, h.lead, h.logits.device, torch.float64)


def _noise(op: str, noise: float | Tensor | None, path: str, h: Head) -> Tensor | None:
    if noise is not None and path != "slerp":
        raise ValueError(f"{op}: noise is a parameter of path='slerp' alone, got path={path!r}")
    fraction = checks.per_row(op, "noise", noise, h.lead, h.logits.device, torch.float64)
    checks.value_range(op, "noise", fraction, torch.finfo(torch.float32).tiny, 1)
    return fraction


def _project(x: Tensor, u: Tensor) -> Tensor:
    return u - (x * u).sum(-1, keepdim=True) * x


def _of_largest(
    op: str, x: Tensor, h: Head, table: Tensor, path: str, kappa: Tensor | None, count: int
) -> Tensor:
    """The velocity under the posterior of the `count` largest logits, from their rows alone."""
    checks.integer(op, "top_k", count)
    if count < 1:
        raise ValueError(f"{op}: top_k must be at least 1, got {count}")
    checks.value_range(op, "kappa", kappa, 0, MAX_KAPPA)
    ids = torch.ops.dlcore.sphere_largest(*h, min(count, h.vocab))
    invalid, ids = ids[..., :1] < 0, ids.clamp(min=0)
    if h.weight is None:
        values = wide(h.logits.gather(-1, ids))
    else:
        values = (wide(h.weight[ids]) * wide(h.logits).unsqueeze(-2)).sum(-1)
        values = values if h.bias is None else values + wide(h.bias[ids])
    state, rows = wide(x), wide(table[ids])
    p = torch.softmax(values, -1)
    if path == "slerp" and p.shape[-1] == 1:
        # Exact up to the antipode. The factor 1 gives the logits their gradient, 0.
        return (p * log_map(state, rows.squeeze(-2))).masked_fill(invalid, torch.nan)
    if path != "cauchy":
        p = p * formulas.radial_weight((rows * state.unsqueeze(-2)).sum(-1), kappa, table.shape[1])
    return _project(state, (p.unsqueeze(-1) * rows).sum(-2)).masked_fill(invalid, torch.nan)
