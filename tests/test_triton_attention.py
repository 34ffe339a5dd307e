"""Triton's attention against the reference in float64: every path of its kernels, on small tiles."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_oracles import normal, qkv, training_mask
from conftest import DEVICE
from test_attention import mask_of, random_intervals
from test_attention_kernels import layouts, results
from triton_calls import captured
from triton_variants import missed, watched

import dlcore
from dlcore import attention
from dlcore.attention import KVCache
from dlcore.triton import attention as kernels_on_the_host
from dlcore.triton import (
    attention_backward,
    attention_forward,
    attention_grad_kv,
    attention_grad_q,
    attention_shapes,
    launch,
)
from dlcore.triton.attention import decode
from dlcore.triton.attention_shapes import Tiles

TABLES = ("FORWARD", "DECODE", "GRAD_Q", "GRAD_KV")
SMALL = 16


@pytest.fixture
def own_tiles(monkeypatch, poisoned):
    """The tiles that a GPU gets, and no splits."""
    monkeypatch.setattr(attention_forward, "_multiprocessors", lambda device: 1)


@pytest.fixture
def small_tiles(monkeypatch, own_tiles):
    """Tiles of 16 rows and 16 keys, so that a few rows have many of them."""
    for table in TABLES:
        small = dict.fromkeys(attention_shapes.FORWARD.half, Tiles(SMALL, SMALL, 4, 2))
        shapes = attention_shapes.Shapes(small, small, small)
        for module in (attention_shapes, attention_backward):
            if hasattr(module, table):
                monkeypatch.setattr(module, table, shapes)


@pytest.fixture
def splits(monkeypatch, small_tiles):
    """Few rows over many keys have several programs."""
    monkeypatch.setattr(attention_forward, "_multiprocessors", lambda device: 132)


def test_devices_that_multiply_from_registers_have_tiles_of_their_own():
    half, single = (
        torch.empty(1, 4, 2, 128, dtype=dtype, device="meta") for dtype in (torch.half, torch.float)
    )
    for target, table in ((80, "other"), (89, "other"), (90, "half"), (100, "half"), (120, "other")):
        with launch.recording(target):
            assert (attention_shapes.described(16, half) is None) == (table == "other")
            for shapes in (attention_shapes.FORWARD, attention_shapes.GRAD_KV):
                assert attention_shapes.tiles(shapes, half, half) == getattr(shapes, table)[128]
                assert attention_shapes.tiles(shapes, single, single) == shapes.single[128]


def on_device(call):
    """`call` with what it is given, and what it made before, on the device of the kernels."""
    return lambda *tensors: [x.cpu() for x in call(*(x.to(DEVICE) for x in tensors))]


def agrees(call, tensors, loose=1.0):
    """out, lse and gradients are the reference's in float64, up to a few roundings of the largest number."""
    with dlcore.use_backend("triton"):
        got = results(on_device(call), tensors)
    with dlcore.use_backend("reference"):
        wanted = results(call, [x.double() for x in tensors])
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, wanted, strict=True):
        assert x.dtype == (torch.float32 if name == "lse" else tensors[0].dtype)
        eps = torch.finfo(x.dtype).eps
        seen = y != -torch.inf
        assert torch.equal(x != -torch.inf, seen), name
        error = (x.double() - y)[seen].abs()
        tolerance = loose * (32 if x.dtype == torch.float32 else 2) * eps * y[seen].abs().amax().clamp(min=1)
        assert bool((error <= tolerance).all()), (name, error.max(), tolerance)


def intervals_call(starts, stops, **kw):
    def call(q, k, v):
        bounds = starts.to(q.device), stops.to(q.device)
        return attention.intervals(q, k, v, *bounds, return_lse=True, **kw)

    return call


def training(block_size, **kw):
    def call(q, k, v):
        moved = {n: x.to(q.device) if isinstance(x, torch.Tensor) else x for n, x in kw.items()}
        size = block_size.to(q.device) if isinstance(block_size, torch.Tensor) else block_size
        return attention.block_diffusion(q, k, v, block_size=size, return_lse=True, **moved)

    return call


