"""Guided draws on the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _C
from dlcore.cpu.tensors import keyed, rows_contiguous, threads, view


def cfg_uniform_step(
    cond: Tensor, uncond: Tensor, z: Tensor, coefficients: Tensor, exclude: int | None, key: Tensor
) -> Tensor:
    """Tokens (...), by one read of both streams; rows that keep z are not read."""
    cond, uncond, z = rows_contiguous(cond), rows_contiguous(uncond), z.contiguous()
    coefficients, key = coefficients.contiguous(), key.contiguous()
    tokens = torch.empty(z.shape, dtype=torch.int64)
    _C.guided_step(
        view(cond),
        view(uncond),
        z.data_ptr(),
        (coefficients.data_ptr(), 0 if coefficients.dim() == 1 else coefficients.shape[-1]),
        exclude,
        keyed(key),
        tokens.data_ptr(),
        threads(2 * cond.numel()),
    )
    return tokens
