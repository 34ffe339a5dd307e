"""Cross-entropy, KL and expectation, alone or with a draw: values, gradients, unread rows, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_calls import call

import dlcore
from dlcore import LinearLogits, categorical, rng
from dlcore.process import uniform

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABULARIES = [1, 17, 256, 1000, 65536 + 300]
LEAD = (3, 4)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def targets(vocab: int) -> Tensor:
    return torch.randint(0, vocab, LEAD, generator=torch.Generator().manual_seed(1))


def with_gradients(f: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = f(*leaves)
    value.backward(torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape))
    return [value.detach(), *(leaf.grad for leaf in leaves)]


TEMPERATURE = torch.tensor([0.5, 1.0, 2.0, 0.8])
KEY = rng.key(4)
OPS = {"c": "log_probs", "k": "kl", "e": "expectation", "s": "sample_expectation"}


def cases(vocab: int) -> dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]]:
    """Losses of their tensors, and these tensors' shapes."""
    x, row, head = targets(vocab), (*LEAD, vocab), (*LEAD, 6)
    weight, table, last = (vocab, 6), (vocab, 5), vocab - 1
    ce, kl, mean = categorical.cross_entropy, categorical.kl, categorical.expectation
    both = categorical.sample_expectation
    return {
        "cross_entropy": (lambda a: ce(a, x), (row,)),
        "cross_entropy softcap": (lambda a: ce(a, x, softcap=3.0), (row,)),
        "cross_entropy exclude": (
            lambda a: ce(a, (x - 1).clamp(min=0), exclude=last if last else None),
            (row,),
        ),
        "cross_entropy ignored": (lambda a: ce(a, torch.where(x % 2 == 0, -100, x)), (row,)),
        "cross_entropy linear": (lambda h, w, b: ce(LinearLogits(h, w, b), x), (head, weight, (vocab,))),
        "kl": (lambda a, b: kl(a, b), (row, row)),
        "kl temperature": (lambda a, b: kl(a, b, temperature=TEMPERATURE), (row, row)),
        "kl linear": (lambda h, w, b: kl(LinearLogits(h, w), b), (head, weight, row)),
        "kl of linear": (lambda a, h, w: kl(a, LinearLogits(h, w)), (row, head, weight)),
        "expectation": (lambda a, t: mean(a, t), (row, table)),
        "expectation all": (
            lambda a, t: mean(a, t, temperature=TEMPERATURE, softcap=3.0, exclude=last if last else None),
            (row, table),
        ),
        "expectation linear": (lambda h, w, t: mean(LinearLogits(h, w), t), (head, weight, table)),
        "sample_expectation": (lambda a, t: both(a, t, x, key=KEY)[1], (row, table)),
        "sample_expectation all": (
            lambda h, w, b, t: both(
                LinearLogits(h, w, b),
                t,
                temperature=TEMPERATURE,
                softcap=3.0,
                exclude=last if last else None,
                key=KEY,
            )[1],
            (head, weight, (vocab,), table),
        ),
        "sample_expectation tied": (lambda h, w: both(LinearLogits(h, w), w, key=KEY)[1], (head, weight)),
    }


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases(1))
def test_parity(vocab, dtype, case, poisoned):
    """Values and gradients against float64, with at most twice the error of same-dtype torch."""
    loss, shapes = cases(vocab)[case]
    inputs = [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    mine = with_gradients(loss, *inputs)
    backend = dlcore.last_backend(f"categorical.{OPS[case[0]]}")
    assert backend != "reference"
    # A GPU's matrix units take factors of a table's dtype.
    rounded = backend == "triton" and "expectation" in case and dtype != torch.float32
    with dlcore.use_backend("reference"):
        torch_own = with_gradients(loss, *inputs)
        truth = with_gradients(loss, *(x.double() for x in inputs))
    for i, (got, own, exact) in enumerate(zip(mine, torch_own, truth, strict=True)):
        assert got.dtype == own.dtype
        scale = exact.abs().max().item()
        error, allowed = ((x.double() - exact).abs().max().item() for x in (got, own))
        # Rounded to its dtype once, after float32 sums of terms up to 8 that may cancel.
        ulp = torch.finfo(got.dtype).eps * scale + 8 * torch.finfo(torch.float32).eps
        if rounded:
            ulp += torch.finfo(dtype).eps
        assert error <= max(2 * allowed, 2 * ulp), (i, error, allowed)


@pytest.mark.parametrize("case", cases(1))
def test_gradcheck(case):
    """The registered backward, in float64."""
    loss, shapes = cases(9)[case]
    inputs = [normal(*shape, seed=i).double().requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(loss, inputs)


def test_values_in_closed_form(backend):
    logits = torch.tensor([[0.0, math.log(3.0)]])
    assert categorical.cross_entropy(logits, torch.tensor([1])).item() == pytest.approx(math.log(4 / 3))
    other = torch.tensor([[0.0, 0.0]])
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert categorical.kl(logits, other).item() == pytest.approx(expected)
    table = torch.tensor([[1.0, 0.0], [5.0, 2.0]])
    assert categorical.expectation(logits, table).tolist()[0] == pytest.approx([4.0, 1.5])


def test_cross_entropy_equals_torch(backend):
    logits, x = normal(*LEAD, 500), targets(500)
    x[0, 0] = -100
    mine = categorical.cross_entropy(logits, x)
    torch.testing.assert_close(mine, F.cross_entropy(logits.movedim(-1, 1), x, reduction="none"))
    assert mine[0, 0].item() == 0
    assert torch.equal(categorical.cross_entropy(logits, x + 0, ignore_index=-100), mine)


def test_kl_of_excluded_tokens(backend):
    """0·log 0 is 0; mass where q has none is infinitely far."""
    p = torch.tensor([[0.0, -torch.inf, 1.0]])
    q = torch.tensor([[0.0, 3.0, 1.0]])
    assert torch.isfinite(categorical.kl(p, q)).all()
    assert categorical.kl(q, p).item() == torch.inf
    assert categorical.kl(p, p).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("far", [50.0, 200.0, 2e4])
def test_kl_of_far_laws(far):
    """q below 2^-125 must not be clamped in log p - log q."""
    p, q = torch.zeros(1, 300), torch.zeros(1, 300)
    q[0, 10:] = far
    with dlcore.use_backend("reference"):
        exact = categorical.kl(p.double(), q.double())
    torch.testing.assert_close(categorical.kl(p, q).double(), exact, rtol=1e-5, atol=1e-5)


def test_ignored_rows_are_not_read(backend):
    logits = torch.full((2, 300), torch.nan)
    logits[1] = 0
    leaf = logits.requires_grad_()
    loss = categorical.cross_entropy(leaf, torch.tensor([-100, 4]))
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0, math.log(300)])
    assert leaf.grad is not None
    assert (leaf.grad[0] == 0).all()
    assert leaf.grad[1].sum().item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("hostile", [float("nan"), float("inf")])
