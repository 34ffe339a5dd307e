"""The torch attentions that dlcore's is measured against, and the masks as public code writes them.

All take q, k, v (B, H, S, D) and give (B, H, S, D). Masks are rules over positions, in flex_attention's form,
so that the dense mask, the block mask and the check of the results come from one place.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

#: (batch, head, query, key) -> whether the query sees the key.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def training_rule(length: int, block: int) -> Rule:
    """BD3LM's training mask over [x_t; x_0] (block_diff_mask of its models/dit.py)."""

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_is_clean, key_is_clean = query >= length, key >= length
        query_block, key_block = query % length // block, key % length // block
        diagonal = (query_block == key_block) & (query_is_clean == key_is_clean)
        offset = (query_block > key_block) & key_is_clean & ~query_is_clean
        causal = (query_block >= key_block) & key_is_clean & query_is_clean
        return diagonal | offset | causal

    return rule


def causal_rule(block: int) -> Rule:
    """Block-causal: a row sees the blocks up to its own."""

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query // block >= key // block

    return rule


def dense(rule: Rule, queries: Tensor, keys: int) -> Tensor:
    """The mask (queries, keys) of a rule, for some query positions."""
    nothing = torch.zeros((), dtype=torch.int64)
    return rule(nothing, nothing, queries.unsqueeze(1), torch.arange(keys))


def masked(rule: Rule, rows: int, keys: int) -> Attention:
    """SDPA with the dense bool mask, which is made here once."""
    mask = dense(rule, torch.arange(rows), keys)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA where every row sees every key: its fast path, for scale."""
    return F.scaled_dot_product_attention(q, k, v)


def flex(rule: Rule, rows: int, keys: int, device: str = "cpu") -> Attention:
    """flex_attention compiled for this shape; the block mask is made here once. No backward on the CPU."""
    block_mask = create_block_mask(rule, None, None, rows, keys, device=device)
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def trained(attention: Attention) -> Callable[..., tuple[Tensor, ...]]:
    """(q, k, v, gradient of the result) -> the result and the gradients of q, k and v. Any layout."""

    def step(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        out = attention(q, k, v)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), gradient))

    return step


def cat_decode(cached_k: Tensor, cached_v: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A dynamic cache (SDAR, BlockGen, Fast-dLLM): cached and new rows concatenated, then SDPA."""
    keys, values = torch.cat((cached_k, k), 2), torch.cat((cached_v, v), 2)
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=q.shape[1] != k.shape[1])


def static_decode(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The best that torch alone can do: new rows copied into their slots, SDPA over cache and slots."""
    new = slice(keys.shape[2] - k.shape[2], None)
    keys[:, :, new].copy_(k)
    values[:, :, new].copy_(v)
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=q.shape[1] != k.shape[1])


def serving(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor
) -> dict[str, Callable[[], Any]]:
    """A denoising step by the libraries of serving engines that are there; all tensors (B, S, H, D).

    keys and values hold `lengths` rows a sequence and have room for those of k and v.
    """
    found: dict[str, Callable[[], Any]] = {}
    if find_spec("flash_attn") is not None:
        flash = import_module("flash_attn").flash_attn_with_kvcache
        found["flash-attn"] = lambda: flash(q, keys, values, k, v, cache_seqlens=lengths, causal=False)
    if find_spec("flashinfer") is not None:
        batch, rows, heads, width = q.shape
        space = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
        ragged = import_module("flashinfer").BatchPrefillWithRaggedKVCacheWrapper(space, "NHD")
        number = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        bounds, shape = (number * rows, number * keys.shape[1]), (heads, keys.shape[2], width)
        ragged.plan(*bounds, *shape, causal=False, q_data_type=q.dtype)
        flat = [x.flatten(0, 1) for x in (q, keys, values)]
        found["flashinfer"] = lambda: ragged.run(*flat)
    return found
