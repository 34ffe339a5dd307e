"""The vMF path's radial weight at every row's κ: the small linear systems of the reference's `vmf_series`,
solved in registers, so that nothing waits for the GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore.reference.sphere_velocity import _degree, vmf_series
from dlcore.triton.launch import launch, power_of_two

#: Unknowns of a system that registers hold.
_LARGEST = 64


@triton.jit
def _line(matrix, where, axis: tl.constexpr):
    """The row (axis 0) or the column (axis 1) of a matrix that is marked."""
    return tl.sum(tl.where(where, matrix, 0.0), axis, keep_dims=True)


@triton.jit(do_not_specialize=["size", "q"])
def sphere_series_kernel(kappa, nodes, values, slopes, out, size, q, SIZE: tl.constexpr):
    """out (3 + 2·(size - 1)): m, 1 - m, a scale, the Chebyshev coefficients of ρ and of its derivative.

    nodes (2, SIZE): 1 - z and 1 - z² of the collocation points z; values and slopes (SIZE, SIZE): T_n(z) and
    (1 - z²) T_n'(z). The system's last unknown is the mean resultant length.
    """
    row = tl.program_id(0).to(tl.int64)
    i, n = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    k, q = tl.load(kappa + row), tl.cast(q, tl.float64)
    root = tl.sqrt(q * q + 4.0 * k * k)
    m, rest = 2.0 * k / (q + root), q * (1.0 + q / (root + 2.0 * k)) / (q + root)
    above, sine_square = tl.load(nodes + i), tl.load(nodes + SIZE + i)
    z, w = 1.0 - above, rest + m * above
    diagonal = q * (2.0 * m - (1.0 + m * m) * z) - m * sine_square * w
    at = i * SIZE + n
    matrix = w * w * tl.load(slopes + at) + diagonal * tl.load(values + at)
    matrix = tl.where(n == size - 1, -q * w, matrix)
    right = q * (m - z)
    # What pads the system is the identity.
    inside = (i < size) & (n < size)
    matrix = tl.where(inside, matrix, tl.where(i == n, 1.0, 0.0))
    right = tl.where(i < size, right, 0.0)
    largest = tl.max(tl.abs(matrix), 1, keep_dims=True)
    matrix, right = matrix / largest, right / largest
    # Gauss and Jordan, with the largest pivot of every column.
    for step in range(0, size):
        column = tl.abs(_line(matrix, n == step, 1))
        pivot = tl.argmax(tl.where(i >= step, column, -1.0), 0, keep_dims=True)
        best, best_right = _line(matrix, i == pivot, 0), _line(right, i == pivot, 0)
        other, other_right = _line(matrix, i == step, 0), _line(right, i == step, 0)
        scale = _line(best, n == step, 1)
        best, best_right = best / scale, best_right / scale
        matrix, right = tl.where(i == pivot, other, matrix), tl.where(i == pivot, other_right, right)
        factor = tl.where(i == step, 0.0, _line(matrix, n == step, 1))
        matrix = tl.where(i == step, best, matrix - factor * best)
        right = tl.where(i == step, best_right, right - factor * best_right)
    terms = size - 1
    sums = tl.where(i < terms, right, 0.0)
    # T_k' = 2k Σ T_j over j < k of the other parity, half of it for j = 0.
    odd = (i > n) & ((i - n) % 2 == 1)
    derivative = tl.sum(tl.where(odd, sums * (2 * i).to(tl.float64), 0.0), 0, keep_dims=True)
    derivative = tl.where(n == 0, 0.5 * derivative, derivative)
    out += row * (2 * size + 1)
    tl.store(out, m.to(tl.float32))
    tl.store(out + 1, rest.to(tl.float32))
    tl.store(out + 2, (rest * (1.0 + m) / q).to(tl.float32))
    tl.store(out + 3 + i, sums.to(tl.float32), i < terms)
    tl.store(out + 3 + terms + n, derivative.to(tl.float32), n < terms)


@cache
def _tables(size: int, padded: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The nodes, T_n and (1 - z²) T_n' there, float64."""
    angle = torch.arange(padded, dtype=torch.float64, device=device) * (math.pi / (size - 1))
    n = torch.arange(padded, dtype=torch.float64, device=device)
    turned = angle.unsqueeze(-1) * n
    nodes = torch.stack([2 * torch.sin(angle / 2) ** 2, torch.sin(angle) ** 2])
    # (1 - z²) T_n' = n (T_{n-1} - z T_n) = n sin(angle) sin(n angle).
    return nodes, torch.cos(turned), n * torch.sin(angle).unsqueeze(-1) * torch.sin(turned)


def _solve_large(kappa: Tensor, dim: int) -> Tensor:
    """The same rows by torch's solver."""
    m, rest, sums = vmf_series(kappa, dim)
    n = torch.arange(sums.shape[-1], device=kappa.device)
    lower = (n > n.unsqueeze(-1)) & ((n - n.unsqueeze(-1)) % 2 == 1)
    matrix = torch.where(lower, 2 * n, 0).double()
    matrix[0] /= 2
    scale = rest * (1 + m) / (dim - 1)
    return torch.cat([torch.stack([m, rest, scale], -1), sums, sums @ matrix.mT], -1).float()


def solve(kappa: Tensor, dim: int) -> tuple[Tensor, int]:
    """Rows (n, 3 + 2·terms) float32 for κ (n) float64, see the kernel; and the number of terms.

    In two and three dimensions the systems are too large for registers.
    """
    size = _degree(dim) + 2
    if size > _LARGEST:
        return _solve_large(kappa, dim), size - 1
    padded, device = power_of_two(size, 16, _LARGEST), kappa.device
    # What is made while a graph is captured is the graph's, and must not be kept.
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    tables = _tables.__wrapped__ if capturing else _tables
    out = torch.empty((kappa.shape[0], 2 * size + 1), dtype=torch.float32, device=device)
    launch(
        sphere_series_kernel,
        kappa.shape[0],
        kappa,
        kappa.contiguous(),
        *tables(size, padded, device),
        out,
        size,
        dim - 1,
        SIZE=padded,
        num_warps=max(1, padded * padded // 512),
    )
    return out, size - 1


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that between them launch every variant of every kernel."""
    for dim in (768, 16, 4):
        yield partial(solve, torch.empty(4, dtype=torch.float64, device=device), dim)
