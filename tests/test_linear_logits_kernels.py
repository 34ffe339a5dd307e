"""The matrix product behind linear heads: against float64, any shape and strides, always the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import levels
from torch import Tensor

from dlcore.cpu import choose_capability
from dlcore.cpu.linear_logits import matmul

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, depth, columns): around lanes, strips, blocks of depth, and parts of rows.
SHAPES = [
    (1, 1, 1),
    (3, 0, 70),
    (1, 300, 129),
    (3, 63, 65),
    (17, 64, 64),
    (31, 65, 15),
    (33, 128, 70),
    (130, 200, 257),
    (300, 40, 16),
]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rows, depth, columns = shape
    return normal(rows, depth), normal(depth, columns, dtype=dtype, seed=1)


def product(a: Tensor, b: Tensor, **kw: object) -> Tensor:
    out = torch.full((a.shape[0], b.shape[1]), torch.nan)
    matmul(a, b, out, **kw)
    return out


def by_column(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def assert_as_good_as_torch(out: Tensor, formula: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Against the formula in float64: at most twice the error of torch in float32, or of one rounding."""
    exact = formula(*(x.double() for x in inputs))
    error, own = (
        (x.double() - exact).abs().max().item() for x in (out, formula(*(x.float() for x in inputs)))
    )
    assert error <= 2 * max(own, torch.finfo(torch.float32).eps * exact.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layouts", [(x, y) for x in (Tensor.clone, by_column) for y in (Tensor.clone, by_column)]
)
def test_against_float64(shape, dtype, layouts, level):
    a, b = (layout(x) for layout, x in zip(layouts, operands(shape, dtype), strict=True))
    assert_as_good_as_torch(product(a, b), torch.matmul, a, b)


@pytest.mark.parametrize("shape", SHAPES)
def test_bias_softcap_and_sum(shape, level):
    a, b = operands(shape)
    bias, start = normal(shape[2], seed=2), normal(shape[0], shape[2], seed=3)
    shifted = product(a, b, bias=bias)
    assert_as_good_as_torch(shifted, lambda a, b, c: a @ b + c, a, b, bias)
    capped = product(a, b, bias=bias, softcap=2.5)
    assert_as_good_as_torch(capped, lambda x: 2.5 * torch.tanh(x / 2.5), shifted)
    matmul(a, b, out := start.clone(), add=True)
    assert_as_good_as_torch(out, lambda a, b, c: a @ b + c, a, b, start)


def test_strided_operands_and_output():
    """Rows may lie apart; what lies between them is neither read nor written."""
    a, b = torch.full((9, 40), torch.nan), torch.full((21, 50), torch.nan)
    a[:, 5:26], b[:, 3:40] = normal(9, 21), normal(21, 37)
    out = torch.full((9, 60), 7.0)
    matmul(a[:, 5:26], b[:, 3:40], out[:, 8:45])
    assert_as_good_as_torch(out[:, 8:45], torch.matmul, a[:, 5:26], b[:, 3:40])
    assert (out[:, :8] == 7).all()
    assert (out[:, 45:] == 7).all()


def test_a_matrix_without_contiguous_rows_or_columns_is_copied():
    a, b = normal(5, 2 * 33)[:, ::2], normal(66, 41, 2)[::2, :, 0]
    assert_as_good_as_torch(product(a, b), torch.matmul, a, b)


@pytest.mark.parametrize("layout", [Tensor.clone, by_column])
def test_the_same_bits_for_any_threads_rows_and_columns(layout):
    a, b = operands((200, 150, 500))
    a, b = layout(a), layout(b)
    expected, threads = product(a, b), torch.get_num_threads()
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        found = product(a, b)
        torch.set_num_threads(threads)
        assert torch.equal(found, expected)
    for part in (slice(0, 1), slice(3, 20), slice(7, 200)):
        assert torch.equal(product(a[part], b), expected[part])
        assert torch.equal(product(a, b[:, part]), expected[:, part])


def test_wide_levels_are_bit_equal():
    found = {}
    a, b = operands((45, 150, 300), torch.bfloat16)
    for name in levels():
        choose_capability(name)
        found[name] = product(a, b, softcap=3.0)
    choose_capability(levels()[0])
    if "avx512" not in found:
        pytest.skip("this machine has one wide level at most")
    assert torch.equal(found["avx512"], found["avx2"])
    torch.testing.assert_close(found["avx512"], found["baseline"], rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_stay_where_they_belong():
    a, b = operands((20, 70, 100))
    a[3, 60], b[2, 99] = torch.nan, torch.inf
    out = product(a, b)
    assert out[3].isnan().all()
    assert not out[:, 99].isfinite().any()
    clean = torch.ones(20, 100, dtype=torch.bool)
    clean[3], clean[:, 99] = False, False
    assert out[clean].isfinite().all()
