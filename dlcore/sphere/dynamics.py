"""Moves on the unit sphere: steps along a velocity, and Langevin corrections by a score.

Vectors come in any floating dtype, mixed ones are promoted; results have that dtype, and are computed in
float32 at least. Leading dimensions broadcast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore._beside import beside, keys_beside
from dlcore._ops.declare import result_dtype
from dlcore._tensors import expanded
from dlcore.sphere.geometry import dimension, exp_map, normalize, vectors

RETRACTIONS = ("exp", "normalize")


def step(x: Tensor, velocity: Tensor, delta: float | Tensor, *, retraction: str = "exp") -> Tensor:
    """The state after `delta` along a velocity: R_x(delta · velocity), (..., d), of norm 1.

    Args:
        x: (..., d), unit.
        velocity: (..., d), tangent at x.
        delta: broadcast to the leading dimensions; s - s' for `velocity(path="slerp", noise=s)`, the increase
            of κ for "vmf", of the rapidity for "cauchy".
        retraction: of v = delta · velocity: "exp", along the great circle, cos|v| x + sin|v| v/|v|; or
            "normalize", (x + v)/|x + v|.

    Differentiable in x, velocity and delta.

    Raises:
        ValueError: shapes that do not fit, another retraction. TypeError: dtypes.

    Example:
        >>> import torch, dlcore
        >>> x, v = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> dlcore.sphere.step(x, v, torch.pi / 6)
        tensor([0.8660, 0.5000])
        >>> dlcore.sphere.step(x, v, 1.0, retraction="normalize")
        tensor([0.7071, 0.7071])
    """
    op = "sphere.step"
    checks.option(op, "retraction", retraction, RETRACTIONS)
    x, v = vectors(op, x=x, velocity=velocity)
    moved = checks.number(op, "delta", delta, x.shape[:-1], x.device, result_dtype(x))
    if not torch.is_grad_enabled() or not any(a.requires_grad for a in (x, v, moved)):
        share = beside(x, expanded(moved, x.shape[:-1]))
        stepped: Tensor = torch.ops.dlcore.sphere_step(x, v, share, retraction == "exp")
        return stepped
    v = (moved.unsqueeze(-1) * v).to(x.dtype)
    return normalize(exp_map(x, v) if retraction == "exp" else x + v)


def correct(
    x: Tensor,
    score: Tensor,
    step_size: float | Tensor,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A step of Langevin dynamics towards the law with this score: (..., d), of norm 1.

    The exponential integrator, with a = (d-1)·step_size and noise ξ ~ N(0, I):

        x' = normalize(e^{-a} x + ((1 - e^{-a}) score + √((d-1)(1 - e^{-2a})) P_x ξ) / (d-1)).

    Noise moves x by √(2(d-1)·step_size): take step_size = c/(d-1), c of 0.1 to 1. No step is too long for a
    flat law; under a vMF law of κ = d/2 the mean cosine errs by 1% at c = 0.1 and by 4% at c = 1. A score may
    be as long as its dtype holds. Where x' has no direction, as for x = 0 with score 0 and step_size 0, it is
    0, with gradient 0.

    Args:
        x: (..., d), unit, d at least 2.
        score: (..., d), tangent at x: `posterior_score`, or the gradient of any log density.
        step_size: at least 0, broadcast to the leading dimensions.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Differentiable in x, score and step_size.

    Example:
        >>> import torch, dlcore
        >>> x = torch.eye(4)[0]
        >>> dlcore.sphere.correct(x, torch.zeros(4), 0.1 / 3, key=dlcore.rng.key(7)).shape
        torch.Size([4])
    """
    op = "sphere.correct"
    x, score = vectors(op, x=x, score=score)
    lead = x.shape[:-1]
    dimension(op, x, "x")
    size = checks.number(op, "step_size", step_size, lead, x.device, result_dtype(x))
    drawn = keys_beside(x, checks.key(op, key, generator, lead, x.device), lead)
    corrected: Tensor = torch.ops.dlcore.sphere_correct(x, score, beside(x, expanded(size, lead)), drawn)
    return corrected