def test_hostile_rows_give_nan(hostile, backend):
    logits = normal(3, 400)
    clean = categorical.cross_entropy(logits, torch.tensor([1, 2, 3]))
    logits[1, 300] = hostile
    loss = categorical.cross_entropy(logits, torch.tensor([1, 2, 3]))
    assert loss[1].isnan()
    assert torch.equal(loss[::2], clean[::2])
    assert categorical.kl(logits, logits.nan_to_num(posinf=0))[1].isnan()
    assert categorical.kl(logits.nan_to_num(posinf=0), logits)[1].isnan()
    table = normal(400, 3)
    assert categorical.expectation(logits, table)[1].isnan().all()
    draw, mean = categorical.sample_expectation(logits, table)
    assert mean[1].isnan().all()
    assert mean[::2].isfinite().all()
    assert (draw.tokens < 0).tolist() == [False, True, False]


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_costs_no_digits(offset):
    """Against float64 of the same numbers: gradients of the softmax, not of its rounded normaliser."""
    x, y, t = normal(8, 3000) + offset, normal(8, 3000, seed=1) + offset, torch.arange(8)
    losses: list[Callable[..., Tensor]] = [
        lambda a, b: categorical.cross_entropy(a, t) + categorical.cross_entropy(b, t),
        lambda a, b: categorical.kl(a, b, temperature=0.7),
        lambda a, b: categorical.expectation(a + 0 * b, y.T[:, :3] - offset, temperature=0.7)[:, 0],
    ]
    for loss in losses:
        mine = with_gradients(loss, x, y)
        with dlcore.use_backend("reference"):
            exact = with_gradients(loss, x.double(), y.double())
        for a, b in zip(mine[1:], exact[1:], strict=True):
            assert (a.double() - b).abs().max() <= 5e-6 * b.abs().max()


