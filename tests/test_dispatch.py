"""Backends: which one runs, why the others do not, and what is said about it."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable

import pytest
import torch
from conftest import DEVICE, run_python
from torch._subclasses import FakeTensorMode

import dlcore
from dlcore import _C, _dispatch, categorical, rng, sphere
from dlcore._dispatch import Preference
from dlcore._registry import CUDA, PREFERRED, REFERENCE, TRITON
from dlcore.cpu import CAPABILITIES, choose_capability

X = torch.zeros(2, 5)


def test_priority_then_variable_then_context(monkeypatch):
    categorical.stats(X)
    assert dlcore.last_backend("categorical.stats") == "cpu"
    monkeypatch.setattr(_dispatch, "_variable", "reference")
    categorical.stats(X)
    assert dlcore.last_backend("categorical.stats") == "reference"
    with dlcore.use_backend("cpu"):
        categorical.stats(X)
        assert dlcore.last_backend("categorical.stats") == "cpu"
    categorical.stats(X)
    assert dlcore.last_backend("categorical.stats") == "reference"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["cpu", "triton", "reference"])
@pytest.mark.parametrize(
    ("op", "function"),
    [
        ("categorical.log_probs", lambda x: categorical.cross_entropy(x, torch.tensor([1, 4]).to(x.device))),
        ("categorical.kl", lambda x: categorical.kl(x, x.detach() + 1)),
        ("sphere.normalize", sphere.normalize),
    ],
)
def test_a_gradient_takes_the_backend_of_its_forward_pass(op, function, name):
    """In another thread, where no context is, as in autograd's own; and under another choice."""
    x = torch.randn(2, 5, device=DEVICE if name == "triton" else "cpu", requires_grad=True)
    other = "cpu" if name == "reference" else "reference"

    def in_a_thread(call: Callable[[], None]) -> None:
        worker = threading.Thread(target=call)
        worker.start()
        worker.join()

    def elsewhere(call: Callable[[], None]) -> None:
        with dlcore.use_backend(other):
            call()

    for run in (in_a_thread, elsewhere):
        with dlcore.use_backend(name):
            total = function(x).sum()
        x.grad, _dispatch._last[f"{op}_backward"] = None, other
        run(total.backward)
        assert x.grad is not None
        assert dlcore.last_backend(f"{op}_backward") == name


def test_without_a_choice_around_the_forward_pass_the_backward_call_chooses():
    x = torch.randn(2, 5, requires_grad=True)
    total = sphere.normalize(x).sum()
    with dlcore.use_backend("reference"):
        total.backward()
    assert dlcore.last_backend("sphere.normalize") == "cpu"
    assert dlcore.last_backend("sphere.normalize_backward") == "reference"


def test_a_request_that_cannot_run_raises_with_every_reason():
    with dlcore.use_backend("cpu"), pytest.raises(NotImplementedError) as error:
        categorical.stats(X.double())
    text = str(error.value)
    assert "backend 'cpu' was asked for and cannot run" in text
    assert "cpu: takes float32, bfloat16, float16, got float64" in text
    assert "reference: can run" in text


def test_a_fallback_is_logged_once(caplog):
    _dispatch._logged.clear()
    with caplog.at_level("INFO", logger="dlcore"):
        categorical.stats(X.double())
        categorical.stats(X.double())
    assert caplog.text.count("categorical.stats: cpu cannot run") == 1
    assert dlcore.last_backend("categorical.stats") == "reference"


def test_questions():
    assert dlcore.backends() == ["cpu", "triton", "cuda", "reference"]
    assert dlcore.backends("attention.decode") == {
        "cpu": [],
        "triton": [],
        "cuda": ["not written for this op"],
        "reference": [],
    }
    assert "chosen: cpu" in dlcore.explain("categorical.kl", X, X)
    head = dlcore.LinearLogits(X.double(), X.double())
    assert "chosen: reference" in dlcore.explain("categorical.sample", head, temperature=0.5)
    assert "chosen: reference" in dlcore.explain("categorical.sample", key=rng.key(0), logits=X.double())
    assert set(_dispatch.SERVED_BY.values()) <= set(_dispatch.ops())
    with dlcore.use_backend("cpu"):
        assert "would raise NotImplementedError" in dlcore.explain("categorical.stats", X.double())


