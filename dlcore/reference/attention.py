"""Attention over two key intervals per query row, in plain torch: the meaning of the kernels.

Shapes: q (B, S, Hq, D), k (B, T, Hkv, D), v (B, T, Hkv, Dv); starts and stops (B or 1, S, 2) int32. Query
row s sees keys [starts[s, i], stops[s, i]) for i = 0, 1; the two must not overlap.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(starts: Tensor, stops: Tensor, keys: int) -> Tensor:
    """The dense mask (B or 1, S, keys) of the intervals."""
    key = torch.arange(keys, device=starts.device)
    inside = (key >= starts.unsqueeze(-1)) & (key < stops.unsqueeze(-1))
    return inside.any(-2)


def gathered(pages: Tensor, page_table: Tensor | None) -> Tensor:
    """Keys or values (B, T, H, D) of pages (num_pages, page_size, H, D); as they are without a table."""
    return pages if page_table is None else pages[page_table.long()].flatten(1, 2)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in tensors)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float,
    finite: bool,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse; with an `lse` of more keys than these, this part of out and Σ exp(score - lse).

    Without `finite` each row gets keys and values of its own, 0 where it sees none: 0 · NaN is NaN.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    queries = q.to(wide).transpose(1, 2)
    keys, values = (x.to(wide).repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))
    pairs = mask.unsqueeze(1)
    if finite:
        scores = queries @ keys.mT * scale
    else:
        keys, values = (torch.where(pairs.unsqueeze(-1), x.unsqueeze(2), 0) for x in (keys, values))
        scores = (keys @ queries.unsqueeze(-1)).squeeze(-1) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = torch.where(pairs, scores, -torch.inf)
    level = torch.logsumexp(scores, -1) if lse is None else lse
    probs = torch.exp(scores - torch.where(level == -torch.inf, 0, level).unsqueeze(-1))
    out = probs @ values if finite else (probs.unsqueeze(-2) @ values).squeeze(-2)
    return out.transpose(1, 2).to(q.dtype).contiguous(), level if lse is None else probs.sum(-1)


def intervals(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    stops: Tensor,
    page_table: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """out (B, S, Hq, Dv) in q's dtype and lse (B, Hq, S): 0 and -inf for a row that sees nothing."""
    k, v = gathered(k, page_table), gathered(v, page_table)
    mask = visible(starts, stops, k.shape[1])
    if not _finite(k, v):
        # Unused slots of a cache may hold anything; what is left takes the slow way.
        k, v = (torch.where(mask.any(1)[..., None, None], x, 0) for x in (k, v))
    return _attend(q, k, v, mask, scale, softcap, _finite(q, k, v))


def intervals_backward(
    grad: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    stops: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, which may be a part of the keys that out and lse are of.

    With p = exp(score - lse), ∂score is p·(∂out·v - ∂out·out + ∂lse).
    """
    mask = visible(starts, stops, k.shape[1])
    pull = grad_lse - (grad.contiguous() * out.to(grad_lse.dtype)).sum(-1).transpose(1, 2)
    with torch.enable_grad():
        leaves = q, k, v = tuple(x.detach().requires_grad_() for x in (q, k, v))
        outputs = _attend(q, k, v, mask, scale, softcap, _finite(q, k, v, grad, pull), lse.detach())
    dq, dk, dv = torch.autograd.grad(outputs, leaves, (grad, pull))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def cache_rows(position: Tensor, keys: Tensor, page_table: Tensor | None, max_len: int) -> Tensor:
    """Where positions (B, n) int64 of the sequences stand among the rows of keys.flatten(0, 1).

    One outside of [0, max_len), where it would run into another sequence, is past all rows: index_copy_
    refuses it.
    """
    size = keys.shape[1]
    inside = (position >= 0) & (position < max_len)
    known = torch.where(inside, position, 0)
    if page_table is None:
        row = known + size * torch.arange(len(position), device=position.device).unsqueeze(1)
    else:
        row = page_table.long().gather(1, known // size) * size + known % size
    return torch.where(inside, row, keys.shape[0] * size)


def decode_intervals(
    lengths: Tensor,
    rows: int,
    num_commit: int,
    causal: Tensor | None,
    window: int | None,
    window_by_row: bool,
) -> tuple[Tensor, Tensor]:
    """Starts and stops (B, S, 2) of new rows that stand at `lengths`; of the two intervals one is empty."""
    length = lengths.long().unsqueeze(1)
    bounds = torch.zeros((2, len(length), rows, 2), dtype=torch.int32, device=length.device)
    row = torch.arange(rows, device=length.device)
    position = length + row
    block = torch.where(row < num_commit, 0, num_commit) + length
    stop = torch.where(row < num_commit, num_commit, rows) + length
    if causal is not None:
        stop = torch.where(causal.unsqueeze(1), position + 1, stop)
    if window is not None:
        bounds[0, ..., 0] = ((position if window_by_row else block) - (window - 1)).clamp(min=0)
        stop = torch.minimum(stop, position + window) if window_by_row else stop
    bounds[1, ..., 0] = stop
    return bounds[0], bounds[1]


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
    """`intervals` on keys and values, with k and v written into them at `lengths`."""
    rows = q.shape[1]
    position = lengths.long().unsqueeze(1) + torch.arange(rows, device=lengths.device)
    at = cache_rows(position, keys, page_table, max_len).flatten()
    for store, x in ((keys, k), (values, v)):
        store.flatten(0, 1).index_copy_(0, at, x.flatten(0, 1))
    starts, stops = decode_intervals(lengths, rows, num_commit, causal, window, window_by_row)
    return intervals(q, keys, values, starts, stops, page_table, scale, softcap)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over the union of two disjoint key sets from the attention over each."""
    empty = torch.maximum(lse_a, lse_b) == -torch.inf
    # -inf minus -inf is NaN, also in the gradient.
    total = torch.logaddexp(*(torch.where(empty, 0, x) for x in (lse_a, lse_b)))
    parts = []
    for out, lse in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.exp(lse - total).transpose(1, 2).unsqueeze(-1)
        parts.append(torch.where(weight > 0, out, 0) * weight)
    return (parts[0] + parts[1]).to(out_a.dtype), torch.where(empty, -torch.inf, total)
