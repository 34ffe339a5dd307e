"""Attention masks straight from their definitions, and dense attention in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def dtype_of(backend: str) -> torch.dtype:
    """float64 where the backend takes it."""
    return torch.float64 if backend == "reference" else torch.float32


def close(got: Tensor, wanted: Tensor) -> None:
    """Equal up to the rounding of got's dtype, for numbers of magnitude 1."""
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[got.dtype]
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(
    batch: int,
    rows: int,
    keys: int,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (32, 32),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, S, Hq, D), k (B, T, Hkv, D), v (B, T, Hkv, Dv)."""
    q = normal(batch, rows, heads[0], dims[0], dtype=dtype, seed=seed)
    k = normal(batch, keys, heads[1], dims[0], dtype=dtype, seed=seed + 1)
    return q, k, normal(batch, keys, heads[1], dims[1], dtype=dtype, seed=seed + 2)


def dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """out (B, S, Hq, Dv) and lse (B, Hq, S) under a bool mask (B or 1, S, T), head by head, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, lses = [], []
    for head in range(q.shape[2]):
        shared = head // (q.shape[2] // k.shape[2])
        scores = torch.einsum("bsd,btd->bst", q[:, :, head], k[:, :, shared]) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask, -torch.inf)
        none = ~mask.any(-1, keepdim=True)
        probs = torch.softmax(scores.masked_fill(none, 0.0), -1).masked_fill(none, 0.0)
        outs.append(probs @ v[:, :, shared])
        lses.append(torch.logsumexp(scores, -1))
    return torch.stack(outs, 2), torch.stack(lses, 1)


def layout(length: int, order: str, num_noisy: int) -> tuple[Tensor, Tensor]:
    """Role (0 clean, c = 1, 2, ... the c-th noisy copy) and position of every row of a training pass."""
    noisy = list(range(1, num_noisy + 1))
    roles = [*noisy, 0] if order == "noisy_first" else [0, *noisy]
    return torch.tensor(roles).repeat_interleave(length), torch.arange(length).repeat(len(roles))


def training_mask(
    length: int,
    block_size: int,
    *,
    order: str = "noisy_first",
    clean: str = "block",
    num_noisy: int = 1,
    documents: list[int] | None = None,
) -> Tensor:
    """BD, OBC and BC of BD3LM, (S, S); documents are lengths."""
    role, position = layout(length, order, num_noisy)
    lengths = torch.tensor(documents or [length])
    document = torch.arange(len(lengths)).repeat_interleave(lengths)[position]
    within = position - (lengths.cumsum(0) - lengths)[document]
    block = within // block_size

    def grid(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.unsqueeze(1), x.unsqueeze(0)

    (rq, rk), (bq, bk), (pq, pk), (dq, dk) = (grid(x) for x in (role, block, within, document))
    block_diagonal = (rq == rk) & (rq > 0) & (bq == bk)
    offset_block_causal = (rq > 0) & (rk == 0) & (bq > bk)
    block_causal = (rq == 0) & (rk == 0) & ((bq >= bk) if clean == "block" else (pq >= pk))
    return (block_diagonal | offset_block_causal | block_causal) & (dq == dk)


def block_causal_mask(
    rows: int,
    keys: int,
    block_size: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    window: int | None = None,
    documents: list[int] | None = None,
) -> Tensor:
    """(S, T)."""
    lengths = torch.tensor(documents or [max(rows + q_offset, keys + kv_offset)])
    document = torch.arange(len(lengths)).repeat_interleave(lengths)
    block = (torch.arange(len(document)) - (lengths.cumsum(0) - lengths)[document]) // block_size
    query = (torch.arange(rows) + q_offset).unsqueeze(1)
    key = (torch.arange(keys) + kv_offset).unsqueeze(0)
    mask = (block[query] >= block[key]) & (document[query] == document[key])
    return mask if window is None else mask & (query - key < window)


def decode_mask(
    committed: int,
    rows: int,
    keys: int,
    num_commit: int = 0,
    causal: bool = False,
    window: int | None = None,
    anchor: str = "block",
) -> Tensor:
    """(S, T): row by row, over positions of the cache."""
    mask = torch.zeros(rows, keys, dtype=torch.bool)
    for r in range(rows):
        own = range(num_commit) if r < num_commit else range(num_commit, rows)
        for t in range(keys):
            inside = t - committed  # which row key t is; negative: it was cached
            allowed = inside < 0 or inside in own or (r >= num_commit > inside)
            if causal:
                allowed &= inside <= r
            if window is not None:
                from_here = inside - (own.start if anchor == "block" else r)
                allowed &= -window < from_here and (anchor == "block" or from_here < window)
            mask[r, t] = allowed
    return mask
