"""Cached decoding against recomputation."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from attention_oracles import (
    block_causal_mask,
    close,
    decode_mask,
    dense,
    dtype_of,
    normal,
    qkv,
)

import dlcore
from dlcore import _checks as checks
from dlcore import attention
from dlcore.attention import KVCache

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[None, 1, 16], ids=lambda p: f"page{p}")
def page_size(request):
    return request.param


def cache_of(batch, max_len, dtype, page_size=None, dims=(32, 32), heads=2):
    """A cache whose memory is all NaN."""
    cache = attention.KVCache(
        2, batch, max_len, heads, dims[0], v_head_dim=dims[1], dtype=dtype, page_size=page_size
    )
    for layer in range(2):
        for x in cache.view(layer):
            x.fill_(torch.nan)
    return cache


def pick(x, starts, count):
    """Rows [start, start + count) of each sequence."""
    return torch.stack([x[b, s : s + count] for b, s in enumerate(starts)])


@pytest.mark.parametrize("blocks", [[8] * 5, [1] * 7, [40], [3, 8, 8, 1, 20], [13, 4, 4, 4]])
def test_schedules_equal_recomputation(blocks, page_size, backend):
    """Blocks of any sizes, denoised twice and committed: the rows of one masked pass over the whole."""
    total, dtype = sum(blocks), dtype_of(backend)
    q, k, v = qkv(2, total, total, dtype=dtype)
    bounds = torch.tensor([0, *torch.tensor(blocks).cumsum(0).tolist()])
    block = torch.arange(len(blocks)).repeat_interleave(torch.tensor(blocks))
    wanted = dense(q, k, v, block.unsqueeze(1) >= block)
    cache = cache_of(2, total + 3, dtype, page_size)
    for first, last in itertools.pairwise(bounds.tolist()):
        rows = slice(first, last)
        noise = normal(*k[:, rows].shape, dtype=dtype, seed=9)
        for layer in range(2):
            attention.decode(q[:, rows], noise, noise, cache, layer)
            out, lse = attention.decode(q[:, rows], k[:, rows], v[:, rows], cache, layer, return_lse=True)
            close(out, wanted[0][:, rows])
            close(lse, wanted[1][..., rows])
        cache.commit(last - first)
    assert cache.lengths.tolist() == [total, total]


def test_sequences_at_different_lengths(page_size, backend):
    """Prefixes of 0 to 30 rows side by side, advancing by counts of their own."""
    lengths, dtype = [0, 30, 7, 16], dtype_of(backend)
    q, k, v = qkv(4, 60, 60, (4, 2), (24, 40), dtype)
    cache = cache_of(4, 60, dtype, page_size, (24, 40))
    cache.write(0, k[:, :30], v[:, :30])
    cache.commit(torch.tensor(lengths))
    for step in ([8, 3, 0, 5], [2, 8, 8, 0], [8, 8, 8, 8]):
        new = [pick(x, lengths, 8) for x in (q, k, v)]
        out, lse = attention.decode(*new, cache, 0, return_lse=True)
        for b, n in enumerate(lengths):
            row = slice(b, b + 1)
            alone = dense(q[row, n : n + 8], k[row, : n + 8], v[row, : n + 8], torch.ones(8, n + 8).bool())
            close(out[row], alone[0])
            close(lse[row], alone[1])
        cache.commit(torch.tensor(step))
        lengths = [n + s for n, s in zip(lengths, step, strict=True)]
        assert cache.lengths.tolist() == lengths


@pytest.mark.parametrize("causal", [False, True, [True, False]])
@pytest.mark.parametrize("num_commit", [0, 4, 7])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("anchor", ["block", "row"])
def test_masks(causal, num_commit, window, anchor, backend):
    """Every combination, row by row, at prefixes around the window: W - 2 to W + 1."""
    dtype, flags = dtype_of(backend), causal if isinstance(causal, list) else [causal, causal]
    for committed in {0, 3, *(max(0, (window or 0) + d) for d in (-2, -1, 0, 1))}:
        total = committed + 7
        q, k, v = qkv(2, 7, total, dtype=dtype)
        cache = cache_of(2, total + 2, dtype)
        cache.write(0, k[:, :committed], v[:, :committed])
        cache.commit(committed)
        got = attention.decode(
            q,
            k[:, committed:],
            v[:, committed:],
            cache,
            0,
            num_commit=num_commit,
            causal=torch.tensor(causal) if isinstance(causal, list) else causal,
            window=window,
            window_anchor=anchor,
            return_lse=True,
        )
        mask = torch.stack([decode_mask(committed, 7, total, num_commit, c, window, anchor) for c in flags])
        wanted = dense(q, k, v, mask)
        close(got[0], wanted[0])
        close(got[1], wanted[1])


@pytest.mark.parametrize(
    ("anchor", "num_commit", "counts"),
    [
        ("block", 0, [4, 4]),  # rows 5 and 6 see 3 4 5 6
        ("row", 0, [4, 3]),  # row 5 sees 3 4 5 6, row 6 sees 4 5 6
        ("block", 1, [3, 3]),  # row 5 sees 3 4 5, row 6 sees 4 5 6
        ("row", 1, [3, 3]),
    ],
)
def test_windows_by_hand(anchor, num_commit, counts, backend):
    """W = 3 at 5 committed rows and 2 new ones; equal scores make lse count the visible keys."""
    dtype = dtype_of(backend)
    rows = torch.zeros(1, 7, 1, 8, dtype=dtype)
    cache = cache_of(1, 8, dtype, dims=(8, 8), heads=1)
    cache.write(0, rows[:, :5], rows[:, :5])
    cache.commit(5)
    kw = {"num_commit": num_commit, "window": 3, "window_anchor": anchor, "return_lse": True}
    _, lse = attention.decode(*[rows[:, 5:]] * 3, cache, 0, **kw)
    assert lse.exp().round().long().flatten().tolist() == counts


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("window", "anchor"), [(None, "block"), (6, "block"), (6, "row")])
def test_fused_commit_equals_two_calls(causal, window, anchor, page_size, backend):
    dtype, kw = dtype_of(backend), {"causal": causal, "window": window, "window_anchor": anchor}
    q, k, v = qkv(2, 22, 22, dtype=dtype)
    found = []
    for fused in (False, True):
        cache = cache_of(2, 22, dtype, page_size)
        cache.write(0, k[:, :10], v[:, :10])
        cache.commit(torch.tensor([10, 6]))
        lengths = cache.lengths.tolist()
        rows = [pick(x, lengths, 12) for x in (q, k, v)]
        if fused:
            out = attention.decode(*rows, cache, 0, num_commit=4, **kw)
            cache.commit(4)
        else:
            clean = attention.decode(*(x[:, :4] for x in rows), cache, 0, **kw)
            cache.commit(4)
            out = torch.cat([clean, attention.decode(*(x[:, 4:] for x in rows), cache, 0, **kw)], 1)
        found.append((out, cache.lengths.tolist()))
    close(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]


def test_causal_decode_is_block_causal_with_blocks_of_one(backend):
    dtype = dtype_of(backend)
    q, k, v = qkv(2, 20, 20, dtype=dtype)
    cache = cache_of(2, 20, dtype)
    wanted = dense(q, k, v, block_causal_mask(20, 20, 1))[0]
    for at in range(0, 20, 5):
        rows = slice(at, at + 5)
        close(attention.decode(q[:, rows], k[:, rows], v[:, rows], cache, 0, causal=True), wanted[:, rows])
        cache.commit(5)


def test_a_denoising_loop_equals_its_last_step(page_size, backend):
    """Repeated overwrites of one block leave the last one, bit for bit."""
    dtype = dtype_of(backend)
    _, k, v = qkv(2, 8, 8, dtype=dtype)
    caches = [cache_of(2, 20, dtype, page_size) for _ in range(2)]
    for cache in caches:
        cache.write(0, k, v)
        cache.commit(torch.tensor([8, 3]))
    for step in range(48 if backend == "cpu" else 3):
        new = qkv(2, 8, 8, dtype=dtype, seed=10 * step)
        out = attention.decode(*new, caches[0], 0)
    assert torch.equal(out, attention.decode(*new, caches[1], 0))
    for x, y in zip(caches[0].view(0), caches[1].view(0), strict=True):
        assert torch.equal(x.nan_to_num(9e9), y.nan_to_num(9e9))


@pytest.mark.parametrize("page_size", [1, 5, 16, 64, 100])
def test_paged_equals_contiguous(page_size, backend):
    """Pages in any order; the kernel's numbers bit for bit."""
    dtype = dtype_of(backend)
    q, k, v = qkv(3, 70, 70, dtype=dtype)
    found = []
    for size in (None, page_size):
        cache = cache_of(3, 70, dtype, size)
        if cache.page_table is not None:
            order = torch.randperm(cache.page_table.numel(), generator=torch.Generator().manual_seed(0))
            cache.page_table.copy_(order.view_as(cache.page_table))
        cache.write(0, k[:, :60], v[:, :60])
        cache.commit(torch.tensor([60, 33, 0]))
        rows = [pick(x, cache.lengths.tolist(), 10) for x in (q, k, v)]
        found.append(attention.decode(*rows, cache, 0, return_lse=True))
    for x, y in zip(*found, strict=True):
        assert backend == "reference" or torch.equal(x, y)
        close(x, y)


