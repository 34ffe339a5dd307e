"""The vocabulary drifts in Triton: logits and cosines tile by tile, their products by cuBLAS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore.reference.sphere_velocity import LOWEST_COSINE
from dlcore.triton import sphere_series
from dlcore.triton.functions import PI, exponential, slerp_series, slerp_series_slope
from dlcore.triton.launch import ceil_div, launch, power_of_two
from dlcore.triton.linear_logits import HeadGradient, matmul, parts, splits, tile_width, tiles
from dlcore.triton.rows import Rows, row_offset

#: Columns of a program at most.
_SPAN = 2048
_LOWEST = tl.constexpr(LOWEST_COSINE)


@triton.jit
def _place(count, spans, BLOCK: tl.constexpr):
    """The row and the columns of a program, and which of them there are."""
    program = tl.program_id(0)
    column = program % spans * BLOCK + tl.arange(0, BLOCK)
    return (program // spans).to(tl.int64), column, column < count


@triton.jit
def _slerp(cosine):
    """ω / sin ω and its slope in the cosine: of the angle up to a right one, else by its supplement."""
    c = tl.where(cosine < _LOWEST, _LOWEST, cosine)
    obtuse = c < 0
    u = 1.0 - tl.abs(c)
    root = 1.0 / tl.sqrt_rn(tl.where(obtuse, (1.0 - c) * (1.0 + c), 1.0))
    steep = tl.where(obtuse & (cosine >= _LOWEST), root * root * root * c * PI, 0.0)
    slope = tl.where(cosine < _LOWEST, 0.0, steep - slerp_series_slope(u))
    series = slerp_series(u)
    return tl.where(obtuse, root * PI - series, series), slope


@triton.jit
def _chebyshev(coefficients, terms, z):
    """Σ a_n T_n(z) by Clenshaw's recurrence."""
    last, before = z * 0.0, z * 0.0
    for i in range(1, terms):
        following = 2.0 * z * last + (tl.load(coefficients + terms - i) - before)
        before = last
        last = following
    return z * last + (tl.load(coefficients) - before)


@triton.jit
def _von_mises_fisher(cosine, row, terms, WITH_SLOPE: tl.constexpr):
    """scale / (1 + mc)·Σ a_n T_n(z), z = (c + m) / (1 + mc), by c + 1, exact where both sums cancel."""
    m, rest, scale = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    above = tl.where(cosine < -1.0, -1.0, cosine) + 1.0
    inverse = 1.0 / (above * m + rest)
    z = (above - rest) * inverse
    rho = _chebyshev(row + 3, terms, z)
    slope = rho
    if WITH_SLOPE:
        # dz/dc = (1 - m²) / (1 + mc)².
        turn = inverse * (rest * (m + 1.0))
        slope = inverse * inverse * scale * (turn * _chebyshev(row + 3 + terms, terms, z) - rho * m)
        slope = tl.where(cosine < -1.0, 0.0, slope)
    return inverse * scale * rho, slope


@triton.jit
def _radial(cosine, radial, terms, VMF: tl.constexpr, WITH_SLOPE: tl.constexpr):
    """The radial weight g and its slope."""
    if VMF:
        return _von_mises_fisher(cosine, radial, terms, WITH_SLOPE)
    else:
        return _slerp(cosine)


@triton.jit
def _probability(logit, reference):
    """exp(logit - reference); exactly 0 where a token is excluded, or as good as that."""
    x = logit - reference
    return tl.where(x < -86.0, 0.0, exponential(x))


@triton.jit(do_not_specialize=["inner", "count", "spans"])
def sphere_peak_kernel(logits, inner, outer, step, peaks, count, spans, BLOCK: tl.constexpr):
    """The largest logit of a program's columns: peaks (rows, spans)."""
    row, column, live = _place(count, spans, BLOCK)
    start = row_offset(row, inner, outer, step)
    x = tl.load(logits + start + column, live, float("-inf")).to(tl.float32)
    tl.store(peaks + row * spans + tl.program_id(0) % spans, tl.max(x, 0))


