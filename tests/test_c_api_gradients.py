"""Every gradient of the C library, and the drifts it is taken of, against the Python op of its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from c_arguments import (
    DTYPES,
    HEADS,
    MAPS,
    ROWS,
    Head,
    attention_of,
    bits_of,
    dense,
    empty,
    heads,
    index_of,
    levels,
    linear,
    logits_of,
    margins_kept,
    normal,
    points,
    python_at_baseline,
    same,
    softmax_of,
    strided,
)
from c_library import Library
from torch import Tensor

from dlcore import categorical, sphere
from dlcore.bits.levels import slope
from dlcore.cpu import attention as attention_kernels
from dlcore.cpu import bits as bits_kernels
from dlcore.cpu import categorical as kernels
from dlcore.cpu import sphere as sphere_kernels
from dlcore.cpu import sphere_velocity as velocity_kernels
from dlcore.cpu import uniform as uniform_kernels

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def baseline() -> Iterator[None]:
    """Python at the level of the library under test."""
    with python_at_baseline(), margins_kept():
        yield


def _parts(head: Head) -> tuple[Tensor, Tensor | None, Tensor | None]:
    logits, weight, bias = categorical.head("test", head)
    return logits, weight, bias


class Grads:
    """Where the gradient of a head goes, and what it should be."""

    def __init__(self, c: Library, head: Head) -> None:
        self.tensors = [None if x is None else empty(*x.shape, dtype=x.dtype) for x in _parts(head)]
        self.struct = c.logits_grad(**dict(zip(("values", "weight", "bias"), self.tensors, strict=True)))

    def are(self, wanted: tuple[Tensor, ...]) -> None:
        values, weight, bias = self.tensors
        assert values is not None
        same(values, wanted[0])
        if weight is not None:
            same(weight, wanted[1])
        if bias is not None:  # sums of a column, added in another order
            torch.testing.assert_close(bias, wanted[2])


def _doubles(seed: int, *shape: int) -> Tensor:
    return normal(seed, *shape).double()


@heads
def test_log_probs(c: Library, head: Callable[[], Head]) -> None:
    logits = head()
    target, index, shift = index_of(logits), index_of(logits).flip(0), torch.linspace(-1, 1, ROWS)
    target[1] = -100
    given = (target, index, shift, 6.0, None)
    numbers, grad = kernels.log_probs(*_parts(logits), *given), _doubles(5, 3, ROWS)
    wanted = kernels.log_probs_backward(grad, numbers, *_parts(logits), *given)
    grads, softmax = Grads(c, logits), softmax_of(c, logits, index, shift=shift, softcap=6.0)
    c.categorical_log_probs_backward(softmax, target, grad, numbers, grads.struct)
    grads.are(wanted)


@pytest.mark.parametrize("head", ["float32", "linear"])
def test_without_an_index_its_gradient_is_not_read(c: Library, head: str) -> None:
    logits = HEADS[head]()
    target, grad, found = index_of(logits), _doubles(5, 3, ROWS), []
    numbers = kernels.log_probs(*_parts(logits), target, None, None, None, None)
    for at_index in (1, 0):
        grad[1] *= at_index
        grads = Grads(c, logits)
        c.categorical_log_probs_backward(softmax_of(c, logits), target, grad, numbers, grads.struct)
        found.append(grads.tensors)
    for got, wanted in zip(*found, strict=True):
        if got is not None:
            same(got, wanted)


@pytest.mark.parametrize("vocab", [1000, 420_000])
def test_kl(c: Library, vocab: int) -> None:
    temperature, grad = torch.linspace(0.5, 2, ROWS), _doubles(5, 3, ROWS)
    for p, q in [
        (dense(vocab), dense(vocab).flip(0)),
        (dense(vocab, torch.bfloat16), linear(vocab, torch.bfloat16)),
        (linear(vocab), linear(vocab, bias=False)),
    ]:
        parts = (*_parts(p), *_parts(q))
        numbers = kernels.kl(*parts, temperature)
        wanted = kernels.kl_backward(grad, numbers, *parts, temperature)
        p_grads, q_grads = Grads(c, p), Grads(c, q)
        pair = logits_of(c, p), logits_of(c, q), c.row_numbers(temperature)
        c.categorical_kl_backward(*pair, grad, numbers, p_grads.struct, q_grads.struct, 0)
        p_grads.are(wanted[:3])
        q_grads.are(wanted[3:])


@heads
def test_expectation(c: Library, head: Callable[[], Head]) -> None:
    logits = head()
    table, grad = strided(normal(6, logits.shape[-1], 20, dtype=torch.bfloat16)), normal(5, ROWS, 20)
    temperature = torch.linspace(0.5, 2, ROWS)
    exclude = 3 if logits.shape[-1] > 3 else None
    given = (table, temperature, 9.0, exclude)
    mean, lse = kernels.expectation(*_parts(logits), *given)
    wanted = kernels.expectation_backward(grad, mean, lse, *_parts(logits), *given)
    softmax = softmax_of(c, logits, temperature=temperature, softcap=9.0, exclude=exclude)
    for wanted_table in (True, False):
        grads = Grads(c, logits)
        table_grad = empty(*table.shape, dtype=table.dtype) if wanted_table else None
        c.categorical_expectation_backward(
            softmax, c.matrix_of(table), grad, mean, lse, grads.struct, table_grad
        )
        # Of another tanh and another order of sums.
        for got, right in zip(grads.tensors, wanted[:3], strict=True):
            if got is not None:
                rounding = 1e-5 if got.dtype == torch.float32 else 1e-2
                # One token's gradient is 0 but for rounding, and float16 has steps of 2^-24.
                least = 1e-5 if logits.shape[-1] == 1 else 2**-24 if got.dtype == torch.float16 else 0.0
                close = max(1e-5 * float(right.abs().max()), least)
                torch.testing.assert_close(got, right, rtol=rounding, atol=close)
        if table_grad is not None:
            same(table_grad, wanted[3])


@heads
def test_nelbo(c: Library, head: Callable[[], Head]) -> None:
    logits = head()
    z, x = index_of(logits), index_of(logits)
    x[2:] = x[2:].flip(0)
    alpha, dalpha = torch.linspace(0.1, 0.9, ROWS).double(), -torch.linspace(1, 2, ROWS).double()
    shift, grad = torch.linspace(-1, 1, ROWS), normal(5, ROWS)
    given = (*_parts(logits), z, x, alpha, dalpha, shift)
    _, saved = uniform_kernels.nelbo(*given)
    softmax, levels = softmax_of(c, logits, z, shift=shift), (c.doubles_of(alpha), c.doubles_of(dalpha))
    mine, loss = empty(5, ROWS, dtype=torch.float64), empty(ROWS)
    c.uniform_nelbo(softmax, x, *levels, loss, mine)
    same(mine, saved)
    grads = Grads(c, logits)
    c.uniform_nelbo_backward(softmax, x, *levels, grad, saved, grads.struct)
    grads.are(uniform_kernels.nelbo_backward(grad, saved, *given))


@levels
@pytest.mark.parametrize("kind", ["squared", "bce"])
@pytest.mark.parametrize("coding", ["01", "pm1"])
@pytest.mark.parametrize("columns", [33, 9000])
def test_bits_loss(c: Library, sigma: Any, kind: str, coding: str, columns: int) -> None:
    x, residual = strided(normal(1, ROWS, columns, dtype=torch.float16)), strided(normal(2, ROWS, columns))
    clean, grad = (normal(3, ROWS, columns) > 0).to(torch.bfloat16), normal(4, ROWS)
    low, high = (0.0, 1.0) if coding == "01" else (-1.0, 1.0)
    gain = torch.as_tensor(slope(sigma, (low, high))).float()
    gain = gain.expand(ROWS).unsqueeze(-1) if gain.dim() else gain
    for with_x in (True, False):
        residual_grad = empty(ROWS, columns)
        x_grad = empty(ROWS, columns, dtype=x.dtype) if with_x else None
        state = bits_of(c, x, residual, sigma, coding, 3.0)
        which = ["squared", "bce"].index(kind)
        c.bits_loss_backward(state, c.matrix_of(clean), which, grad, residual_grad, x_grad)
        wanted = bits_kernels.loss_backward(
            grad, residual, x, clean, gain, low, high, 3.0, kind == "squared", with_x
        )
        same(residual_grad, wanted[0])
        if x_grad is not None:
            same(x_grad, wanted[1])


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps(c: Library, name: str, dtype: torch.dtype) -> None:
    x = [points(seed, dtype) for seed in range(MAPS[name])]
    grad = normal(9, ROWS) if name == "angle" else strided(normal(9, ROWS, 70, dtype=dtype))
    t = [torch.linspace(0.1, 0.9, ROWS)] if name == "slerp" else []
    backward, function = getattr(sphere_kernels, f"{name}_backward"), getattr(c, f"sphere_{name}_backward")
    count = len(x) + len(t)
    for needed in ([True] * count, [i == count - 1 for i in range(count)]):
        found = backward(grad, needed, *x, *t)
        wanted = found if isinstance(found, tuple) else (found,)
        like = [*x, *(empty(ROWS) for _ in t)]
        mine = [empty(*v.shape, dtype=v.dtype) if n else None for v, n in zip(like, needed, strict=True)]
        numbers = [c.row_numbers(v) for v in t]
        given = grad if name == "angle" else c.matrix_of(grad)
        function(given, *(c.matrix_of(v) for v in x), *numbers, *mine, 0)
        for got, right, n in zip(mine, wanted, needed, strict=True):
            if n:
                assert got is not None
                same(got, right)


PATHS: dict[str, Tensor | None] = {
    "slerp": None,
    "vmf": torch.tensor(20.0).double(),
    "vmf, per row": torch.tensor([0.0, 0.3, 5.0, 200.0, 1e6]).double(),
}


@pytest.mark.parametrize("dim", [3, 24, 300])
@pytest.mark.parametrize("kappa", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("head", ["dense", "linear"])
def test_velocity(c: Library, head: str, kappa: Tensor | None, dim: int) -> None:
    vocab = 1500
    logits = dense(vocab) if head == "dense" else linear(vocab)
    x = strided(sphere.normalize(normal(7, ROWS, dim)))
    table = strided(sphere.normalize(normal(8, vocab, dim)).to(torch.bfloat16))
    given = (*_parts(logits), x, table, kappa)
    wanted = velocity_kernels.velocity(*given)
    arguments = logits_of(c, logits), c.matrix_of(x), c.matrix_of(table), c.doubles_of(kappa)
    moved, along, lse = empty(ROWS, dim), empty(ROWS), empty(ROWS, dtype=torch.float64)
    c.sphere_velocity(*arguments, moved, along, lse, 0)
    # The series at κ is solved by another elimination, sums of a row are added in another order.
    close: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}
    for got, right in zip((moved, along, lse), wanted, strict=True):
        torch.testing.assert_close(got, right, **close)
    grad = normal(9, ROWS, dim)
    grads, x_grad, table_grad = Grads(c, logits), empty(ROWS, dim), empty(vocab, dim, dtype=table.dtype)
    left = (moved, along, lse)
    c.sphere_velocity_backward(*arguments, grad, *left, grads.struct, x_grad, table_grad, 0)
    right = velocity_kernels.velocity_backward(grad, *left, *given, True, True)
    for got, wanted_grad in zip((*grads.tensors, x_grad, table_grad), right, strict=True):
        if got is not None:
            tolerance = {"rtol": 1e-2, "atol": 1e-6} if got.dtype == torch.bfloat16 else close
            torch.testing.assert_close(got, wanted_grad, **tolerance)


@heads
def test_largest(c: Library, head: Callable[[], Head]) -> None:
    logits = head()
    if isinstance(logits, Tensor) and logits.shape[-1] > 7:
        logits[1, 7] = torch.inf
    count = min(6, logits.shape[-1])
    ids = empty(ROWS, count, dtype=torch.int64)
    c.sphere_largest(logits_of(c, logits), count, ids, 0)
    same(ids, velocity_kernels.largest(*_parts(logits), count))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_intervals(c: Library, dtype: torch.dtype, shared: bool) -> None:
    batch, rows, keys = 2, 37, 150
    q = normal(1, batch, 4, rows, 40, dtype=dtype).transpose(1, 2)
    k, v = normal(2, batch, keys, 2, 40, dtype=dtype), normal(3, batch, keys, 2, 24, dtype=dtype)
    row = torch.arange(rows).expand(1 if shared else batch, rows)
    stops = torch.stack([row + 1, 60 + 2 * row], -1).to(torch.int32)
    starts = torch.stack([row // 8, 50 + row], -1).to(torch.int32)
    out, lse = attention_kernels.intervals(q, k, v, starts, stops, None, 0.2, 3.0)
    grad, grad_lse = normal(4, *out.shape, dtype=dtype), normal(5, *lse.shape)
    mine = [empty(*x.shape, dtype=dtype) for x in (q, k, v)]
    attention = attention_of(c, q, k, v, scale=0.2, softcap=3.0)
    c.attention_intervals_backward(attention, starts, stops, int(shared), out, lse, grad, grad_lse, *mine)
    wanted = attention_kernels.intervals_backward(grad, grad_lse, out, lse, q, k, v, starts, stops, 0.2, 3.0)
    for got, right in zip(mine, wanted, strict=True):
        same(got, right)


def test_keys_that_no_row_sees_have_a_gradient_of_zero(c: Library) -> None:
    q, k = normal(1, 1, 0, 2, 8), normal(2, 1, 5, 2, 8)
    k_grad, v_grad = empty(1, 5, 2, 8), empty(1, 5, 2, 8)
    attention = attention_of(c, q, k, k)
    c.attention_intervals_backward(attention, *([None] * 2), 1, *([None] * 5), k_grad, v_grad)
    same(k_grad, torch.zeros_like(k_grad))
    same(v_grad, torch.zeros_like(v_grad))


def test_threads_change_nothing(c: Library) -> None:
    logits, target = linear(9000), torch.arange(ROWS)
    given = (target, None, None, None, None)
    numbers, grad = kernels.log_probs(*_parts(logits), *given), _doubles(5, 3, ROWS)
    first: list[Tensor | None] = []
    for threads in (1, 2, 7):
        grads = Grads(c, logits)
        softmax = softmax_of(c, logits, threads=threads)
        c.categorical_log_probs_backward(softmax, target, grad, numbers, grads.struct)
        first = first or grads.tensors
        for got, wanted in zip(grads.tensors, first, strict=True):
            assert got is not None
            assert wanted is not None
            same(got, wanted)


def test_halves_are_rounded_to_the_nearest(c: Library) -> None:
    """A head's gradient in 16 bits: subnormals, ties and what overflows."""
    for dtype in (torch.bfloat16, torch.float16):
        scale = torch.logspace(-9, 5, ROWS)
        weight = torch.eye(24).to(dtype)
        logits = torch.zeros(ROWS, 24).to(dtype)
        head = type(linear(1))(logits, weight)
        target = torch.arange(ROWS)
        given = (target, None, None, None, None)
        numbers = kernels.log_probs(*_parts(head), *given)
        grad = torch.stack([scale.double(), torch.zeros(ROWS).double(), 0.3 * scale.double()])
        grads = Grads(c, head)
        c.categorical_log_probs_backward(softmax_of(c, head), target, grad, numbers, grads.struct)
        grads.are(kernels.log_probs_backward(grad, numbers, *_parts(head), *given))