def test_a_full_cache_changes_nothing(page_size, backend):
    dtype = dtype_of(backend)
    q, k, v = qkv(2, 8, 8, dtype=dtype)
    cache = cache_of(2, 13, dtype, page_size)
    cache.write(0, k, v)
    cache.commit(torch.tensor([5, 6]))
    before = [x.clone() for x in (*cache.view(0), cache.lengths)]
    with pytest.raises(ValueError, match="the cache is full: max_len is 13, 14 are needed"):
        attention.decode(q, k, v, cache, 0)
    assert all(
        torch.equal(x.nan_to_num(9e9), y.nan_to_num(9e9))
        for x, y in zip(before, (*cache.view(0), cache.lengths), strict=True)
    )
    attention.decode(q[:, :7], k[:, :7], v[:, :7], cache, 0)


def test_zero_rows(page_size, backend):
    cache = cache_of(2, 10, dtype_of(backend), page_size)
    q, k, v = qkv(2, 0, 0, dtype=dtype_of(backend))
    out, lse = attention.decode(q, k, v, cache, 0, return_lse=True)
    assert (out.shape, lse.shape) == ((2, 0, 4, 32), (2, 4, 0))


def test_strided_rows(page_size, backend):
    """Rows cut from packed QKV, and BHSD."""
    dtype = dtype_of(backend)
    q, k, v = qkv(2, 9, 9, dtype=dtype)
    wanted = attention.decode(q, k, v, cache_of(2, 20, dtype, page_size), 0)
    packed = torch.cat([q, k, v], 2).split([4, 2, 2], 2)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for rows in (packed, swapped):
        assert torch.equal(attention.decode(*rows, cache_of(2, 20, dtype, page_size), 0), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 40])
