"""The sphere's maps and draws in Triton: a row is read once, where it fits into a program's registers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore._ops.sphere import MAPS
from dlcore._tensors import empty
from dlcore.triton.functions import over, power_of_two_below
from dlcore.triton.launch import ceil_div, launch, power_of_two
from dlcore.triton.rows import per_row, row_offset, rows_of
from dlcore.triton.sphere_maps import antipodal, combine, measure, sinc_cosine

#: Columns of a tile: a longer row takes several, and is read twice or three times.
_TILE = 4096
#: Elements of a warp, which a program of several rows has one of.
_WARP = 512


@triton.jit
def _load(data, start, column, live, columns):
    return tl.load(data + start + column, live & (column < columns), 0.0).to(tl.float32)


@triton.jit
def _vectors(
    MAP: tl.constexpr, BACKWARD: tl.constexpr, x, x_start, y, y_start, z, z_start, g, g_start,
    column, live, columns,
):  # fmt: skip
    """A tile of each vector; x for those that a map has not."""
    a = _load(x, x_start, column, live, columns)
    b, c, d = a, a, a
    if MAP != "normalize":
        b = _load(y, y_start, column, live, columns)
    if MAP == "rotate":
        c = _load(z, z_start, column, live, columns)
    if BACKWARD and MAP != "angle":
        d = _load(g, g_start, column, live, columns)
    return a, b, c, d


@triton.jit
def _farthest_axis(base, start, other, other_start, live, columns, least, BLOCK: tl.constexpr):
    """The axis that a row of `base` is farthest from, the lowest of several, and both rows' entries there."""
    at = tl.zeros_like(least).to(tl.int32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        size = tl.load(base + start + column, live & (column < columns), float("inf")).to(tl.float32)
        size = tl.where(size < 0, -size, size)
        here = tl.min(size, 1, keep_dims=True)
        at = tl.where(here < least, tl.argmin(size, 1, keep_dims=True) + first, at)
        least = tl.where(here < least, here, least)
    entry = tl.load(base + start + at, live, 0.0).to(tl.float32)
    return at, entry, tl.load(other + other_start + at, live, 0.0).to(tl.float32)


@triton.jit
def _store(
    x, y, z, x_out, y_out, z_out, start, column, live, columns,
    X_OUT: tl.constexpr, Y_OUT: tl.constexpr, Z_OUT: tl.constexpr,
):  # fmt: skip
    mask = live & (column < columns)
    if X_OUT:
        tl.store(x_out + start + column, x.to(x_out.dtype.element_ty), mask)
    if Y_OUT:
        tl.store(y_out + start + column, y.to(y_out.dtype.element_ty), mask)
    if Z_OUT:
        tl.store(z_out + start + column, z.to(z_out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows", "x_inner", "y_inner", "z_inner", "g_inner"])
def sphere_map_kernel(
    x, x_inner, x_outer, x_step, y, y_inner, y_outer, y_step,
    z, z_inner, z_outer, z_step, g, g_inner, g_outer, g_step,
    t, t_step, x_out, y_out, z_out, t_out, rows, columns,
    MAP: tl.constexpr, BACKWARD: tl.constexpr,
    X_OUT: tl.constexpr, Y_OUT: tl.constexpr, Z_OUT: tl.constexpr, T_OUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A map, or its gradients, on ROWS rows; WHOLE if one tile holds them."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < rows
    x_start = row_offset(row, x_inner, x_outer, x_step)
    y_start = row_offset(row, y_inner, y_outer, y_step)
    z_start = row_offset(row, z_inner, z_outer, z_step)
    g_start = row_offset(row, g_inner, g_outer, g_step)
    start, lane = row * columns, tl.arange(0, BLOCK)[None, :]
    zero = tl.zeros([ROWS, 1], tl.float32)
    share, factor = zero, zero + 1.0
    if MAP == "slerp" or (MAP == "angle" and BACKWARD):
        share = tl.load(t + row * t_step, live, 0.0)

    # The sums. A vector of any length has a square after its largest entry is brought next to 1.
    a, b, c, d = _vectors(MAP, BACKWARD, x, x_start, y, y_start, z, z_start, g, g_start, lane, live, columns)
    if MAP == "normalize" or MAP == "project":
        largest = tl.max(tl.abs(a), 1, keep_dims=True)
        if not WHOLE:
            for first in range(BLOCK, columns, BLOCK):
                tile = _load(x, x_start, first + lane, live, columns)
                largest = tl.maximum(largest, tl.max(tl.abs(tile), 1, keep_dims=True))
        factor = power_of_two_below(largest)
    a = a * factor
    s0, s1, s2, s3, s4, s5, s6, s7 = measure(MAP, BACKWARD, a, b, c, d, zero)
    if not WHOLE:
        for first in range(BLOCK, columns, BLOCK):
            a, b, c, d = _vectors(
                MAP, BACKWARD, x, x_start, y, y_start, z, z_start, g, g_start, first + lane, live, columns
            )
            m0, m1, m2, m3, m4, m5, m6, m7 = measure(MAP, BACKWARD, a * factor, b, c, d, zero)
            s0, s1, s2, s3 = s0 + m0, s1 + m1, s2 + m2, s3 + m3
            s4, s5, s6, s7 = s4 + m4, s5 + m5, s6 + m6, s7 + m7

    at, entry, other = tl.zeros([ROWS, 1], tl.int32), zero, zero
    if MAP == "slerp" or MAP == "log_map" or MAP == "rotate":  # noqa: SIM102
        if tl.max(antipodal(MAP, s0, s1, s2, s3).to(tl.int32)) > 0:
            least = zero + float("inf")
            if MAP != "rotate" and not BACKWARD:
                at, entry, other = _farthest_axis(x, x_start, x, x_start, live, columns, least, BLOCK)
            elif MAP != "rotate":
                at, entry, other = _farthest_axis(x, x_start, g, g_start, live, columns, least, BLOCK)
            elif BACKWARD:
                at, entry, other = _farthest_axis(y, y_start, g, g_start, live, columns, least, BLOCK)
            else:
                at, entry, other = _farthest_axis(y, y_start, x, x_start, live, columns, least, BLOCK)

    if WHOLE:
        a, b, c, number = combine(
            MAP, BACKWARD, a, b, c, d, share, factor, at, entry, other, lane, s0, s1, s2, s3, s4, s5, s6, s7
        )
        _store(a, b, c, x_out, y_out, z_out, start, lane, live, columns, X_OUT, Y_OUT, Z_OUT)
    else:
        number = zero
        for first in range(0, columns, BLOCK):
            column = first + lane
            a, b, c, d = _vectors(
                MAP, BACKWARD, x, x_start, y, y_start, z, z_start, g, g_start, column, live, columns
            )
            a, b, c, number = combine(
                MAP, BACKWARD, a * factor, b, c, d, share, factor, at, entry, other, column,
                s0, s1, s2, s3, s4, s5, s6, s7,
            )  # fmt: skip
            _store(a, b, c, x_out, y_out, z_out, start, column, live, columns, X_OUT, Y_OUT, Z_OUT)
    if T_OUT:
        tl.store(t_out + row, number, live)


@triton.jit(do_not_specialize=["rows", "x_inner", "v_inner"])
def sphere_step_kernel(
    x, x_inner, x_outer, x_step, v, v_inner, v_outer, v_step, t, t_step, out, rows, columns,
    EXPONENTIAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x moved by t·v, along the great circle or straight on, and back to length 1; one tile holds a row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    live, lane = row < rows, tl.arange(0, BLOCK)[None, :]
    y = _load(x, row_offset(row, x_inner, x_outer, x_step), lane, live, columns)
    move = _load(v, row_offset(row, v_inner, v_outer, v_step), lane, live, columns)
    move = move * tl.load(t + row * t_step, live, 0.0).to(tl.float32)
    if EXPONENTIAL:
        sinc, cosine = sinc_cosine(tl.sqrt_rn(tl.sum(move * move, 1, keep_dims=True)))
        y = y * cosine + move * sinc
    else:
        y = y + move
    # Of any length: the largest entry is brought next to 1.
    y = y * power_of_two_below(tl.max(tl.abs(y), 1, keep_dims=True))
    y = y * over(1.0, tl.sqrt_rn(tl.sum(y * y, 1, keep_dims=True)))
    tl.store(out + row * columns + lane, y.to(out.dtype.element_ty), live & (lane < columns))


def tiling(rows: int, columns: int, noise: bool = False) -> tuple[int, dict[str, Any]]:
    """So many programs, and their constants: several short rows each, or a tile of a long one at a time.

    Tiles are half as large where `noise` takes its registers, too.
    """
    whole = columns <= _TILE
    block = power_of_two(columns, 16, _TILE) if whole else _TILE >> noise
    height = max(1, (_WARP >> noise) // block)
    warps = max(1, height * block // (2 * _WARP)) if whole else min(8, max(1, block // 128))
    constants = {"ROWS": height, "BLOCK": block, "WHOLE": whole, "num_warps": warps}
    return ceil_div(rows, height), constants


def _run(
    name: str,
    vectors: tuple[Tensor, ...],
    grad: Tensor | None,
    t: Tensor | None,
    outputs: Sequence[Tensor | None],
    number: Tensor | None,
    backward: bool,
) -> None:
    like = vectors[0]
    columns, rows = like.shape[-1], like.shape[:-1].numel()
    inputs = [rows_of(v) for v in (*vectors, *(vectors[:1] * (3 - len(vectors))))]
    inputs.append(inputs[0] if grad is None else rows_of(grad))
    t, step = per_row(t, like.shape[:-1])
    outs = [*outputs, *[None] * (3 - len(outputs))]
    programs, constants = tiling(rows, columns)
    launch(
        sphere_map_kernel,
        programs,
        like,
        *(part for v in inputs for part in v),
        like if t is None else t,
        step,
        *(like if o is None else o for o in outs),
        like if number is None else number,
        rows,
        columns,
        MAP=name,
        BACKWARD=backward,
        X_OUT=outs[0] is not None,
        Y_OUT=outs[1] is not None,
        Z_OUT=outs[2] is not None,
        T_OUT=number is not None,
        **constants,
    )


def _map(name: str, *vectors: Tensor, t: Tensor | None = None) -> Tensor:
    """A result of the first vector's shape, or for the angle a number per row."""
    x = vectors[0]
    if name == "angle":
        number = empty(x.shape[:-1], torch.float32, x.device)
        _run(name, vectors, None, None, (), number, False)
        return number
    out = empty(x.shape, x.dtype, x.device)
    _run(name, vectors, None, t, (out,), None, False)
    return out


def _map_backward(
    name: str, grad: Tensor, needed: Sequence[bool], *vectors: Tensor, t: Tensor | None = None
) -> tuple[Tensor, ...]:
    """A gradient per input, empty where not needed; that of t, if there is one, last."""
    grads = [empty(x.shape if n else (0,), x.dtype, x.device) for x, n in zip(vectors, needed, strict=False)]
    outputs = [g if n else None for g, n in zip(grads, needed, strict=False)]
    if name == "angle":
        _run(name, vectors, None, grad.float(), outputs, None, True)
        return tuple(grads)
    if t is None:
        _run(name, vectors, grad, None, outputs, None, True)
        return tuple(grads)
    number = empty(t.shape if needed[-1] else (0,), torch.float32, t.device)
    _run(name, vectors, grad, t, outputs, number if needed[-1] else None, True)
    return (*grads, number)


def _only(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    return lambda *args: backward(*args)[0]


normalize, normalize_backward = partial(_map, "normalize"), _only(partial(_map_backward, "normalize"))
project, project_backward = partial(_map, "project"), partial(_map_backward, "project")
angle, angle_backward = partial(_map, "angle"), partial(_map_backward, "angle")
log_map, log_map_backward = partial(_map, "log_map"), partial(_map_backward, "log_map")
exp_map, exp_map_backward = partial(_map, "exp_map"), partial(_map_backward, "exp_map")
rotate, rotate_backward = partial(_map, "rotate"), partial(_map_backward, "rotate")


def slerp(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return _map("slerp", x, y, t=t)


def slerp_backward(
    grad: Tensor, needed: Sequence[bool], x: Tensor, y: Tensor, t: Tensor
) -> tuple[Tensor, ...]:
    return _map_backward("slerp", grad, needed, x, y, t=t)


def step(x: Tensor, v: Tensor, t: Tensor, exponential: bool) -> Tensor:
    """x moved by t·v in float32, along the great circle or straight on, and back to length 1."""
    columns, rows = x.shape[-1], x.shape[:-1].numel()
    programs, constants = tiling(rows, columns)
    if not constants.pop("WHOLE"):
        start, move = x.float(), t.float().unsqueeze(-1) * v
        moved: Tensor = normalize(exp_map(start, move) if exponential else start + move)
        return moved.to(x.dtype)
    out = empty(x.shape, x.dtype, x.device)
    read = (*rows_of(x), *rows_of(v), *per_row(t, x.shape[:-1]))
    launch(sphere_step_kernel, programs, x, *read, out, rows, columns, EXPONENTIAL=exponential, **constants)
    return out


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that between them launch every variant of every kernel."""
    for columns, dtype in ((64, torch.float32), (768, torch.bfloat16), (5000, torch.float32)):
        x, t = torch.empty(64, columns, dtype=dtype, device=device), torch.empty(64, device=device)
        for name, arguments in MAPS.items():
            inputs = [t if a == "t" else x for a in arguments]
            function, backward = globals()[name], globals()[f"{name}_backward"]
            yield partial(function, *inputs)
            yield partial(backward, t if name == "angle" else x, [True] * len(inputs), *inputs)
        for exponential in (True, False):
            yield partial(step, x, x, t, exponential)
