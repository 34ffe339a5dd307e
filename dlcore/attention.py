"""Block-diffusion attention with a KV cache: every mask is at most two key intervals per query row.

Layout (B, S, H, D); only the last dimension must be contiguous, so transposed BHSD tensors and views into
packed QKV are read in place. Query heads are a multiple of key heads. lse is the natural log-sum-exp of the
scores, float32, (B, Hq, S). Bad shapes and values raise ValueError, bad dtypes TypeError.

Masks: Arriola et al., "Block Diffusion", ICLR 2025 (BD3LM).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import _registry  # noqa: F401  (stands the backends behind the ops)
from dlcore._beside import beside
from dlcore._ops.attention import MAX_HEAD_DIM
from dlcore.kv_cache import KVCache
from dlcore.reference import attention as reference

if TYPE_CHECKING:
    Intervals = tuple[Tensor, Tensor]

__all__ = ["KVCache", "block_causal", "block_diffusion", "decode", "intervals", "merge"]

#: Positions fit int32.
MOST_ROWS = 2**31 - 1


def _heads(op: str, name: str, x: object) -> Tensor:
    checks.floating(op, name, x)
    assert isinstance(x, Tensor)
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must be (B, S, H, D), got {tuple(x.shape)}")
    return x


def _check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _heads(op, name, x)
        if x.shape[-1] > MAX_HEAD_DIM:
            raise ValueError(
                f"{op}: {name} must have a head dimension of at most {MAX_HEAD_DIM}, got {x.shape[-1]}"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{op}: {name} must be on {q.device}, got {x.device}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{op}: v must have k's (B, S, H) {tuple(k.shape[:3])}, got {tuple(v.shape[:3])}")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"{op}: k must have q's batch of {q.shape[0]}, got {k.shape[0]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"{op}: k must have q's head dimension {q.shape[3]}, got {k.shape[3]}")
    if k.shape[2] < 1 or q.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{op}: q must have a multiple of k's {k.shape[2]} heads, got {q.shape[2]}")


def _scale(op: str, softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return float(head_dim**-0.5)
    return _number(op, "softmax_scale", softmax_scale)


def _number(op: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {checks.describe(value)}")
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{op}: {name} must be a finite float32, got {value}")
    return float(value)


def _softcap(op: str, value: float) -> float:
    number = _number(op, "softcap", value)
    if number < 0:
        raise ValueError(f"{op}: softcap must be at least 0 (0: none), got {value}")
    return number


def _positive(op: str, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {checks.describe(value)}")
    if value < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {value}")
    # More changes nothing, and sums of positions must not wrap.
    return value if isinstance(value, torch.SymInt) else min(value, MOST_ROWS)


def _block_size(op: str, value: int | Tensor, batch: int, device: torch.device) -> int | Tensor:
    if not isinstance(value, Tensor):
        return _positive(op, "block_size", value)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: block_size must be an int or an int32 Tensor, got {checks.describe(value)}")
    if value.shape != (batch,):
        raise ValueError(f"{op}: block_size must have shape {(batch,)}, got {tuple(value.shape)}")
    checks.value_range(op, "block_size", value, 1)
    return value.to(device=device, dtype=torch.int64).clamp(max=MOST_ROWS).unsqueeze(1)


def _documents(op: str, cu_seqlens: Tensor | None, length: int, device: torch.device) -> Intervals:
    """Where the document of each of `length` positions starts and stops."""
    if cu_seqlens is None:
        position = torch.zeros(length, dtype=torch.int64, device=device)
        return position, position + length
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: cu_seqlens must be an int32 Tensor, got {checks.describe(cu_seqlens)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{op}: cu_seqlens must be (documents + 1,), got {tuple(cu_seqlens.shape)}")
    bounds = cu_seqlens.to(device=device, dtype=torch.int64)
    if checks.reads_data(bounds):
        ends, ascending = (int(bounds[0]), int(bounds[-1])), bool((bounds[1:] >= bounds[:-1]).all())
        if ends != (0, length) or not ascending:
            raise ValueError(f"{op}: cu_seqlens must ascend from 0 to {length}, got {bounds.tolist()}")
    document = torch.searchsorted(bounds, torch.arange(length, device=device), right=True) - 1
    return bounds[document], bounds[document + 1]


def _block_start(position: Tensor, origin: Tensor | int, size: int | Tensor) -> Tensor:
    """Where the block of `position` starts, blocks counted from `origin`."""
    return position - (position - origin) % size


def _pair(first: Intervals, second: Intervals) -> Intervals:
    """Two intervals per row as starts and stops (B or 1, S, 2) int32."""
    rows = [torch.stack(torch.broadcast_tensors(*pair), -1) for pair in zip(first, second, strict=True)]
    starts, stops = (x.to(torch.int32) for x in rows)
    return (starts, stops) if starts.dim() == 3 else (starts.unsqueeze(0), stops.unsqueeze(0))


def _training_intervals(
    length: int,
    block_size: int | Tensor,
    order: str,
    clean: str,
    num_noisy: int,
    rows: str,
    documents: Intervals,
) -> Intervals:
    start, stop = documents
    position = torch.arange(length, device=start.device)
    begin = _block_start(position, start, block_size)
    end = torch.minimum(begin + block_size, stop)
    clean_at = 0 if order == "clean_first" else num_noisy * length
    noisy_at = length if order == "clean_first" else 0
    nothing = torch.zeros_like(begin)
    noisy = [
        _pair(
            (start + clean_at, begin + clean_at),
            (begin + noisy_at + c * length, end + noisy_at + c * length),
        )
        for c in range(num_noisy)
    ]
    last = end if clean == "block" else (position + 1).expand_as(end)
    clean_rows = [_pair((start + clean_at, last + clean_at), (nothing, nothing))]
    clean_rows = clean_rows if rows == "all" else []
    parts = clean_rows + noisy if order == "clean_first" else noisy + clean_rows
    return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _plain_training_intervals(
    length: int, block_size: int, order: str, clean: str, num_noisy: int, rows: str, device: torch.device
) -> Intervals:
    documents = _documents("attention.block_diffusion", None, length, device)
    return _training_intervals(length, block_size, order, clean, num_noisy, rows, documents)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Intervals,
    scale: float,
    softcap: float,
    return_lse: bool,
    page_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    starts, stops = (beside(q, x) for x in bounds)
    out, lse = torch.ops.dlcore.attention_intervals(q, k, v, starts, stops, page_table, scale, softcap)
    return (out, lse) if return_lse else out


def intervals(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    stops: Tensor,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention where row s sees keys [starts[s, 0], stops[s, 0]) and [starts[s, 1], stops[s, 1]).

    q (B, S, Hq, D), k (B, T, Hkv, D), v (B, T, Hkv, Dv); starts, stops (B or 1, S, 2) int32 in [0, T], the
    two intervals of a row disjoint; an interval that does not stop after its start is empty. Returns out
    (B, S, Hq, Dv) in q's dtype, with `return_lse` also lse (B, Hq, S) float32. A row that sees nothing gives
    0 and -inf. Scores are `softmax_scale`·q·k (default D^-1/2), through softcap·tanh(score/softcap) where
    `softcap` > 0. Differentiable in q, k and v, through out and lse. What a row does not see may hold NaN.
    Inside torch.compile values are checked for their range only, where the op runs.

    Example:
        >>> import torch
        >>> from dlcore import attention
        >>> q, k, v = torch.randn(3, 1, 4, 2, 32).unbind(0)
        >>> stops = torch.tensor([[[1, 0], [2, 0], [3, 0], [4, 0]]], dtype=torch.int32)
        >>> causal = attention.intervals(q, k, v, torch.zeros_like(stops), stops)
        >>> bool(torch.allclose(causal[0, 0], v[0, 0], atol=1e-6))
        True
    """
    op = "attention.intervals"
    _check_heads(op, q, k, v)
    rows, keys = q.shape[1], k.shape[1]
    for name, x in (("starts", starts), ("stops", stops)):
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: {name} must be an int32 Tensor, got {checks.describe(x)}")
        if x.dim() != 3 or x.shape[0] not in (1, q.shape[0]) or x.shape[1:] != (rows, 2):
            raise ValueError(f"{op}: {name} must be ({q.shape[0]} or 1, {rows}, 2), got {tuple(x.shape)}")
        checks.value_range(op, name, x, 0, keys)
    if starts.shape != stops.shape:
        raise ValueError(
            f"{op}: stops must have starts' shape {tuple(starts.shape)}, got {tuple(stops.shape)}"
        )
    starts, stops = starts.to(torch.int32), stops.to(torch.int32)
    if checks.reads_data(starts):
        both = torch.minimum(stops[..., 0], stops[..., 1]) > torch.maximum(starts[..., 0], starts[..., 1])
        if bool((both & (stops > starts).all(-1)).any()):
            raise ValueError(f"{op}: the two intervals of a row must not overlap")
    scale = _scale(op, softmax_scale, q.shape[3])
    return _attend(q, k, v, (starts, stops), scale, _softcap(op, softcap), return_lse)