def test_no_rows(backend):
    assert categorical.expectation(torch.randn(0, 3), torch.randn(3, 2)).shape == (0, 2)
    assert categorical.sample_expectation(torch.randn(0, 3), torch.randn(3, 2))[1].shape == (0, 2)
    leaf = torch.randn(2, 0, 3).requires_grad_()
    categorical.expectation(leaf, torch.randn(3, 2)).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == (2, 0, 3)


@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "expectation", "sample_expectation"])
def test_no_rows_give_weights_no_gradient(loss, backend):
    hidden, weight, table = torch.randn(0, 8), torch.randn(50, 8), torch.randn(50, 4)
    leaves = [x.requires_grad_() for x in (weight, table)]
    logits = LinearLogits(hidden, weight)
    calls = {
        "cross_entropy": lambda: categorical.cross_entropy(logits, torch.zeros(0, dtype=torch.int64)),
        "kl": lambda: categorical.kl(logits, logits),
        "expectation": lambda: categorical.expectation(logits, table),
        "sample_expectation": lambda: categorical.sample_expectation(logits, table)[1],
    }
    grads = torch.autograd.grad(calls[loss]().sum(), leaves, allow_unused=True)
    assert all(not g.any() for g in grads if g is not None)
    assert grads[0] is not None


def test_a_gradient_of_a_shifted_capped_entry():
    """The internal op behind the processes' losses: shift at an index, softcap, exclude, all at once."""
    logits, x = normal(*LEAD, 700, scale=4.0), targets(700)
    index = (x + 300) % 700

    def loss(a: Tensor) -> Tensor:
        shift = torch.full((), 1.5)
        numbers = torch.ops.dlcore.categorical_log_probs(a, None, None, x, index, shift, 3.0, 5)
        return numbers[0] + 0.5 * numbers[1] - 0.25 * numbers[2]

    mine = with_gradients(loss, logits)
    with dlcore.use_backend("reference"):
        exact = with_gradients(loss, logits.double())
    torch.testing.assert_close(mine[1].double(), exact[1], rtol=1e-4, atol=1e-6)


