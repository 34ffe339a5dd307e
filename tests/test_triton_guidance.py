"""The guided draw in Triton: the tokens of the reference in float64, and of the CPU's kernel."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from guided_draws import (
    ROWS,
    broken_streams,
    check_streams,
    every_kind,
    impossible_tokens,
    kept_rows,
    strided_streams,
)
from triton_calls import quiet
from triton_variants import missed

from dlcore.triton import guidance

pytestmark = [quiet, pytest.mark.usefixtures("poisoned")]

#: On a GPU a program of the scan takes several tiles, too.
COUNT = 5000 if DEVICE == "cuda" else ROWS


def test_tokens_of_each_kind_of_row():
    check_streams("triton", 700)


@pytest.mark.parametrize("vocab", [1, 5, 256, 257])
def test_vocabularies(vocab):
    check_streams("triton", vocab, table=every_kind()[::7])


def test_parts_of_a_row_draw_and_are_merged(monkeypatch):
    """Of a few groups each; and a program of the scan takes one tile after the other."""
    monkeypatch.setattr(guidance, "_ENOUGH", 40)
    monkeypatch.setattr(guidance, "_LEAST", 3)
    check_streams("triton", 5003, table=every_kind()[::7])


def test_dtypes():
    for c in (torch.float32, torch.bfloat16, torch.float16):
        for u in (torch.float32, torch.bfloat16, torch.float16):
            check_streams("triton", 300, c, u, every_kind()[::9])


def test_many_rows():
    check_streams("triton", 3000, table=every_kind().repeat(-(-COUNT // ROWS), 1)[: COUNT // 4])


def test_strided_rows():
    strided_streams("triton")


def test_broken_rows():
    broken_streams("triton")


def test_rows_that_stay_are_not_read():
    kept_rows("triton")


def test_impossible_tokens():
    impossible_tokens("triton")


def test_every_variant_was_launched():
    assert missed("guidance") == []