DOCUMENTS = torch.tensor([0, 5, 5, 6, 20], dtype=torch.int32)
SIZES = torch.tensor([4, 20], dtype=torch.int32)
CASES = {
    "ragged": (training(5), (74, 74), (2, 2), (32, 32)),
    "clean first, by token": (training(8, order="clean_first", clean="token"), (96, 96), (2, 1), (16, 16)),
    "noisy rows alone": (training(4, num_noisy=2, rows="noisy"), (60, 90), (2, 1), (16, 16)),
    "documents": (training(SIZES, cu_seqlens=DOCUMENTS), (40, 40), (3, 1), (16, 32)),
    "softcap": (training(4, softcap=1.5, softmax_scale=-0.7), (48, 48), (2, 1), (32, 16)),
    "negative scale": (training(4, softmax_scale=-0.7), (48, 48), (2, 1), (32, 16)),
    "softcap, ragged": (training(4, softcap=1.5), (20, 20), (2, 1), (24, 32)),
    "capped far out": (training(4, softcap=0.3, softmax_scale=4.0), (48, 48), (2, 1), (32, 16)),
    "intervals": (intervals_call(*random_intervals(2, 23, 70)), (23, 70), (4, 2), (17, 40)),
    "shared intervals": (intervals_call(*random_intervals(1, 40, 50, 3)), (40, 50), (5, 1), (7, 3)),
    "one key": (intervals_call(*random_intervals(1, 3, 1)), (3, 1), (1, 1), (1, 1)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_reference(name, dtype, small_tiles):
    call, (rows, keys), heads, dims = CASES[name]
    agrees(call, qkv(2, rows, keys, heads, dims, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("window", [None, 20])
def test_chunked_prefill(window, dtype, small_tiles):
    def call(q, k, v):
        return attention.block_causal(q, k, v, block_size=6, q_offset=41, window=window, return_lse=True)

    agrees(call, qkv(1, 37, 78, (6, 2), (32, 32), dtype))


@pytest.mark.parametrize("dims", [(32, 32), (96, 96), (192, 128), (512, 512), (8, 512), (512, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dims_on_their_own_tiles(dims, dtype, own_tiles):
    agrees(training(16), qkv(1, 66, 66, (2, 1), dims, dtype))


@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_head_dims_on_the_tiles_of_other_devices(dim, own_tiles, monkeypatch):
    """Of devices that multiply from registers, with rows enough for the tiles of many rows and of few."""
    monkeypatch.setattr(attention_shapes, "multiplies_from_shared", lambda device: False)
    with watched() as launched:
        agrees(training(16), qkv(1, 66, 66, (2, 1), (dim, dim), torch.bfloat16))
        agrees(training(4), qkv(1, 16, 16, (2, 1), (dim, dim), torch.bfloat16))
        constants = [(v.kernel, dict(v.constants)) for v in launched]
    shapes = (attention_shapes.FORWARD.other[dim], attention_shapes.DECODE.other[dim])
    assert {c["BLOCK_N"] for kernel, c in constants if kernel == "forward_kernel"} == {x.keys for x in shapes}
    assert not any(c.get("DESCRIBED") for _, c in constants)


def test_no_rows_and_no_keys(small_tiles):
    agrees_shapes = [((0, 6), (6, 6)), ((2, 0), (5, 5)), ((2, 3), (3, 0))]
    for (batch, rows), (_, keys) in agrees_shapes:
        q, k, v = (x.to(DEVICE).requires_grad_() for x in qkv(batch, rows, keys, dtype=torch.float32))
        bounds = torch.zeros(1, rows, 2, dtype=torch.int32, device=DEVICE)
        with dlcore.use_backend("triton"):
            out, lse = attention.intervals(q, k, v, bounds, bounds, return_lse=True)
            out.sum().backward()
        assert not out.any()
        assert bool((lse == -torch.inf).all())
        assert not any(x.grad.any() for x in (q, k, v))


# --- which tiles are visited -------------------------------------------------------------------------------


class Visits:
    """Counts the calls of a kernel's tile function by its flag MASKED; on a GPU there is nothing to count."""

    def __init__(self, monkeypatch, module, name, masked_at):
        self.whole = self.partial = 0
        function = getattr(module, name)

        def counted(*args):
            masked = bool(getattr(args[masked_at], "value", args[masked_at]))
            self.partial += masked
            self.whole += not masked
            return function(*args)

        monkeypatch.setattr(module, name, counted)


def tile_counts(mask):
    """Of a mask (S, T) in tiles: how many are seen whole, how many in part."""
    pad = [(-n) % SMALL for n in mask.shape]
    # Rows past the last repeat it; keys past the last are not there.
    mask = torch.cat([mask, mask[-1:].expand(pad[0], -1)])
    mask = torch.cat([mask, torch.zeros(len(mask), pad[1], dtype=torch.bool)], 1)
    tiles = mask.unflatten(1, (-1, SMALL)).unflatten(0, (-1, SMALL)).transpose(1, 2).flatten(2)
    return int(tiles.all(-1).sum()), int((tiles.any(-1) & ~tiles.all(-1)).sum())


def far_apart():
    """Rows of one tile that see the first and the last keys; nobody those between."""
    starts, stops = torch.zeros(1, 20, 2, dtype=torch.int32), torch.zeros(1, 20, 2, dtype=torch.int32)
    stops[0, ::2, 0] = 5
    starts[0, 1::2, 0], stops[0, 1::2, 0] = 120, 128
    starts[0, 18:], stops[0, 18:] = torch.tensor([32, 128]), torch.tensor([64, 128])
    return starts, stops


def behind(rows, window):
    """Row r sees the keys less than `window` before r + 60, and some at the start."""
    row = torch.arange(rows, dtype=torch.int32)
    starts = torch.stack([row * 0, row + 61 - window], -1)
    return starts.unsqueeze(0), torch.stack([row * 0 + 3, row + 61], -1).unsqueeze(0)


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter's calls can be counted")
@pytest.mark.parametrize("which", ["training", "far apart", "window"])
def test_only_what_is_seen_is_visited_and_only_the_ragged_is_masked(which, small_tiles, monkeypatch):
    if which == "training":
        starts, stops = attention._training_intervals(
            80, 8, "noisy_first", "block", 1, "all", attention._documents("", None, 80, torch.device("cpu"))
        )
    else:
        starts, stops = far_apart() if which == "far apart" else behind(60, 45)
    keys = 160 if which == "training" else 128
    whole, partial = tile_counts(mask_of(starts, stops, keys)[0])
    names = (
        (attention_forward, "_absorb", 11),
        (attention_grad_q, "_add_keys", 15),
        (attention_grad_kv, "_add_rows", 17),
    )
    visits = [Visits(monkeypatch, *n) for n in names]
    tensors = qkv(1, starts.shape[1], keys, (1, 1), (16, 16), torch.float32)
    with dlcore.use_backend("triton"):
        results(intervals_call(starts, stops), tensors)
    assert [(v.whole, v.partial) for v in visits] == [(whole, partial)] * 3
    assert which == "far apart" or whole > 0


# --- what is not seen stays out ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("half", ["noisy", "clean"])
def test_poison_stays_with_the_rows_that_see_it(value, which, half, small_tiles):
    """One block of keys is poisoned: rows that don't see it keep their numbers and gradients."""
    length, block, at = 40, 5, slice(15, 20)
    mask = training_mask(length, block)
    hurt = torch.zeros(2 * length, dtype=torch.bool)
    hurt[slice(at.start + length, at.stop + length) if half == "clean" else at] = True
    sees = mask[:, hurt].any(1)
    apart = ~mask[sees].any(0)
    assert apart.any()
    weight = normal(1, 2 * length, 2, 16, seed=5, dtype=torch.float32) * ~sees[:, None, None]
    found = []
    for poison in (False, True):
        leaves = list(qkv(1, 2 * length, 2 * length, (2, 1), (16, 16), torch.float32))
        if poison:
            leaves["qkv".index(which)][:, hurt] = value
        leaves = [x.to(DEVICE).requires_grad_() for x in leaves]
        with dlcore.use_backend("triton"):
            out, lse = attention.block_diffusion(*leaves, block_size=block, return_lse=True)
            grad_lse = torch.where(sees, 0, normal(1, 2, 2 * length, seed=6, dtype=lse.dtype)).to(DEVICE)
            grads = torch.autograd.grad((out, lse), leaves, (weight.to(DEVICE), grad_lse))
        found.append([x.detach().cpu() for x in (out, lse, *grads)])
    (out, lse, dq, dk, dv), (out_, lse_, dq_, dk_, dv_) = found
    for x, y in ((out[:, ~sees], out_[:, ~sees]), (lse[..., ~sees], lse_[..., ~sees])):
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dq_[:, ~sees], dq[:, ~sees], rtol=1e-4, atol=1e-4)
    for x, y in ((dk, dk_), (dv, dv_)):
        torch.testing.assert_close(y[:, apart], x[:, apart], rtol=1e-4, atol=1e-4)
    assert not torch.isfinite(out_[:, sees]).all(-1).any()


def test_rows_that_see_nothing(small_tiles):
    """0, -inf and no gradient for anybody, whatever stands in such a row and in its gradient."""
    q, k, v = qkv(1, 40, 40, (2, 1), (16, 16), torch.float32)
    starts, stops = torch.zeros(1, 40, 2, dtype=torch.int32), torch.zeros(1, 40, 2, dtype=torch.int32)
    some = torch.arange(40) % 3 == 0
    stops[0, some, 0] = 30
    q[:, ~some] = torch.nan
    grad = normal(1, 40, 2, 16, dtype=torch.float32, seed=4)
    grad[:, ~some] = torch.nan
    found = []
    for rows in (slice(None), some):
        leaves = [x.to(DEVICE).requires_grad_() for x in (q[:, rows], k, v)]
        with dlcore.use_backend("triton"):
            out, lse = intervals_call(starts[:, rows], stops[:, rows])(*leaves)
            found.append(
                [x.cpu() for x in (out, lse, *torch.autograd.grad(out, leaves, grad[:, rows].to(DEVICE)))]
            )
    (out, lse, dq, dk, dv), (_, _, _, dk_, dv_) = found
    assert not out[:, ~some].any()
    assert bool((lse[..., ~some] == -torch.inf).all())
    assert not dq[:, ~some].any()
    assert not dk[:, 30:].any()
    torch.testing.assert_close(dk, dk_, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dv, dv_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lone", [False, True])
def test_first_tiles_masked(lone, small_tiles):
    """The first keys are seen by no row, or by one of many."""
    starts = torch.tensor([50, 0], dtype=torch.int32).expand(1, 20, 2).clone()
    stops = torch.tensor([90, 0], dtype=torch.int32).expand(1, 20, 2).clone()
    if lone:
        starts[0, 7, 0] = 0
    agrees(intervals_call(starts, stops), qkv(1, 20, 90, (2, 1), (16, 16), torch.float32))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's numpy
def test_scores_of_minus_infinity_see_nothing(small_tiles):
    q, k = torch.full((1, 2, 1, 32), 1e20), torch.full((1, 40, 1, 32), -1e20)
    starts, stops = torch.zeros(1, 2, 2, dtype=torch.int32), torch.full((1, 2, 2), 35, dtype=torch.int32)
    stops[..., 1] = 0
    with dlcore.use_backend("triton"):
        out, lse = on_device(intervals_call(starts, stops))(q, k, torch.ones(1, 40, 1, 32))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_wild_numbers_read_nothing_outside(small_tiles):
    """Bounds and pages that the checks don't see, on a GPU or called past them."""
    q, k, v = (x.to(DEVICE) for x in qkv(1, 4, 40, (2, 1), (16, 16), torch.float32))
    starts = torch.tensor([[-9, 3], [0, 2**31 - 1], [-(2**31), 7], [5, 5]], dtype=torch.int32, device=DEVICE)[
        None
    ]
    stops = torch.full_like(starts, 2**31 - 1)
    stops[..., 1] = -5
    whole = torch.zeros_like(starts), torch.tensor([40, 0], dtype=torch.int32, device=DEVICE).expand(1, 4, 2)
    out, lse = kernels_on_the_host.intervals(q, k, v, starts, stops, None, 1.0, 0.0)
    assert bool(torch.isfinite(out).all())
    inside, _ = kernels_on_the_host.intervals(q, k, v, *whole, None, 1.0, 0.0)
    torch.testing.assert_close(out[:, :3], inside[:, :3])
    kernels_on_the_host.intervals_backward(out, lse, out, lse, q, k, v, starts, stops, 1.0, 0.0)
    pages = k.view(5, 8, 1, 16), v.view(5, 8, 1, 16)
    table = torch.tensor([[0, -7, 2**31 - 1, 99, 1]], dtype=torch.int32, device=DEVICE)
    out, _ = kernels_on_the_host.intervals(q, *pages, *whole, table, 1.0, 0.0)
    assert bool(torch.isfinite(out).all())


# --- splits, pages, layouts --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 100])
def test_splits(window, dtype, splits):
    """Sequences of lengths from 0 on, so that parts are empty, and splits that no tile of the keys ends."""
    starts, stops = torch.zeros(3, 4, 2, dtype=torch.int32), torch.zeros(3, 4, 2, dtype=torch.int32)
    stops[..., 0] = torch.tensor([[0], [37], [299]]) + torch.arange(4)
    stops[0] = 0
    if window is not None:
        starts[..., 0] = (stops[..., 0] - window).clamp(min=0)
    tensors = qkv(3, 4, 303, (6, 2), (32, 16) if dtype == torch.float32 else (24, 24), dtype)
    with watched() as seen:
        agrees(intervals_call(starts, stops), tensors)
    assert "merge_kernel" in {v.kernel for v in seen}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_intervals_over_splits(dtype, splits):
    starts, stops = random_intervals(2, 5, 200, 2)
    agrees(intervals_call(starts, stops, softcap=2.0), qkv(2, 5, 200, (2, 1), (24, 16), dtype))


@pytest.mark.parametrize("page_size", [None, 1, 5, 16])
@pytest.mark.parametrize(("causal", "anchor"), [(False, "block"), (True, "block"), (False, "row")])
def test_decode(page_size, causal, anchor, splits):
    decodes((24, 40), torch.float32, page_size, causal, anchor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("page_size", "anchor"), [(None, "block"), (16, "row")])
def test_decode_of_short_numbers(page_size, anchor, dtype, splits):
    """Of heads that fill their tiles."""
    decodes((16, 32), dtype, page_size, True, anchor)


def decodes(dims, dtype, page_size, causal, anchor):
    """Blocks written, denoised and committed, over pages in any order; all that is not written is NaN."""
    q, k, v = qkv(3, 90, 90, (4, 2), dims, dtype)
    found = {}
    for backend, device in (("triton", DEVICE), ("reference", "cpu")):
        kw = {"v_head_dim": dims[1], "page_size": page_size, "device": device, "dtype": dtype}
        cache = KVCache(1, 3, 90, 2, dims[0], **kw)
        for x in cache.view(0):
            x.fill_(torch.nan)
        if cache.page_table is not None:
            order = torch.randperm(cache.page_table.numel(), generator=torch.Generator().manual_seed(0))
            cache.page_table.copy_(order.view_as(cache.page_table))
        cache.write(0, k[:, :70].to(device), v[:, :70].to(device))
        cache.commit(torch.tensor([70, 33, 0]).to(device))
        rows = [x[:, 70:80].to(device) for x in (q, k, v)]
        with dlcore.use_backend(backend):
            kw = {
                "num_commit": 4,
                "window": 60,
                "window_anchor": anchor,
                "causal": causal,
                "return_lse": True,
            }
            found[backend] = [x.cpu() for x in attention.decode(*rows, cache, 0, **kw)]
    near = max(1e-5, 2 * torch.finfo(dtype).eps)
    for x, y in zip(*found.values(), strict=True):
        torch.testing.assert_close(x, y, rtol=near, atol=near)


@pytest.mark.parametrize("paged", [False, True])
def test_decode_writes_nothing_outside_of_the_cache(paged):
    """What no check stops on a GPU: more rows than there is room for, and pages that there are not."""
    q, k, v = qkv(2, 4, 4, (1, 1), (16, 16), torch.float32)
    store = torch.zeros(4, 8, 1, 16) if paged else torch.zeros(2, 16, 1, 16)
    around = torch.zeros(3, *store.shape, device=DEVICE)
    keys, values = around[1], torch.zeros_like(around[1])
    table = torch.tensor([[0, 1], [7, -1]], dtype=torch.int32, device=DEVICE) if paged else None
    lengths = torch.tensor([14, 2], dtype=torch.int32, device=DEVICE)
    rows = [x.to(DEVICE) for x in (q, k, v)]
    decode(*rows, keys, values, lengths, table, 16, 0, None, None, False, 1.0, 0.0)
    assert not bool(around[::2].any())
    wanted = torch.zeros(2, 16, 1, 16)
    wanted[0, 14:] = k[0, :2]
    if not paged:
        wanted[1, 2:6] = k[1]
    assert torch.equal(keys.cpu().reshape(-1)[: wanted.numel()], wanted.reshape(-1))
    assert not bool(keys.reshape(-1)[wanted.numel() :].any())


def test_strided_inputs(small_tiles):
    tensors = qkv(2, 26, 26, (4, 2), (32, 32), torch.float32)
    wanted = None
    for _, strided in itertools.chain([("plain", tensors)], layouts(*tensors)):
        leaves = [x.detach().to(DEVICE).requires_grad_() for x in strided]
        with dlcore.use_backend("triton"):
            out, lse = training(4)(*leaves)
            grad = normal(*out.shape, dtype=out.dtype, seed=7).transpose(1, 3).contiguous().transpose(1, 3)
            grads = torch.autograd.grad((out, lse.sum()), leaves, (grad.to(DEVICE), None))
        got = [x.cpu() for x in (out, lse, *grads)]
        wanted = got if wanted is None else wanted
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_gradient_of_one_output_only(small_tiles):
    tensors = qkv(1, 20, 20, (2, 1), (16, 16), torch.float32)
    for which in (0, 1):
        found = []
        for backend, device in (("triton", DEVICE), ("reference", "cpu")):
            leaves = [x.detach().to(device).requires_grad_() for x in tensors]
            with dlcore.use_backend(backend):
                attention.block_causal(*leaves, block_size=4, return_lse=True)[which].sum().backward()
            found.append([x.grad.cpu() for x in leaves])
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# --- on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (128, 128), (256, 256), (512, 512), (192, 128)])
def test_long_sequences(dims, dtype):
    agrees(training(16), qkv(1, 1400, 1400, (4, 2), dims, dtype), loose=2)


@pytest.mark.gpu
def test_training_in_a_graph():
    """The intervals of a shape that is first seen while capturing are not kept."""
    leaves = [x.cuda().requires_grad_() for x in qkv(1, 514, 514, (4, 2), (64, 64), torch.bfloat16)]
    training(16)(*leaves)
    attention._plain_training_intervals.cache_clear()
    replay = captured(lambda: training(16)(*leaves), warm=False)
    assert attention._plain_training_intervals.cache_info().currsize == 0
    with torch.no_grad():
        for x in leaves:
            x.normal_()
    assert torch.equal(replay()[0], training(16)(*leaves)[0])


def test_every_variant_was_launched():
    assert missed("attention_forward", "attention_decode", "attention_backward") == []
