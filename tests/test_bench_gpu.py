"""The GPU benchmarks' cases, made small and run once where there is no GPU."""

from __future__ import annotations

import pytest
from conftest import DEVICE

from bench import gpu


@pytest.mark.parametrize("case", gpu.CASES, ids=lambda case: case.name)
def test_every_provider_runs(case):
    work = case.build(DEVICE, True)
    assert work.bytes > 0
    for provider, call in work.calls.items():
        if provider != "compile":
            call()


@pytest.mark.skipif(DEVICE == "cuda", reason="says that it needs a GPU")
def test_without_a_gpu(capsys):
    assert gpu.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
