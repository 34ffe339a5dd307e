"""Keyed noise on the CUDA kernels: the stream's bits, both precisions, keys of any strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import DEVICE
from test_rng import FROZEN

import dlcore
from dlcore import rng

NAMES = ("uniform", "normal", "gumbel")


@pytest.fixture(autouse=True)
def on_cuda(cuda_kernels: None, guarded: None) -> Iterator[None]:
    with dlcore.use_backend("cuda"):
        yield


def _elsewhere(name: str, keys: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    with dlcore.use_backend("cpu"):
        return getattr(rng, name)(keys, shape, dtype=dtype)


def _keys(*shape: int) -> torch.Tensor:
    with dlcore.use_backend("cpu"):
        return rng.split(rng.key(-3, 2**62), shape)


def test_stream_v1_is_frozen() -> None:
    key = rng.key(7, 3, device=DEVICE)
    assert rng.fold_in(key, 5).tolist() == [7, FROZEN["fold_in"]]
    for name in NAMES:
        drawn = getattr(rng, name)(key, 3, dtype=torch.float64).cpu()
        expected = torch.tensor(FROZEN[name], dtype=torch.float64)
        torch.testing.assert_close(drawn, expected, rtol=1e-14, atol=0)


# Numbers are written four at a time, unless several keys have a number that is no multiple of it.
@pytest.mark.parametrize("shape", [(), (1,), (2,), (5, 57), (600,), (0,)], ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_as_on_the_cpu(
    name: str, dtype: torch.dtype, lead: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    keys = _keys(*lead) if lead else rng.key(-3, 2**62)
    drawn = getattr(rng, name)(keys.to(DEVICE), shape, dtype=dtype).cpu()
    expected = _elsewhere(name, keys, shape, dtype)
    assert drawn.shape == expected.shape
    if name == "uniform":
        assert torch.equal(drawn, expected)
    else:  # but for the last digit of a logarithm or a sine
        close = {"rtol": 2e-15 if dtype == torch.float64 else 6e-8, "atol": 1e-12}
        torch.testing.assert_close(drawn, expected, **close)


def test_normals_are_the_doubles_of_the_cpu() -> None:
    """Of relative error 2e-15, next to their zeros absolute; so rounded they are all but surely the same."""
    wide = _elsewhere("normal", _keys(3), (20_001,), torch.float64)
    drawn = rng.normal(_keys(3).to(DEVICE), 20_001, dtype=torch.float64).cpu()
    torch.testing.assert_close(drawn, wide, rtol=2e-15, atol=2e-15)
    assert torch.equal(rng.normal(_keys(3).to(DEVICE), 20_001).cpu(), wide.float())


def test_more_pairs_than_a_grid_has_threads() -> None:
    drawn = rng.uniform(_keys(3).to(DEVICE), 300_001).cpu()
    assert torch.equal(drawn, _elsewhere("uniform", _keys(3), (300_001,), torch.float32))


def test_a_result_that_does_not_lie_at_a_multiple_of_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    room = torch.full((12,), torch.nan, dtype=torch.float64, device=DEVICE)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: room[1:11])
    rng.normal(rng.key(1, device=DEVICE), 10, dtype=torch.float64)
    monkeypatch.undo()
    expected = _elsewhere("normal", rng.key(1), (10,), torch.float64)
    torch.testing.assert_close(room[1:11].cpu(), expected, rtol=2e-15, atol=1e-12)
    assert room[[0, 11]].isnan().all()


def _one_key() -> torch.Tensor:
    return rng.key(-3, 2**62)


@pytest.mark.parametrize(
    "make",
    [
        lambda: _keys(300).unsqueeze(1).expand(300, 2, 2),
        lambda: _one_key().expand(300, 2, 2),
        lambda: torch.stack((_one_key(), _one_key()), 1)[:, 0].expand(300, 2, 2),
    ],
    ids=["per row", "shared", "shared, its numbers apart"],
)
def test_fold_in_of_strided_keys(make: Callable[[], torch.Tensor]) -> None:
    keys, data = make(), torch.arange(-300, 300).view(300, 2)
    with dlcore.use_backend("cpu"):
        expected = rng.fold_in(keys, data)
    assert torch.equal(rng.fold_in(keys.to(DEVICE), data.to(DEVICE)).cpu(), expected)
    assert dlcore.last_backend("rng.fold_in") == "cuda"
