"""Guided draws on the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _cuda
from dlcore.cpu.tensors import keyed, rows_contiguous, view
from dlcore.cuda.tensors import call, scratch


def cfg_uniform_step(
    cond: Tensor, uncond: Tensor, z: Tensor, coefficients: Tensor, exclude: int | None, key: Tensor
) -> Tensor:
    """Tokens (...), by one read of both streams and of few groups again; rows that keep z are not read."""
    cond, uncond, z = rows_contiguous(cond), rows_contiguous(uncond), z.contiguous()
    coefficients, key = coefficients.contiguous(), key.contiguous()
    tokens = torch.empty(z.shape, dtype=torch.int64, device=z.device)
    workspace = scratch(_cuda.guided_step_bytes(z.numel(), cond.shape[-1]), cond)
    step = 0 if coefficients.dim() == 1 else coefficients.shape[-1]
    known = (z.data_ptr(), (coefficients.data_ptr(), step), exclude, keyed(key))
    places = (tokens.data_ptr(), workspace.data_ptr())
    call(_cuda.guided_step, cond, view(cond), view(uncond), *known, *places)
    return tokens
