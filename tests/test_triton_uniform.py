"""Triton's uniform-state NELBO against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from test_triton_categorical_losses import LEAD, VOCAB, case, head, number
from triton_calls import assert_same, call, quiet
from triton_variants import missed

from dlcore.triton import linear_logits

pytestmark = [quiet, pytest.mark.usefixtures("poisoned")]

Z = torch.tensor([[5, 1299], [7, 900], [300, 2]])
X = torch.tensor([[5, 3], [7, 901], [1, 2]])
ALPHA = torch.tensor([[1e-6, 0.3], [0.5, 0.999], [0.9, 0.01]], dtype=torch.float64)
SLOPE = torch.tensor(-1.3, dtype=torch.float64)


@case
@pytest.mark.parametrize("shift", [None, torch.tensor(0.7)])
def test_nelbo(dtype, linear, close, near, shift, monkeypatch):
    monkeypatch.setattr(linear_logits, "_TILE", 6 * 512)
    h = head(dtype, linear) if linear else (4 * number(*LEAD, VOCAB, dtype=dtype), None, None)
    args, grad = (*h, Z, X, ALPHA, SLOPE, shift), number(*LEAD, seed=3)
    loss, saved = call("uniform.nelbo", "reference", *args, wide=True)
    found = call("uniform.nelbo", "triton", *args)
    assert_same(found[1:], (saved,), close, close)
    # The loss is a difference of numbers up to V·log1p(c): as near as the CPU's.
    cpu = call("uniform.nelbo", "cpu", *args)[0].double()
    assert ((found[0] - loss).abs() <= 4 * (cpu - loss).abs() + 2e-5 * loss.abs() + 1e-5).all()
    expected = call("uniform.nelbo_backward", "reference", grad, saved, *args, wide=True)
    assert_same(call("uniform.nelbo_backward", "triton", grad, saved, *args), expected, 2 * near, 2 * near)


def test_every_variant_was_launched():
    assert missed("uniform") == []