BAD = [
    (
        lambda: dlcore.use_backend("gpu").__enter__(),
        r"dlcore.use_backend: backend must be one of cpu, triton, cuda, reference",
    ),
    (
        lambda: dlcore.last_backend("stats"),
        r"dlcore: op must be one of .*categorical.expectation, .*, got 'stats'",
    ),
    (
        lambda: dlcore.last_backend("uniform.step"),
        r"dlcore: uniform.step has no op of its own, ask for categorical.sample_mixture",
    ),
    (lambda: dlcore.backends("nothing"), r"dlcore: op must be one of"),
    (lambda: dlcore.explain("nothing", X), r"dlcore: op must be one of"),
    (lambda: choose_capability("sse9"), r"DLCORE_CPU_CAPABILITY: must be one of avx512, avx2, baseline"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_tensor_is_taken_by_the_backend_of_its_device(caplog):
    """A CPU tensor never falls to Triton by itself, not even where its interpreter could run."""
    _dispatch._logged.clear()
    key = torch.zeros(2, dtype=torch.int64)
    with caplog.at_level("INFO", logger="dlcore"):
        assert _dispatch.choose("rng.fold_in", (key, key[0])) == "cpu"
        assert _dispatch.choose("categorical.stats", (X.double(),)) == "reference"
        assert _dispatch.choose("rng.fold_in", (key.to("meta"), key[0].to("meta"))) == "reference"
    assert caplog.text.count("cannot run") == 1
    with dlcore.use_backend("triton"):
        rng.fold_in(key, 1)
        assert dlcore.last_backend("rng.fold_in") == "triton"


def test_every_op_stands_in_triton():
    assert {op for ops in TRITON.values() for op in ops} == REFERENCE.keys()


@pytest.fixture
def on_cuda():
    """A tensor of a CUDA device, which need not be there, and backends that all can run."""
    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        for op in ("bits.step", "attention.decode"):
            able = {name: (function, lambda *_: []) for name, (function, _) in _table(op).items()}
            patch.setitem(_dispatch._implementations, op, able)
        yield torch.empty(2, 5, device="cuda")


def _table(op):
    return _dispatch._implementations[op]


def test_what_goes_first_on_a_device_is_said_and_can_be_turned_round(on_cuda, monkeypatch):
    report = dlcore.explain("bits.step", on_cuda)
    assert "\n  triton before cuda: 1.2 times as fast on an H200\n" in report
    assert report.endswith("chosen: triton")
    turned = Preference("cuda", "triton", "1.2 times as fast")
    monkeypatch.setitem(_dispatch._preferences, "bits.step", turned)
    report = dlcore.explain("bits.step", on_cuda)
    assert "\n  cuda before triton: 1.2 times as fast\n" in report
    assert report.endswith("chosen: cuda")
    # What has one kind of kernels, or is elsewhere, prefers nothing.
    assert "before" not in dlcore.explain("attention.decode", on_cuda)
    assert _dispatch.choose("attention.decode", (on_cuda,)) == "triton"
    assert "before" not in dlcore.explain("categorical.stats", X)


def test_rows_longer_than_gpus_count_are_refused():
    """Read past 32 bits they would be read out of bounds."""
    from dlcore.cuda import tensors
    from dlcore.triton import launch

    longest, longer = (torch.empty(1, 2**31 - 2**20 + n, device="meta") for n in (0, 1))
    for reasons in (launch.reasons, tensors.reasons):
        assert not any("columns" in r for r in reasons(longest))
        assert any(r == "takes at most 2146435072 columns, got 2146435073" for r in reasons(longer))


def test_every_op_with_both_kinds_of_kernels_has_a_preference():
    assert {op for ops in CUDA.values() for op in ops} == PREFERRED.keys() <= REFERENCE.keys()
    assert all({p.first, p.then} == {"triton", "cuda"} for p in PREFERRED.values())


def test_without_triton_or_its_interpreter():
    code = (
        "import sys, dlcore; assert 'triton' not in sys.modules\n"
        "import importlib.util as u; find = u.find_spec\n"
        "from dlcore.triton import launch\n"
        "print(dlcore.backends('rng.fold_in')['triton'], dlcore.explain('rng.fold_in', dlcore.rng.key(0)))\n"
        "launch.find_spec = lambda name: None\n"
        "print(dlcore.backends('rng.fold_in')['triton'])\n"
    )
    out = run_python(code, TRITON_INTERPRET="")
    assert "takes CUDA tensors, got cpu" in out
    assert "chosen: cpu" in out
    assert "needs Triton: pip install triton" in out


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("reference", "reference"),
        ("tpu", "DLCORE_BACKEND: backend must be one of cpu, triton, cuda, reference, got 'tpu'"),
    ],
)
def test_the_backend_variable(value, said):
    code = """if True:
        import torch, dlcore
        try:
            dlcore.categorical.stats(torch.zeros(2, 5))
            print(dlcore.last_backend("categorical.stats"))
        except ValueError as error:
            print(error)
    """
    assert run_python(code, DLCORE_BACKEND=value).strip() == said


@pytest.mark.parametrize("name", CAPABILITIES)
def test_the_capability_variable(name):
    out = run_python("import dlcore; print(dlcore._C.capability())", DLCORE_CPU_CAPABILITY=name)
    assert out.strip() == name or f"got '{name}'" in out


def test_without_the_compiled_module_the_reference_runs():
    code = (
        "import sys; sys.modules['dlcore._C'] = None\n"
        "import torch, dlcore\n"
        "dlcore.categorical.stats(torch.zeros(2, 5))\n"
        "print(dlcore.last_backend('categorical.stats'), dlcore.backends('categorical.stats')['cpu'])"
    )
    out = run_python(code)
    assert out.startswith("reference")
    assert "can't be imported" in out


def test_kernels_run_in_torchs_own_pool():
    """No second OpenMP pool competes with torch's for the cores."""
    with open("/proc/self/maps") as maps:
        loaded = {line.split("/")[-1].strip() for line in maps if "libgomp" in line or "libomp" in line}
    assert _C.parallel_runtime() in loaded


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
def test_another_openmp_loaded_first_is_not_taken_for_torchs(tmp_path):
    """What scikit-learn ships, say: the runtime is the one that torch links."""
    decoy = tmp_path / "libgomp-decoy.so"
    source = 'extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) { __builtin_trap(); }'
    build = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(decoy)]
    subprocess.run(build, input=source, text=True, check=True)
    code = (
        f"import ctypes; ctypes.CDLL({str(decoy)!r})\n"
        "import torch, dlcore; torch.set_num_threads(2)\n"
        "dlcore.categorical.sample(torch.zeros(64, 5000)); print(dlcore._C.parallel_runtime())"
    )
    out = run_python(code).strip()
    assert "gomp" in out or "omp" in out
    assert "decoy" not in out


def test_kernels_release_the_gil():
    """A Python thread goes on while a kernel runs."""
    logits = torch.zeros(3000, 50_000, dtype=torch.bfloat16)
    ticks, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0.0005)

    counter = threading.Thread(target=count)
    counter.start()
    before = ticks[0]
    categorical.sample(logits, key=rng.key(0))
    during = ticks[0] - before
    stop.set()
    counter.join()
    assert during >= 3