TARGET = torch.tensor([1, 2])
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "log_probs": lambda x: categorical.cross_entropy(x, TARGET),
    "kl": lambda x: categorical.kl(x, x.detach().flip(0)),
    "expectation": lambda x: categorical.expectation(x, torch.eye(50)[:, :3]),
    "nelbo": lambda x: uniform.nelbo(x, TARGET, TARGET + 1, 0.5, -1.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_raise(name, backend):
    """Not only where nothing else depends on the logits: a penalty beside the loss would be dropped."""
    leaf = normal(2, 50).requires_grad_()
    loss = LOSSES[name](leaf).square().sum()
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (plain,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(first, plain)
    for objective in (first.square().sum(), first.sum() + loss + leaf.sum()):
        with pytest.raises(NotImplementedError, match=f"{name}: has a first derivative only"):
            torch.autograd.grad(objective, leaf, retain_graph=True)
        with pytest.raises(NotImplementedError, match=f"{name}: has a first derivative only"):
            objective.backward(retain_graph=True)


X, T = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
BAD = [
    (
        lambda: categorical.cross_entropy(X, T[0]),
        ValueError,
        r"cross_entropy: target must have shape \(2, 3\)",
    ),
    (
        lambda: categorical.cross_entropy(X, T + 5),
        ValueError,
        r"cross_entropy: target must lie in \[0, 5\), got 5",
    ),
    (
        lambda: categorical.cross_entropy(X, T - 1),
        ValueError,
        r"cross_entropy: target must lie in \[0, 5\), got -1",
    ),
    *[
        (
            lambda value=value: categorical.cross_entropy(X, T, ignore_index=value),
            TypeError,
            r"cross_entropy: ignore_index must be an int, got",
        )
        for value in (True, 1.0, "a", None, T)
    ],
    (
        lambda: categorical.cross_entropy(X, T, ignore_index=2**70),
        ValueError,
        r"cross_entropy: ignore_index must fit in 64 bits",
    ),
    (lambda: categorical.cross_entropy(X, T.to("meta")), ValueError, r"target must be on cpu, got meta"),
    (lambda: categorical.kl(X, X.to("meta")), ValueError, r"kl: q_logits must be on cpu, got meta"),
    (
        lambda: categorical.expectation(X, torch.ones(5, 2, device="meta")),
        ValueError,
        r"expectation: table must be on cpu, got meta",
    ),
    (lambda: categorical.kl(X, X, temperature=None), TypeError, r"kl: temperature must be a number"),
    (lambda: categorical.cross_entropy(X, T.float()), TypeError, r"cross_entropy: target must be an int64"),
    (
        lambda: categorical.cross_entropy(X, T, softcap=-1),
        ValueError,
        r"cross_entropy: softcap must be positive",
    ),
    (
        lambda: categorical.kl(X, X[:1]),
        ValueError,
        r"kl: q_logits must have p_logits' shape \(2, 3, 5\), got \(1",
    ),
    (
        lambda: categorical.kl(X, X.double()),
        TypeError,
        r"kl: q_logits must have p_logits' dtype torch.float32",
    ),
    (lambda: categorical.kl(X, X.long()), TypeError, r"kl: q_logits must be float32"),
    (
        lambda: categorical.kl(X, X, temperature=0),
        ValueError,
        r"kl: temperature must lie in .*, got 0",
    ),
    (
        lambda: categorical.sample_expectation(X, X),
        ValueError,
        r"categorical.sample_expectation: table must be \(5, E\), got \(2, 3, 5\)",
    ),
    (
        lambda: categorical.sample_expectation(X, torch.zeros(5, 2), T + 5),
        ValueError,
        r"categorical.sample_expectation: index must lie in \[0, 5\)",
    ),
    (
        lambda: categorical.sample_expectation(X, torch.zeros(5, 2), temperature=0),
        ValueError,
        r"categorical.sample_expectation: temperature must",
    ),
    (
        lambda: categorical.sample_expectation(X, torch.zeros(5, 2), key=T),
        ValueError,
        r"categorical.sample_expectation: key must",
    ),
    (
        lambda: categorical.expectation(X, X),
        ValueError,
        r"expectation: table must be \(5, E\), got \(2, 3, 5\)",
    ),
    (lambda: categorical.expectation(X, T), TypeError, r"expectation: table must be float32"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def check_kl_of_nothing(backend: str) -> None:
    """Rows of nothing but -inf: logsumexps -inf, so that parts merge; KL and gradients NaN."""
    p, q = (torch.randn(5, 700, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    p[0] = q[1] = p[2] = q[2] = q[3] = -torch.inf
    p[3, 5] = torch.nan
    numbers = call("categorical.kl", backend, p, None, None, q, None, None, torch.tensor(0.7))[0]
    assert numbers[0].isnan().tolist() == [True] * 4 + [False]
    assert (numbers[1, [0, 2]] == -torch.inf).all()
    assert (numbers[2, [1, 2]] == -torch.inf).all()
    for row, x in ((1, p[[1, 4]]), (2, q[[0, 4]])):
        wanted = torch.logsumexp(x.double() / 0.7, -1)
        torch.testing.assert_close(numbers[row, [2 - row, 4]], wanted, rtol=1e-6, atol=1e-6)
    broken = numbers.masked_fill(numbers[0].isnan(), torch.nan)
    rest = (p, None, None, q, None, None, torch.tensor(0.7))
    grad = torch.ones(3, 5, dtype=torch.float64)
    found, wanted = (call("categorical.kl_backward", backend, grad, n, *rest) for n in (numbers, broken))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def check_means_of_nothing(backend: str) -> None:
    """Rows of nothing but -inf: logsumexps -inf; means and gradients NaN."""
    p = torch.randn(5, 700, generator=torch.Generator().manual_seed(1))
    p[0] = p[2] = -torch.inf
    p[3, 5] = torch.nan
    table = torch.randn(700, 3, generator=torch.Generator().manual_seed(3))
    for op, extra in (("expectation", ()), ("sample_expectation", (None, rng.key(1)))):
        mean, lse, *_ = call(f"categorical.{op}", backend, p, None, None, table, None, None, 699, *extra)
        assert mean.isnan().all(-1).tolist() == [True, False, True, True, False]
        assert lse[[0, 2]].tolist() == [-torch.inf] * 2
        assert lse.isnan().tolist() == [False, False, False, True, False]
    broken = lse.masked_fill(mean[:, 0].isnan(), torch.nan)
    rest = (p, None, None, table, None, None, 699)
    found, wanted = (
        call("categorical.expectation_backward", backend, torch.ones(5, 3), mean, n, *rest)
        for n in (lse, broken)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_rows_of_nothing(name):
    check_kl_of_nothing(name)
    check_means_of_nothing(name)
