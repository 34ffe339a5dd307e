"""Attention over a sequence, or a cache, that is spread over ranks, against one process that holds it all."""

from __future__ import annotations

import hashlib
import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from attention_oracles import close, normal, qkv

import dlcore
from dlcore import attention
from dlcore.distributed import attention as sharded
from dlcore.distributed import groups
from dlcore.distributed.attention import SequenceShards
from dlcore.reference.attention import cache_rows

RING, GATHERED = 0, 1 << 40
RANKS = [1, 2, 3, 4]


def running(dtype):
    """float64 has the reference only."""
    return dlcore.use_backend("reference") if dtype == torch.float64 else nullcontext()


def near(got, wanted):
    """Equal up to rounding, NaN where the other is NaN; of gradients, which are sums."""
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5}[got.dtype]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


# --- shards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("block", [1, 3, 16])
def test_shards(ranks, block):
    """Every position on one rank, blocks whole, chunks equal up to a block, and the work as stated."""
    for length in range(0, 80 * block, 1 if block == 1 else 2 * block // 3):
        shards = SequenceShards(length, block, ranks)
        held = [shards.positions(rank) for rank in range(ranks)]
        assert torch.cat(held).sort().values.tolist() == list(range(length))
        assert [len(x) for x in held] == [shards.size(rank) for rank in range(ranks)]
        blocks = [math.ceil((last - first) / block) for first, last in map(shards.chunk, range(2 * ranks))]
        assert max(blocks) - min(blocks) <= 1
        assert all(shards.chunk(i)[0] % block == 0 or shards.chunk(i)[0] == length for i in range(2 * ranks))
        pairs = [sum(min((p // block + 1) * block, length) for p in x.tolist()) for x in held]
        assert max(pairs) <= sum(pairs) / ranks + block * length
        assert length <= 8 * ranks * block or max(pairs) <= 1.125 * sum(pairs) / ranks


def test_shards_of_bad_input():
    for arguments in ((-1, 4, 2), (8, 0, 2), (8, 4, 0)):
        with pytest.raises(ValueError, match=r"SequenceShards: .* must be at least"):
            SequenceShards(*arguments)
    with pytest.raises(TypeError, match="block_size must be an int"):
        SequenceShards(8, 4.0, 2)
    with pytest.raises(ValueError, match=r"rank must lie in \[0, 2\), got 2"):
        SequenceShards(8, 4, 2).positions(2)


def there_and_back(group, length, block):
    x = normal(2, length, 3)
    mine = SequenceShards(length, block, dist.get_world_size(group)).positions(dist.get_rank(group))
    for y, dim in ((x, 1), (x, -2), (x.transpose(1, 2), 2), ((x * 100).long()[0], 0)):
        part = sharded.shard_sequence(y, dim, group, block)
        assert torch.equal(part, y.index_select(dim, mine))
        assert torch.equal(sharded.unshard_sequence(part, dim, group, block, length), y)


@pytest.mark.parametrize("ranks", RANKS)
def test_there_and_back(ranks, ranks4):
    for length, block in ((22, 4), (5, 4), (40, 1)):
        ranks4.run(ranks, there_and_back, length, block)


# --- training and prefill ----------------------------------------------------------------------------------


def compare(group, length, call, whole, rows, keys, *, dtype, heads, dims, batch=2, poison=None):
    """`call` on this rank's rows, by either way, is `whole` there; so are the gradients through out and lse.

    `rows` and `keys` say how often q's and k's rows go through the sequence, 1 or 2.
    """
    mine = SequenceShards(length, call["block_size"], dist.get_world_size(group)).positions(
        dist.get_rank(group)
    )

    def own(times):
        return torch.cat([mine + half * length for half in range(times)])

    tensors = qkv(batch, rows * length, keys * length, heads, dims, dtype)
    if poison is not None:
        for x in tensors[1:]:
            x[:, poison] = torch.nan
    tensors = [x.requires_grad_() for x in tensors]
    with running(dtype):
        wanted = whole(*tensors)
    out_rows = 1 if call.get("rows") == "noisy" else rows
    grads = (
        normal(*wanted[0].shape, dtype=dtype, seed=7),
        normal(*wanted[1].shape, dtype=wanted[1].dtype, seed=8),
    )
    wanted_grads = torch.autograd.grad(wanted, tensors, grads)
    parts = [
        x.detach()[:, own(times)].requires_grad_()
        for x, times in zip(tensors, (rows, keys, keys), strict=True)
    ]
    at = own(out_rows)
    function = sharded.block_diffusion if keys == 2 else sharded.block_causal
    pairs = []
    for memory in (RING, GATHERED):
        with running(dtype):
            got = function(*parts, length=length, group=group, memory=memory, return_lse=True, **call)
        pairs += [(got[0], wanted[0][:, at]), (got[1], wanted[1][:, :, at])]
        got_grads = torch.autograd.grad(got, parts, (grads[0][:, at], grads[1][:, :, at]))
        for x, y, times in zip(got_grads, wanted_grads, (rows, keys, keys), strict=True):
            pairs.append((x, y[:, own(times)]))
        with torch.no_grad(), running(dtype):
            alone = function(*parts, length=length, group=group, memory=memory, **call)
        pairs.append((alone, got[0]))
    # Once nothing more is exchanged, so that no other rank waits for one that failed.
    for x, y in pairs:
        near(x, y)


def training(group, length, call, noisy_q=False, **setting):
    def whole(q, k, v):
        return attention.block_diffusion(q, k, v, return_lse=True, **call)

    compare(group, length, call, whole, 1 if noisy_q else 2, 2, **setting)


def prefill(group, length, call, **setting):
    def whole(q, k, v):
        return attention.block_causal(q, k, v, return_lse=True, **call)

    compare(group, length, call, whole, 1, 1, **setting)


def on(ranks4, ranks, function, length, call, **setting):
    ranks4.run(ranks, partial(function, **setting), length, call)


F32 = {"dtype": torch.float32, "heads": (4, 2), "dims": (32, 32)}
F64 = {"dtype": torch.float64, "heads": (2, 2), "dims": (8, 8)}
#: Ragged, a short last block, fewer blocks than chunks, one block, blocks of one, whole chunks, nothing.
LENGTHS = [(45, 4), (37, 8), (13, 4), (5, 8), (19, 1), (64, 4), (0, 4)]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("setting", [F32, F64], ids=["float32", "float64"])
def test_training(ranks, setting, ranks4):
    for length, block in LENGTHS:
        on(ranks4, ranks, training, length, {"block_size": block}, **setting)


@pytest.mark.parametrize("ranks", [2, 3])
def test_training_in_every_form(ranks, ranks4):
    uneven = {**F32, "heads": (6, 2), "dims": (32, 16)}
    for call, extra in (
        ({"clean": "token"}, {}),
        ({"rows": "noisy"}, {}),
        ({"rows": "noisy"}, {"noisy_q": True}),
        ({"softcap": 1.5, "softmax_scale": -0.3}, {}),
        ({"clean": "token", "softcap": 2.0}, {"batch": 1}),
    ):
        for setting in ({**uneven, **extra}, {**F64, **extra}):
            on(ranks4, ranks, training, 30, {"block_size": 4, **call}, **setting)


@pytest.mark.parametrize("ranks", RANKS)
def test_prefill(ranks, ranks4):
    for length, block in LENGTHS:
        for setting in (F32, F64):
            on(ranks4, ranks, prefill, length, {"block_size": block}, **setting)
    for call in ({"window": 1}, {"window": 7}, {"window": 30, "softcap": 1.5}):
        on(ranks4, ranks, prefill, 45, {"block_size": 4, **call}, **F64)


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_a_row_does_not_see_may_be_nan(ranks, ranks4):
    """Clean rows of the last block, seen by themselves only; noisy ones of a block in the middle."""
    for poison in (slice(30 + 26, 60), slice(12, 16)):
        for setting in (F32, F64):
            on(ranks4, ranks, training, 30, {"block_size": 4}, **setting, poison=poison)
    on(ranks4, ranks, prefill, 30, {"block_size": 4}, **F64, poison=slice(20, 30))


def half_precision(group):
    """Errors of out, dq, dk and dv by ring and gathered, over those of one process."""
    length, block = 96, 8
    mine = SequenceShards(length, block, dist.get_world_size(group)).positions(dist.get_rank(group))
    own = torch.cat([mine, mine + length])
    exact = [x.requires_grad_() for x in qkv(1, 2 * length, 2 * length, dtype=torch.bfloat16)]
    exact = [x.detach().double().requires_grad_() for x in exact]
    once = [x.detach().bfloat16().requires_grad_() for x in exact]
    parts = [x.detach()[:, own].requires_grad_() for x in once]
    grad = normal(1, 2 * length, 4, 32, dtype=torch.bfloat16, seed=5)
    with running(torch.float64):
        wanted = attention.block_diffusion(*exact, block_size=block)
    plain = attention.block_diffusion(*once, block_size=block)
    wanted, plain = (
        [y, *torch.autograd.grad(y, x, grad.to(y.dtype))] for y, x in ((wanted, exact), (plain, once))
    )
    errors = []
    for memory in (RING, GATHERED):
        got = sharded.block_diffusion(*parts, block_size=block, length=length, group=group, memory=memory)
        assert got.dtype == torch.bfloat16
        got = [got, *torch.autograd.grad(got, parts, grad[:, own])]
        for x, y, z in zip(got, plain, wanted, strict=True):
            errors.append(((x.double() - z[:, own]).abs().max() / (y.double() - z).abs().max()).item())
    return errors


def test_half_precision(ranks4):
    """Results are merged in float32; a gradient is a sum of as many rounded parts as there are ranks."""
    for errors in ranks4.run(4, half_precision):
        assert max(errors[0], errors[4]) <= 1.5, errors
        assert max(errors) <= 4, errors


def backend_backward(group):
    q, k, v = qkv(1, 24, 24, dtype=torch.float32)
    mine = SequenceShards(12, 4, dist.get_world_size(group)).positions(dist.get_rank(group))
    leaves = [x[:, torch.cat([mine, mine + 12])].requires_grad_() for x in (q, k, v)]
    with dlcore.use_backend("reference"):
        out = sharded.block_diffusion(*leaves, block_size=4, length=12, group=group)
    out.sum().backward()
    return dlcore.last_backend("attention.intervals_backward")


def test_backward_on_the_backend_of_the_forward_pass(ranks4):
    assert ranks4.run(2, backend_backward) == ["reference", "reference"]


def compiled(group):
    q, k, v = qkv(1, 24, 24, dtype=torch.float32)
    mine = SequenceShards(12, 4, dist.get_world_size(group)).positions(dist.get_rank(group))
    own = torch.cat([mine, mine + 12])

    def layer(q, k, v):
        return sharded.block_diffusion(q * 2, k, v, block_size=4, length=12, group=group) + 1

    wanted = attention.block_diffusion(q * 2, k, v, block_size=4) + 1
    with torch.no_grad():
        close(torch.compile(layer, backend="eager")(*(x[:, own] for x in (q, k, v))), wanted[:, own])


@pytest.mark.slow
def test_compiled(ranks4):
    ranks4.run(2, compiled)


# --- decode ------------------------------------------------------------------------------------------------


def poisoned_cache(dtype, page_size, dims):
    cache = attention.KVCache(2, 2, 64, 2, dims[0], v_head_dim=dims[1], dtype=dtype, page_size=page_size)
    for layer in range(2):
        for x in cache.view(layer):
            x.fill_(torch.nan)
    if page_size is not None:
        cache.page_table.copy_(cache.page_table.flip(0, 1))
    return cache


def decoding(group, dtype, page_size, owners):
    """Blocks of different owners, denoised twice, committed; also fused with the next block's first step."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    dims, seed = (32, 16), iter(range(10, 1000, 3))
    whole, part = (poisoned_cache(dtype, page_size, dims) for _ in range(2))
    lengths = [11, 2]
    _, k, v = qkv(2, 1, 11, (4, 2), dims, dtype)
    for b, n in enumerate(lengths):
        # Sequence 0 in turns, sequence 1 on the last rank: other caches hold none of it.
        held = [p for p in range(n) if (p % ranks if b == 0 else ranks - 1) == rank]
        for layer in range(2):
            for cache, rows in ((whole, list(range(n))), (part, held)):
                position = torch.tensor(rows, dtype=torch.int64)
                for store, x in zip(cache.view(layer), (k, v), strict=True):
                    local = torch.arange(len(rows)).expand(2, -1)
                    at = cache_rows(local, store, cache.page_table, 64)[b]
                    store.flatten(0, 1)[at] = x[b, position]
        whole.lengths[b], part.lengths[b] = n, len(held)
    pairs = []

    def step(rows, owner, **call):
        for layer in range(2):
            q, k, v = qkv(2, rows, rows, (4, 2), dims, dtype, seed=next(seed))
            with running(dtype):
                wanted = attention.decode(q, k, v, whole, layer, return_lse=True, **call)
                call_of = {"group": group, "owner": owner, "return_lse": True, **call}
                got = sharded.decode(q, k, v, part, layer, **call_of)
            pairs.extend(zip(got, wanted, strict=True))

    def commit(owner, n):
        whole.commit(n)
        if rank == owner:
            part.commit(n)

    for block, owner in enumerate(owners):
        step(4, owner)
        step(4, owner, softcap=1.5, softmax_scale=0.3)
        commit(owner, torch.tensor([4, block % 3]))
    step(3, owners[0], causal=True)
    step(3, owners[-1], causal=torch.tensor([False, True]))
    for owner in owners:
        step(9, owner, num_commit=4)
        step(9, owner, num_commit=4, causal=torch.tensor([True, False]))
        commit(owner, 4)
    for x, y in pairs:
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        close(x, y)
    return [hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest() for x, _ in pairs]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("page_size", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decode(ranks, page_size, dtype, ranks4):
    owners = [sharded.owner_of(block, ranks) for block in range(3)]
    digests = ranks4.run(ranks, decoding, dtype, page_size, owners)
    assert all(x == digests[0] for x in digests)


def prefill_then_decode(group):
    """What a user does: each rank keeps what its own rows gave."""
    rank, ranks, length, block = dist.get_rank(group), dist.get_world_size(group), 22, 4
    shards = SequenceShards(length, block, ranks)
    mine = shards.positions(rank)
    q, k, v = qkv(1, length, length, dtype=torch.float32)
    whole, part = (attention.KVCache(1, 1, 64, 2, 32) for _ in range(2))
    out = sharded.block_causal(*(x[:, mine] for x in (q, k, v)), block_size=block, length=length, group=group)
    close(out, attention.block_causal(q, k, v, block_size=block)[:, mine])
    for cache, x, y in ((whole, k, v), (part, k[:, mine], v[:, mine])):
        cache.write(0, x, y)
        cache.commit(x.shape[1])
    for i in range(4):
        owner, new = sharded.owner_of(i, ranks), qkv(1, 4, 4, dtype=torch.float32, seed=20 + i)
        close(sharded.decode(*new, part, 0, group=group, owner=owner), attention.decode(*new, whole, 0))
        whole.commit(4)
        if rank == owner:
            part.commit(4)
    return part.lengths.tolist()


def test_prefill_then_decode(ranks4):
    held = ranks4.run(3, prefill_then_decode)
    assert sum(n for (n,) in held) == 22 + 16


def test_blocks_in_turn():
    owners = [sharded.owner_of(block, 3) for block in range(7)]
    assert owners == [0, 1, 2, 0, 1, 2, 0]
    for block, ranks in ((-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="owner_of: "):
            sharded.owner_of(block, ranks)


# --- bad input ---------------------------------------------------------------------------------------------


def of(length, **changes):
    """A good call's arguments for one rank, changed."""
    q, k, v = qkv(1, 2 * length, 2 * length, dtype=torch.float32)
    return {"q": q, "k": k, "v": v, "block_size": 4, "length": length, **changes}


TRAINING = [
    ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
    ({"block_size": torch.tensor([4])}, TypeError, "block_size must be an int"),
    ({"length": 9}, ValueError, "k must have 18 rows.*got 16"),
    ({"length": 8.0}, TypeError, "length must be an int"),
    ({"length": -8}, ValueError, "length must lie in"),
    ({"clean": "row"}, ValueError, "clean must be one of"),
    ({"rows": "clean"}, ValueError, "rows must be one of"),
    ({"memory": -1}, ValueError, "memory must be at least 0"),
    ({"memory": 1e9}, TypeError, "memory must be an int"),
    ({"softcap": -1.0}, ValueError, "softcap must be at least 0"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be a finite"),
    ({"q": torch.ones(1, 16, 3, 32)}, ValueError, "q must have a multiple of k's 2 heads"),
    ({"q": torch.ones(1, 8, 4, 32)}, ValueError, "q must have 16 rows, got 8"),
    ({"q": torch.ones(1, 16, 4, 32).double()}, TypeError, "k must have q's dtype"),
    ({"q": None}, TypeError, "q must be a Tensor"),
    ({"v": torch.ones(1, 16, 2)}, ValueError, "v must be"),
    ({"group": "world"}, TypeError, "group must be a ProcessGroup or a DeviceMesh"),
]
PREFILL = [
    ({"length": 15}, ValueError, "q must have 15 rows, this rank's positions, got 16"),
    ({"k": torch.ones(1, 8, 2, 32), "v": torch.ones(1, 8, 2, 32)}, ValueError, "k must have 16 rows"),
    ({"window": 0}, ValueError, "window must be at least 1"),
]
DECODE = [
    ({"owner": 1}, ValueError, r"owner must lie in \[0, 1\), got 1"),
    ({"owner": 0.0}, TypeError, "owner must be an int"),
    ({"window": 4}, NotImplementedError, "takes no window"),
    ({"num_commit": 5}, ValueError, r"num_commit must lie in \[0, 4\]"),
    ({"causal": 1}, TypeError, "causal must be a bool"),
    ({"cache": None}, TypeError, "cache must be a KVCache"),
    ({"layer": 1}, ValueError, "layer must lie in"),
    ({"k": torch.ones(1, 3, 2, 32)}, ValueError, "v must have k's|k must have"),
    ({"cache": attention.KVCache(1, 1, 3, 2, 32)}, ValueError, "the cache is full"),
    ({"softcap": -1.0}, ValueError, "softcap must be at least 0"),
]


def refusals(group):
    new = dict(zip("qkv", qkv(1, 4, 4, dtype=torch.float32), strict=True))
    new |= {"cache": attention.KVCache(1, 1, 8, 2, 32), "layer": 0, "owner": 0}
    for function, good, table in (
        (sharded.block_diffusion, of(8), TRAINING),
        (sharded.block_causal, of(8) | {"length": 16}, PREFILL),
        (sharded.decode, new, DECODE),
    ):
        function(**{"group": group, **good})
        for changes, error, message in table:
            with pytest.raises(error, match=f"distributed.attention.*{message}|attention.decode.*{message}"):
                function(**{"group": group, **good, **changes})
    x = torch.ones(3, 2)
    for dim, length, error in ((2, 3, ValueError), (None, 3, TypeError), (0, 4, ValueError)):
        with pytest.raises(error, match="unshard_sequence: "):
            sharded.unshard_sequence(x, dim, group, 2, length)
    with pytest.raises(NotImplementedError, match="unshard_sequence: has no gradient"):
        sharded.unshard_sequence(x.requires_grad_(), 0, group, 2, 3)
    with pytest.raises(TypeError, match="x must be a Tensor"):
        sharded.shard_sequence(None, 0, group, 2)


def test_bad_input(ranks4):
    ranks4.run(1, refusals)


def disagreements(group):
    """Under DLCORE_CHECK=1 every rank is told, and the group goes on working."""
    rank = dist.get_rank(group)
    mine = SequenceShards(8, 4, 2).positions(rank)
    rows = torch.cat([mine, mine + 8])
    q, k, v = (x[:, rows] for x in qkv(1, 16, 16, dtype=torch.float32))
    good = {"q": q, "k": k, "v": v, "block_size": 4, "length": 8, "group": group}
    new = dict(zip("qkv", qkv(1, 4, 4, dtype=torch.float32), strict=True))
    new |= {"cache": attention.KVCache(1, 1, 8, 2, 32), "layer": 0, "owner": 0, "group": group}
    table = [
        (sharded.block_diffusion, good, {"block_size": 2}, "block_size must be the same on all ranks"),
        (sharded.block_diffusion, good, {"memory": 0}, "memory must be the same on all ranks"),
        (sharded.block_diffusion, good, {"clean": "token"}, "clean must be the same on all ranks"),
        (sharded.block_diffusion, good, {"softcap": -1.0}, "softcap must be at least 0"),
        (sharded.block_diffusion, good, {"q": q.double()}, "k must have q's dtype"),
        (sharded.block_diffusion, good, {"q": q.clone().requires_grad_()}, "gradient must be the same"),
        (sharded.block_diffusion, good, {"q": q[:, :, :2]}, "q must be the same on all ranks"),
        (sharded.block_causal, {**good, "length": 16}, {"window": 3}, "window must be the same"),
        (sharded.decode, new, {"owner": 1}, "owner must be the same on all ranks"),
        (sharded.decode, new, {"k": new["k"] + 1}, "k must be the same on all ranks"),
        (sharded.decode, new, {"window": 2}, "takes no window"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLCORE_CHECK", "1")
        for function, arguments, changes, message in table:
            with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
                function(**{**arguments, **(changes if rank == 1 else {})})
        for function, arguments in ((sharded.block_diffusion, good), (sharded.decode, new)):
            function(**arguments)
        # A backward pass that one rank leaves out.
        patch.setattr(groups, "CHECK_SECONDS", 1.0)
        leaf = q.clone().requires_grad_()
        out = sharded.block_diffusion(**{**good, "q": leaf})
        if rank == 0:
            with pytest.raises(ValueError, match="backward: rank 1 did not come within 1 s"):
                out.sum().backward()


def test_disagreements(ranks4):
    ranks4.run(2, disagreements)
