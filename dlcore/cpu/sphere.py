"""The sphere's maps and draws on the compiled kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dlcore import _C
from dlcore._tensors import empty
from dlcore.cpu.tensors import keyed, per_row, rows_contiguous, strided, threads, view

_NORMALIZE, _PROJECT, _ANGLE, _SLERP, _LOG, _EXP, _ROTATE, _STEP, _RETRACT = range(9)


def _empty_like(x: Tensor) -> Tensor:
    return empty(x.shape, x.dtype)


def _map(code: int, *vectors: Tensor, t: Tensor | None = None) -> Tensor:
    """A result of the first vector's shape, or for the angle a number per row."""
    vectors, t = _packed(vectors, t)
    lead = vectors[0].shape[:-1]
    out = empty(lead, torch.float32) if code == _ANGLE else _empty_like(vectors[0])
    number = out.data_ptr() if code == _ANGLE else 0
    outputs = [None if code == _ANGLE else view(out)]
    used = threads(vectors[0].numel())
    _C.sphere_map(code, [view(x) for x in vectors], strided(t), None, 0, outputs, number, used)
    return out


def _map_backward(
    code: int, grad: Tensor, needed: Sequence[bool], *vectors: Tensor, t: Tensor | None = None
) -> tuple[Tensor, ...]:
    """A gradient per input, empty where not needed; that of t, if there is one, last."""
    vectors, t = _packed(vectors, t)
    lead = vectors[0].shape[:-1]
    grads = [_empty_like(x) if n else x.new_empty(0) for x, n in zip(vectors, needed, strict=False)]
    outputs = [view(g) if n else None for g, n in zip(grads, needed, strict=False)]
    number = torch.empty(lead if t is not None and needed[-1] else (0,), dtype=torch.float32)
    of_angle = code == _ANGLE
    grad = grad.float().contiguous() if of_angle else rows_contiguous(grad)
    _C.sphere_map(
        code,
        [view(x) for x in vectors],
        strided(t),
        None if of_angle else view(grad),
        grad.data_ptr() if of_angle else 0,
        outputs,
        number.data_ptr(),
        threads(vectors[0].numel()),
    )
    return tuple(grads) if t is None else (*grads, number)


def _packed(vectors: tuple[Tensor, ...], t: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor | None]:
    lead = vectors[0].shape[:-1]
    return tuple(map(rows_contiguous, vectors)), per_row(t, lead)


def _only(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    return lambda *args: backward(*args)[0]


normalize, normalize_backward = partial(_map, _NORMALIZE), _only(partial(_map_backward, _NORMALIZE))
project, project_backward = partial(_map, _PROJECT), partial(_map_backward, _PROJECT)
angle, angle_backward = partial(_map, _ANGLE), partial(_map_backward, _ANGLE)
log_map, log_map_backward = partial(_map, _LOG), partial(_map_backward, _LOG)
exp_map, exp_map_backward = partial(_map, _EXP), partial(_map_backward, _EXP)
rotate, rotate_backward = partial(_map, _ROTATE), partial(_map_backward, _ROTATE)


def slerp(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """A contiguous result of x's shape and dtype; a t of one element serves all rows as it is."""
    return _map(_SLERP, x, y, t=t)


def slerp_backward(
    grad: Tensor, needed: Sequence[bool], x: Tensor, y: Tensor, t: Tensor
) -> tuple[Tensor, ...]:
    """Contiguous gradients of x, y and t, empty where not needed; that of t is float32, a number per row."""
    return _map_backward(_SLERP, grad, needed, x, y, t=t)


def step(x: Tensor, v: Tensor, t: Tensor, exponential: bool) -> Tensor:
    """A contiguous result of x's shape and dtype; a t of one element serves all rows as it is."""
    return _map(_STEP if exponential else _RETRACT, x, v, t=t)


def sample(mean: Tensor, kappa: Tensor, key: Tensor, reject: bool) -> Tensor:
    """Points of mean's shape and dtype."""
    mean, key, out = rows_contiguous(mean), key.contiguous(), _empty_like(mean)
    kappa = kappa if kappa.numel() == 1 else kappa.expand(mean.shape[:-1]).contiguous()
    # A normal number costs about as much as reading eight floats.
    used = threads(8 * mean.numel())
    _C.sphere_sample(view(mean), strided(kappa), keyed(key), reject, view(out), used)
    return out
