"""Draws of the von Mises-Fisher and the spherical Cauchy law in Triton, without a branch.

A point is W·μ + √(1 - W²)·v with v uniform across the mean direction μ, a projected normal vector. The
cosine W is (m + y)/(1 + my), y the cosine of a uniform point: as it is for the Cauchy law, after Wood's
rejection for von Mises-Fisher, in a form without κ's large differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore._tensors import empty
from dlcore.reference.vmf import CANDIDATES
from dlcore.triton.functions import exponential, normals, one_minus_exponential, over, power_of_two_below
from dlcore.triton.launch import launch
from dlcore.triton.noise import COSINE, DIRECTION, block, log, row_key, sine_cosine
from dlcore.triton.noise import exponential as exponential_noise
from dlcore.triton.rows import per_row, row_offset, rows_of
from dlcore.triton.sphere import tiling


@triton.jit
def _log_excess(one):
    """log(1 + s) - s/(1 + s) for 1 + s in (0, 2], without cancellation."""
    # With u = s/(2 + s) it is 2u²/(1 + u) + 2(artanh u - u); |u| <= 1/3 where that is used.
    near = one >= 0.5
    a = tl.where(near, one, 1.0)
    u = (a - 1.0) / (a + 1.0)
    s = u * u
    p = s * (1 / 17) + 1 / 15
    p = s * p + 1 / 13
    p = s * p + 1 / 11
    p = s * p + 1 / 9
    p = s * p + 1 / 7
    p = s * p + 1 / 5
    p = s * p + 1 / 3
    return tl.where(near, 2.0 * s * (1.0 / (1.0 + u) + u * p), log(one) - 1.0 + 1.0 / one)


@triton.jit
def _cosine(seed, offset, kappa, q, REJECT: tl.constexpr, COUNT: tl.constexpr):
    """The cosine to the mean and its sine (rows, 1): those of the first of COUNT candidates that is taken.

    y = t/√(q + t²) for Student's t with q = d - 1 degrees of freedom (Bailey 1994), from draws 4k and 4k + 1;
    it is taken where the exponential number of draw 4k + 2 exceeds q·(log(1 + s) - s/(1 + s)), s = my.
    """
    # 1 - m and 1 + y are kept beside m and y: where κ is large and y next to -1, both sums cancel.
    root = tl.sqrt(q * q + 4.0 * kappa * kappa)
    b, m = (q / (2.0 * kappa + root)).to(tl.float32), (2.0 * kappa / (q + root)).to(tl.float32)
    rest, width = 2.0 * b / (1.0 + b), 2.0 * tl.sqrt_rn(b) / (1.0 + b)
    q = q.to(tl.float32)
    k = tl.arange(0, COUNT)[None, :].to(tl.int64)
    low, high, _, bits = block(seed, offset, COSINE, 2 * k)
    _, turn = sine_cosine(bits)
    a = 2.0 / q * exponential_noise(low, high)
    g, square = exponential(-a), turn * turn * one_minus_exponential(a)
    y = tl.sqrt_rn(square / (g + square))
    across = tl.sqrt_rn(g / (g + square))
    above = tl.where(turn < 0, across * across / (1.0 + y), 1.0 + y)
    one = rest + m * above
    cosine, sine = (above - rest) / one, width * across / one
    if REJECT:
        low, high, _, _ = block(seed, offset, COSINE, 2 * k + 1)
        taken = exponential_noise(low, high) >= q * _log_excess(one)
        first = tl.min(tl.where(taken, k, COUNT - 1), 1, keep_dims=True)
        cosine = tl.sum(tl.where(k == first, cosine, 0.0), 1, keep_dims=True)
        sine = tl.sum(tl.where(k == first, sine, 0.0), 1, keep_dims=True)
    return cosine, sine


@triton.jit
def _dot(a, b):
    return tl.sum(a * b, 1, keep_dims=True)


@triton.jit(do_not_specialize=["rows", "inner"])
def sphere_sample_kernel(
    mean, inner, outer, step, kappa, kappa_step, keys, out, rows, columns,
    REJECT: tl.constexpr, PER_ROW: tl.constexpr, COUNT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A draw per row; WHOLE if one tile holds a row, else the noise is drawn twice."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < rows
    row = tl.where(live, row, 0)
    start, lane = row_offset(row, inner, outer, step), tl.arange(0, BLOCK)[None, :]
    seed, offset = row_key(keys, row, PER_ROW)
    inside = lane < columns
    w = tl.load(mean + start + lane, inside, 0.0).to(tl.float32)
    g = tl.where(inside, normals(seed, offset, DIRECTION, 0, BLOCK), 0.0)
    # A mean of any length: its largest entry is brought next to 1.
    largest = tl.max(tl.abs(w), 1, keep_dims=True)
    if not WHOLE:
        for first in range(BLOCK, columns, BLOCK):
            w = tl.load(mean + start + first + lane, first + lane < columns, 0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(w), 1, keep_dims=True))
        w = tl.load(mean + start + lane).to(tl.float32)
    factor = power_of_two_below(largest)
    w = w * factor
    square, product, whole = _dot(w, w), _dot(w, g), _dot(g, g)
    if not WHOLE:
        for first in range(BLOCK, columns, BLOCK):
            inside = first + lane < columns
            w = tl.load(mean + start + first + lane, inside, 0.0).to(tl.float32) * factor
            g = tl.where(inside, normals(seed, offset, DIRECTION, first, BLOCK), 0.0)
            square, product, whole = square + _dot(w, w), product + _dot(w, g), whole + _dot(g, g)
    share = over(product, square)
    if WHOLE and BLOCK <= 256:
        # So few numbers may lie almost along the mean: what is left across it is formed anew, and once more.
        for _ in tl.static_range(2):
            g = g - w * share
            product, whole = _dot(w, g), _dot(g, g)
            share = over(product, square)
    cosine, sine = _cosine(
        seed, offset, tl.load(kappa + row * kappa_step), (columns - 1).to(tl.float64), REJECT, COUNT
    )
    # A mean that is zero gives the uniform law.
    directed = square > 0
    across = tl.where(directed, sine, 1.0) / tl.sqrt_rn(whole - share * product)
    along = tl.where(directed, over(cosine, tl.sqrt_rn(square)), 0.0) - across * share
    if WHOLE:
        tl.store(out + row * columns + lane, (w * along + g * across).to(out.dtype.element_ty), live & inside)
    else:
        for first in range(0, columns, BLOCK):
            inside = first + lane < columns
            w = tl.load(mean + start + first + lane, inside, 0.0).to(tl.float32) * factor
            g = normals(seed, offset, DIRECTION, first, BLOCK)
            drawn = (w * along + g * across).to(out.dtype.element_ty)
            tl.store(out + row * columns + first + lane, drawn, live & inside)


def sample(mean: Tensor, kappa: Tensor, key: Tensor, reject: bool) -> Tensor:
    """Points of mean's shape and dtype."""
    lead, columns = mean.shape[:-1], mean.shape[-1]
    out = empty(mean.shape, mean.dtype, mean.device)
    concentration, kappa_step = per_row(kappa, lead)
    programs, constants = tiling(lead.numel(), columns, noise=True)
    count = CANDIDATES if reject else 1
    # At most eight candidates a thread, however short the rows are.
    constants["num_warps"] = max(constants["num_warps"], constants["ROWS"] * count // 256)
    launch(
        sphere_sample_kernel,
        programs,
        mean,
        *rows_of(mean),
        concentration,
        kappa_step,
        key.contiguous(),
        out,
        lead.numel(),
        columns,
        REJECT=reject,
        PER_ROW=key.dim() > 1,
        COUNT=count,
        **constants,
    )
    return out


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that between them launch every variant of every kernel."""
    key, kappa = (
        torch.empty(2, dtype=torch.int64, device=device),
        torch.empty(64, dtype=torch.float64, device=device),
    )
    for columns, dtype in (
        (3, torch.float32),
        (64, torch.bfloat16),
        (768, torch.float32),
        (5000, torch.float32),
    ):
        mean = torch.empty(64, columns, dtype=dtype, device=device)
        yield partial(sample, mean, kappa, key, True)
        yield partial(sample, mean, kappa[0], key.expand(64, 2), False)
