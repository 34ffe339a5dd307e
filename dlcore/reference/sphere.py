"""The meaning of the sphere's maps, in plain torch: differentiable also where two points meet.

Points are unit vectors. Two of them include the angle ω = 2 atan2(‖y - x‖, ‖y + x‖); what depends on ω
smoothly is a series in h = sin²(ω/2) where h is small.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

#: Below these, series stand for h and for the square of an angle; their first terms left out are below 1e-17.
_NEAR, _SMALL = 1e-3, 1e-2


def antipodal_limit(dtype: torch.dtype) -> float:
    """‖y + x‖/‖y - x‖ below which x and y count as antipodes: a unit vector's rounding, with a margin."""
    return 1e-12 if dtype == torch.float64 else 1e-5


def _series(x: Tensor, *coefficients: float) -> Tensor:
    total = torch.zeros_like(x)
    for c in reversed(coefficients):
        total = total * x + c
    return total


def _over(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    empty = b == 0
    return (a / torch.where(empty, 1, b)).masked_fill(empty, 0)


def _root(x: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0."""
    empty = x == 0
    return torch.sqrt(torch.where(empty, 1, x)).masked_fill(empty, 0)


def _cos_sinc(square: Tensor) -> tuple[Tensor, Tensor]:
    """cos θ and sin θ/θ as functions of θ²."""
    small = square < _SMALL
    near = torch.where(small, square, 0)
    theta = torch.sqrt(torch.where(small, 1, square))
    cos = _series(near, 1, -1 / 2, 1 / 24, -1 / 720, 1 / 40320, -1 / 3628800, 1 / 479001600)
    sinc = _series(near, 1, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800, 1 / 6227020800)
    return torch.where(small, cos, torch.cos(theta)), torch.where(small, sinc, torch.sin(theta) / theta)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)


def _squares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """‖y - x‖² and ‖y + x‖²."""
    return (y - x).square().sum(-1), (y + x).square().sum(-1)


def _angle_square(near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    """ω² and ω/sin ω, smooth at ω = 0."""
    h = _over(near, near + far)
    small = h < _NEAR
    s = torch.where(small, h, 0)
    # asin²√h and asin√h/√(h (1 - h)).
    square = 4 * s * _series(s, 1, 1 / 3, 8 / 45, 4 / 35, 128 / 1575, 128 / 2079)
    stretch = _series(s, 1, 2 / 3, 8 / 15, 16 / 35, 128 / 315, 256 / 693)
    a, b = torch.where(small, 1, near), torch.where(small | (far == 0), 1, far)
    omega = 2 * torch.atan2(torch.sqrt(a), torch.where(far == 0, 0, torch.sqrt(b)))
    wide = omega * (a + b) / (2 * torch.sqrt(a * b))
    return torch.where(small, square, omega.square()), torch.where(small, stretch, wide)


def perpendicular(x: Tensor) -> Tensor:
    """A unit vector across x, without a gradient: from the axis that x is farthest from."""
    x = x.detach()
    axis = torch.zeros_like(x).scatter(-1, x.abs().argmin(-1, keepdim=True), 1)
    across = project(x, axis)
    return normalize(across)


def _wide(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Computed in float32 at least; vectors come back in x's dtype."""

    @wraps(function)
    def run(x: Tensor, *more: Tensor | bool) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        result = function(x.to(wide), *(a.to(wide) if isinstance(a, Tensor) else a for a in more))
        return result.to(x.dtype) if result.dim() == x.dim() else result

    return run


def _sized(x: Tensor) -> Tensor:
    """x over its largest entry, so that its square is a normal number at any length; zero stays zero."""
    return x / x.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


@_wide
def normalize(x: Tensor) -> Tensor:
    """x/‖x‖; zero stays zero."""
    scaled = _sized(x)
    return _over(scaled, _root(scaled.square().sum(-1, keepdim=True)))


@_wide
def project(x: Tensor, u: Tensor) -> Tensor:
    """u less its part along x, which may have any length."""
    x = _sized(x)
    return u - _over(_dot(x, u), x.square().sum(-1)).unsqueeze(-1) * x


def _across(x: Tensor, y: Tensor) -> Tensor:
    """y's part across x, from the smaller one of y - x and y + x: x itself has none."""
    near, far = _squares(x.detach(), y.detach())
    return project(x, torch.where((near <= far).unsqueeze(-1), y - x, y + x))


@_wide
def angle(x: Tensor, y: Tensor) -> Tensor:
    """2 atan2(‖y - x‖, ‖y + x‖); its derivative is taken as 0 where it has none, at 0 and at π."""
    near, far = _squares(x, y)
    apart = (near > 0) & (far > antipodal_limit(x.dtype) ** 2 * near)
    moved = 2 * torch.atan2(torch.where(apart, near, 1).sqrt(), torch.where(apart, far, 1).sqrt())
    fixed = 2 * torch.atan2(near.detach().sqrt(), far.detach().sqrt())
    return torch.where(apart, moved, fixed)


@_wide
def slerp(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """cos(tω) x + sin(tω) τ, τ the unit tangent at x towards y."""
    near, far = _squares(x, y)
    antipodal = far < antipodal_limit(x.dtype) ** 2 * near
    t = t.expand(near.shape)
    square, stretch = _angle_square(near, torch.where(antipodal, 1, far))
    cos, sinc = _cos_sinc(t * t * square)
    along = cos.unsqueeze(-1) * x + (t * sinc * stretch).unsqueeze(-1) * _across(x, y)
    turned = (t * 2 * torch.atan2(near.detach().sqrt(), far.detach().sqrt())).unsqueeze(-1)
    half = torch.cos(turned) * x + torch.sin(turned) * perpendicular(x)
    return torch.where(antipodal.unsqueeze(-1), half, along)


@_wide
def log_map(x: Tensor, y: Tensor) -> Tensor:
    """The tangent at x of length ω towards y."""
    near, far = _squares(x, y)
    antipodal = far < antipodal_limit(x.dtype) ** 2 * near
    stretch = _angle_square(near, torch.where(antipodal, 1, far))[1]
    omega = 2 * torch.atan2(near.detach().sqrt(), far.detach().sqrt())
    half = omega.unsqueeze(-1) * perpendicular(x)
    return torch.where(antipodal.unsqueeze(-1), half, stretch.unsqueeze(-1) * _across(x, y))


@_wide
def exp_map(x: Tensor, v: Tensor) -> Tensor:
    """cos‖v‖ x + sin‖v‖ v/‖v‖."""
    cos, sinc = _cos_sinc(v.square().sum(-1))
    return cos.unsqueeze(-1) * x + sinc.unsqueeze(-1) * v


@_wide
def rotate(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """x + 2⟨source, x⟩ target - 2⟨e, x⟩/‖e‖² e, e = source + target: two reflections."""
    e = source + target
    square, size = e.square().sum(-1), source.square().sum(-1)
    antipodal = square < (2 * antipodal_limit(x.dtype)) ** 2 * size
    e = torch.where(antipodal.unsqueeze(-1), perpendicular(source), e)
    turned = x + 2 * _dot(source, x).unsqueeze(-1) * target
    return turned - 2 * _over(_dot(e, x), e.square().sum(-1)).unsqueeze(-1) * e


@_wide
def step(x: Tensor, v: Tensor, t: Tensor, exponential: bool) -> Tensor:
    """x moved by t·v, along the great circle or straight on, and back to length 1."""
    v = t.unsqueeze(-1) * v
    return normalize(exp_map(x, v) if exponential else x + v)