def test_long_caches(dtype, window):
    """The kernel against float64 at 1,000 cached keys, in every dtype."""
    q, k, v = qkv(2, 16, 1016, (8, 2), (64, 64), dtype)
    cache = cache_of(2, 1100, dtype, dims=(64, 64))
    cache.write(0, k[:, :1000], v[:, :1000])
    cache.commit(1000)
    out, lse = attention.decode(q, k[:, 1000:], v[:, 1000:], cache, 0, window=window, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    wanted, wanted_lse = dense(q, k, v, decode_mask(1000, 16, 1016, window=window))
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=max(torch.finfo(dtype).eps / 2, 2e-6))
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dims", [(32, 48), (40, 24)])
@pytest.mark.parametrize("page_size", [None, 1, 48, 64, 128])
@pytest.mark.parametrize("heads", [(8, 8), (16, 2)])
def test_tiles_of_any_kind_give_the_same_bits(dims, page_size, heads, level):
    """Tiles read in place, converted before or beside others' products: float32 on the same numbers."""
    lengths, kw = [200, 500, 333], {"window": 290, "window_anchor": "block", "return_lse": True}
    q, k, v = ((x * 32).round() / 32 for x in qkv(3, 11, 520, heads, dims, torch.float32))
    found = {}
    for dtype in DTYPES:
        for size in (None, page_size):
            cache = cache_of(3, 520, dtype, size, dims, heads[1])
            if cache.page_table is not None:
                order = torch.randperm(cache.page_table.numel(), generator=torch.Generator().manual_seed(0))
                cache.page_table.copy_(order.view_as(cache.page_table))
            old = [x[:, :500].to(dtype, copy=True) for x in (k, v)]
            for x in old:
                x[0, 200:], x[2, 333:], x[1, :199] = torch.nan, torch.nan, torch.nan
            cache.write(0, *old)
            cache.commit(torch.tensor(lengths))
            rows = [x.to(dtype) for x in (q, pick(k, lengths, 11), pick(v, lengths, 11))]
            found[dtype, size] = attention.decode(*rows, cache, 0, **kw)
    out, lse = found[torch.float32, None]
    for (dtype, _), got in found.items():
        assert torch.equal(got[0], out.to(dtype))
        assert torch.equal(got[1], lse)
    for b, n in enumerate(lengths):
        row = slice(b, b + 1)
        mask = decode_mask(n, 11, n + 11, window=290)
        wanted = dense(q[row], k[row, : n + 11], v[row, : n + 11], mask)
        close(out[row], wanted[0])
        close(lse[row], wanted[1])


