"""The guided draw's CUDA kernels: the tokens of the reference in float64, and of the CPU's kernel."""

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

pytestmark = [quiet, pytest.mark.usefixtures("cuda_kernels", "guarded")]

#: On a GPU a warp of the scan takes several steps, too.
COUNT = 5000 if DEVICE == "cuda" else ROWS


#: Below a group, every width of a load, and several parts: 5000 is a multiple of 8, 1028 of 4 alone.
@pytest.mark.parametrize("vocab", [1, 5, 257, 1028, 5000])
def test_tokens_of_each_kind_of_row(vocab):
    check_streams("cuda", vocab)


def test_parts_of_a_row_draw_and_are_merged():
    check_streams("cuda", 40 * 256 + 3, table=every_kind()[::7])


def test_dtypes():
    for c in (torch.float32, torch.bfloat16, torch.float16):
        for u in (torch.float32, torch.bfloat16, torch.float16):
            check_streams("cuda", 300, c, u, every_kind()[::9])


def test_many_rows():
    check_streams("cuda", 3000, table=every_kind().repeat(-(-COUNT // ROWS), 1)[: COUNT // 4])


def test_strided_rows():
    strided_streams("cuda")


def test_broken_rows():
    broken_streams("cuda")


def test_rows_that_stay_are_not_read():
    kept_rows("cuda")


def test_impossible_tokens():
    impossible_tokens("cuda")
