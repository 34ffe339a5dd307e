"""The cache itself: writing, committing, refreshing, cutting, reordering; errors that change nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_oracles import normal

from dlcore.attention import KVCache

EMPTY = -7.0


@pytest.fixture(params=[None, 1, 3, 4, 32], ids=lambda p: f"page{p}")
def page_size(request):
    return request.param


def filled(page_size=None, batch=3, max_len=10, layers=2, dims=(4, 2), dtype=torch.float32):
    """A cache with a known number in every slot."""
    cache = KVCache(layers, batch, max_len, 2, dims[0], v_head_dim=dims[1], dtype=dtype, page_size=page_size)
    for layer in range(layers):
        for x in cache.view(layer):
            x.fill_(EMPTY)
    return cache


def contents(cache, layer=0):
    """Keys and values by position, (B, max_len, H, D), copied."""
    found = cache.view(layer)
    if cache.page_table is not None:
        found = tuple(x[cache.page_table.long()].flatten(1, 2)[:, : cache.max_len] for x in found)
    return tuple(x.clone() for x in found)


def rows(count, batch=3, dims=(4, 2), seed=0):
    return tuple(normal(batch, count, 2, d, dtype=torch.float32, seed=seed + d) for d in dims)


def same(found, wanted):
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_write_goes_where_the_lengths_are(page_size):
    cache = filled(page_size)
    cache.commit(torch.tensor([0, 3, 7]))
    k, v = rows(3)
    cache.write(1, k, v)
    wanted = contents(filled())
    for new, x in zip((k, v), wanted, strict=True):
        for b, at in enumerate((0, 3, 7)):
            x[b, at : at + 3] = new[b]
    same(contents(cache, 1), wanted)
    same(contents(cache, 0), contents(filled()))
    assert cache.lengths.tolist() == [0, 3, 7]


@pytest.mark.parametrize("start", [0, 5, torch.tensor([2, 0, 6]), torch.tensor([4])])
def test_write_from_a_start(start, page_size):
    cache = filled(page_size)
    k, v = rows(4)
    cache.write(0, k, v, start)
    wanted = contents(filled())
    for b, at in enumerate(torch.as_tensor(start).expand(3).tolist()):
        for new, x in zip((k, v), wanted, strict=True):
            x[b, at : at + 4] = new[b]
    same(contents(cache), wanted)


def test_commit_advances_by_a_number_or_by_sequence():
    cache = filled()
    cache.commit(4)
    cache.commit(torch.tensor([0, 6, 1]))
    cache.commit(0)
    assert cache.lengths.tolist() == [4, 10, 5]
    assert cache.lengths.dtype == torch.int32


def test_scatter_overwrites_single_rows(page_size):
    """In any order, also past the lengths."""
    cache = filled(page_size)
    k, v = rows(2)
    at = torch.tensor([[9, 0], [3, 4], [5, 2]])
    cache.scatter(1, at, k, v)
    wanted = contents(filled())
    for new, x in zip((k, v), wanted, strict=True):
        for b in range(3):
            x[b, at[b]] = new[b]
    same(contents(cache, 1), wanted)
    same(contents(cache, 0), contents(filled()))


def test_truncate_then_write_again(page_size):
    cache = filled(page_size)
    first, second = rows(8), rows(3, seed=5)
    cache.write(0, *first)
    cache.commit(torch.tensor([8, 2, 5]))
    cache.truncate(torch.tensor([4, 9, 5]))
    assert cache.lengths.tolist() == [4, 2, 5]
    cache.truncate(3)
    assert cache.lengths.tolist() == [3, 2, 3]
    cache.write(0, *second)
    for new, old, x in zip(second, first, contents(cache), strict=True):
        for b, at in enumerate((3, 2, 3)):
            assert torch.equal(x[b, :at], old[b, :at])
            assert torch.equal(x[b, at : at + 3], new[b])


@pytest.mark.parametrize("index", [[0, 1, 2], [2, 0, 1], [1, 1, 1], [2, 2, 0]])
def test_reorder(index, page_size):
    cache = filled(page_size)
    for layer in range(2):
        cache.write(layer, *rows(6, seed=10 * layer))
    cache.commit(torch.tensor([6, 2, 4]))
    before = [contents(cache, layer) for layer in range(2)]
    cache.reorder(torch.tensor(index))
    for layer in range(2):
        same(contents(cache, layer), [x[index] for x in before[layer]])
    assert cache.lengths.tolist() == [[6, 2, 4][i] for i in index]


def test_reordered_sequences_are_apart(page_size):
    """Two beams from one sequence may diverge."""
    cache = filled(page_size)
    cache.write(0, *rows(6))
    cache.reorder(torch.tensor([0, 0, 0]))
    one = contents(cache)
    k, v = rows(1)
    cache.write(0, k, v, 2)
    for new, x, y in zip((k, v), contents(cache), one, strict=True):
        y[:, 2] = new[:, 0]
        assert torch.equal(x, y)


def test_reset_keeps_the_memory(page_size):
    cache = filled(page_size)
    address = cache.view(0)[0].data_ptr()
    cache.commit(5)
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0]
    assert cache.view(0)[0].data_ptr() == address


def test_views_share_one_allocation(page_size):
    cache = filled(page_size, layers=3)
    stores = [x for layer in range(3) for x in cache.view(layer)]
    assert len({x.untyped_storage().data_ptr() for x in stores}) == 1
    pages = -(-10 // page_size) if page_size else None
    lead = (3 * pages, page_size) if page_size else (3, 10)
    assert [tuple(x.shape) for x in cache.view(0)] == [(*lead, 2, 4), (*lead, 2, 2)]
    assert stores[0].untyped_storage().nbytes() == 4 * sum(x.numel() for x in stores)
    spans = sorted((x.data_ptr(), x.data_ptr() + 4 * x.numel()) for x in stores)
    assert all(last <= first for (_, last), (first, _) in itertools.pairwise(spans))
    if page_size:
        assert cache.page_table.dtype == torch.int32
        assert cache.page_table.flatten().tolist() == list(range(3 * pages))
    else:
        assert cache.page_table is None


def test_written_rows_may_need_a_gradient_and_be_strided():
    cache = filled(batch=2)
    k, v = (x.requires_grad_() for x in rows(4, batch=2))
    cache.write(0, k, v)
    assert not cache.view(0)[0].requires_grad
    wanted = contents(cache)
    other = filled(batch=2)
    other.write(0, *(x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)))
    same(contents(other), wanted)


def test_nothing_to_write(page_size):
    cache = filled(page_size)
    cache.write(0, *rows(0))
    cache.scatter(0, torch.zeros(3, 0, dtype=torch.int64), *rows(0))
    same(contents(cache), contents(filled()))


K, V = rows(4)
FIRST = torch.arange(4).expand(3, 4)
BAD = [
    (lambda c: c.write(0, *rows(11)), ValueError, "the cache is full: max_len is 10, 11 are needed"),
    (lambda c: c.write(0, K, V, 7), ValueError, "the cache is full"),
    (lambda c: c.write(0, K, V, torch.tensor([0, 0, 7])), ValueError, "the cache is full"),
    (lambda c: c.write(0, K, V, -1), ValueError, r"start must lie in \[0, inf\], got -1"),
    (lambda c: c.write(0, K, V, 0.5), TypeError, "start must be an integer"),
    (lambda c: c.write(0, K, V, torch.tensor([0, 1])), ValueError, "start must broadcast"),
    (lambda c: c.write(2, K, V), ValueError, r"layer must lie in \[0, 2\), got 2"),
    (lambda c: c.write(-1, K, V), ValueError, "layer must lie in"),
    (lambda c: c.write(True, K, V), TypeError, "layer must be an int"),
    (lambda c: c.write(0, K.double(), V), TypeError, "k must have the cache's dtype"),
    (lambda c: c.write(0, K, V.half()), TypeError, "v must have the cache's dtype"),
    (lambda c: c.write(0, K, V[:, :3]), ValueError, "v must have k's 4 rows, got 3"),
    (lambda c: c.write(0, K[:2], V[:2]), ValueError, r"k must be \(3, n, 2, 4\)"),
    (lambda c: c.write(0, K[..., :2], V), ValueError, r"k must be \(3, n, 2, 4\)"),
    (lambda c: c.write(0, K[0], V[0]), ValueError, r"k must be \(3, n, 2, 4\)"),
    (lambda c: c.commit(11), ValueError, "the cache is full"),
    (lambda c: c.commit(torch.tensor([0, 0, 11])), ValueError, "the cache is full"),
    (lambda c: c.commit(-1), ValueError, "n must lie in"),
    (lambda c: c.truncate(-1), ValueError, "n must lie in"),
    (lambda c: c.scatter(0, torch.full((3, 4), 10), K, V), ValueError, r"rows must lie in \[0, 10\)"),
    (lambda c: c.scatter(0, torch.full((3, 4), -1), K, V), ValueError, "rows must lie in"),
    (lambda c: c.scatter(0, torch.zeros(3, 3).long(), K, V), ValueError, "rows must have shape"),
    (lambda c: c.scatter(0, torch.zeros(3, 4), K, V), TypeError, "rows must be an int64"),
    (lambda c: c.scatter(0, torch.zeros(3, 4).long(), None, None), ValueError, "give k or v, got neither"),
    (
        lambda c: c.scatter(0, FIRST, K, V, torch.tensor([0, 5, 0])),
        ValueError,
        r"count must lie in \[0, 5\), got 5",
    ),
    (lambda c: c.scatter(0, FIRST, K, V, torch.tensor([0, 0])), ValueError, "count must have shape"),
    (lambda c: c.scatter(0, FIRST, K, V, 3), TypeError, "count must be an int64"),
    (lambda c: c.scatter(0, FIRST + 9, K, V, torch.tensor([0, 2, 0])), ValueError, "rows must lie in"),
    (lambda c: c.reorder(torch.tensor([0, 1, 3])), ValueError, "index must lie in"),
    (lambda c: c.reorder(torch.tensor([0, 1])), ValueError, "index must have shape"),
    (lambda c: c.reorder([0, 1, 2]), TypeError, "index must be an int64"),
    (lambda c: c.view(5), ValueError, "layer must lie in"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD)
@pytest.mark.parametrize("page_size", [None, 4])
def test_bad_input_changes_nothing(call, error, text, page_size):
    cache = filled(page_size)
    with pytest.raises(error, match=rf"KVCache\.\w+: .*{text}"):
        call(cache)
    same(contents(cache), contents(filled()))
    assert cache.lengths.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("kw", "error", "text"),
    [
        ({"batch": 0}, ValueError, "batch must be at least 1, got 0"),
        ({"max_len": 2.0}, TypeError, "max_len must be an int"),
        ({"head_dim": True}, TypeError, "head_dim must be an int"),
        ({"v_head_dim": 0}, ValueError, "v_head_dim must be at least 1"),
        ({"page_size": 0}, ValueError, "page_size must be at least 1"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float32"),
    ],
)
def test_bad_sizes(kw, error, text):
    sizes = {"num_layers": 1, "batch": 1, "max_len": 4, "num_kv_heads": 1, "head_dim": 2}
    with pytest.raises(error, match=f"KVCache: {text}"):
        KVCache(**{**sizes, **kw})


@pytest.mark.parametrize("huge", [2**31 - 1, torch.tensor(2**32 + 1), torch.tensor(2**62)])
def test_huge_counts_do_not_wrap(huge):
    cache = KVCache(1, 1, 16, 2, 8)
    cache.commit(5)
    rows = torch.zeros(1, 4, 2, 8)
    for call in (lambda: cache.commit(huge), lambda: cache.write(0, rows, rows, start=huge)):
        with pytest.raises(ValueError, match=r"the cache is full|must lie in"):
            call()
    assert cache.lengths.tolist() == [5]
    with pytest.raises(TypeError, match="n must be an int"):
        cache.commit(None)


@pytest.mark.parametrize("given", ["kv", "k", "v"])
@pytest.mark.parametrize("count", [[0, 1, 2], [2, 2, 2], [0, 0, 0]])
def test_scatter_of_a_part(count, given, page_size):
    """Rows that don't count are not written, whatever they and their positions hold; nor is what is None."""
    cache = filled(page_size)
    k, v = rows(2)
    at = torch.tensor([[9, 0], [0, 3], [5, 0]])
    for b, n in enumerate(count):
        at[b, n:], k[b, n:], v[b, n:] = -(2**40), torch.nan, torch.nan
    cache.scatter(1, at, k if "k" in given else None, v if "v" in given else None, torch.tensor(count))
    wanted = contents(filled())
    for name, new, x in zip("kv", (k, v), wanted, strict=True):
        for b, n in enumerate(count):
            if name in given:
                x[b, at[b, :n]] = new[b, :n]
    same(contents(cache, 1), wanted)
    same(contents(cache, 0), contents(filled()))
