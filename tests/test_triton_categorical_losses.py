"""Triton's losses and expectations, dense and linear, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from test_categorical_losses import check_kl_of_nothing, check_means_of_nothing
from triton_calls import assert_same, call, quiet
from triton_variants import missed

from dlcore import rng
from dlcore.triton import linear_logits

pytestmark = [quiet, pytest.mark.usefixtures("poisoned")]

LEAD, VOCAB = (3, 2), 1300
#: (dtype, linear, tolerance of numbers, tolerance of gradients)
CASES = [
    (torch.float32, False, 4e-6, 4e-6),
    (torch.bfloat16, False, 4e-6, 8e-3),
    (torch.float16, False, 4e-6, 2e-3),
    (torch.float32, True, 1e-5, 1e-5),
    (torch.bfloat16, True, 1e-5, 2e-2),
]
case = pytest.mark.parametrize(("dtype", "linear", "close", "near"), CASES)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, the last of them ragged."""
    monkeypatch.setattr(linear_logits, "_TILE", 6 * 512)


def head(dtype, linear, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    if linear:
        return normal(*LEAD, 8), normal(VOCAB, 8), normal(VOCAB)
    x = 4 * normal(*LEAD, VOCAB)
    x[1, 0, 7:900] = float("-inf")
    return x, None, None


def number(*shape, seed=9, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


TEMPERATURE = torch.tensor([[0.7, 1.3], [1.0, 0.5], [2.0, 0.9]])
TARGET = torch.tensor([[5, 1299], [-1, 900], [300, 2]])
INDEX = torch.tensor([[5, 0], [7, 901], [300, 4]])


@case
def test_log_probs(dtype, linear, close, near):
    h, grad = head(dtype, linear), number(3, *LEAD, dtype=torch.float64)
    for options in ((None,) * 4, (INDEX, torch.tensor(0.5), 5.0, 3)):
        args = (*h, TARGET, *options)
        numbers = call("categorical.log_probs", "reference", *args, wide=True)
        assert_same(call("categorical.log_probs", "triton", *args), numbers, close, close)
        expected = call("categorical.log_probs_backward", "reference", grad, numbers[0], *args, wide=True)
        found = call("categorical.log_probs_backward", "triton", grad, numbers[0], *args)
        assert_same(found, expected, near, near)


def test_rows_without_a_target_are_not_read():
    x = torch.full((*LEAD, VOCAB), float("nan"))
    target = torch.full(LEAD, -1)
    numbers = call("categorical.log_probs", "triton", x, None, None, target, None, None, None, None)[0]
    assert torch.equal(numbers, torch.zeros(3, *LEAD, dtype=torch.float64))
    args = (x, None, None, target, None, None, None, None)
    grads = call("categorical.log_probs_backward", "triton", numbers + 1, numbers, *args)
    assert torch.equal(grads[0], torch.zeros_like(x))


@case
@pytest.mark.parametrize("temperature", [None, TEMPERATURE])
def test_kl(dtype, linear, close, near, temperature):
    p, q = head(dtype, linear), head(dtype, linear, 1)
    if not linear:
        # What p excludes costs nothing, whatever q says; what q excludes costs everything.
        q[0][1, 0, 7:900] = float("-inf")
        q[0][2, 0, 5], p[0][2, 1] = float("-inf"), float("nan")
    args, grad = (*p, *q, temperature), number(3, *LEAD, dtype=torch.float64)
    grad[1:] = 0  # the logsumexps are only saved
    numbers = call("categorical.kl", "reference", *args, wide=True)
    found = call("categorical.kl", "triton", *args)
    assert_same(found, numbers, 2 * close, 2 * close)
    sound = (slice(None), slice(2) if not linear else slice(None))
    p, q = (tuple(x if x is None or linear else x[:2] for x in h) for h in (p, q))
    args = (*p, *q, None if temperature is None else temperature[sound[1]])
    grad, numbers = grad[sound], numbers[0][sound]
    expected = call("categorical.kl_backward", "reference", grad, numbers, *args, wide=True)
    assert_same(call("categorical.kl_backward", "triton", grad, numbers, *args), expected, 2 * near, 2 * near)


@case
def test_expectation(dtype, linear, close, near):
    h, table, grad = head(dtype, linear), number(VOCAB, 7, dtype=dtype), number(*LEAD, 7, seed=3)
    for options in ((None,) * 3, (TEMPERATURE, 5.0, 3)):
        args = (*h, table, *options)
        expected = call("categorical.expectation", "reference", *args, wide=True)
        within = close if dtype == torch.float32 else near
        assert_same(call("categorical.expectation", "triton", *args), expected, within, within)
        grads = call("categorical.expectation_backward", "reference", grad, *expected, *args, wide=True)
        saved = (grad, expected[0].float(), expected[1])
        assert_same(call("categorical.expectation_backward", "triton", *saved, *args), grads, near, near)


def test_expectation_of_a_row_without_a_law_is_nan():
    x = torch.zeros(3, 600)
    x[0, 5], x[1] = float("nan"), float("-inf")
    mean, lse = call("categorical.expectation", "triton", x, None, None, torch.ones(600, 2), None, None, None)
    assert mean[:2].isnan().all()
    assert lse[0].isnan()
    assert lse[1] == float("-inf")
    torch.testing.assert_close(mean[2], torch.ones(2))


def test_rows_of_nothing():
    check_kl_of_nothing("triton")
    check_means_of_nothing("triton")


def test_what_is_summed_follows_the_largest_logit():
    """The largest logits grow from tile to tile, by more than exp can hold."""
    x = torch.linspace(-800, 0, VOCAB).expand(6, VOCAB)
    args = (x, None, None, torch.arange(VOCAB * 2.0).view(VOCAB, 2), None, None, None)
    expected = call("categorical.expectation", "reference", *args, wide=True)
    assert_same(call("categorical.expectation", "triton", *args), expected, 1e-5, 1e-5)


@case
def test_sample_expectation(dtype, linear, close, near):
    h, table = head(dtype, linear), number(VOCAB, 7, dtype=dtype)
    args = (*h, table, TEMPERATURE, 30.0, 3, INDEX, rng.key(5))
    mean, lse, tokens, numbers = call("categorical.sample_expectation", "triton", *args)
    expected = call("categorical.sample_expectation", "cpu", *args)
    assert_same((lse, tokens, numbers), expected[1:], 2e-5, 2e-5)
    within = close if dtype == torch.float32 else near
    assert_same((mean,), expected[:1], within, within)


def test_flat_rows_of_a_large_vocabulary_in_float16():
    """1/V lies among float16's subnormals; what is summed refers to the largest logit."""
    logits, table = torch.zeros(2, 126_464), torch.ones(126_464, 1, dtype=torch.float16)
    mean, _ = call("categorical.expectation", "triton", logits, None, None, table, None, None, None)
    torch.testing.assert_close(mean, torch.ones(2, 1), rtol=0, atol=1e-4)


def test_every_variant_was_launched():
    assert missed("categorical_losses", "categorical_expectation") == []
