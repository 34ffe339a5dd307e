"""LinearLogits: the same results as materialised logits, and never a tensor of their size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import run_python
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dlcore
from dlcore import LinearLogits, categorical, rng
from dlcore.cpu import categorical as compiled
from dlcore.cpu import linear_logits, uniform
from dlcore.process import masked
from dlcore.process import uniform as uniform_process

ROWS, VOCAB, WIDTH = (4, 75), 40_000, 24
KEY = rng.key(3)


def make(dtype: torch.dtype = torch.float32, bias: bool = True) -> LinearLogits:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(*ROWS, WIDTH, generator=generator),
        torch.randn(VOCAB, WIDTH, generator=generator),
    )
    shift = torch.randn(VOCAB, generator=generator).to(dtype) if bias else None
    return LinearLogits((hidden / 2).to(dtype), weight.to(dtype), shift)


Z = torch.randint(0, VOCAB, ROWS, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_draws_equal_those_of_materialised_logits(dtype, bias):
    """Tiles of 3,328 tokens: each row's scan is merged from several."""
    head = make(dtype, bias)
    assert linear_logits.tile_width(ROWS[0] * ROWS[1]) < VOCAB
    dense = head.materialize()
    calls: list[Callable[[Any], Tensor]] = [
        lambda a: (
            categorical.sample(a, Z, shift=2.0, temperature=0.9, softcap=20.0, exclude=3, key=KEY).tokens
        ),
        lambda a: categorical.sample(a, top_k=20, top_p=0.8, key=KEY).tokens,
        lambda a: categorical.stats(a).argmax,
        lambda a: categorical.sample_mixture(a, Z, torch.tensor([1.0, 3, 0.2, 3, 0.8, 0]), key=KEY),
        lambda a: uniform_process.step(a, Z, 0.5, 0.7, key=KEY),
        lambda a: masked.step(a, torch.full(ROWS, 7), 0.2, 0.9, 7, key=KEY),
        lambda a: categorical.sample_expectation(a, head.weight, softcap=20.0, exclude=3, key=KEY)[0].tokens,
    ]
    for call in calls:
        assert (call(head) == call(dense)).double().mean() == 1
    for a, b in zip(categorical.stats(head, Z), categorical.stats(dense, Z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("linear", [True, False])
def test_a_draw_with_a_soft_embedding_is_both(dtype, linear):
    """The same draw and statistics as `sample`, the same mean as `expectation`."""
    head, table = make(dtype), torch.randn(VOCAB, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    logits = head if linear else head.materialize()
    row: dict[str, Any] = {"temperature": torch.linspace(0.5, 2, 75), "softcap": 9.0, "exclude": 3}
    draw, mean = categorical.sample_expectation(logits, table, Z, key=KEY, **row)
    assert dlcore.last_backend("categorical.sample_expectation") != "reference"
    alone = categorical.sample(logits, Z, key=KEY, **row)
    assert torch.equal(draw.tokens, alone.tokens)
    assert torch.equal(draw.stats.argmax, alone.stats.argmax)
    torch.testing.assert_close(draw.logprob, alone.logprob, rtol=2e-6, atol=2e-6)
    for a, b in zip(draw.stats, alone.stats, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    expected = categorical.expectation(logits, table, **row)
    assert mean.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)
    assert categorical.sample_expectation(logits, table, key=KEY)[0].stats.index_logprob is None


def test_a_soft_embedding_follows_a_rising_maximum():
    """The largest logit grows from tile to tile, by more than float32's exp can hold."""
    logits = torch.linspace(-300, 300, VOCAB).expand(300, VOCAB) + torch.arange(300.0).unsqueeze(-1)
    table = torch.stack([torch.ones(VOCAB), torch.arange(float(VOCAB))], -1)
    _, mean = categorical.sample_expectation(logits, table, key=KEY)
    exact = torch.softmax(logits.double(), -1) @ table.double()
    torch.testing.assert_close(mean.double(), exact, rtol=1e-5, atol=0)


def test_a_soft_embedding_of_rows_that_begin_or_end_with_nothing():
    """Whole tiles of -inf weigh nothing."""
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[0, : VOCAB // 2], logits[1, VOCAB // 2 :], logits[2] = -torch.inf, -torch.inf, -torch.inf
    logits, table = logits.repeat(100, 1), torch.arange(float(VOCAB)).unsqueeze(-1)
    _, mean = categorical.sample_expectation(logits, table, key=KEY)
    exact = torch.softmax(logits.double(), -1) @ table.double()
    torch.testing.assert_close(mean.double(), exact, rtol=1e-5, atol=0, equal_nan=True)
    assert mean[2].isnan()


class Largest(TorchDispatchMode):
    """The largest tensor that any torch operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def test_logits_never_exist():
    head = make()
    triple = (head.hidden, head.weight, head.bias)
    numbers, grad = torch.zeros(3, *ROWS), torch.ones(3, *ROWS)
    table = torch.zeros(VOCAB, 8)
    level, slope = torch.full((), 0.5, dtype=torch.float64), torch.full((), -1.0, dtype=torch.float64)
    saved = torch.zeros(5, *ROWS, dtype=torch.float64)
    none = (None,) * 3
    five, most = torch.tensor(5), torch.tensor(0.9)
    mixture = torch.tensor([1.0, 1, 0, 1, 1, 0]).double()
    out, logsumexp = torch.ones(*ROWS, 8), torch.zeros(ROWS, dtype=torch.float64)
    calls = [
        lambda: compiled.stats(*triple, None, None, None, None, None),
        lambda: compiled.sample(*triple, *none, None, None, five, most, None, KEY),
        lambda: compiled.sample_mixture(*triple, Z, mixture, -1, *none, None, KEY),
        lambda: compiled.log_probs(*triple, Z, *none, None),
        lambda: compiled.log_probs_backward(grad, numbers, *triple, Z, *none, None),
        lambda: compiled.kl(*triple, *triple, None),
        lambda: compiled.kl_backward(grad, numbers, *triple, *triple, None),
        lambda: compiled.expectation(*triple, table, *none),
        lambda: compiled.sample_expectation(*triple, table, *none, Z, KEY),
        lambda: compiled.expectation_backward(out, out, logsumexp, *triple, table, *none),
        lambda: uniform.nelbo(*triple, Z, Z, level, slope, None),
        lambda: uniform.nelbo_backward(grad[0], saved, *triple, Z, Z, level, slope, None),
    ]
    for call in calls:
        with Largest() as seen:
            call()
        assert seen.numel < Z.numel() * VOCAB / 4
    with Largest() as seen:
        head.materialize()
    assert seen.numel >= Z.numel() * VOCAB


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nelbo_gradients_equal_those_of_materialised_logits(dtype):
    head = make(dtype)
    x = torch.where(torch.rand(ROWS, generator=torch.Generator().manual_seed(2)) < 0.5, Z, (Z + 1) % VOCAB)
    leaves = [t.detach().clone().requires_grad_() for t in (head.hidden, head.weight, head.bias)]
    loss = uniform_process.nelbo(LinearLogits(*leaves), Z, x, 0.4, -1.0)
    loss.sum().backward()
    exact = [t.detach().double().requires_grad_() for t in leaves]
    with dlcore.use_backend("reference"):
        truth = uniform_process.nelbo(LinearLogits(*exact), Z, x, 0.4, -1.0)
        truth.sum().backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    for mine, own in zip(leaves, exact, strict=True):
        assert mine.grad is not None
        assert own.grad is not None
        scale = own.grad.abs().max().item()
        allowed = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
        assert (mine.grad.double() - own.grad).abs().max().item() <= allowed * scale


def test_a_head_that_is_being_trained_can_be_sampled(backend):
    """No no_grad needed around draws; they carry no gradient."""
    weight = torch.randn(300, WIDTH).requires_grad_()
    head = LinearLogits(torch.randn(2, WIDTH, requires_grad=True), weight)
    z = torch.zeros(2, dtype=torch.int64)
    for result in (
        categorical.sample(head).logprob,
        categorical.stats(head).entropy,
        uniform_process.step(head, z, 0.5, 0.7),
    ):
        assert not result.requires_grad


def test_shape_device_dtype_and_gaps():
    head = make(torch.bfloat16)
    assert head.shape == (*ROWS, VOCAB)
    assert head.dtype == torch.bfloat16
    assert head.device.type == "cpu"
    single = LinearLogits(torch.randn(WIDTH), torch.randn(300, WIDTH))
    assert categorical.sample(single).tokens.shape == ()
    none = LinearLogits(torch.zeros(0, WIDTH), torch.randn(300, WIDTH))
    assert categorical.sample(none).tokens.shape == (0,)


H, W = torch.zeros(2, 4), torch.zeros(5, 4)
BAD = [
    (lambda: LinearLogits(H, W[:, :3]), ValueError, r"LinearLogits: weight must be \(V, D\) for hidden"),
    (lambda: LinearLogits(H, W[0]), ValueError, r"LinearLogits: weight must be"),
    (
        lambda: LinearLogits(H, W, torch.zeros(4)),
        ValueError,
        r"LinearLogits: bias must be \(5,\), got float32 \(4,\)",
    ),
    (
        lambda: LinearLogits(H, W.bfloat16()),
        TypeError,
        r"LinearLogits: weight must be floating and of hidden's dtype",
    ),
    (lambda: LinearLogits(H.long(), W), TypeError, r"LinearLogits: hidden must be floating"),
    (
        lambda: LinearLogits(None, None),
        TypeError,
        r"LinearLogits: hidden must be a Tensor, got NoneType None",
    ),
    (lambda: LinearLogits([1], W), TypeError, r"LinearLogits: hidden must be a Tensor, got list \[1\]"),
    (lambda: LinearLogits(H, None), TypeError, r"LinearLogits: weight must be a Tensor, got NoneType None"),
    (lambda: LinearLogits(H, W, [1]), TypeError, r"LinearLogits: bias must be a Tensor, got list \[1\]"),
    (lambda: LinearLogits(H[:, :0], W[:, :0]), ValueError, r"LinearLogits: weight must be .* D >= 1"),
    (lambda: LinearLogits(H, W.to("meta")), ValueError, r"LinearLogits: weight must be on cpu, got meta"),
    (
        lambda: categorical.stats(LinearLogits(H, W[:0])),
        ValueError,
        r"categorical.stats: logits must have a voc",
    ),
    (
        lambda: categorical.stats(LinearLogits(H, W), torch.zeros(3, dtype=torch.int64)),
        ValueError,
        r"index must have",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


MEMORY = """
import dlcore, torch
from dlcore import LinearLogits, categorical

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def head(vocab):
    leaves = torch.randn(256, 16), torch.randn(vocab, 16)
    return LinearLogits(*(x.requires_grad_() for x in leaves)), torch.arange(256), torch.randn(vocab, 8)

def gradients(rows, a):
    return torch.autograd.grad(rows.sum(), (a.hidden, a.weight))

calls = {
    "sample": lambda a, x, t: categorical.sample(a).tokens,
    "truncated": lambda a, x, t: categorical.sample(a, top_k=50, top_p=0.9).tokens,
    "stats": lambda a, x, t: categorical.stats(a),
    "sample_expectation": lambda a, x, t: categorical.sample_expectation(a, t, softcap=9.0),
    "cross_entropy": lambda a, x, t: gradients(categorical.cross_entropy(a, x), a),
    "kl": lambda a, x, t: gradients(categorical.kl(a, LinearLogits(a.hidden.detach() + 1, a.weight)), a),
    "expectation": lambda a, x, t: gradients(categorical.expectation(a, t), a),
    "materialised": lambda a, x, t: categorical.sample(a.materialize()).tokens,
}
large = head(131072)
for name, call in calls.items():
    call(*head(1000))
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    before = status("VmRSS")
    result = call(*large)
    print(name, status("VmHWM") - before)
    del result
"""


@pytest.mark.slow
def test_extra_memory_is_a_tenth_of_the_logits_at_most():
    """Of 134 MB, over what gradients of weight, 8 MB, twice for kl, and table take themselves."""
    peaks = dict(line.split() for line in run_python(MEMORY, MALLOC_MMAP_THRESHOLD_="65536").splitlines())
    logits, weight = 256 * 131072 * 4, 131072 * 16 * 4
    gradients = {"cross_entropy": weight, "kl": 2 * weight, "expectation": 2 * weight}
    for name, peak in peaks.items():
        allowed = logits / 10 + gradients.get(name, 0)
        assert (int(peak) <= allowed) == (name != "materialised"), (name, peak, allowed)


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_few_rows_over_several_segments(rows):
    """Tiles of few rows are wider than a segment, and rows are shared between threads."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(rows, 4, generator=generator), torch.randn(140001, 4, generator=generator)
    head, index = LinearLogits(hidden, weight), torch.full((rows,), 140000)
    draw = categorical.sample(head, index, key=KEY)
    dense = categorical.sample(head.materialize(), index, key=KEY)
    assert torch.equal(draw.tokens, dense.tokens)
    for got, want in zip(draw.stats, dense.stats, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_token_alone_in_an_excluded_tile():
    vocab = 2**20 // 256 + 1
    head = LinearLogits(torch.randn(256, 4), torch.randn(vocab, 4))
    index = torch.full((256,), vocab - 1)
    assert (categorical.stats(head, index, exclude=vocab - 1).index_logprob == -torch.inf).all()
