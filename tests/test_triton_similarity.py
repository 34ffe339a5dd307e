"""Triton's cosines between fresh and cached rows against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from test_similarity import DTYPES, SHAPES, cache_near, fresh
from triton_calls import assert_same, call, quiet

from dlcore.triton import similarity
from dlcore.triton.launch import kernels, launched

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


def test_rows_in_order():
    args = (fresh(3, 17, "bhsd", torch.float32), fresh(3, 17, "packed", torch.float32, 11, 3), None, None)
    want = call("similarity.cosine", "reference", *args, wide=True)
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


def test_every_kernel_was_launched():
    assert kernels("similarity").keys() <= launched
