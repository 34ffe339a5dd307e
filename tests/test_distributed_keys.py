"""A batch split over ranks draws what one process would."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

import dlcore
from dlcore import bits, categorical, distributed, rng, sphere
from dlcore.process import absorbing_uniform, masked, uniform

B, L, V, D = 5, 4, 300, 8
KEY = rng.key(20261126)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LOGITS, Z = normal(B, L, V), torch.randint(0, V, (B, L), generator=torch.Generator().manual_seed(1))
MASKED = torch.where(Z % 2 == 0, V - 1, Z)
POINTS = sphere.normalize(normal(B, L, D))
#: Draws of rows [part] under keys.
DRAWS: dict[str, Any] = {
    "sample": lambda part, key: categorical.sample(LOGITS[part], key=key).tokens,
    "top_k": lambda part, key: categorical.sample(LOGITS[part], top_k=9, key=key).tokens,
    "uniform.corrupt": lambda part, key: uniform.corrupt(Z[part], 0.5, V, key=key),
    "uniform.step": lambda part, key: uniform.step(LOGITS[part], Z[part], 0.3, 0.6, key=key),
    "masked.corrupt": lambda part, key: masked.corrupt(Z[part], 0.5, V - 1, key=key),
    "masked.step": lambda part, key: masked.step(LOGITS[part], MASKED[part], 0.3, 0.6, V - 1, key=key),
    "absorbing_uniform.corrupt": lambda part, key: absorbing_uniform.corrupt(Z[part], 0.5, V, key=key)[0],
    "bits.corrupt": lambda part, key: bits.corrupt(normal(B, L, 6)[part], 0.5, key=key),
    "bits.step": lambda part, key: bits.step(normal(B, L, 6)[part], None, 0.5, 0.3, gamma_next=0.1, key=key)[
        0
    ],
    "vmf.sample": lambda part, key: sphere.vmf.sample(POINTS[part], 30.0, key=key),
    "sphere.correct": lambda part, key: sphere.correct(POINTS[part], normal(B, L, D)[part], 0.01, key=key),
    "rng.normal": lambda part, key: rng.normal(key, 3),
}
#: Those in which a shared key is folded with the row by the op itself.
SHARED = ("sample", "top_k", "bits.corrupt", "bits.step", "vmf.sample", "sphere.correct")


@pytest.mark.parametrize(
    "part", [slice(0, 2), slice(2, 5), slice(3, 3), slice(None), slice(-1, None), slice(4, 2)]
)
@pytest.mark.parametrize("lead", [(B, L), (B,), (B, 2, 3), B])
def test_keys_are_those_of_the_whole(part: slice, lead: Any) -> None:
    keys = distributed.row_keys(KEY, lead, part)
    assert torch.equal(keys, rng.split(KEY, lead)[part])
    assert torch.equal(distributed.row_keys(rng.split(KEY, lead), lead, part), keys)


@pytest.mark.parametrize("name", DRAWS)
def test_parts_draw_the_whole(name: str) -> None:
    parts = [slice(0, 2), slice(2, 2), slice(2, 5)]
    drawn = torch.cat([DRAWS[name](part, distributed.row_keys(KEY, (B, L), part)) for part in parts])
    whole = slice(None)
    assert torch.equal(drawn, DRAWS[name](whole, rng.split(KEY, (B, L))))
    assert not torch.equal(drawn, DRAWS[name](whole, rng.split(rng.key(1), (B, L))))
    if name in SHARED:
        assert torch.equal(drawn, DRAWS[name](whole, KEY))


def draw_here(group: dist.ProcessGroup) -> dict[str, Tensor]:
    part = distributed.rows(B, group)
    return {name: draw(part, distributed.row_keys(KEY, (B, L), group)) for name, draw in DRAWS.items()}


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_draw_the_whole(ranks4: ranks.Ranks, size: int) -> None:
    found = ranks4.run(size, draw_here)
    for name, draw in DRAWS.items():
        whole = draw(slice(None), rng.split(KEY, (B, L)))
        assert torch.equal(torch.cat([f[name] for f in found]), whole), name


def chunks(group: dist.ProcessGroup) -> bool:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for batch in range(9):
        x = torch.arange(batch)
        parts = [*x.chunk(size), *[x[:0]] * size] if batch else [x] * size
        if not torch.equal(x[distributed.rows(batch, group)], parts[rank]):
            return False
    return True


def test_rows_are_torch_chunk_s(ranks4: ranks.Ranks) -> None:
    assert all(ranks4.run(3, chunks) + ranks4.run(4, chunks))


def refusals(group: dist.ProcessGroup) -> list[str]:
    said = []
    for arguments in ((-1, group), (2.0, group), (2, 3)):
        try:
            distributed.rows(*arguments)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_bad_input(ranks4: ranks.Ranks) -> None:
    (said,) = ranks4.run(1, refusals)
    assert said[0] == "ValueError: distributed.rows: batch must be at least 0, got -1"
    assert said[1].startswith("TypeError: distributed.rows: batch must be an int")
    assert said[2].startswith("TypeError: distributed.rows: group must be a ProcessGroup or a DeviceMesh")
    for part, lead, key, error in (
        (slice(0, 4, 2), (B, L), KEY, "part must be a slice without a step"),
        (slice(0, 4), (), KEY, "lead must have a first dimension"),
        (slice(0, 4), (B, L), rng.split(KEY, B), "key must have shape"),
        (slice(0, 4), (B, -1), KEY, "shape must not be negative"),
    ):
        with pytest.raises(ValueError, match=error):
            distributed.row_keys(key, lead, part)
    with pytest.raises(TypeError, match="key must be an int64 Tensor"):
        distributed.row_keys(torch.zeros(2), (B, L), slice(0, 1))


def test_dlcore_imports_no_distributed() -> None:
    from conftest import run_python

    there = "print('dlcore.distributed' in sys.modules);"
    code = f"import sys, dlcore; {there} dlcore.distributed.rows; {there}"
    assert run_python(code).split() == ["False", "True"]
    assert "distributed" in dir(dlcore)


def test_a_torch_without_distributed() -> None:
    from conftest import run_python

    code = "import torch, dlcore; torch.distributed.is_available = lambda: False; dlcore.distributed"
    assert "ImportError: dlcore.distributed needs torch.distributed" in run_python(code)
