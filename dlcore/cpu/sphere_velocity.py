"""The vocabulary drifts on the compiled kernels: logits and cosines tile by tile."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dlcore import _C
from dlcore.cpu.categorical import Softmax, scanned_tiles
from dlcore.cpu.linear_logits import HeadGradient, flat_hidden, matmul, tile_width, tiles
from dlcore.cpu.tensors import per_row, scratch, threads, view, workspace
from dlcore.reference.sphere_velocity import vmf_series

#: What a float32 sum of Chebyshev terms does not see.
_NEGLIGIBLE = 1e-9


class Radial(NamedTuple):
    """The radial weight for the compiled module; holds what `packed` points to."""

    rows: Tensor | None
    packed: tuple[tuple[int, int], int] | None


def _radial(kappa: Tensor | None, lead: torch.Size, dim: int) -> Radial:
    kappa = per_row(kappa, lead)
    if kappa is None:
        return Radial(None, None)
    m, rest, sums = vmf_series(kappa.reshape(-1), dim)
    seen = (sums.abs() > _NEGLIGIBLE).any(0).nonzero()
    terms = int(seen[-1]) + 1 if len(seen) else 1
    sums = sums[:, :terms]
    scale = rest * (1 + m) / (dim - 1)
    rows = torch.cat([torch.stack([m, rest, scale], -1), sums, _derivative(sums)], -1).float().contiguous()
    return Radial(rows, ((rows.data_ptr(), 0 if len(rows) == 1 else rows.shape[1]), terms))


def _derivative(sums: Tensor) -> Tensor:
    """Chebyshev coefficients (..., n) of the derivative: T_k' = 2k Σ T_j, j < k of the other parity."""
    n = torch.arange(sums.shape[-1])
    j, k = n.unsqueeze(-1), n
    matrix = torch.where((k > j) & ((k - j) % 2 == 1), 2 * k, 0).to(sums.dtype)
    matrix[0] /= 2
    return sums @ matrix.mT


def _cosines(x: Tensor, table: Tensor, tokens: slice, buffer: str) -> Tensor:
    """x (rows, d) · table[tokens], in a workspace."""
    piece = table[tokens]
    out = workspace(buffer, x.shape[0] * piece.shape[0]).view(x.shape[0], piece.shape[0])
    matmul(x, piece.mT, out)
    return out


def velocity(
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x: Tensor,
    table: Tensor,
    kappa: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """P_x m (..., d), <x, m> (...) and the logsumexp (...): each logit and each cosine is computed once.

    What is summed refers to the largest logit so far, and is scaled down when a larger one appears.
    """
    lead, head, table = logits.shape[:-1], (logits, weight, bias), table.detach()
    flat, rows, dim = flat_hidden(x.detach()), lead.numel(), table.shape[1]
    radial = _radial(kappa, lead, dim)
    mean = torch.zeros((rows, dim), dtype=torch.float32)
    references = torch.empty((2, rows), dtype=torch.float64)
    factor = torch.empty((rows, 1), dtype=torch.float32)
    summaries = scratch("summaries", rows * _C.SUMMARY_BYTES)
    for first, tile in scanned_tiles(head, Softmax(head), summaries, width=tile_width(rows)):
        tokens = slice(first, first + tile.shape[-1])
        if _C.follow_largest(summaries, rows, first == 0, references.data_ptr(), factor.data_ptr()):
            mean.mul_(factor)
        weights = _cosines(flat, table, tokens, "cosines")
        used = threads(weights.numel())
        _C.sphere_weights(view(tile), references[1].data_ptr(), radial.packed, weights.data_ptr(), used)
        matmul(weights, table[tokens], mean, add=True)
    lse = torch.empty(lead, dtype=torch.float64)
    _C.finish_logsumexp(summaries, rows, math.nan, lse.data_ptr())
    wide, state = mean.double(), flat.double()
    wide *= (references[1] - lse.view(rows)).exp().unsqueeze(-1)
    along = (wide * state).sum(-1)
    result = wide.sub_(state.mul_(along.unsqueeze(-1))).float()
    return result.view(*lead, dim), along.float().view(lead), lse


def velocity_backward(
    grad: Tensor,
    output: Tensor,
    along: Tensor,
    lse: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x: Tensor,
    table: Tensor,
    kappa: Tensor | None,
    with_x: bool,
    with_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the head, of x and of the table, tile by tile from the logsumexp; empty if not wanted.

    With h = P_x grad: d/da_k = p_k (g_k <h, E_k> - <h, m>), d/dc_k = p_k g'_k <h, E_k>, and x and E_k follow
    from c_k = <x, E_k> and m = Σ p_k g_k E_k.
    """
    lead, head, dim = logits.shape[:-1], (logits, weight, bias), table.shape[1]
    rows, flat, lse = lead.numel(), flat_hidden(x), lse.contiguous()
    radial = _radial(kappa, lead, dim)
    grad, along = grad.reshape(rows, dim).float(), along.reshape(rows, 1)
    mean = output.reshape(rows, dim) + along * flat
    pulled = (grad * flat).sum(-1, keepdim=True)
    tangent = grad - pulled * flat
    level = (tangent * mean).sum(-1)
    result = HeadGradient(head)
    empty = logits.new_empty(0)
    x_grad = -(pulled * mean + along * grad) if with_x else None
    table_grad = torch.empty(table.shape, dtype=torch.float32) if with_table else None
    for first, tile in tiles(head, width=tile_width(rows)):
        tokens = slice(first, first + tile.shape[-1])
        weights, pulls = _cosines(flat, table, tokens, "cosines"), _cosines(tangent, table, tokens, "pulls")
        gradient = result.tile(first, tile)
        _C.sphere_velocity_backward(
            view(tile),
            lse.data_ptr(),
            level.data_ptr(),
            radial.packed,
            weights.data_ptr(),
            pulls.data_ptr(),
            view(gradient),
            threads(weights.numel()),
        )
        if x_grad is not None:
            matmul(pulls, table[tokens], x_grad, add=True)
        if table_grad is not None:
            matmul(weights.mT, tangent, table_grad[tokens])
            matmul(pulls.mT, flat, table_grad[tokens], add=True)
        result.add(first, gradient)
    return (
        *result.result(),
        empty.clone() if x_grad is None else x_grad.view(x.shape).to(x.dtype),
        empty.clone() if table_grad is None else table_grad.to(table.dtype),
    )


def largest(logits: Tensor, weight: Tensor | None, bias: Tensor | None, count: int) -> Tensor:
    """Ids (..., count) of the largest logits, descending, ties to the lowest id; -1 in invalid rows."""
    lead, head = logits.shape[:-1], (logits, weight, bias)
    values = torch.empty((*lead, count), dtype=torch.float32)
    ids = torch.empty((*lead, count), dtype=torch.int64)
    for first, tile in tiles(head):
        used = threads(tile.numel())
        _C.largest(view(tile), first, count, values.data_ptr(), ids.data_ptr(), used)
    return ids.masked_fill_(~values[..., :1].isfinite(), -1)