def block_diffusion(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int | Tensor,
    order: str = "noisy_first",
    clean: str = "block",
    num_noisy: int = 1,
    rows: str = "all",
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention under block diffusion's training mask over [x_t; x_0], each of L positions.

    A noisy row of block i sees clean blocks before i and its own noisy block; a clean row sees clean blocks
    up to its own (`clean` "block"), or clean tokens up to itself ("token"). `order` "noisy_first" is
    [x_t; x_0], "clean_first" [x_0; x_t]; with `num_noisy` = n, n noisy copies stand side by side and share
    the clean half.

    q (B, (n + 1)·L, Hq, D), k and v likewise over Hkv heads. `rows` "noisy", for a last layer, returns the
    noisy rows only; q may then hold just those, (B, n·L, Hq, D). `block_size`: an int, or int32 (B,), one per
    sequence; the last block may be short. `cu_seqlens` (documents + 1,) int32 cuts the L positions of each
    half, in every sequence, into documents that don't see one another, blocks counted from each one's start.
    Returns out (B, rows, Hq, Dv), with `return_lse` also lse (B, Hq, rows); see `intervals` for scores,
    gradients and errors.

    Source: Arriola et al., "Block Diffusion", ICLR 2025, eq. 9 and its vectorised training mask.

    Example:
        >>> import torch
        >>> from dlcore import attention
        >>> q, k, v = torch.randn(3, 2, 2 * 12, 4, 32).unbind(0)
        >>> attention.block_diffusion(q, k, v, block_size=4).shape
        torch.Size([2, 24, 4, 32])
    """
    op = "attention.block_diffusion"
    _check_heads(op, q, k, v)
    checks.option(op, "order", order, ("noisy_first", "clean_first"))
    checks.option(op, "clean", clean, ("block", "token"))
    checks.option(op, "rows", rows, ("all", "noisy"))
    num_noisy = _positive(op, "num_noisy", num_noisy)
    if k.shape[1] % (num_noisy + 1):
        raise ValueError(f"{op}: k must have (num_noisy + 1)·L = {num_noisy + 1}·L rows, got {k.shape[1]}")
    length = k.shape[1] // (num_noisy + 1)
    if rows == "noisy" and q.shape[1] == k.shape[1]:
        at = length if order == "clean_first" else 0
        q = q[:, at : at + num_noisy * length]
    wanted = num_noisy * length if rows == "noisy" else k.shape[1]
    if q.shape[1] != wanted:
        raise ValueError(f"{op}: q must have {wanted} rows, got {q.shape[1]}")
    size = _block_size(op, block_size, q.shape[0], q.device)
    # Intervals that are fake, as a fake tensor's, or not there before a graph is replayed, must not be kept.
    plain = cu_seqlens is None and not isinstance(size, Tensor) and type(q) is Tensor
    if plain and not torch.compiler.is_compiling() and not _capturing(q.device):
        bounds = _plain_training_intervals(length, size, order, clean, num_noisy, rows, q.device)
    else:
        documents = _documents(op, cu_seqlens, length, q.device)
        bounds = _training_intervals(length, size, order, clean, num_noisy, rows, documents)
    scale = _scale(op, softmax_scale, q.shape[3])
    return _attend(q, k, v, bounds, scale, _softcap(op, softcap), return_lse)


def _offset(op: str, name: str, value: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """(1 or B, 1) int64."""
    row = checks.per_row(op, name, value, torch.Size((batch,)), device, torch.int64)
    assert row is not None
    checks.value_range(op, name, row, 0)
    return row.reshape(-1, 1)


def block_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int | Tensor,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention where a row sees the blocks up to its own: (s + q_offset) // size >= (t + kv_offset) // size.

    q (B, S, Hq, D), k (B, T, Hkv, D), v (B, T, Hkv, Dv). `block_size` and the offsets, positions of the first
    query row and the first key (chunked prefill), are ints or int32 (B,). With `window` = W a row sees no key
    W or more positions before itself, and what follows it in its block. `cu_seqlens` (documents + 1,) int32
    packs documents, for S = T without offsets. block_size 1 is causal attention, block_size >= T
    bidirectional. Returns out (B, S, Hq, Dv), with `return_lse` also lse (B, Hq, S); see `intervals` for
    scores, gradients and errors.

    Example:
        >>> import torch
        >>> from dlcore import attention
        >>> q, k, v = torch.randn(3, 1, 8, 2, 32).unbind(0)
        >>> whole = attention.block_causal(q, k, v, block_size=4)
        >>> tail = attention.block_causal(q[:, 5:], k, v, block_size=4, q_offset=5)
        >>> bool(torch.allclose(whole[:, 5:], tail, atol=1e-6))
        True
    """
    op = "attention.block_causal"
    _check_heads(op, q, k, v)
    batch, rows, keys, device = q.shape[0], q.shape[1], k.shape[1], q.device
    size = _block_size(op, block_size, batch, device)
    query_at = _offset(op, "q_offset", q_offset, batch, device)
    key_at = _offset(op, "kv_offset", kv_offset, batch, device)
    if window is not None:
        window = _positive(op, "window", window)
    position = torch.arange(rows, device=device) + query_at
    if cu_seqlens is not None:
        if rows != keys or any(isinstance(o, Tensor) or o != 0 for o in (q_offset, kv_offset)):
            raise ValueError(
                f"{op}: cu_seqlens needs as many q as k rows and no offsets, got {rows} and {keys}"
            )
        first, last = _documents(op, cu_seqlens, rows, device)
        begin = _block_start(position, first, size)
    else:
        first, last = key_at, key_at + keys
        begin = _block_start(position, 0, size)
    stop = torch.minimum(begin + size, last)
    start = first if window is None else torch.maximum(first, position - (window - 1))
    start, stop = torch.broadcast_tensors(start - key_at, stop - key_at)
    start, stop = start.clamp(0, keys), stop.clamp(0, keys)
    nothing = torch.zeros_like(start)
    scale = _scale(op, softmax_scale, q.shape[3])
    bounds = _pair((start, stop), (nothing, nothing))
    return _attend(q, k, v, bounds, scale, _softcap(op, softcap), return_lse)


def _decode_flags(
    op: str, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, num_commit: int, causal: bool | Tensor
) -> Tensor | None:
    """What decode's arguments say of `causal`, (1,) or (B,), None for no sequence, once all are checked."""
    _check_heads(op, q, k, v)
    batch, rows, device = q.shape[0], q.shape[1], q.device
    if k.shape[1] != rows:
        raise ValueError(f"{op}: k must have q's {rows} rows, got {k.shape[1]}")
    checks.integer(op, "num_commit", num_commit)
    if not 0 <= num_commit <= rows:
        raise ValueError(f"{op}: num_commit must lie in [0, {rows}], got {num_commit}")
    if not isinstance(cache, KVCache):
        raise TypeError(f"{op}: cache must be a KVCache, got {checks.describe(cache)}")
    if isinstance(causal, Tensor):
        if causal.dtype != torch.bool:
            raise TypeError(f"{op}: causal must be a bool or a bool Tensor, got {checks.describe(causal)}")
        if causal.shape != (batch,):
            raise ValueError(f"{op}: causal must have shape {(batch,)}, got {tuple(causal.shape)}")
        return causal.to(device)
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: causal must be a bool or a bool Tensor, got {checks.describe(causal)}")
    return torch.ones(1, dtype=torch.bool, device=device) if causal else None


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    layer: int,
    *,
    num_commit: int = 0,
    causal: bool | Tensor = False,
    window: int | None = None,
    window_anchor: str = "block",
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One denoising step against a cache: k and v are written at the cache's lengths, which stay as they are.

    q (B, S, Hq, D), k (B, S, Hkv, D), v (B, S, Hkv, Dv), keys as they are to be compared (after RoPE). Row r
    stands at position lengths + r. All rows see what is cached. The first `num_commit` rows are the clean
    rows of a block being committed: they see one another. The others, the block being denoised, see those and
    one another. Where `causal` (bool, or bool (B,)) a row sees nothing after itself. `window` = W narrows
    that: with `window_anchor` "block" to the last W - 1 positions before the row's block (what is committed,
    or what is denoised) and the block whole; with "row" to the positions less than W away from the row, on
    both sides. Calling it again overwrites: `cache.commit(n)` keeps the first n rows. Returns out
    (B, S, Hq, Dv), with `return_lse` also lse (B, Hq, S); `intervals` describes scores and errors. No
    gradients. ValueError, and nothing is written, where the cache is full: all sequences write S rows, also
    one that is finished.

    Example:
        >>> import torch
        >>> from dlcore import attention
        >>> cache = attention.KVCache(1, batch=2, max_len=64, num_kv_heads=2, head_dim=32)
        >>> q, k, v = torch.randn(2, 8, 4, 32), torch.randn(2, 8, 2, 32), torch.randn(2, 8, 2, 32)
        >>> out = attention.decode(q, k, v, cache, layer=0)
        >>> cache.commit(8)
        >>> cache.lengths.tolist()
        [8, 8]
    """
    op = "attention.decode"
    flags = _decode_flags(op, q, k, v, cache, num_commit, causal)
    checks.option(op, "window_anchor", window_anchor, ("block", "row"))
    if window is not None:
        window = _positive(op, "window", window)
    scale, softcap = _scale(op, softmax_scale, q.shape[3]), _softcap(op, softcap)
    out, lse = torch.ops.dlcore.attention_decode(
        q,
        k,
        v,
        *cache.layer_for(op, layer, k, v),
        cache.lengths,
        cache.page_table,
        cache.max_len,
        num_commit,
        flags,
        window,
        window_anchor == "row",
        scale,
        softcap,
    )
    return (out, lse) if return_lse else out


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over the union of two disjoint key sets, from the attention over each.

    out (B, S, H, Dv) and lse (B, H, S) as the other functions return them; so is the result. A set that a row
    sees nothing of has lse -inf and no weight. Differentiable.

    Example:
        >>> import torch
        >>> from dlcore import attention
        >>> q, k, v = torch.randn(3, 1, 8, 2, 32).unbind(0)
        >>> both = [
        ...     attention.block_causal(q, k[:, s], v[:, s], block_size=8, return_lse=True)
        ...     for s in (slice(0, 3), slice(3, 8))
        ... ]
        >>> whole = attention.block_causal(q, k, v, block_size=8)
        >>> bool(torch.allclose(attention.merge(*both[0], *both[1])[0], whole, atol=1e-6))
        True
    """
    op = "attention.merge"
    for name, out, lse in (("out_a", out_a, lse_a), ("out_b", out_b, lse_b)):
        _heads(op, name, out)
        batch, rows, heads, _ = out.shape
        if not isinstance(lse, Tensor) or lse.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: lse of {name} must be a float32 Tensor, got {checks.describe(lse)}")
        if lse.shape != (batch, heads, rows):
            wanted = (batch, heads, rows)
            raise ValueError(f"{op}: lse of {name} must have shape {wanted}, got {tuple(lse.shape)}")
    if out_a.shape != out_b.shape or out_a.dtype != out_b.dtype:
        raise ValueError(
            f"{op}: out_b must be like out_a, {checks.describe(out_a)}, got {checks.describe(out_b)}"
        )
    return reference.merge(out_a, lse_a, out_b, lse_b)
