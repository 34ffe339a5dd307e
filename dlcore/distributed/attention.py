"""dlcore.attention where a sequence, or the cache of one, is spread over ranks.

A sequence is cut by `SequenceShards`, so that every rank has the same work. Only keys and values of clean
rows travel, and their gradients. All ranks of `group` (a ProcessGroup, or a DeviceMesh of one dimension) make
the same calls, also backward; under DLCORE_CHECK=1 what they ask for is compared, and what differs is a
ValueError on every rank instead of a hang.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dlcore import _checks as checks
from dlcore import attention as whole
from dlcore.attention import _check_heads, _decode_flags, _positive, _scale, _softcap
from dlcore.distributed import groups
from dlcore.distributed.context import Plan, attend
from dlcore.distributed.sequence import SequenceShards, shard_sequence, unshard_sequence
from dlcore.kv_cache import KVCache

__all__ = [
    "MEMORY",
    "SequenceShards",
    "block_causal",
    "block_diffusion",
    "decode",
    "owner_of",
    "shard_sequence",
    "unshard_sequence",
]

#: Bytes that gathered keys and values may take, unless told: 1 GiB.
MEMORY = 1 << 30


def block_diffusion(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    length: int,
    group: groups.Group,
    clean: str = "block",
    rows: str = "all",
    memory: int = MEMORY,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """attention.block_diffusion of this rank's rows of [x_t; x_0], `length` positions spread over `group`.

    With n = SequenceShards(length, block_size, ranks).size(rank), q is (B, 2·n, Hq, D), the noisy rows of
    this rank's positions and then their clean ones, k and v likewise over Hkv heads. `rows` "noisy" returns
    the noisy rows only; q may then hold just those. `clean`, scores and results are those of
    attention.block_diffusion.

    Keys and values of all ranks' clean rows are gathered where they take at most `memory` bytes, once as they
    come and once in order: B·Hkv·(D + Dv)·(ranks·largest shard + length) numbers; backward, with gradients,
    up to three times that. Else they go around a ring, two shards at a time. Both give the same up to
    rounding: parts, each rounded to q's dtype, are merged, and gradients summed, in float32 (float64 for
    float64). Nothing but this rank's own is kept for the backward pass, in which keys travel again.
    Differentiable once in q, k and v, through out and lse, by calls that all ranks must make.

    Raises ValueError for shapes and values, TypeError for dtypes. Inside torch.compile it is a graph break.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from dlcore.distributed import attention
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> q, k, v = torch.randn(3, 1, 2 * 10, 4, 32).unbind(0)
        >>> attention.block_diffusion(q, k, v, block_size=4, length=10, group=dist.group.WORLD).shape
        torch.Size([1, 20, 4, 32])
        >>> dist.destroy_process_group()
    """
    op = "distributed.attention.block_diffusion"
    members = groups.process_group(op, group)
    facts = _facts(q, k, v, block_size, length, memory, softmax_scale, softcap)
    with groups.agreement(op, members, **facts, clean=clean, rows=rows):
        _check_heads(op, q, k, v)
        checks.option(op, "clean", clean, ("block", "token"))
        checks.option(op, "rows", rows, ("all", "noisy"))
        shards, size = _shards(op, length, block_size, members)
        if k.shape[1] != 2 * size:
            raise ValueError(
                f"{op}: k must have {2 * size} rows, noisy and clean ones of this rank's {size} positions, "
                f"got {k.shape[1]}"
            )
        if rows == "noisy" and q.shape[1] == 2 * size:
            q = q[:, :size]
        wanted = size if rows == "noisy" else 2 * size
        if q.shape[1] != wanted:
            raise ValueError(f"{op}: q must have {wanted} rows, got {q.shape[1]}")
        gathers = _fits(op, memory, k, v, shards)
        scale, softcap = _scale(op, softmax_scale, q.shape[3]), _softcap(op, softcap)

    position = shards.positions(dist.get_rank(members), q.device)
    begin = position - position % shards.block_size
    end = (begin + shards.block_size).clamp(max=length)
    row, nothing = torch.arange(size, device=q.device), torch.zeros_like(position)
    # Chunks are whole blocks, so a block's rows lie side by side here too.
    stop, block = begin, (row - (position - begin), row + (end - position))
    if rows == "all":
        stop = torch.cat([begin, end if clean == "block" else position + 1])
        block = (torch.cat([block[0], nothing]), torch.cat([block[1], nothing]))
    plan = Plan(op, members, shards, (torch.zeros_like(stop), stop), block, gathers, scale, softcap)
    out, lse = attend(q, (k[:, size:], v[:, size:]), (k[:, :size], v[:, :size]), plan)
    return (out, lse) if return_lse else out


def block_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    length: int,
    group: groups.Group,
    window: int | None = None,
    memory: int = MEMORY,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """attention.block_causal of this rank's rows of a sequence of `length` spread over `group`.

    With n = SequenceShards(length, block_size, ranks).size(rank), q is (B, n, Hq, D), k (B, n, Hkv, D) and v
    (B, n, Hkv, Dv), rows of this rank's positions. `window`, scores and results are attention.block_causal's;
    `memory`, gradients and errors those of `block_diffusion` here. A window saves work, not exchange.
    """
    op = "distributed.attention.block_causal"
    members = groups.process_group(op, group)
    facts = _facts(q, k, v, block_size, length, memory, softmax_scale, softcap)
    with groups.agreement(op, members, **facts, window=window):
        _check_heads(op, q, k, v)
        shards, size = _shards(op, length, block_size, members)
        for name, x in (("q", q), ("k", k)):
            if x.shape[1] != size:
                raise ValueError(
                    f"{op}: {name} must have {size} rows, this rank's positions, got {x.shape[1]}"
                )
        if window is not None:
            window = _positive(op, "window", window)
        gathers = _fits(op, memory, k, v, shards)
        scale, softcap = _scale(op, softmax_scale, q.shape[3]), _softcap(op, softcap)

    position = shards.positions(dist.get_rank(members), q.device)
    stop = (position - position % shards.block_size + shards.block_size).clamp(max=length)
    nothing = torch.zeros_like(position)
    start = nothing if window is None else (position - (window - 1)).clamp(min=0)
    plan = Plan(op, members, shards, (start, stop), (nothing, nothing), gathers, scale, softcap)
    out, lse = attend(q, (k, v), (k[:, :0], v[:, :0]), plan)
    return (out, lse) if return_lse else out


def owner_of(block: int, ranks: int) -> int:
    """Which rank takes a block into its cache: blocks in turn, so that caches differ by one block at most.

    `block` counts the blocks of a sequence from 0 (those of a prompt may be spread otherwise: any rank may
    own any block).
    """
    for name, value in (("block", block), ("ranks", ranks)):
        checks.integer("owner_of", name, value)
    if block < 0 or ranks < 1:
        raise ValueError(f"owner_of: block must be at least 0 and ranks 1, got {block} and {ranks}")
    return block % ranks


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    layer: int,
    *,
    group: groups.Group,
    owner: int,
    num_commit: int = 0,
    causal: bool | Tensor = False,
    window: int | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """attention.decode where each rank's cache holds a part of what is committed, each row on one rank.

    q, k and v are the same on all ranks, attention.decode's. Rank `owner` (of the group) writes k and v at
    its cache's lengths, the others nothing; every rank attends to what it holds. A gather of lse and a sum
    over the ranks of B·S·Hq·Dv float32 numbers merge it to what attention.decode gives over all caches
    together, with `num_commit` and `causal` as there. To keep rows, `cache.commit(n)` on the rank that owned
    them when they were last written, and nowhere else; the next block may have another owner (`owner_of`). A
    rank's part of a sequence may have any length, also none. A cache's order is its own, so `window` is
    refused with NotImplementedError. No gradients. ValueError where the owner's cache is full; the other
    ranks learn of what fails on one under DLCORE_CHECK=1.
    """
    op = "distributed.attention.decode"
    members = groups.process_group(op, group)
    facts = {"q": q, "k": k, "v": v, "layer": layer, "owner": owner, "num_commit": num_commit}
    facts |= {"causal": causal, "softmax_scale": softmax_scale, "softcap": softcap}
    with torch.no_grad(), groups.agreement(op, members, **facts):
        _decode_flags(op, q, k, v, cache, num_commit, causal)
        ranks = dist.get_world_size(members)
        checks.integer(op, "owner", owner)
        if not 0 <= owner < ranks:
            raise ValueError(f"{op}: owner must lie in [0, {ranks}), got {owner}")
        if window is not None:
            raise NotImplementedError(
                f"{op}: takes no window, as a part of a cache does not know its rows' positions, got {window}"
            )
        scale, softcap = _scale(op, softmax_scale, q.shape[3]), _softcap(op, softcap)
        keys, values = cache.layer_for(op, layer, k, v)
        if dist.get_rank(members) == owner:
            out, lse = whole.decode(
                q,
                k,
                v,
                cache,
                layer,
                num_commit=num_commit,
                causal=causal,
                softmax_scale=scale,
                softcap=softcap,
                return_lse=True,
            )
        else:
            bounds = torch.zeros((2, *q.shape[:2], 2), dtype=torch.int32, device=q.device)
            bounds[1, :, :, 0] = cache.lengths.unsqueeze(1)
            out, lse = torch.ops.dlcore.attention_intervals(
                q, keys, values, bounds[0], bounds[1], cache.page_table, scale, softcap
            )
    with torch.no_grad():
        total = torch.logsumexp(groups.gather(lse, members), 0)
        weight = torch.exp(lse - total).transpose(1, 2).unsqueeze(-1)
        merged = groups.total(weight * out, members).to(q.dtype)
    return (merged, total) if return_lse else merged


def _facts(
    q: object,
    k: object,
    v: object,
    block_size: object,
    length: object,
    memory: object,
    softmax_scale: object,
    softcap: object,
) -> dict[str, object]:
    """What all ranks must agree on, whatever it is."""
    tensors = [x for x in (q, k, v) if isinstance(x, Tensor)]
    return {
        **{name: _shape_but_rows(x) for name, x in (("q", q), ("k", k), ("v", v))},
        "gradient": torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
        "block_size": block_size,
        "length": length,
        "memory": memory,
        "softmax_scale": softmax_scale,
        "softcap": softcap,
    }


def _shape_but_rows(x: object) -> str:
    if not isinstance(x, Tensor) or x.dim() != 4:
        return checks.describe(x)
    batch, _, heads, size = x.shape
    return f"{x.dtype} ({batch}, rows, {heads}, {size}) on {x.device.type}"


def _shards(op: str, length: int, block_size: int, group: dist.ProcessGroup) -> tuple[SequenceShards, int]:
    """The shards, and how many positions are this rank's."""
    checks.integer(op, "length", length)
    if not 0 <= length <= whole.MOST_ROWS // 2:
        raise ValueError(f"{op}: length must lie in [0, {whole.MOST_ROWS // 2}], got {length}")
    shards = SequenceShards(length, _positive(op, "block_size", block_size), dist.get_world_size(group))
    return shards, shards.size(dist.get_rank(group))


def _fits(op: str, memory: int, k: Tensor, v: Tensor, shards: SequenceShards) -> bool:
    """Whether all ranks' keys and values, as they come and in order, take at most `memory` bytes."""
    checks.integer(op, "memory", memory)
    if memory < 0:
        raise ValueError(f"{op}: memory must be at least 0, got {memory}")
    row = k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3]) * k.element_size()
    return row * (shards.ranks * shards.largest + shards.length) <= memory