@triton.jit(do_not_specialize=["inner", "count", "spans", "terms", "size"])
def sphere_weights_kernel(
    logits, inner, outer, step, reference, radial, radial_step, terms, cosines, weights, size, sums, count,
    spans, PARTS: tl.constexpr, VMF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weights <- p·g(cosines) for p = exp(logits - reference), and the sums of p (rows, spans).

    `size` further on stands what the dtype of the weights rounds off, and so on for so many parts.
    """
    row, column, live = _place(count, spans, BLOCK)
    start = row_offset(row, inner, outer, step)
    p = _probability(
        tl.load(logits + start + column, live, float("-inf")).to(tl.float32), tl.load(reference + row)
    )
    at = row * count + column
    g, _ = _radial(tl.load(cosines + at, live, 0.0), radial + row * radial_step, terms, VMF, False)
    rest = p * g
    for i in tl.static_range(PARTS):
        part = rest.to(weights.dtype.element_ty)
        tl.store(weights + i * size.to(tl.int64) + at, part, live)
        rest -= part.to(tl.float32)
    tl.store(sums + row * spans + tl.program_id(0) % spans, tl.sum(p, 0))


@triton.jit(do_not_specialize=["inner", "count", "spans", "terms"])
def sphere_velocity_backward_kernel(
    logits, inner, outer, step, logsumexp, levels, radial, radial_step, terms, cosines, pulls, out, out_step,
    count, spans, VMF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With p = exp(logits - logsumexp), c the cosines and h the pulls: out <- p·(g(c)·h - level),
    cosines <- p·g(c) and pulls <- p·g'(c)·h."""
    row, column, live = _place(count, spans, BLOCK)
    start = row_offset(row, inner, outer, step)
    lse = tl.load(logsumexp + row)
    reference = lse.to(tl.float32)
    logit = tl.load(logits + start + column, live, float("-inf")).to(tl.float32)
    # What a float does not hold of the logsumexp comes back as a factor.
    p = _probability(logit, reference) * (1.0 + (reference.to(tl.float64) - lse).to(tl.float32))
    at = row * count + column
    cosine, pull = tl.load(cosines + at, live, 0.0), tl.load(pulls + at, live, 0.0)
    g, slope = _radial(cosine, radial + row * radial_step, terms, VMF, True)
    in_logit = p * (g * pull - tl.load(levels + row))
    tl.store(out + row * out_step + column, in_logit.to(out.dtype.element_ty), live)
    tl.store(pulls + at, p * slope * pull, live)
    tl.store(cosines + at, p * g, live)


@triton.jit(do_not_specialize=["inner", "count", "spans", "first_token"])
def sphere_order_kernel(logits, inner, outer, step, keys, count, spans, first_token, BLOCK: tl.constexpr):
    """int64 keys that order as (logit, lowest id): NaN above +inf, both zeros equal."""
    row, column, live = _place(count, spans, BLOCK)
    start = row_offset(row, inner, outer, step)
    x = tl.load(logits + start + column, live, 0.0).to(tl.float32)
    x = tl.where(x == 0, 0.0, x)
    bits = tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    tl.store(
        keys + row * count + column,
        (ordered << 32) | (0xFFFFFFFF - (first_token + column).to(tl.int64)),
        live,
    )


class _Radial(NamedTuple):
    """The radial weight as the kernels take it; SLERP's has no rows."""

    rows: Tensor | None
    step: int
    terms: int

    def arguments(self, like: Tensor) -> tuple[Tensor, int, int]:
        return (like if self.rows is None else self.rows, self.step, self.terms)


def _radial_of(kappa: Tensor | None, lead: torch.Size, dim: int) -> _Radial:
    if kappa is None:
        return _Radial(None, 0, 1)
    kappa = kappa.reshape(1) if kappa.numel() == 1 else kappa.expand(lead).reshape(-1)
    rows, terms = sphere_series.solve(kappa, dim)
    return _Radial(rows, 0 if rows.shape[0] == 1 else rows.shape[1], terms)


def _blocks(count: int) -> tuple[int, dict[str, Any]]:
    """Programs abreast in a row of so many columns, and their constants."""
    block = power_of_two(count, 64, _SPAN)
    return ceil_div(count, block), {"BLOCK": block, "num_warps": max(1, block // 256)}


class _Cosines:
    """Products of rows (rows, d) with the table's rows, tile by tile into one buffer."""

    def __init__(self, vectors: Tensor, table: Tensor, width: int) -> None:
        self.parts, self.table = parts(vectors, table.dtype), table
        size = vectors.shape[0] * min(width, table.shape[0])
        self.buffer = torch.empty(size, dtype=torch.float32, device=vectors.device)

    def tile(self, first: int, count: int) -> Tensor:
        """(rows, count) float32; the next tile overwrites it."""
        rows, columns = self.parts[0].shape[0], self.table[first : first + count].mT
        out = self.buffer[: rows * count].view(rows, count)
        for i, part in enumerate(self.parts):
            matmul(part, columns, out, add=i > 0)
        return out


def _peaks(tile: Rows, rows: int, count: int) -> Tensor:
    """Each row's largest logit, of so many."""
    spans, constants = _blocks(count)
    peaks = torch.empty((rows, spans), dtype=torch.float32, device=tile.data.device)
    launch(sphere_peak_kernel, rows * spans, peaks, *tile, peaks, count, spans, **constants)
    return peaks.amax(-1)


def _finite(reference: Tensor) -> Tensor:
    """As long as there is no logit, what is summed refers to 0."""
    return torch.where(reference == -torch.inf, 0.0, reference)


def velocity(
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x: Tensor,
    table: Tensor,
    kappa: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """P_x m (..., d), <x, m> (...) and the logsumexp (...): each logit and each cosine is computed once.

    Dense logits are read twice. Of a head's what is summed refers to the largest logit so far, and is scaled
    down when a larger one appears.
    """
    lead, dim, device = logits.shape[:-1], table.shape[1], logits.device
    rows, table, flat = lead.numel(), table.detach(), x.detach().reshape(-1, dim)
    head = (logits.detach(), weight, bias)
    radial, width = _radial_of(kappa, lead, dim), tile_width(head)
    cosines, dense = _Cosines(flat, table, width), weight is None
    mean = torch.zeros((rows, dim), dtype=torch.float32, device=device)
    total = torch.zeros(rows, dtype=torch.float32, device=device)
    reference = torch.full((rows,), -torch.inf, dtype=torch.float32, device=device)
    split, size = splits(table.dtype), len(cosines.buffer)
    room = torch.empty((split, size), dtype=table.dtype, device=device) if split > 1 else None
    if dense:
        ((_, count, tile),) = tiles(head)
        reference = _peaks(tile, rows, count)
        held = _finite(reference)
    for first, count, tile in tiles(head, width):
        spans, constants = _blocks(count)
        if not dense:
            before, reference = reference, torch.maximum(reference, _peaks(tile, rows, count))
            held = _finite(reference)
            factor = torch.exp(before - held)
            mean.mul_(factor.unsqueeze(-1))
            total *= factor
        sums = torch.empty((rows, spans), dtype=torch.float32, device=device)
        angles = cosines.tile(first, count)
        weights = [angles] if room is None else [x[: rows * count].view(rows, count) for x in room]
        launch(
            sphere_weights_kernel,
            rows * spans,
            flat,
            *tile,
            held,
            *radial.arguments(sums),
            angles,
            weights[0],
            size,
            sums,
            count,
            spans,
            PARTS=split,
            VMF=kappa is not None,
            **constants,
        )
        total += sums.sum(-1)
        for part in weights:
            matmul(part, table[first : first + count], mean, add=True)
    total = torch.where(total > 0, total, torch.nan)
    mean.div_(total.unsqueeze(-1))
    state = flat.float()
    along = (mean * state).sum(-1, keepdim=True)
    result = torch.addcmul(mean, along, state, value=-1)
    lse = reference.double() + total.double().log()
    return result.view(*lead, dim), along.view(lead), lse.view(lead)


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
    rows, flat, lse = lead.numel(), x.reshape(-1, dim), lse.contiguous()
    radial, width, state = _radial_of(kappa, lead, dim), tile_width(head), flat.float()
    grad, along = grad.reshape(rows, dim).float(), along.reshape(rows, 1)
    mean = output.reshape(rows, dim) + along * state
    pulled = (grad * state).sum(-1, keepdim=True)
    tangent = grad - pulled * state
    level = (tangent * mean).sum(-1)
    result = HeadGradient(head)
    empty = logits.new_empty(0)
    x_grad = -(pulled * mean + along * grad) if with_x else None
    table_grad = torch.empty(table.shape, dtype=torch.float32, device=x.device) if with_table else None
    cosines, across = _Cosines(flat, table, width), _Cosines(tangent, table, width)
    for first, count, tile in tiles(head, width):
        tokens = slice(first, first + count)
        weights, pulls, gradient = (
            cosines.tile(first, count),
            across.tile(first, count),
            result.tile(first, count),
        )
        spans, constants = _blocks(count)
        launch(
            sphere_velocity_backward_kernel,
            rows * spans,
            flat,
            *tile,
            lse,
            level,
            *radial.arguments(level),
            weights,
            pulls,
            gradient,
            gradient.stride(0),
            count,
            spans,
            VMF=kappa is not None,
            **constants,
        )
        if x_grad is not None:
            matmul(pulls, table[tokens], x_grad, add=True)
        if table_grad is not None:
            matmul(weights.mT, tangent, table_grad[tokens])
            matmul(pulls.mT, state, table_grad[tokens], add=True)
        result.add(first, gradient)
    return (
        *result.result(),
        empty.clone() if x_grad is None else x_grad.view(x.shape).to(x.dtype),
        empty.clone() if table_grad is None else table_grad.to(table.dtype),
    )


def largest(logits: Tensor, weight: Tensor | None, bias: Tensor | None, count: int) -> Tensor:
    """Ids (..., count) of the largest logits, descending, ties to the lowest id; -1 in invalid rows."""
    lead, head = logits.shape[:-1], (logits.detach(), weight, bias)
    rows, width = lead.numel(), tile_width(head)
    kept = torch.empty((rows, 0), dtype=torch.int64, device=logits.device)
    for first, columns, tile in tiles(head, width):
        keys = torch.empty((rows, columns), dtype=torch.int64, device=logits.device)
        spans, constants = _blocks(columns)
        launch(sphere_order_kernel, rows * spans, keys, *tile, keys, columns, spans, first, **constants)
        kept = torch.cat([kept, keys.topk(min(count, columns)).values], -1)
        kept = kept.topk(min(count, kept.shape[1])).values
    ids, top = 0xFFFFFFFF - (kept & 0xFFFFFFFF), kept[:, :1] >> 32
    # Between -inf, whose bits order as these, and inf.
    finite = (top > -0x7F800001) & (top < 0x7F800000)
    return ids.masked_fill(~finite, -1).view(*lead, count)


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that between them launch every variant of every kernel."""
    for dtype, rows in ((torch.float32, 64), (torch.bfloat16, 4096)):
        x, table = (torch.empty(n, 64, dtype=dtype, device=device) for n in (rows, 1000))
        logits = torch.empty(rows, 1000, dtype=dtype, device=device)
        along, lse = (torch.empty(rows, dtype=t, device=device) for t in (torch.float32, torch.float64))
        yield partial(largest, logits, None, None, 4)
        for kappa in (None, lse):
            yield partial(velocity, logits, None, None, x, table, kappa)
            saved = (x, x, along, lse)
            yield partial(velocity_backward, *saved, logits, None, None, x, table, kappa, True, True)
            yield partial(velocity, x, table, None, x, table, kappa)
