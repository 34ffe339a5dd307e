"""The CUDA kernels' losses and gradients against the reference: the cases of Triton's."""

from __future__ import annotations

import pytest
import torch
from test_categorical_losses import check_kl_of_nothing
from test_triton_categorical_losses import INDEX, LEAD, TARGET, TEMPERATURE, case, head, number
from test_triton_uniform import ALPHA, SLOPE, VOCAB, X, Z
from triton_calls import assert_same, call, quiet

from dlcore.triton import linear_logits

pytestmark = [quiet, pytest.mark.usefixtures("cuda_kernels", "guarded")]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, the last of them ragged."""
    monkeypatch.setattr(linear_logits, "_TILE", 6 * 512)


@case
def test_log_probs(dtype, linear, close, near):
    h, grad = head(dtype, linear), number(3, *LEAD, dtype=torch.float64)
    for options in ((None,) * 4, (INDEX, torch.tensor(0.5), 5.0, 3)):
        args = (*h, TARGET, *options)
        numbers = call("categorical.log_probs", "reference", *args, wide=True)
        assert_same(call("categorical.log_probs", "cuda", *args), numbers, close, close)
        expected = call("categorical.log_probs_backward", "reference", grad, numbers[0], *args, wide=True)
        found = call("categorical.log_probs_backward", "cuda", grad, numbers[0], *args)
        assert_same(found, expected, near, near)


def test_rows_without_a_target_are_not_read():
    x, target = torch.full((*LEAD, 300), float("nan")), torch.full(LEAD, -1)
    args = (x, None, None, target, None, None, None, None)
    (numbers,) = call("categorical.log_probs", "cuda", *args)
    assert torch.equal(numbers, torch.zeros(3, *LEAD, dtype=torch.float64))
    grads = call("categorical.log_probs_backward", "cuda", numbers + 1, numbers, *args)
    assert torch.equal(grads[0], torch.zeros_like(x))


@case
@pytest.mark.parametrize("temperature", [None, TEMPERATURE])
def test_kl(dtype, linear, close, near, temperature):
    p, q = head(dtype, linear), head(dtype, linear, 1)
    if not linear:
        # What p excludes costs nothing, whatever q says; what q excludes costs everything.
        q[0][1, 0, 7:900] = float("-inf")
        q[0][2, 0, 5], p[0][2, 1], q[0][2, 1] = float("-inf"), float("nan"), float("nan")
    args, grad = (*p, *q, temperature), number(3, *LEAD, dtype=torch.float64)
    grad[1:] = 0  # the logsumexps are only saved
    numbers = call("categorical.kl", "reference", *args, wide=True)
    assert_same(call("categorical.kl", "cuda", *args), numbers, 2 * close, 2 * close)
    sound = slice(None) if linear else slice(2)
    p, q = (tuple(x if x is None or linear else x[:2] for x in h) for h in (p, q))
    args = (*p, *q, None if temperature is None else temperature[sound])
    grad, numbers = grad[:, sound], numbers[0][:, sound]
    expected = call("categorical.kl_backward", "reference", grad, numbers, *args, wide=True)
    assert_same(call("categorical.kl_backward", "cuda", grad, numbers, *args), expected, 2 * near, 2 * near)


def test_kl_of_a_head_and_of_dense_logits():
    """Of two dtypes: tiles are float32, and so are read both."""
    p, q = head(torch.bfloat16, True), head(torch.bfloat16, False, 1)
    q[0].clamp_(min=-20)
    grad = number(3, *LEAD, dtype=torch.float64)
    grad[1:] = 0
    args = (*p, *q, None)
    numbers = call("categorical.kl", "reference", *args, wide=True)
    assert_same(call("categorical.kl", "cuda", *args), numbers, 1e-5, 1e-5)
    expected = call("categorical.kl_backward", "reference", grad, numbers[0], *args, wide=True)
    assert_same(call("categorical.kl_backward", "cuda", grad, numbers[0], *args), expected, 4e-2, 4e-2)


@case
@pytest.mark.parametrize("shift", [None, torch.tensor(0.5)])
def test_nelbo(dtype, linear, close, near, shift):
    h = head(dtype, linear) if linear else (4 * number(*LEAD, VOCAB, dtype=dtype), None, None)
    args, grad = (*h, Z, X, ALPHA, SLOPE, shift), number(*LEAD, seed=3)
    loss, saved = call("uniform.nelbo", "reference", *args, wide=True)
    found = call("uniform.nelbo", "cuda", *args)
    assert_same(found[1:], (saved,), close, close)
    # The loss is a difference of numbers up to V·log1p(c): as near as the CPU's.
    cpu = call("uniform.nelbo", "cpu", *args)[0].double()
    assert ((found[0] - loss).abs() <= 4 * (cpu - loss).abs() + 2e-5 * loss.abs() + 1e-5).all()
    expected = call("uniform.nelbo_backward", "reference", grad, saved, *args, wide=True)
    assert_same(call("uniform.nelbo_backward", "cuda", grad, saved, *args), expected, 2 * near, 2 * near)


@pytest.mark.parametrize("level", [1e-4, 0.5, 1 - 1e-6, 1 - 1e-9])
def test_nelbo_at_every_noise_level(level):
    """Eight factors share a logarithm, or four, or none."""
    x = 4 * number(*LEAD, VOCAB)
    args = (x, None, None, Z, X, torch.tensor(level, dtype=torch.float64), SLOPE, None)
    _, saved = call("uniform.nelbo", "reference", *args, wide=True)
    assert_same(call("uniform.nelbo", "cuda", *args)[1:], (saved,), 2e-5, 2e-5)


def test_kl_of_rows_of_nothing():
    check_kl_of_nothing("cuda")