def test_autograd_sees_that_a_cache_was_written():
    """What a graph holds of it is stale then."""
    q, k, v = qkv(1, 4, 4, dtype=torch.float32)
    cache = cache_of(1, 8, torch.float32)
    cache.write(0, k, v)
    out = attention.block_causal(q.requires_grad_(), *(x[:, :4] for x in cache.view(0)), block_size=4)
    attention.decode(q, k, v, cache, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


Q, K, V = qkv(2, 4, 4, dtype=torch.float32)


def decode_op(**changed):
    """A good call of the registered op, with some arguments changed."""
    rows = dict(zip("qkv", qkv(2, 4, 4, dtype=torch.float32), strict=True))
    keys, values = torch.zeros(2, 9, 2, 32), torch.zeros(2, 9, 2, 32)
    rest = {"keys": keys, "values": values, "lengths": torch.tensor([3, 5]).int(), "page_table": None}
    rest |= {"max_len": 9, "num_commit": 1, "causal": None, "window": 3, "window_by_row": False}
    arguments = rows | rest | {"scale": 0.2, "softcap": 0.0} | changed
    return torch.ops.dlcore.attention_decode(*arguments.values()), keys


PAGED = {"keys": torch.zeros(5, 3, 2, 32), "values": torch.zeros(5, 3, 2, 32)}
REFUSED = [
    ({"q": Q.double()}, TypeError, "k and v must have q's dtype"),
    ({"q": Q[:, :3]}, ValueError, "k must have q's 3 rows, got 4"),
    ({"k": Q}, ValueError, "same"),
    ({"keys": torch.zeros(9)}, ValueError, r"keys must be \(B, S, H, D\), got \(9,\)"),
    ({"q": Q[0]}, ValueError, r"q must be \(B, S, H, D\)"),
    ({"keys": torch.zeros(2, 9, 4, 32)}, ValueError, r"keys must be \(B, T, 2, 32\)"),
    ({"values": torch.zeros(2, 8, 2, 32)}, ValueError, r"values must be \(B, T, 2, 32\)"),
    ({"keys": torch.zeros(2, 9, 2, 32).half()}, TypeError, "keys must have q's dtype"),
    ({"keys": torch.zeros(2, 9, 2, 33)[..., 1:]}, ValueError, "keys must be contiguous"),
    ({"max_len": 10}, ValueError, "keys must hold 2 times 10 rows, got 2 times 9"),
    ({"lengths": torch.tensor([3, 6]).int()}, ValueError, "the cache is full: max_len is 9, 10 are needed"),
    ({"lengths": torch.tensor([3, -1]).int()}, ValueError, "lengths must be at least 0, got -1"),
    ({"lengths": torch.tensor([3, 5])}, ValueError, "lengths must be int32"),
    ({"lengths": torch.tensor([3]).int()}, ValueError, "lengths must be int32"),
    ({"causal": torch.tensor([1, 0])}, ValueError, "causal must be bool"),
    ({"causal": torch.tensor([True] * 3)}, ValueError, "causal must be bool"),
    ({"num_commit": 5}, ValueError, r"num_commit must lie in \[0, 4\], got 5"),
    ({"window": 0}, ValueError, "window must lie in"),
    ({**PAGED, "page_table": torch.tensor([[0, 1, 5], [2, 3, 4]]).int()}, ValueError, "page_table must lie"),
    ({**PAGED, "page_table": torch.tensor([[0, 1], [2, 3]]).int()}, ValueError, "hold 2 times 9 rows, got 2"),
    ({**PAGED, "page_table": torch.tensor([[0, 1, 2]]).int()}, ValueError, r"page_table must be \(2, pages"),
    ({**PAGED, "page_table": torch.tensor([[0, 1, 2], [2, 3, 4]])}, TypeError, "page_table must be int32"),
]


@pytest.mark.parametrize(("changed", "error", "text"), REFUSED)
def test_the_op_refuses_what_it_would_misread(changed, error, text, backend):
    """Whoever calls it: nothing is read or written out of bounds."""
    (out, _), keys = decode_op()
    assert torch.isfinite(out).all()
    assert keys.any()
    with pytest.raises(error, match=rf"attention\.decode: .*{text}"):
        decode_op(**changed)


def test_where_no_length_is_read_no_other_sequence_is_written(monkeypatch):
    """As on a GPU: the reference refuses rows past the end, and leaves committed ones alone."""
    monkeypatch.setattr(checks, "reads_data", lambda x: False)
    keys, values = torch.zeros(2, 9, 2, 32), torch.zeros(2, 9, 2, 32)
    lengths = torch.tensor([7, 4]).int()
    with dlcore.use_backend("reference"), pytest.raises((IndexError, RuntimeError)):
        decode_op(keys=keys, values=values, lengths=lengths)
    assert not keys[1, :4].any()


def test_decoding_has_no_gradient():
    q, k, v = (x.requires_grad_() for x in qkv(1, 4, 4, dtype=torch.float32))
    assert not attention.decode(q, k, v, cache_of(1, 8, torch.float32), 0).requires_grad


def test_a_cache_serves_inside_and_outside_inference_mode():
    q, k, v = qkv(1, 4, 4, dtype=torch.float32)
    with torch.inference_mode():
        cache = cache_of(1, 12, torch.float32)
        attention.decode(q, k, v, cache, 0)
        cache.commit(4)
    attention.decode(q, k, v, cache, 0)
    cache.commit(4)
    assert cache.lengths.tolist() == [8]


BAD = [
    ((Q, K[:, :3], V[:, :3]), {}, ValueError, "k must have q's 4 rows, got 3"),
    ((Q, K, V), {"num_commit": 5}, ValueError, r"num_commit must lie in \[0, 4\], got 5"),
    ((Q, K, V), {"num_commit": -1}, ValueError, "num_commit must lie in"),
    ((Q, K, V), {"num_commit": True}, TypeError, "num_commit must be an int"),
    ((Q, K, V), {"causal": 1}, TypeError, "causal must be a bool"),
    ((Q, K, V), {"causal": torch.tensor([1, 0])}, TypeError, "causal must be a bool"),
    ((Q, K, V), {"causal": torch.tensor([True])}, ValueError, r"causal must have shape \(2,\), got \(1,\)"),
    ((Q, K, V), {"window": 0}, ValueError, "window must be at least 1"),
    ((Q, K, V), {"window_anchor": "x"}, ValueError, "window_anchor must be one of 'block', 'row'"),
    ((Q, K, V), {"softcap": -1}, ValueError, "softcap must be at least 0"),
    ((Q.half(), K.half(), V.half()), {}, TypeError, "k must have the cache's dtype torch.float32"),
    ((Q[:1], K[:1], V[:1]), {}, ValueError, r"k must be \(2, n, 2, 32\), got \(1, 4, 2, 32\)"),
    ((Q, K[:, :, :1], V[:, :, :1]), {}, ValueError, r"k must be \(2, n, 2, 32\)"),
    ((Q, K, V[..., :16]), {}, ValueError, r"v must be \(2, n, 2, 32\)"),
    ((Q, K, V), {"layer": 2}, ValueError, r"layer must lie in \[0, 2\), got 2"),
]


@pytest.mark.parametrize(("args", "kw", "error", "text"), BAD)
def test_bad_input(args, kw, error, text):
    cache = cache_of(2, 8, torch.float32)
    kw = {"layer": 0, **kw}
    with pytest.raises(error, match=text):
        attention.decode(*args, cache, **kw)
    assert all(bool(x.isnan().all()) for x in cache.view(0))


def test_huge_windows_and_blocks_are_none():
    """Sums of positions don't wrap."""
    q, k, v = (torch.randn(1, 6, 2, 32) for _ in range(3))
    plain = attention.block_causal(q, k, v, block_size=6)
    assert torch.equal(attention.block_causal(q, k, v, block_size=sys.maxsize, window=sys.maxsize), plain)
    outs = []
    for window in (None, sys.maxsize):
        cache = KVCache(1, 1, 8, 2, 32)
        outs.append(attention.decode(q, k, v, cache, 0, window=window, window_anchor="row"))
    assert torch.equal(*outs)
    halves = [torch.cat((x, x), 1) for x in (q, k, v)]
    cut = torch.tensor([0, 2, 6], dtype=torch.int32)
    sizes = [attention.block_diffusion(*halves, block_size=b, cu_seqlens=cut) for b in (6, sys.maxsize)]
    assert torch.equal(*sizes)
