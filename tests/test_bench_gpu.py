"""The GPU benchmarks' cases, made small and run once where there is no GPU, and what is written of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import DEVICE
from triton_calls import quiet

import dlcore
from bench import gpu, peers_head
from bench.gpu_cases import CASES, Case, Work

CEILING = {"read": 4e12, "copy": 2e12, "bfloat16": 8e14}


@quiet
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_provider_runs(case):
    """dlcore's on Triton, too, with gradients that are as large as the inputs."""
    work = case.build(DEVICE, True)
    assert max(work.reads, work.writes, work.flops) > 0
    for provider, call in work.calls.items():
        if provider.startswith("dlcore"):
            with dlcore.use_backend("triton"):
                call()
        if provider != "compile":
            call()


def test_a_loss_by_chunks_of_rows():
    """Its gradients are autograd's; the last chunk is ragged."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (11, 64))
    target = torch.randint(64, (11,), generator=generator)
    assert peers_head.rows_of_a_chunk(11, 16, 64) == 4
    loss = peers_head.cross_entropy(hidden, weight, target)
    expected = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    found = peers_head.chunked_cross_entropy(hidden.detach(), weight.detach(), target)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-5)


def test_shares_of_what_may_bind():
    assert gpu.shares(Work({}, reads=1 << 30), 1.0, CEILING) == {"read": (1 << 30) / 4e12}
    assert gpu.shares(Work({}, reads=3, writes=1), 1.0, CEILING) == {"copy": 4 / 2e12}
    assert gpu.shares(Work({}, reads=8, flops=16), 2.0, CEILING) == {"read": 1e-12, "matrix": 1e-14}


def row(case: str, provider: str, seconds: float, **more: Any) -> gpu.Row:
    return {"case": case, "provider": provider, "seconds": seconds, "shares": {"read": 0.5}, **more}


def test_the_days_file_keeps_other_cases(tmp_path):
    """Each run's versions and ceilings stay as long as one of its rows does."""
    path = tmp_path / "gpu.json"
    gpu.merge(path, "first", {"cuda": "1"}, [row("a", "dlcore", 1.0), row("a", "eager", 2.0)])
    gpu.merge(path, "first", {"cuda": "1"}, [row("b", "dlcore", 3.0)])
    gpu.merge(path, "second", {"cuda": "2"}, [row("a", "dlcore", 4.0)])
    found = json.loads(path.read_text())
    assert [(r["case"], r["seconds"], r["run"]) for r in found["results"]] == [
        ("b", 3.0, "first"),
        ("a", 4.0, "second"),
    ]
    assert found["runs"] == {"first": {"cuda": "1"}, "second": {"cuda": "2"}}
    gpu.merge(path, "second", {"cuda": "2"}, [row("b", "dlcore", 5.0)])
    assert json.loads(path.read_text())["runs"].keys() == {"second"}


def test_a_line_of_the_table():
    said = gpu.line(row("bits.step", "dlcore", 1e-5, host_us=12.3))
    assert said.split() == ["bits.step", "dlcore", "10.0", "50%", "12.3"]
    assert len(said) == len(gpu.HEADER) == len(gpu.line(row("bits.step", "eager", 1e-5)))


def test_the_hosts_time_is_that_of_a_call():
    """A call whose work is done at once takes what it takes to return."""
    made: list[None] = []
    assert 0 < gpu.host_seconds(lambda: made.append(None), rounds=3, calls=5) < 1
    assert len(made) == 15


def test_versions():
    assert {"dlcore", "torch", "triton"} <= gpu.versions().keys()


def test_a_run(tmp_path, monkeypatch, capsys):
    """Two small cases as if there were a GPU: the table, and the file after each."""

    def small(case: Case) -> Case:
        def build(*_: object) -> Work:
            work = case.build(DEVICE, True)
            return work._replace(calls={k: c for k, c in work.calls.items() if k != "compile"})

        return Case(case.name, build)

    states: list[int] = []

    def seconds(call: gpu.Call) -> float:
        call()
        states.extend(len(json.loads(p.read_text())["results"]) for p in tmp_path.iterdir())
        return 1.0

    for name, value in (("is_available", lambda: True), ("get_device_name", lambda: "No GPU")):
        monkeypatch.setattr(torch.cuda, name, value)
    for name, value in (
        ("CASES", [small(c) for c in CASES]),
        ("RESULTS", tmp_path),
        ("ceilings", lambda: CEILING),
    ):
        monkeypatch.setattr(gpu, name, value)
    for name, value in (("seconds", seconds), ("graph_of", lambda call: call), ("_wait", lambda: None)):
        monkeypatch.setattr(gpu, name, value)
    assert gpu.main(["sphere.step", "vmf"]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("no-gpu-")
    found = json.loads(path.read_text())
    providers = [(r["case"], r["provider"]) for r in found["results"]]
    assert providers[:2] == [("sphere.step", "dlcore"), ("sphere.step", "dlcore, graph")]
    assert ("vmf.sample", "eager") in providers
    timed = ("dlcore", "dlcore, cuda")
    assert all(("host_us" in r) == (r["provider"] in timed) for r in found["results"])
    assert states
    assert "vmf.sample" in capsys.readouterr().out


@pytest.mark.skipif(DEVICE == "cuda", reason="says that it needs a GPU")
def test_without_a_gpu(capsys):
    assert gpu.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
