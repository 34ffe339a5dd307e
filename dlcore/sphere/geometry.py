"""Maps of the unit sphere of R^d: points are unit vectors (..., d), tangents at x are orthogonal to x.

Every function takes float32, bfloat16, float16 or float64 (mixed ones are promoted), broadcasts the leading
dimensions of its vectors, computes in float32 at least, returns vectors in the inputs' dtype, and is
differentiable once in every argument, each gradient in one fused pass. Vectors that are not of unit length
give what the formulas give; `normalize` makes points, and its gradient drops what others have along them.

Where two points coincide everything is smooth but the angle, whose derivative is taken as 0. Antipodes have
no shortest way from one to the other: below an angle of π - 2e-5 (float64: π - 2e-12) `slerp`, `log_map` and
`rotate` go through the unit vector across x from the axis that x is farthest from, a function of x alone, and
hold it fixed in derivatives. A zero vector is no direction; nothing is NaN where one occurs: the angle of two
zeros is 0, with a unit vector π/2.

Raises TypeError for other dtypes, ValueError for shapes that do not fit; `slerp`, `log_map` and `rotate`
need a direction across x, and so d of 2 or more.

Sources: Shoemake, "Animating rotation with quaternion curves" (1985); Kahan, "How futile are mindless
assessments of roundoff in floating-point computation" (2006), section 12, for the angle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import _registry  # noqa: F401  (stands the backends behind the ops)
from dlcore._beside import beside
from dlcore._tensors import broadcast, expanded

__all__ = ["angle", "exp_map", "log_map", "normalize", "project", "rotate", "slerp"]


def vectors(op: str, **named: Tensor) -> list[Tensor]:
    """The arguments, checked, in one dtype and with one shape; views where possible."""
    for name, x in named.items():
        checks.floating(op, name, x)
    (first_name, first), *others = named.items()
    for name, x in others:
        checks.on_device(op, name, x, first.device)
        if x.shape[-1] != first.shape[-1]:
            shapes = f"{tuple(first.shape)} and {tuple(x.shape)}"
            raise ValueError(f"{op}: {first_name} and {name} must have the same last dimension, got {shapes}")
    try:
        shape = broadcast(*(x.shape for x in named.values()))
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
        raise ValueError(f"{op}: leading dimensions must broadcast, got {shapes}") from error
    dtype = first.dtype
    for _, x in others:
        dtype = dtype if x.dtype == dtype else torch.promote_types(dtype, x.dtype)
    return [expanded(x if x.dtype == dtype else x.to(dtype), shape) for x in named.values()]


def dimension(op: str, x: Tensor, name: str) -> int:
    """d, at least 2."""
    d = x.shape[-1]
    if d < 2:
        raise ValueError(f"{op}: {name} must be (..., d) with d >= 2, got {tuple(x.shape)}")
    return d


def normalize(x: Tensor) -> Tensor:
    """x/‖x‖ (..., d), for any length that its dtype holds; zero stays zero, with gradient 0.

    Example:
        >>> import torch
        >>> from dlcore import sphere
        >>> sphere.normalize(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    (x,) = vectors("sphere.normalize", x=x)
    unit: Tensor = torch.ops.dlcore.sphere_normalize(x)
    return unit


def project(x: Tensor, u: Tensor) -> Tensor:
    """u less its part along x: u - (⟨x, u⟩/⟨x, x⟩) x (..., d), a tangent at x. x may have any length.

    Example:
        >>> import torch
        >>> from dlcore import sphere
        >>> sphere.project(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 3.0]))
        tensor([0., 3.])
    """
    x, u = vectors("sphere.project", x=x, u=u)
    tangent: Tensor = torch.ops.dlcore.sphere_project(x, u)
    return tangent


def angle(x: Tensor, y: Tensor) -> Tensor:
    """The angle 2 atan2(‖x - y‖, ‖x + y‖) in [0, π] (...), float32 or wider, accurate at every angle.

    Example:
        >>> import torch
        >>> from dlcore import sphere
        >>> sphere.angle(torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 1e-5], [0.0, 1.0]]))
        tensor([1.0000e-05, 1.5708e+00])
    """
    x, y = vectors("sphere.angle", x=x, y=y)
    radians: Tensor = torch.ops.dlcore.sphere_angle(x, y)
    return radians


def slerp(x: Tensor, y: Tensor, t: float | Tensor) -> Tensor:
    """The point at share t of the great circle's way from x (t = 0) to y (t = 1): (..., d).

    (sin((1 - t)ω) x + sin(tω) y)/sin ω, in a form that keeps its digits at every angle ω; a t outside of
    [0, 1] goes on along the circle. t broadcasts to the leading dimensions and gets a gradient if a Tensor.

    Example:
        >>> import torch
        >>> from dlcore import sphere
        >>> sphere.slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 1 / 3)
        tensor([0.8660, 0.5000])
    """
    op = "sphere.slerp"
    x, y = vectors(op, x=x, y=y)
    dimension(op, x, "x")
    lead = x.shape[:-1]
    share = checks.number(op, "t", t, lead, x.device, torch.promote_types(x.dtype, torch.float32))
    checks.within(op, "t", share, -torch.inf, torch.inf, "()")
    point: Tensor = torch.ops.dlcore.sphere_slerp(x, y, beside(x, expanded(share, lead)))
    return point


def log_map(x: Tensor, y: Tensor) -> Tensor:
    """The tangent at x that points to y, its length their angle: (ω/sin ω)(y - cos ω x), (..., d).

    Example:
        >>> import torch
        >>> from dlcore import sphere
        >>> sphere.log_map(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor([0.0000, 1.5708])
    """
    x, y = vectors("sphere.log_map", x=x, y=y)
    dimension("sphere.log_map", x, "x")
    tangent: Tensor = torch.ops.dlcore.sphere_log_map(x, y)
    return tangent


def exp_map(x: Tensor, v: Tensor) -> Tensor:
    """Where the great circle from x along the tangent v leads after ‖v‖: cos‖v‖ x + sin‖v‖ v/‖v‖, (..., d).

    Example:
        >>> import torch
        >>> from dlcore import sphere
        >>> sphere.exp_map(torch.tensor([1.0, 0.0]), torch.tensor([0.0, torch.pi / 6]))
        tensor([0.8660, 0.5000])
    """
    x, v = vectors("sphere.exp_map", x=x, v=v)
    point: Tensor = torch.ops.dlcore.sphere_exp_map(x, v)
    return point


def rotate(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """x turned by the rotation that takes source to target and leaves what is across both: (..., d).

    Two reflections, no d×d matrix: x + 2⟨source, x⟩ target - 2⟨e, x⟩/‖e‖² e with e = source + target. x is
    any vector. Antipodes are joined by a half turn.

    Example:
        >>> import torch
        >>> from dlcore import sphere
        >>> a, b = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
        >>> sphere.rotate(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 5.0]]), a, b)
        tensor([[ 0.,  1.,  0.],
                [-1.,  0.,  5.]])
    """
    x, source, target = vectors("sphere.rotate", x=x, source=source, target=target)
    dimension("sphere.rotate", x, "x")
    turned: Tensor = torch.ops.dlcore.sphere_rotate(x, source, target)
    return turned
