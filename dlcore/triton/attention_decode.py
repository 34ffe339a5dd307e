"""A step against a cache: new rows written where they belong, their intervals made, attention run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore.triton.attention_forward import intervals
from dlcore.triton.attention_shapes import rows_contiguous, width
from dlcore.triton.launch import launch


@triton.jit
def _copy_row(source, target, inside, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = column < tl.where(inside, COLUMNS, 0)
    tl.store(target + column, tl.load(source + column, mask), mask)


@triton.jit(
    do_not_specialize=["rows", "max_len", "num_commit", "window", "pages", "num_pages", "causal_stride"]
)
def write_kernel(
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    lengths,
    page_table,
    causal,
    starts,
    stops,
    rows,
    max_len,
    num_commit,
    window,
    pages,
    page_size,
    num_pages,
    causal_stride,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAGED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """A program has a new row of one head; that of head 0 also makes the row's intervals, the first empty.

    A row past the cache's end, or of a page that there is not, is not written.
    """
    program = tl.program_id(0)
    head, program = program % HEADS, program // HEADS
    row, sequence = program % rows, (program // rows).to(tl.int64)
    length = tl.load(lengths + sequence)
    position = length + row
    inside = (position >= 0) & (position < max_len)
    known = tl.where(inside, position, 0)
    if PAGED:
        page = tl.load(page_table + sequence * pages + known // page_size)
        inside = inside & (page >= 0) & (page < num_pages)
        place = page.to(tl.int64) * page_size + known % page_size
    else:
        place = sequence * page_size + known
    place = place * HEADS + head
    k_ptr += sequence * k_batch + row.to(tl.int64) * k_row + head.to(tl.int64) * k_head
    v_ptr += sequence * v_batch + row.to(tl.int64) * v_row + head.to(tl.int64) * v_head
    _copy_row(k_ptr, keys_ptr + place * DIM, inside, DIM, BLOCK_D)
    _copy_row(v_ptr, values_ptr + place * VALUE_DIM, inside, VALUE_DIM, BLOCK_V)

    committed = row < num_commit
    start = tl.zeros_like(length)
    stop = tl.where(committed, num_commit, rows)
    if CAUSAL:
        stop = tl.where(tl.load(causal + sequence * causal_stride) != 0, row + 1, stop)
    if WINDOW:
        block = tl.where(committed, 0, num_commit)
        if BY_ROW:
            # The largest window and a row would pass 32 bits.
            start, stop = position - (window - 1), row + tl.minimum(stop - row, window)
        else:
            start = length + block - (window - 1)
    if head == 0:
        at = (sequence * rows + row) * 2
        tl.store(starts + at, tl.maximum(start, 0))
        tl.store(stops + at, length + stop)
        tl.store(starts + at + 1, 0)
        tl.store(stops + at + 1, 0)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    page_table: Tensor | None,
    max_len: int,
    num_commit: int,
    causal: Tensor | None,
    window: int | None,
    window_by_row: bool,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """out (B, S, Hq, Dv) and lse (B, Hq, S), with k and v written into keys and values."""
    k, v, lengths = rows_contiguous(k), rows_contiguous(v), lengths.contiguous()
    causal = None if causal is None else causal.contiguous()
    page_table = None if page_table is None else page_table.contiguous()
    batch, rows, heads, dim = k.shape
    starts, stops = torch.empty((2, batch, rows, 2), dtype=torch.int32, device=q.device).unbind(0)
    launch(
        write_kernel,
        batch * rows * heads,
        q,
        *(k, v, keys, values, lengths, page_table, causal, starts, stops),
        *(rows, max_len, num_commit, window or 0, 1 if page_table is None else page_table.shape[1]),
        *(keys.shape[1], keys.shape[0], 0 if causal is None or causal.shape[0] == 1 else 1),
        *(*k.stride()[:3], *v.stride()[:3]),
        HEADS=heads,
        DIM=dim,
        VALUE_DIM=v.shape[3],
        BLOCK_D=width(dim),
        BLOCK_V=width(v.shape[3]),
        PAGED=page_table is not None,
        CAUSAL=causal is not None,
        WINDOW=window is not None,
        BY_ROW=window_by_row,
    )
    # For autograd to see that what it may have saved has changed.
    torch.autograd.graph.increment_version((keys, values))
    return intervals(q, keys, values, starts, stops, page_table, scale, softcap)


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that launch every variant of every kernel."""

    def call(dtype: torch.dtype, paged: bool, causal: bool, window: int | None, by_row: bool) -> None:
        def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=of, device=device)

        store = zeros(4, 64, 2, 128)
        table = zeros(2, 2, of=torch.int32) if paged else None
        flags = zeros(2, of=torch.bool) if causal else None
        q, row, lengths = zeros(2, 8, 4, 128), zeros(2, 8, 2, 128), zeros(2, of=torch.int32)
        cache = (store, store) if paged else (store[:2], store[:2])
        decode(q, row, row, *cache, lengths, table, 64, 4, flags, window, by_row, 1.0, 0.0)

    yield lambda: call(torch.bfloat16, False, False, None, False)
    yield lambda: call(torch.float32, True, True, 16, True)
    yield lambda: call(torch.float16, False, True, 16, False)
