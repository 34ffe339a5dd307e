"""The sphere's maps, draws and corrections on the CUDA kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dlcore import _cuda
from dlcore._tensors import empty
from dlcore.cpu.tensors import keyed, per_row, rows_contiguous, strided, view
from dlcore.cuda.tensors import call
from dlcore.reference import sphere_dynamics as reference

_NORMALIZE, _PROJECT, _ANGLE, _SLERP, _LOG, _EXP, _ROTATE, _STEP, _RETRACT = range(9)


def _map(code: int, *vectors: Tensor, t: Tensor | None = None) -> Tensor:
    """A result of the first vector's shape, or for the angle a number per row."""
    x, t = vectors[0], per_row(t, vectors[0].shape[:-1])
    vectors = tuple(map(rows_contiguous, vectors))
    inputs = [view(v) for v in vectors]
    if code == _ANGLE:
        angle = empty(x.shape[:-1], torch.float32, x.device)
        call(_cuda.sphere_map, x, code, inputs, None, None, 0, [], angle.data_ptr())
        return angle
    out = empty(x.shape, x.dtype, x.device)
    call(_cuda.sphere_map, x, code, inputs, strided(t), None, 0, [view(out)], 0)
    return out


def _map_backward(
    code: int, grad: Tensor, needed: Sequence[bool], *vectors: Tensor, t: Tensor | None = None
) -> tuple[Tensor, ...]:
    """A gradient per input, empty where not needed; that of t, if there is one, last."""
    x, lead = vectors[0], vectors[0].shape[:-1]
    vectors, t = tuple(map(rows_contiguous, vectors)), per_row(t, lead)
    grads = [empty(v.shape if n else (0,), v.dtype, v.device) for v, n in zip(vectors, needed, strict=False)]
    number = torch.empty(lead if t is not None and needed[-1] else (0,), dtype=torch.float32, device=x.device)
    of_angle = code == _ANGLE
    grad = grad.float().contiguous() if of_angle else rows_contiguous(grad)
    call(
        _cuda.sphere_map,
        x,
        code,
        [view(v) for v in vectors],
        strided(t),
        None if of_angle else view(grad),
        grad.data_ptr() if of_angle else 0,
        [view(g) if n else None for g, n in zip(grads, needed, strict=False)],
        number.data_ptr() if number.numel() else 0,
    )
    return tuple(grads) if t is None else (*grads, number)


def _only(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    return lambda *args: backward(*args)[0]


normalize, normalize_backward = partial(_map, _NORMALIZE), _only(partial(_map_backward, _NORMALIZE))
project, project_backward = partial(_map, _PROJECT), partial(_map_backward, _PROJECT)
angle, angle_backward = partial(_map, _ANGLE), partial(_map_backward, _ANGLE)
log_map, log_map_backward = partial(_map, _LOG), partial(_map_backward, _LOG)
exp_map, exp_map_backward = partial(_map, _EXP), partial(_map_backward, _EXP)
rotate, rotate_backward = partial(_map, _ROTATE), partial(_map_backward, _ROTATE)


def slerp(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Points of x's shape and dtype."""
    return _map(_SLERP, x, y, t=t)


def slerp_backward(
    grad: Tensor, needed: Sequence[bool], x: Tensor, y: Tensor, t: Tensor
) -> tuple[Tensor, ...]:
    """The gradients by x, y and t; `needed` says which are wanted."""
    return _map_backward(_SLERP, grad, needed, x, y, t=t)


def step(x: Tensor, v: Tensor, t: Tensor, exponential: bool) -> Tensor:
    """x moved by t·v, by the exponential map or by normalising."""
    return _map(_STEP if exponential else _RETRACT, x, v, t=t)


def sample(mean: Tensor, kappa: Tensor, key: Tensor, reject: bool) -> Tensor:
    """Points of mean's shape and dtype."""
    mean, key, concentration = rows_contiguous(mean), key.contiguous(), per_row(kappa, mean.shape[:-1])
    out = empty(mean.shape, mean.dtype, mean.device)
    call(_cuda.sphere_sample, mean, view(mean), strided(concentration), keyed(key), reject, view(out))
    return out


def correct(x: Tensor, score: Tensor, step_size: Tensor, key: Tensor) -> Tensor:
    """Points of x's shape and dtype."""
    x, score, key = rows_contiguous(x), rows_contiguous(score), key.contiguous()
    steps = per_row(step_size.double(), x.shape[:-1])
    out = empty(x.shape, x.dtype, x.device)
    call(_cuda.sphere_correct, x, view(x), view(score), strided(steps), keyed(key), view(out))
    return out


def correct_backward(
    grad: Tensor, x: Tensor, score: Tensor, step_size: Tensor, key: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, score and step_size; the reference's for rows longer than a block keeps."""
    lead = x.shape[:-1]
    if x.shape[-1] > _cuda.MOST_CORRECTED:
        return reference.correct_backward(grad, x, score, step_size, key)
    grad, x, score, key = rows_contiguous(grad), rows_contiguous(x), rows_contiguous(score), key.contiguous()
    steps = per_row(step_size.double(), lead)
    x_grad, score_grad = (empty(v.shape, v.dtype, v.device) for v in (x, score))
    step_grad = empty(lead, torch.float64, x.device)
    call(
        _cuda.sphere_correct_backward,
        x,
        view(grad),
        view(x),
        view(score),
        strided(steps),
        keyed(key),
        view(x_grad),
        view(score_grad),
        step_grad.data_ptr(),
    )
    return x_grad, score_grad, step_grad.to(step_size.dtype)
