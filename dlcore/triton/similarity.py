"""Cosines between fresh and cached rows in Triton: a program reads a row of each, where the cache has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore._tensors import empty
from dlcore.triton.attention_shapes import rows_contiguous
from dlcore.triton.functions import power_of_two_below
from dlcore.triton.launch import launch, power_of_two

#: Columns of a tile: a longer row takes several, and is read twice.
_TILE = 4096


@triton.jit
def _load(data, column, columns, head_dim, head_stride, APART: tl.constexpr):
    at = column
    if APART:
        at = (column // head_dim).to(tl.int64) * head_stride + column % head_dim
    return tl.load(data + at, column < columns, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "cached_rows", "pages", "num_pages"])
def cosine_kernel(
    new, new_batch, new_row, new_head, cached, cached_batch, cached_row, cached_head,
    positions, page_table, out, rows, cached_rows, pages, page_size, num_pages, columns, head_dim,
    APART: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A row; APART if heads lie so, WHOLE if one tile holds a row."""
    program = tl.program_id(0).to(tl.int64)
    sequence, row = program // rows, program % rows
    position = row
    if positions is not None:
        position = tl.load(positions + program)
    inside = (position >= 0) & (position < cached_rows)
    place, holder = tl.where(inside, position, 0), sequence
    if page_table is not None:
        holder = tl.load(page_table + sequence * pages + place // page_size).to(tl.int64)
        inside = inside & (holder >= 0) & (holder < num_pages)
        place = place % page_size
    new += sequence * new_batch + row * new_row
    cached += tl.where(inside, holder * cached_batch + place * cached_row, 0)
    held = tl.where(inside, columns, 0)

    # A vector of any length has a square after its largest entry is brought next to 1.
    column = tl.arange(0, BLOCK)
    a = _load(new, column, columns, head_dim, new_head, APART)
    b = _load(cached, column, held, head_dim, cached_head, APART)
    most_a, most_b = tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0)
    if not WHOLE:
        for first in range(BLOCK, columns, BLOCK):
            x = _load(new, first + column, columns, head_dim, new_head, APART)
            y = _load(cached, first + column, held, head_dim, cached_head, APART)
            most_a = tl.maximum(most_a, tl.max(tl.abs(x), 0))
            most_b = tl.maximum(most_b, tl.max(tl.abs(y), 0))
    scale_a, scale_b = power_of_two_below(most_a), power_of_two_below(most_b)
    a, b = a * scale_a, b * scale_b
    dot, square_a, square_b = tl.sum(a * b, 0), tl.sum(a * a, 0), tl.sum(b * b, 0)
    if not WHOLE:
        for first in range(BLOCK, columns, BLOCK):
            x = _load(new, first + column, columns, head_dim, new_head, APART) * scale_a
            y = _load(cached, first + column, held, head_dim, cached_head, APART) * scale_b
            dot += tl.sum(x * y, 0)
            square_a += tl.sum(x * x, 0)
            square_b += tl.sum(y * y, 0)

    none, one = (square_a == 0) & (square_b == 0), (square_a == 0) | (square_b == 0)
    sizes = tl.sqrt(square_a) * tl.sqrt(square_b)
    cosine = dot / tl.where(one, 1.0, sizes)
    cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))
    cosine = tl.where(none, 1.0, tl.where(one, 0.0 * (square_a + square_b), cosine))
    tl.store(out + program, tl.where(inside, cosine, float("nan")))


def cosine(new: Tensor, cached: Tensor, rows: Tensor | None, page_table: Tensor | None) -> Tensor:
    """(B, n) float32."""
    new, cached = rows_contiguous(new), rows_contiguous(cached)
    table = None if page_table is None else page_table.contiguous()
    batch, count, heads, head_dim = new.shape
    pages = 1 if table is None else table.shape[1]
    columns = heads * head_dim
    block = power_of_two(columns, 16, _TILE)
    out = empty((batch, count), torch.float32, new.device)
    launch(
        cosine_kernel,
        batch * count,
        new,
        *(new, *new.stride()[:3], cached, *cached.stride()[:3]),
        None if rows is None else rows.contiguous(),
        table,
        *(out, count, cached.shape[1] * pages, pages, cached.shape[1], cached.shape[0], columns, head_dim),
        APART=not all(x.stride(2) == head_dim for x in (new, cached)),
        BLOCK=block,
        WHOLE=columns <= block,
        num_warps=min(8, max(1, block // 512)),
    )
    return out


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that between them launch every variant of every kernel."""
    rows = torch.empty(2, 16, dtype=torch.int64, device=device)
    table = torch.empty(2, 4, dtype=torch.int32, device=device)
    for heads, dtype in ((2, torch.float32), (8, torch.bfloat16), (64, torch.float16)):
        new = torch.empty(2, 16, heads, 128, dtype=dtype, device=device)
        pages = torch.empty(8, 16, heads, 128, dtype=dtype, device=device)
        apart = new.transpose(1, 2).contiguous().transpose(1, 2)
        for x, at, (cached, where) in product((new, apart), (None, rows), ((new, None), (pages, table))):
            yield partial(cosine, x, cached, at, where)
