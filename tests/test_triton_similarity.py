"""Triton's cosines between fresh and cached rows against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from test_similarity import DTYPES, SHAPES, cache_near, fresh
from triton_calls import assert_same, call, quiet
from triton_variants import missed

from dlcore.triton import similarity

pytestmark = [quiet, pytest.mark.usefixtures("poisoned")]


@pytest.mark.parametrize("tile", [4096, 256])
@pytest.mark.parametrize("layout", ["plain", "packed", "bhsd"])
@pytest.mark.parametrize(("shape", "page_size"), list(zip(SHAPES, [None, 4, 1, None], strict=True)))
def test_cosines_with_a_cache(shape, page_size, layout, tile, monkeypatch):
    monkeypatch.setattr(similarity, "_TILE", tile)
    for dtype in DTYPES:
        new = fresh(*shape, layout, dtype)
        cache, at = cache_near(new, page_size)
        args = (new, cache.view(1)[1], at, cache.page_table)
        want = call("similarity.cosine", "reference", *args, wide=True)
        assert_same(call("similarity.cosine", "triton", *args), want, 0, 3e-7)


@pytest.mark.parametrize("tile", [4096, 16])
@pytest.mark.parametrize("layout", ["plain", "packed", "bhsd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_order(dtype, layout, tile, monkeypatch):
    """The cache in one piece, and the same rows in pages of four."""
    monkeypatch.setattr(similarity, "_TILE", tile)
    new, cached = fresh(3, 17, layout, dtype), fresh(3, 17, layout, dtype, 8, 3)
    pages, table = cached.reshape(6, 4, 3, 17), torch.arange(6, dtype=torch.int32).view(3, 2)
    want = call("similarity.cosine", "reference", new, cached, None, None, wide=True)
    for args in ((new, cached, None, None), (new, pages, None, table)):
        assert_same(call("similarity.cosine", "triton", *args), want, 0, 3e-7)


@pytest.mark.parametrize("tile", [4096, 16])
def test_rows_of_any_length_and_none(tile, monkeypatch):
    """Zeros, huge and tiny rows, NaN and infinity, one of each kind against the next."""
    monkeypatch.setattr(similarity, "_TILE", tile)
    x = fresh(2, 40, "plain", torch.float32, rows=8)
    for i, factor in enumerate((0, 1e38 / 8, 1e-38, 1)):
        x[:, i] *= factor
    x[:, 4, 1, 39] = torch.nan
    x[:, 5, 0, 0] = torch.inf
    y = torch.stack([x[b].roll(b + 1, 0) for b in range(3)])
    y[0, 0], y[0, 5] = 0, 0
    args = (x, y, None, None)
    want = call("similarity.cosine", "reference", *args)
    assert_same(call("similarity.cosine", "triton", *args), want, 0, 3e-7)


@pytest.mark.parametrize("page_size", [None, 4])
def test_unchecked_positions_read_nothing(page_size):
    new = fresh(3, 17, "plain", torch.float32)
    cache, at = cache_near(new, page_size)
    table = cache.page_table
    at[0, 1], at[2, 3] = -1, 12
    where = [[0, 1], [2, 3]]
    if table is not None:
        table[1] = torch.tensor([-1, 99, 9], dtype=torch.int32)
        where[1:1] = [[1, i] for i in range(5)]
    args = [None if x is None else x.to(DEVICE) for x in (new, cache.view(1)[1], at, table)]
    assert similarity.cosine(*args).isnan().nonzero().tolist() == where


def test_every_variant_was_launched():
    assert missed("similarity") == []
