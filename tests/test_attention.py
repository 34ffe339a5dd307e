"""Attention's masks and identities, against masks built from their definitions; bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_oracles import (
    block_causal_mask,
    close,
    dense,
    dtype_of,
    layout,
    normal,
    qkv,
    training_mask,
)

from dlcore import attention


def same(got, wanted) -> None:
    for x, y in zip(got, wanted, strict=True):
        close(x, y)


# length, block size: ragged, one token, whole, larger than the sequence, and several key tiles.
SIZES = [(1, 1), (7, 3), (12, 4), (9, 1), (10, 10), (5, 16), (37, 8), (150, 16)]


@pytest.mark.parametrize(("length", "block"), SIZES)
@pytest.mark.parametrize("order", ["noisy_first", "clean_first"])
@pytest.mark.parametrize("clean", ["block", "token"])
@pytest.mark.parametrize("num_noisy", [1, 3])
def test_training_mask(length, block, order, clean, num_noisy, backend):
    kw = {"order": order, "clean": clean, "num_noisy": num_noisy}
    mask = training_mask(length, block, **kw)
    q, k, v = qkv(2, len(mask), len(mask), dtype=dtype_of(backend))
    wanted = dense(q, k, v, mask)
    same(attention.block_diffusion(q, k, v, block_size=block, return_lse=True, **kw), wanted)
    noisy = layout(length, order, num_noisy)[0] > 0
    for rows in (q, q[:, noisy]):
        got = attention.block_diffusion(rows, k, v, block_size=block, rows="noisy", return_lse=True, **kw)
        same(got, (wanted[0][:, noisy], wanted[1][:, :, noisy]))


@pytest.mark.parametrize("order", ["noisy_first", "clean_first"])
@pytest.mark.parametrize("clean", ["block", "token"])
@pytest.mark.parametrize("num_noisy", [1, 2])
@pytest.mark.parametrize("rows", ["all", "noisy"])
def test_documents_and_mixed_block_sizes(order, clean, num_noisy, rows, backend):
    """Packed documents, one of them empty, one shorter than a block; a block size per sequence."""
    documents, sizes = [5, 0, 1, 11, 3], [4, 1, 20]
    kw = {"order": order, "clean": clean, "num_noisy": num_noisy}
    bounds = torch.tensor([0, 5, 5, 6, 17, 20], dtype=torch.int32)
    mask = torch.stack([training_mask(20, size, documents=documents, **kw) for size in sizes])
    q, k, v = qkv(3, mask.shape[1], mask.shape[1], dtype=dtype_of(backend))
    chosen = layout(20, order, num_noisy)[0] >= (1 if rows == "noisy" else 0)
    wanted = dense(q[:, chosen], k, v, mask[:, chosen])
    block = torch.tensor(sizes, dtype=torch.int32)
    options = {**kw, "rows": rows, "cu_seqlens": bounds, "return_lse": True}
    same(attention.block_diffusion(q, k, v, block_size=block, **options), wanted)


@pytest.mark.parametrize("rows", [0, 13])
@pytest.mark.parametrize("block", [1, 4, 50])
@pytest.mark.parametrize(
    ("q_offset", "kv_offset"), [(0, 0), (7, 0), (9, 6), (2, 8), (0, 30), ([0, 3], 2), (60, [40, 0])]
)
@pytest.mark.parametrize("window", [None, 1, 5])
def test_block_causal_mask(rows, block, q_offset, kv_offset, window, backend):
    def of(x, b):
        return x[b] if isinstance(x, list) else x

    mask = torch.stack(
        [block_causal_mask(rows, 17, block, of(q_offset, b), of(kv_offset, b), window) for b in range(2)]
    )
    q, k, v = qkv(2, rows, 17, dtype=dtype_of(backend))
    q_offset, kv_offset = (torch.tensor(x) if isinstance(x, list) else x for x in (q_offset, kv_offset))
    got = attention.block_causal(
        q,
        k,
        v,
        block_size=block,
        q_offset=q_offset,
        kv_offset=kv_offset,
        window=window,
        return_lse=True,
    )
    same(got, dense(q, k, v, mask))


@pytest.mark.parametrize("window", [None, 3])
def test_block_causal_documents(window, backend):
    documents = [6, 1, 0, 10]
    bounds, block = torch.tensor([0, 6, 7, 7, 17]), torch.tensor([4, 3], dtype=torch.int32)
    mask = torch.stack(
        [block_causal_mask(17, 17, int(size), window=window, documents=documents) for size in block]
    )
    q, k, v = qkv(2, 17, 17, dtype=dtype_of(backend))
    got = attention.block_causal(q, k, v, block_size=block, window=window, cu_seqlens=bounds, return_lse=True)
    same(got, dense(q, k, v, mask))


def random_intervals(batch: int, rows: int, keys: int, seed: int = 0):
    """Two disjoint intervals per row, some empty, in either order."""
    bounds = torch.randint(0, keys + 1, (batch, rows, 4), generator=torch.Generator().manual_seed(seed))
    bounds = bounds.sort(-1).values.to(torch.int32)
    starts, stops = bounds[..., ::2], bounds[..., 1::2]
    swap = torch.arange(rows) % 2 == 1
    starts[:, swap], stops[:, swap] = starts[:, swap].flip(-1), stops[:, swap].flip(-1)
    return starts.contiguous(), stops.contiguous()


def mask_of(starts, stops, keys):
    """(B, S, T), row by row."""
    mask = torch.zeros(*starts.shape[:2], keys, dtype=torch.bool)
    for (b, s), first, last in zip(
        itertools.product(*map(range, starts.shape[:2])),
        starts.flatten(0, 1).tolist(),
        stops.flatten(0, 1).tolist(),
        strict=True,
    ):
        for i in range(2):
            mask[b, s, first[i] : last[i]] = True
    return mask


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (5, 0), (0, 5), (23, 70), (70, 400)])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("scale", [None, -0.3])
def test_intervals(batch, rows, keys, softcap, scale, backend):
    """Any two intervals, shared by the batch or not, with any scale."""
    starts, stops = random_intervals(batch, rows, keys)
    q, k, v = qkv(2, rows, keys, dtype=dtype_of(backend))
    kw = {"softmax_scale": scale, "softcap": softcap, "return_lse": True}
    got = attention.intervals(q, k, v, starts, stops, **kw)
    same(got, dense(q, k, v, mask_of(starts, stops, keys), scale, softcap))
    assert torch.equal(attention.intervals(q, k, v, starts.long(), stops.long(), **kw)[0], got[0])


def test_an_interval_that_ends_before_it_starts_is_empty(backend):
    q, k, v = qkv(1, 2, 40, dtype=dtype_of(backend))
    starts = torch.tensor([[[30, 5], [35, 40]]], dtype=torch.int32)
    stops = torch.tensor([[[10, 25], [3, 0]]], dtype=torch.int32)
    out, lse = attention.intervals(q, k, v, starts, stops, return_lse=True)
    mask = torch.zeros(1, 2, 40, dtype=torch.bool)
    mask[0, 0, 5:25] = True
    same((out, lse), dense(q, k, v, mask))


def test_no_sequences(backend):
    q, k, v = qkv(0, 6, 6, dtype=dtype_of(backend))
    assert attention.block_diffusion(q, k, v, block_size=2).shape == (0, 6, 4, 32)
    out, lse = attention.block_causal(q, k, v, block_size=2, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 6, 4, 32), (0, 4, 6))
    empty = attention.block_diffusion(*qkv(2, 0, 0, dtype=dtype_of(backend)), block_size=2)
    assert empty.shape == (2, 0, 4, 32)


# --- identities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "block"), SIZES)
def test_every_row_of_a_block_sees_equally_many_keys(length, block, backend):
    """With equal keys, lse is log count + score: c_i keys for both kinds of rows of block i."""
    q, k, v = qkv(1, 2 * length, 2 * length, (1, 1), dtype=dtype_of(backend))
    _, lse = attention.block_diffusion(q, torch.zeros_like(k), v, block_size=block, return_lse=True)
    seen = torch.tensor([min((p // block + 1) * block, length) for p in range(length)]).repeat(2)
    assert torch.equal(lse.exp().round().long()[0, 0], seen)


@pytest.mark.parametrize(("length", "block"), SIZES)
def test_equal_halves_give_block_causal_attention_twice(length, block, backend):
    q, k, v = qkv(2, length, length, dtype=dtype_of(backend))
    out = attention.block_diffusion(*(torch.cat([x, x], 1) for x in (q, k, v)), block_size=block)
    once = attention.block_causal(q, k, v, block_size=block)
    close(out, torch.cat([once, once], 1))


def test_blocks_of_one_are_causal_and_of_all_bidirectional(backend):
    q, k, v = qkv(2, 12, 12, dtype=dtype_of(backend))
    close(attention.block_causal(q, k, v, block_size=1), dense(q, k, v, torch.ones(12, 12).tril().bool())[0])
    close(attention.block_causal(q, k, v, block_size=12), dense(q, k, v, torch.ones(12, 12).bool())[0])
    out = attention.block_diffusion(q, k, v, block_size=6)
    for half in (slice(0, 6), slice(6, 12)):
        alone = dense(q[:, half], k[:, half], v[:, half], torch.ones(6, 6).bool())[0]
        close(out[:, half], alone)


@pytest.mark.parametrize("chunk", [1, 3, 16, 40])
def test_chunked_prefill(chunk, backend):
    q, k, v = qkv(2, 40, 40, dtype=dtype_of(backend))
    whole = attention.block_causal(q, k, v, block_size=8)
    for at in range(0, 40, chunk):
        part = attention.block_causal(q[:, at : at + chunk], k, v, block_size=8, q_offset=at)
        close(part, whole[:, at : at + chunk])


@pytest.mark.parametrize("cuts", [(0, 40), (0, 13, 40), (0, 1, 2, 39, 40), tuple(range(41))])
def test_merge_of_key_splits(cuts, backend):
    q, k, v = qkv(2, 40, 40, dtype=dtype_of(backend))
    whole = attention.block_causal(q, k, v, block_size=8, return_lse=True)
    merged = None
    for first, last in itertools.pairwise(cuts):
        part = attention.block_causal(
            q, k[:, first:last], v[:, first:last], block_size=8, kv_offset=first, return_lse=True
        )
        merged = part if merged is None else attention.merge(*merged, *part)
    same(merged, whole)


def test_merge_with_nothing():
    """Nothing has no weight, whatever stands in its output; nothing twice has no gradient, not NaN."""
    out, nothing = normal(1, 3, 2, 4), torch.full((1, 2, 3), -torch.inf, dtype=torch.float64)
    lse = normal(1, 2, 3, seed=1)
    lse[0, :, 0] = -torch.inf
    out[:, 0] = 0
    inputs = [x.clone().requires_grad_() for x in (out, lse, torch.full_like(out, torch.nan), nothing)]
    for order in (inputs, inputs[2:] + inputs[:2]):
        merged, total = attention.merge(*order)
        assert torch.equal(merged, out)
        assert torch.equal(total, lse)
        gradients = torch.autograd.grad((merged.sum(), total[total > -torch.inf].sum()), inputs)
        assert all(bool(torch.isfinite(g).all()) for g in gradients)


def test_merge_gradient():
    inputs = [
        normal(1, 3, 2, 4),
        normal(1, 2, 3, seed=1),
        normal(1, 3, 2, 4, seed=2),
        normal(1, 2, 3, seed=3),
    ]
    assert torch.autograd.gradcheck(attention.merge, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("clean", ["block", "token"])
def test_orders_differ_by_a_permutation(clean, backend):
    q, k, v = qkv(2, 26, 26, dtype=dtype_of(backend))
    swapped = [x.roll(13, 1) for x in (q, k, v)]
    one = attention.block_diffusion(q, k, v, block_size=4, clean=clean)
    other = attention.block_diffusion(*swapped, block_size=4, clean=clean, order="clean_first")
    close(other.roll(13, 1), one)


def test_packed_documents_are_separate_runs(backend):
    q, k, v = qkv(1, 34, 34, dtype=dtype_of(backend))
    lengths = [6, 10, 1]
    bounds = torch.tensor([0, 6, 16, 17], dtype=torch.int32)
    packed = attention.block_diffusion(q, k, v, block_size=4, cu_seqlens=bounds)
    for first, n in zip(bounds.tolist(), lengths, strict=False):
        rows = torch.cat([torch.arange(first, first + n), torch.arange(17 + first, 17 + first + n)])
        alone = attention.block_diffusion(q[:, rows], k[:, rows], v[:, rows], block_size=4)
        close(packed[:, rows], alone)


def test_noisy_copies_are_separate_runs(backend):
    q, k, v = qkv(2, 44, 44, dtype=dtype_of(backend))
    together = attention.block_diffusion(q, k, v, block_size=4, num_noisy=3)
    for copy in range(3):
        rows = torch.cat([torch.arange(11) + 11 * copy, torch.arange(33, 44)])
        alone = attention.block_diffusion(q[:, rows], k[:, rows], v[:, rows], block_size=4)
        close(together[:, rows], alone)


def test_keys_of_a_block_may_be_permuted(backend):
    q, k, v = qkv(2, 24, 24, dtype=dtype_of(backend))
    order = torch.arange(24).view(4, 6).flip(-1).flatten()
    one = attention.block_diffusion(q, k, v, block_size=6)
    close(attention.block_diffusion(q, k[:, order], v[:, order], block_size=6), one)


# --- bad input ---------------------------------------------------------------------------------------------

Q, K, V = qkv(2, 8, 8, dtype=torch.float32)
I32 = torch.zeros(1, 8, 2, dtype=torch.int32)
WIDE = normal(2, 8, 2, 513, dtype=torch.float32)
BAD = [
    ("intervals", (Q[0], K, V, I32, I32), {}, ValueError, r"q must be \(B, S, H, D\), got \(8, 4, 32\)"),
    ("intervals", (Q.int(), K, V, I32, I32), {}, TypeError, "q must be float32"),
    ("intervals", ([1], K, V, I32, I32), {}, TypeError, "q must be a Tensor"),
    ("intervals", (Q, K.double(), V, I32, I32), {}, TypeError, "k must have q's dtype"),
    ("intervals", (Q, K, V.bfloat16(), I32, I32), {}, TypeError, "v must have q's dtype"),
    ("intervals", (Q, K[:1], V[:1], I32, I32), {}, ValueError, "k must have q's batch of 2, got 1"),
    ("intervals", (Q, K, V[:, :7], I32, I32), {}, ValueError, r"v must have k's \(B, S, H\)"),
    ("intervals", (Q, K[..., :16], V, I32, I32), {}, ValueError, "k must have q's head dimension 32, got 16"),
    ("intervals", (Q[:, :, :3], K, V, I32, I32), {}, ValueError, "q must have a multiple of k's 2 heads"),
    ("intervals", (Q[:, :, :0], K, V, I32, I32), {}, ValueError, "q must have a multiple of k's 2 heads"),
    ("intervals", (Q, K[:, :, :0], V[:, :, :0], I32, I32), {}, ValueError, "q must have a multiple"),
    ("intervals", (WIDE, WIDE, V, I32, I32), {}, ValueError, "head dimension of at most 512, got 513"),
    ("intervals", (Q, K, V, I32.float(), I32), {}, TypeError, "starts must be an int32 Tensor"),
    ("intervals", (Q, K, V, I32[:, :7], I32), {}, ValueError, r"starts must be \(2 or 1, 8, 2\)"),
    ("intervals", (Q, K, V, I32, I32.expand(2, 8, 2)), {}, ValueError, "stops must have starts' shape"),
    ("intervals", (Q, K, V, I32 - 1, I32), {}, ValueError, r"starts must lie in \[0, 8\], got -1"),
    ("intervals", (Q, K, V, I32, I32 + 9), {}, ValueError, r"stops must lie in \[0, 8\], got 9"),
    ("intervals", (Q, K, V, I32, I32.long() + 2**32), {}, ValueError, r"stops must lie in \[0, 8\]"),
    ("intervals", (Q, K, V, I32, I32 + 1), {}, ValueError, "two intervals of a row must not overlap"),
    ("intervals", (Q, K, V, I32, I32), {"softmax_scale": "1"}, TypeError, "softmax_scale must be a number"),
    (
        "intervals",
        (Q, K, V, I32, I32),
        {"softmax_scale": float("nan")},
        ValueError,
        "must be a finite float32",
    ),
    ("intervals", (Q, K, V, I32, I32), {"softcap": -1.0}, ValueError, "softcap must be at least 0"),
    ("block_diffusion", (Q, K, V), {"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
    ("block_diffusion", (Q, K, V), {"block_size": 2.0}, TypeError, "block_size must be an int"),
    ("block_diffusion", (Q, K, V), {"block_size": True}, TypeError, "block_size must be an int"),
    ("block_diffusion", (Q, K, V), {"block_size": torch.ones(2)}, TypeError, "block_size must be an int"),
    (
        "block_diffusion",
        (Q, K, V),
        {"block_size": torch.tensor([1])},
        ValueError,
        "block_size must have shape",
    ),
    ("block_diffusion", (Q, K, V), {"block_size": torch.tensor([1, 0])}, ValueError, "got 0"),
    ("block_diffusion", (Q, K, V), {"block_size": 2, "order": "x"}, ValueError, "order must be one of"),
    ("block_diffusion", (Q, K, V), {"block_size": 2, "clean": "x"}, ValueError, "clean must be one of"),
    ("block_diffusion", (Q, K, V), {"block_size": 2, "rows": "x"}, ValueError, "rows must be one of"),
    ("block_diffusion", (Q, K, V), {"block_size": 2, "num_noisy": 0}, ValueError, "num_noisy must be"),
    ("block_diffusion", (Q, K, V), {"block_size": 2, "num_noisy": 2}, ValueError, r"3·L rows, got 8"),
    ("block_diffusion", (Q[:, :4], K, V), {"block_size": 2}, ValueError, "q must have 8 rows, got 4"),
    ("block_diffusion", (Q[:, :5], K, V), {"block_size": 2, "rows": "noisy"}, ValueError, "4 rows, got 5"),
    ("block_causal", (Q, K, V), {"block_size": 2, "q_offset": -1}, ValueError, "q_offset must lie in"),
    (
        "block_causal",
        (Q, K, V),
        {"block_size": 2, "kv_offset": 0.5},
        TypeError,
        "kv_offset must be an integer",
    ),
    ("block_causal", (Q, K, V), {"block_size": 2, "q_offset": torch.zeros(3).int()}, ValueError, "q_offset"),
    ("block_causal", (Q, K, V), {"block_size": 2, "window": 0}, ValueError, "window must be at least 1"),
]
for _cu, _error, _text in (
    (torch.tensor([0.0, 4.0]), TypeError, "cu_seqlens must be an int32 Tensor"),
    ([0, 4], TypeError, "cu_seqlens must be an int32 Tensor"),
    (torch.tensor([4]), ValueError, "cu_seqlens must be"),
    (torch.tensor([0, 3]), ValueError, "must ascend from 0 to 4"),
    (torch.tensor([1, 4]), ValueError, "must ascend from 0 to 4"),
    (torch.tensor([0, 3, 2, 4]), ValueError, "must ascend from 0 to 4"),
):
    BAD.append(("block_diffusion", (Q, K, V), {"block_size": 2, "cu_seqlens": _cu}, _error, _text))
BAD.append(
    (
        "block_causal",
        (Q, K, V),
        {"block_size": 2, "cu_seqlens": torch.tensor([0, 8]), "q_offset": 1},
        ValueError,
        "no offsets",
    )
)
OUT, LSE = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 3)
BAD += [
    ("merge", (OUT, LSE, OUT[:, :2], LSE[..., :2]), {}, ValueError, "out_b must be like out_a"),
    ("merge", (OUT, LSE.mT, OUT, LSE), {}, ValueError, "lse of out_a must have shape"),
    ("merge", (OUT, LSE.int(), OUT, LSE), {}, TypeError, "lse of out_a must be a float32 Tensor"),
    ("merge", (OUT[0], LSE, OUT, LSE), {}, ValueError, r"out_a must be \(B, S, H, D\)"),
]


@pytest.mark.parametrize(("name", "args", "kw", "error", "text"), BAD)
def test_bad_input(name, args, kw, error, text):
    with pytest.raises(error, match=rf"attention\.{name}: .*{text}"):
        getattr(attention, name)(*args, **kw)


def test_the_op_itself_refuses_intervals_out_of_range():
    for starts, stops in ((I32 - 1, I32), (I32, I32 + 9)):
        with pytest.raises(ValueError, match="must lie in"):
            torch.ops.dlcore.attention_intervals(Q, K, V, starts, stops, None, 1.0, 0.0)


def test_intervals_built_in_inference_mode_serve_training():
    q, k, v = (x.clone().requires_grad_() for x in qkv(1, 46, 46, dtype=torch.float32))
    with torch.inference_mode():
        attention.block_diffusion(q, k, v, block_size=5)
    attention.block_diffusion(q, k, v, block_size=5).sum().backward()
    assert bool(torch.isfinite(q.grad).all())


def test_fake_tensors_leave_nothing_behind():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(1, 58, 2, 8)
        assert attention.block_diffusion(fake, fake, fake, block_size=5).shape == fake.shape
    real = normal(1, 58, 2, 8, dtype=torch.float32)
    assert bool(torch.isfinite(attention.block_diffusion(real, real, real, block_size=5)).all())
