"""Cosines between fresh and cached rows: the kernels against the reference in float64."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from attention_oracles import normal
from conftest import levels

import dlcore
from dlcore import _C, similarity
from dlcore.attention import KVCache
from dlcore.cpu import choose_capability
from dlcore.cpu import similarity as kernels
from dlcore.reference import similarity as reference

BATCH, ROWS, HELD = 3, 5, 11
#: (H, D): one entry, ragged, one head of the largest size, several spans of a sum.
SHAPES = [(1, 1), (3, 17), (1, 512), (20, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def fresh(heads, dim, layout, dtype, rows=ROWS, seed=0):
    """New values (B, n, H, D): contiguous, a view into packed QKV, or BHSD transposed."""
    x = normal(BATCH, rows, heads, dim, dtype=torch.float32, seed=seed).to(dtype)
    if layout == "packed":
        packed = torch.full((BATCH, rows, heads, 3 * dim), torch.nan, dtype=dtype)
        packed[..., dim : 2 * dim] = x
        return packed[..., dim : 2 * dim]
    return x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "bhsd" else x


def cache_near(new, page_size=None, layer=1):
    """A cache whose rows `at` (B, n) are new ones that have moved a little; all others hold NaN."""
    heads, dim = new.shape[2:]
    cache = KVCache(2, BATCH, HELD, heads, 3, v_head_dim=dim, dtype=new.dtype, page_size=page_size)
    for i in range(2):
        cache.view(i)[1].fill_(torch.nan)
    at = torch.stack(
        [torch.randperm(HELD, generator=torch.Generator().manual_seed(b))[:ROWS] for b in range(3)]
    )
    noise = normal(*new.shape, dtype=torch.float32, seed=7)
    moved = new.float() + torch.logspace(-4, 1, ROWS).view(1, -1, 1, 1) * noise
    cache.scatter(layer, at, None, moved.to(new.dtype))
    return cache, at


def exact(new, cached, rows=None, page_table=None):
    with dlcore.use_backend("reference"):
        return similarity.cosine(new.double(), cached.double(), rows, page_table=page_table)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("page_size", [None, 1, 4])
@pytest.mark.parametrize("layout", ["plain", "packed", "bhsd"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cosines_with_a_cache(backend, dtype, shape, layout, page_size, caplog):
    new = fresh(*shape, layout, dtype)
    cache, at = cache_near(new, page_size)
    values = cache.view(1)[1]
    with caplog.at_level(logging.INFO, "dlcore"):
        found = similarity.cosine(new, values, at, page_table=cache.page_table)
    assert "copied" not in caplog.text
    assert dlcore.last_backend("similarity.cosine") == backend
    assert found.dtype == torch.float32
    want = exact(new, values, at, cache.page_table)
    assert bool(want.isfinite().all())
    assert float((found - want).abs().max()) < 3e-7


@pytest.mark.parametrize("layout", ["plain", "packed", "bhsd"])
def test_rows_in_order_and_rows_of_numbers(backend, layout):
    new, cached = fresh(3, 17, layout, torch.float32), fresh(3, 17, "plain", torch.float32, rows=HELD, seed=3)
    want = exact(new, cached)
    torch.testing.assert_close(similarity.cosine(new, cached).double(), want, rtol=0, atol=3e-7)
    flat = similarity.cosine(new.flatten(2), cached.flatten(2))
    torch.testing.assert_close(flat.double(), want, rtol=0, atol=3e-7)
    assert similarity.cosine(new[:, :0], cached).shape == (BATCH, 0)


def test_it_is_torchs_cosine(backend):
    new, cached = fresh(3, 17, "plain", torch.float32), fresh(3, 17, "plain", torch.float32, seed=3)
    want = torch.nn.functional.cosine_similarity(new.flatten(2), cached.flatten(2), dim=-1)
    torch.testing.assert_close(similarity.cosine(new, cached), want, rtol=0, atol=3e-7)


def test_levels_agree_to_the_bit():
    new = fresh(20, 64, "bhsd", torch.bfloat16)
    cache, at = cache_near(new)
    current, found = _C.capability(), {}
    for name in levels():
        choose_capability(name)
        found[name] = similarity.cosine(new, cache.view(1)[1], at)
    choose_capability(current)
    torch.testing.assert_close(found["baseline"], next(iter(found.values())), rtol=0, atol=3e-7)
    found.pop("baseline")
    assert all(torch.equal(x, next(iter(found.values()))) for x in found.values())


def test_threads_change_nothing():
    new = normal(2, 65, 4, 128, dtype=torch.float32)
    cached = normal(2, 65, 4, 128, dtype=torch.float32, seed=1)
    threads, found = torch.get_num_threads(), []
    for n in (1, 3):
        torch.set_num_threads(n)
        found.append(similarity.cosine(new, cached))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_length(backend, dtype):
    """Squares that no float holds; a cosine has no length."""
    a, b = fresh(2, 40, "plain", torch.float32), fresh(2, 40, "plain", torch.float32, seed=3)
    big, small = (1e38 / 8, 1e-38) if dtype != torch.float16 else (8e3, 1e-3)
    pairs = [(big * a, b), (a, small * b), (big * a, big * b), (small * a, small * b), (big * a, small * b)]
    for x, y in pairs:
        x, y = x.to(dtype), y.to(dtype)
        torch.testing.assert_close(similarity.cosine(x, y).double(), exact(x, y), rtol=0, atol=3e-7)


def test_zero_rows(backend):
    new, cached = torch.ones(1, 4, 1, 40), torch.ones(1, 4, 1, 40)
    new[0, 0] = cached[0, 0] = new[0, 1] = cached[0, 2] = 0
    new[0, 1, 0, 3] = -0.0
    assert similarity.cosine(new, cached).tolist() == [[1, 0, 0, 1]]
    cached[0, 1] = 3e38
    assert similarity.cosine(new, cached).tolist() == [[1, 0, 0, 1]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_no_number(backend, bad):
    new, cached = fresh(3, 17, "plain", torch.float32), fresh(3, 17, "plain", torch.float32, seed=3)
    clean = similarity.cosine(new, cached)
    new[1, 2, 1, 16] = bad
    cached[2, 4, 0, 0] = bad
    new[0, 0], cached[0, 0, 2, 5] = 0, bad
    found = similarity.cosine(new, cached)
    broken = torch.zeros_like(found, dtype=torch.bool)
    broken[1, 2] = broken[2, 4] = broken[0, 0] = True
    assert bool(found[broken].isnan().all())
    assert torch.equal(found[~broken], clean[~broken])


@pytest.mark.parametrize("function", [kernels.cosine, reference.cosine])
def test_unchecked_positions_read_nothing(function):
    new = fresh(3, 17, "plain", torch.float32)
    cache, at = cache_near(new, page_size=4)
    values, table = cache.view(1)[1], cache.page_table
    clean = function(new, values, at, table)
    wrong = at.clone()
    wrong[0, 1], wrong[2, 3] = -1, 12
    found = function(new, values, wrong, table)
    assert found.isnan().nonzero().tolist() == [[0, 1], [2, 3]]
    assert torch.equal(found.nan_to_num(9), torch.where(wrong == at, clean, 9))


def test_what_no_kernel_reads_in_place_is_copied_and_logged(caplog):
    new = fresh(3, 17, "plain", torch.float32)
    cached = fresh(3, 17, "plain", torch.float32, seed=3)
    strided = new.transpose(-1, -2).contiguous().transpose(-1, -2)
    with caplog.at_level(logging.INFO, "dlcore"):
        assert torch.equal(similarity.cosine(strided, cached), similarity.cosine(new, cached))
    assert "copied a (3, 5, 3, 17) tensor" in caplog.text


def test_float64_is_the_references():
    new = normal(2, 3, 2, 5)
    assert similarity.cosine(new, 2 * new).dtype == torch.float64
    assert dlcore.last_backend("similarity.cosine") == "reference"


@pytest.mark.parametrize("paged", [False, True])
def test_opcheck(backend, paged):
    new = fresh(3, 17, "bhsd", torch.float32)
    cache, at = cache_near(new, 4 if paged else None)
    args = (new, cache.view(1)[1], at, cache.page_table)
    torch.library.opcheck(torch.ops.dlcore.similarity_cosine.default, args)


def test_whole_graphs():
    new = fresh(3, 17, "plain", torch.float32)
    cache, at = cache_near(new)

    def lowest(new, at):
        return similarity.cosine(new, cache.view(1)[1], at).argmin(-1)

    compiled = torch.compile(lowest, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(new, at), lowest(new, at))


def test_no_gradient():
    new = fresh(3, 17, "plain", torch.float32).requires_grad_()
    assert not similarity.cosine(new, new.detach()).requires_grad


NEW, CACHED = torch.zeros(2, 3, 2, 4), torch.zeros(2, 6, 2, 4)
PAGES, TABLE = torch.zeros(4, 3, 2, 4), torch.zeros(2, 2, dtype=torch.int32)
AT = torch.zeros(2, 3, dtype=torch.int64)
BAD = [
    ((None, CACHED), {}, TypeError, "new must be a Tensor, got NoneType"),
    ((NEW.long(), CACHED), {}, TypeError, "new must be float32"),
    ((NEW, CACHED.half()), {}, TypeError, "cached must have new's dtype torch.float32, got torch.float16"),
    (
        (NEW[0, 0], CACHED[0, 0]),
        {},
        ValueError,
        "new must be (B, S, H, D) or (B, S, N), both alike, got (2, 4)",
    ),
    ((NEW, CACHED.flatten(2)), {}, ValueError, "cached must be (B, S, H, D) or (B, S, N), both alike"),
    ((NEW, CACHED[..., :3]), {}, ValueError, "got (2, 3, 2, 4) and (2, 6, 2, 3)"),
    ((NEW, CACHED[:1]), {}, ValueError, "cached must hold 2 sequences, got 1"),
    ((NEW, CACHED[:, :2]), {}, ValueError, "cached must hold new's 3 rows, got 2"),
    ((NEW, CACHED, AT + 6), {}, ValueError, "rows must lie in [0, 6), got 6"),
    ((NEW, CACHED, AT - 1), {}, ValueError, "rows must lie in [0, 6), got -1"),
    ((NEW, CACHED, AT.int()), {}, TypeError, "rows must be an int64 Tensor, got int32 (2, 3)"),
    ((NEW, CACHED, AT[:, :2]), {}, ValueError, "rows must have shape (2, 3), got (2, 2)"),
    ((NEW, PAGES), {"page_table": TABLE.long()}, TypeError, "page_table must be an int32 Tensor"),
    ((NEW, PAGES), {"page_table": TABLE[:1]}, ValueError, "cached must hold 2 sequences, got 1"),
    ((NEW, PAGES), {"page_table": TABLE[0]}, ValueError, "page_table must be int32 (2, pages)"),
    ((NEW, PAGES), {"page_table": TABLE + 4}, ValueError, "page_table must lie in [0, 4), got 4"),
    ((NEW, CACHED.to("meta")), {}, ValueError, "cached must be on cpu, got meta"),
]


@pytest.mark.parametrize(("args", "options", "error", "text"), BAD)
def test_bad_input(args, options, error, text):
    with pytest.raises(error, match=rf"^similarity\.cosine: .*{re.escape(text)}"):
        similarity.cosine(*args, **options)
