"""The Langevin corrector on the compiled kernels."""

from __future__ import annotations

from torch import Tensor

from dlcore import _C
from dlcore._tensors import empty
from dlcore.cpu.tensors import keyed, per_row, rows_contiguous, strided, threads, view
from dlcore.reference import sphere_dynamics as reference


def correct(x: Tensor, score: Tensor, step_size: Tensor, key: Tensor) -> Tensor:
    """Points of x's shape and dtype."""
    x, score, key = rows_contiguous(x), rows_contiguous(score), key.contiguous()
    step_size = step_size.double()
    steps, out = per_row(step_size, x.shape[:-1]), empty(x.shape, x.dtype)
    # A normal number costs about as much as reading eight floats.
    used = threads(8 * x.numel())
    _C.sphere_correct(view(x), view(score), strided(steps), keyed(key), view(out), used)
    return out


def correct_backward(
    grad: Tensor, x: Tensor, score: Tensor, step_size: Tensor, key: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference's: training through a corrector is rare, and its noise is drawn anew there."""
    return reference.correct_backward(grad, x, score, step_size, key)
