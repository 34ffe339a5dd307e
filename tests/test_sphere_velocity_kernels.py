"""The kernels of the vocabulary drifts: against float64, any layout and dtype, always the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import levels
from sphere_points import turned
from test_linear_logits import Largest
from torch import Tensor

import dlcore
from dlcore import LinearLogits, sphere
from dlcore.cpu import choose_capability, linear_logits
from dlcore.cpu import sphere_velocity as compiled
from dlcore.reference import sphere_velocity as reference

ROWS, VOCAB, DIM = (2, 6), 1003, 24
PATHS: dict[str, dict[str, Any]] = {
    "slerp": {"path": "slerp", "noise": 0.7},
    "vmf": {"path": "vmf", "kappa": 30.0},
    "vmf per row": {"path": "vmf", "kappa": torch.tensor([0.0, 0.1, 3.0, 80.0, 1e3, 1e5])},
    "cauchy": {"path": "cauchy"},
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    x = normal(*shape, seed=seed)
    return x / x.norm(dim=-1, keepdim=True)


TABLE, X = unit(VOCAB, DIM, seed=1), unit(*ROWS, DIM, seed=2)
LOGITS = 3 * normal(*ROWS, VOCAB, seed=3)
HEAD = LinearLogits(normal(*ROWS, 9, seed=4), normal(VOCAB, 9, seed=5), normal(VOCAB, seed=6))


def truth(
    x: Tensor, logits: Tensor | LinearLogits, table: Tensor, path: str, **kw: Any
) -> tuple[Tensor, Tensor]:
    """By the formula in float64, and the scale of its error: Σ p g."""
    noise, kappa = kw.get("noise", 1.0), kw.get("kappa")
    dense = logits.materialize() if isinstance(logits, LinearLogits) else logits
    x, p, table = x.double(), torch.softmax(dense.double(), -1), table.double()
    c = x @ table.T
    own = {} if path != "vmf" else {"kappa": kappa}
    weighed = p * sphere.radial_weight(c, table.shape[1], path=path, **own)
    mean = weighed @ table
    v = mean - (x * mean).sum(-1, keepdim=True) * x
    return v / noise, weighed.sum(-1, keepdim=True) / noise


def assert_close(
    got: Tensor, x: Tensor, logits: Tensor | LinearLogits, table: Tensor, share: float = 1e-6, **kw: Any
) -> None:
    exact, scale = truth(x, logits, table, **kw)
    assert got.dtype == torch.float32
    assert (((got.double() - exact).norm(dim=-1, keepdim=True)) / scale).max().item() <= share


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> dict[str, Any]:
    return PATHS[request.param]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tiles of 256 tokens, the last one ragged."""
    monkeypatch.setattr(linear_logits, "_TILE", 1)


@pytest.mark.usefixtures("narrow", "poisoned")
@pytest.mark.parametrize("logits", [LOGITS, HEAD], ids=["dense", "linear"])
def test_against_float64(path, logits, level):
    got = sphere.velocity(X, logits, TABLE, **path)
    assert_close(got, X, logits, TABLE, **path)
    if path["path"] != "cauchy":
        assert dlcore.last_backend("sphere.velocity") == "cpu"


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(path, dtype):
    """Read as it is: the truth is that of the rounded numbers."""
    x, table, logits = X.to(dtype), TABLE.to(dtype), LOGITS.to(dtype)
    assert_close(sphere.velocity(x, logits, table, **path), x, logits, table, **path)
    head = LinearLogits(*(t.to(dtype) for t in (HEAD.hidden, HEAD.weight, HEAD.bias)))
    assert_close(sphere.velocity(X, head, table, **path), X, head, table, **path)


def special(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, logits and table of an edge case."""
    x, logits, table = X.clone(), LOGITS.clone(), TABLE.clone()
    if kind == "one-hot":
        logits = torch.full_like(logits, -torch.inf).index_fill(-1, torch.tensor([VOCAB - 1]), 5.0)
    elif kind == "uniform":
        logits = torch.full_like(logits, -7.0)
    elif kind == "low":
        logits = logits - 3e4
    elif kind == "mostly excluded":
        logits = logits.masked_fill(normal(*logits.shape, seed=9) < 1.5, -torch.inf)
    elif kind == "rising":
        logits = torch.linspace(-300, 300, VOCAB).expand_as(logits)
    elif kind == "duplicates":
        table[500:] = table[7]
    elif kind == "at a token":
        x = table[: x[..., 0].numel()].view_as(x).clone()
        logits[..., :20] += 6
    elif kind == "antipodal":
        x = -table[: x[..., 0].numel()].view_as(x)
        logits[..., :20] += 6
    elif kind == "one token":
        logits, table = logits[..., :1], table[:1]
    return x, logits, table


KINDS = (
    "one-hot",
    "uniform",
    "low",
    "mostly excluded",
    "rising",
    "duplicates",
    "at a token",
    "antipodal",
    "one token",
)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("kind", KINDS)
def test_edges(path, kind, backend):
    x, logits, table = special(kind)
    got = sphere.velocity(x, logits, table, **path)
    assert got.isfinite().all()
    # The reference of `expectation` subtracts a float32 logsumexp, of 3e4 or 300 here.
    share = {"low": 5e-3, "rising": 5e-5}.get(kind, 2e-6)
    rough = path["path"] == "cauchy" and backend == "reference"
    assert_close(got, x, logits, table, share=share if rough else 2e-6, **path)


@pytest.mark.parametrize("rest", [0.5, 0.2, 0.1, 0.01, 2e-3, 1e-3, 1e-4])
def test_next_to_the_antipode(rest, backend):
    """At an angle π - rest errors grow as 0.5/rest; below 1.4e-3 the weight is capped, not for top_k=1."""
    x = turned(TABLE[:12], torch.pi - rest)
    logits = torch.full((12, VOCAB), -torch.inf)
    logits[torch.arange(12), torch.arange(12)] = 0
    with dlcore.use_backend("reference"):
        exact = sphere.log_map(x.double(), TABLE[:12].double())
    weight = torch.pi / rest
    error = (sphere.velocity(x, logits, TABLE).double() - exact).norm(dim=-1)
    if rest > 1.4e-3:
        assert error.max() < 1e-6 * (1 if rest >= 0.2 else 0.5 / rest) * weight
    else:
        capped = torch.pi * rest / 2**-9.5
        v = sphere.velocity(x, logits, TABLE)
        torch.testing.assert_close(v.norm(dim=-1), torch.full((12,), capped), rtol=1e-2, atol=0)
    first = sphere.velocity(x, logits, TABLE, top_k=1)
    assert torch.equal(first, sphere.log_map(x, TABLE[:12]))
    assert (first.double() - exact).norm(dim=-1).max() < 1e-6 * max(1, 1 / rest)


def test_top_1_has_the_gradients_of_the_log_map():
    """In x and table; the logits' is 0, not none."""
    x, table, logits = (t.clone().requires_grad_() for t in (X, TABLE, LOGITS))
    v = sphere.velocity(x, logits, table, noise=0.5, top_k=1)
    grads = torch.autograd.grad(v[..., 0].sum(), (x, table, logits))
    want = 2 * sphere.log_map(x, table[LOGITS.argmax(-1)])
    for got, exact in zip(grads, torch.autograd.grad(want[..., 0].sum(), (x, table)), strict=False):
        torch.testing.assert_close(got, exact)
    assert (grads[2] == 0).all()


@pytest.mark.parametrize("kind", ["one-hot", "at a token"])
def test_at_the_token_there_is_no_velocity(path, kind):
    """x = E_k exactly under a posterior that is certain of k."""
    x = TABLE[:12].view(*ROWS, DIM)
    logits = torch.full((12, VOCAB), -torch.inf)
    logits[torch.arange(12), torch.arange(12)] = 0
    v = sphere.velocity(x, logits.view(*ROWS, VOCAB), TABLE, **path)
    assert v.norm(dim=-1).max() < 1e-6


def test_invalid_rows_are_nan_and_alone(path, backend):
    x, logits = X.flatten(0, 1).clone(), LOGITS.flatten(0, 1).clone()
    row_path = {k: v[[0, 1, 2, 3, 4, 5] * 2] if isinstance(v, Tensor) else v for k, v in path.items()}
    clean = sphere.velocity(x, logits, TABLE, **row_path)
    x[1, 3] = torch.nan
    logits[4, 900] = torch.nan
    logits[6, 0] = torch.inf
    logits[8] = -torch.inf
    for top_k in (None, 3):
        got = sphere.velocity(x, logits, TABLE, top_k=top_k, **row_path)
        bad = torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor([1, 4, 6, 8]), True)
        assert got[bad].isnan().all()
        assert got[~bad].isfinite().all()
        if top_k is None:
            assert torch.equal(got[~bad], clean[~bad])


@pytest.mark.parametrize("inner", [LOGITS, HEAD], ids=["dense", "linear"])
@pytest.mark.usefixtures("narrow")
def test_same_bits_on_any_threads_levels_and_batch(path, inner):
    def run(rows: slice = slice(None)) -> tuple[Tensor, ...]:
        part = LinearLogits(inner.hidden[rows], inner.weight, inner.bias) if inner is HEAD else inner[rows]
        leaves = [t.detach().clone().requires_grad_() for t in (X[rows], TABLE)]
        v = sphere.velocity(leaves[0], part, leaves[1], **path)
        return v.detach(), *torch.autograd.grad(v.square().sum(), leaves)[: 2 if rows == slice(None) else 1]

    threads, found = torch.get_num_threads(), run()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(), found, strict=True))
    finally:
        torch.set_num_threads(threads)
    halves = [run(slice(r, r + 1)) for r in range(ROWS[0])]
    for i in range(2):
        assert torch.equal(torch.cat([h[i] for h in halves]), found[i])
    fused = [name for name in levels() if name != "baseline"]
    for name in fused:
        choose_capability(name)
        try:
            assert all(torch.equal(a, b) for a, b in zip(run(), found, strict=True))
        finally:
            choose_capability(fused[0])


def test_strided_inputs(path):
    """Transposed leading dimensions, a slice of columns, a table of spread columns."""
    expected = sphere.velocity(X, LOGITS, TABLE, **path)
    logits = torch.full((ROWS[1], ROWS[0], VOCAB + 9), torch.nan)
    logits[..., 4:-5] = LOGITS.transpose(0, 1)
    x, table = torch.full((*ROWS, 2 * DIM), torch.nan), torch.full((VOCAB, DIM + 3), torch.nan)
    x[..., ::2], table[:, :DIM] = X, TABLE
    got = sphere.velocity(x[..., ::2], logits[..., 4:-5].transpose(0, 1), table[:, :DIM], **path)
    assert torch.equal(got, expected)
    torch.testing.assert_close(sphere.velocity(X, LOGITS, TABLE.T.contiguous().T, **path), expected)


def test_no_rows_and_no_leading_dimensions(path, backend):
    own = {k: v[3] if isinstance(v, Tensor) else v for k, v in path.items()}
    alone = sphere.velocity(X[1, 3], LOGITS[1, 3], TABLE, **own)
    assert alone.shape == (DIM,)
    torch.testing.assert_close(alone, sphere.velocity(X, LOGITS, TABLE, **path)[1, 3], rtol=1e-4, atol=1e-6)
    assert sphere.velocity(X[:0, 0], LOGITS[:0, 0], TABLE, **own).shape == (0, DIM)


def leaves_of(linear: bool, dtype: torch.dtype) -> list[Tensor]:
    logits = (HEAD.hidden, HEAD.weight, HEAD.bias) if linear else (LOGITS,)
    return [t.detach().to(dtype).requires_grad_() for t in (X, TABLE, *logits)]


def value(leaves: list[Tensor], top_k: int | None = None, **kw: Any) -> Tensor:
    x, table, *logits = leaves
    given = logits[0] if len(logits) == 1 else LinearLogits(*logits)
    return sphere.velocity(x, given, table, top_k=top_k, **kw)


@pytest.mark.usefixtures("narrow", "poisoned")
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("top_k", [None, 5])
def test_gradients_against_float64(path, linear, top_k):
    leaves, exact = leaves_of(linear, torch.float32), leaves_of(linear, torch.float64)
    pull = normal(*X.shape, seed=8)
    got = torch.autograd.grad((value(leaves, top_k, **path) * pull).sum(), leaves)
    wanted = torch.autograd.grad((value(exact, top_k, **path) * pull.double()).sum(), exact)
    for a, b in zip(got, wanted, strict=True):
        assert (a.double() - b).norm() <= 5e-6 * b.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("linear", [False, True])
def test_gradients_in_half_precision(path, linear, dtype):
    leaves = leaves_of(linear, dtype)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    pull = normal(*X.shape, seed=8)
    got = torch.autograd.grad((value(leaves, **path) * pull).sum(), leaves)
    wanted = torch.autograd.grad((value(exact, **path) * pull.double()).sum(), exact)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= torch.finfo(dtype).eps * b.norm()


@pytest.mark.parametrize("linear", [False, True])
def test_gradcheck(path, linear):
    """Of the formulas themselves, in float64, on a few tokens."""
    leaves = [t[..., :11, :] if t.dim() == 2 else t for t in leaves_of(linear, torch.float64)]
    leaves = [t.detach() for t in leaves]
    leaves = [leaves[0][:1, :6], leaves[1], *leaves[2:]]
    leaves[2] = leaves[2][:1, :6] if linear else leaves[2][:1, :6, :11]
    if linear:
        leaves[4] = leaves[4][:11]
    leaves = [t.clone().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(lambda *a: value(list(a), **path), leaves, fast_mode=True)


def test_only_what_is_wanted_has_a_gradient(path, backend):
    """Each input alone; the others stay without."""
    everything = leaves_of(False, torch.float32)
    full = torch.autograd.grad(value(everything, **path).square().sum(), everything)
    for i in range(3):
        leaves = [t.detach() for t in everything]
        leaves[i].requires_grad_()
        value(leaves, **path).square().sum().backward()
        assert leaves[i].grad is not None
        torch.testing.assert_close(leaves[i].grad, full[i])
        assert all(t.grad is None for j, t in enumerate(leaves) if j != i)


@pytest.mark.slow
def test_nothing_of_rows_times_vocabulary(path):
    rows, vocab = 300, 20_000
    x, table = unit(rows, 8), unit(vocab, 8)
    head = (normal(rows, 6), normal(vocab, 6), None)
    kappa = None if path["path"] != "vmf" else torch.tensor(5.0)
    calls = [lambda: compiled.velocity(*head, x, table, kappa), lambda: compiled.largest(*head, 4)]
    with torch.no_grad():
        v, along, lse = calls[0]()
    calls += [lambda: compiled.velocity_backward(v, v, along, lse, *head, x, table, kappa, True, True)]
    calls += [lambda: sphere.velocity(x, LinearLogits(*head), table, top_k=4)]
    for call in calls:
        with Largest() as seen:
            call()
        assert 0 < seen.numel <= linear_logits._TILE
    with Largest() as seen:
        reference.velocity(*head, x, table, kappa)
    assert seen.numel >= rows * vocab


def test_largest_across_tiles_with_ties(level, monkeypatch):
    monkeypatch.setattr(linear_logits, "_TILE", 1)
    hidden = torch.randint(-2, 3, (40, 3), generator=torch.Generator().manual_seed(7)).float()
    weight = torch.randint(-2, 3, (VOCAB, 3), generator=torch.Generator().manual_seed(8)).float()
    dense = hidden @ weight.T
    for k in (1, 2, 17, 300, VOCAB):
        wanted = dense.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(compiled.largest(hidden, weight, None, k), wanted)
        assert torch.equal(compiled.largest(dense, None, None, k), wanted)
    low = dense.clone()
    low[:, 1:] = -torch.inf
    assert torch.equal(compiled.largest(low, None, None, 3), torch.arange(3).expand(40, 3))
    low[0, -1], low[1, 5], low[2, 0] = torch.nan, torch.inf, -torch.inf
    got = compiled.largest(low, None, None, 3)
    assert (got[:3] == -1).all()
    assert (got[3:] >= 0).all()


def test_the_score_through_a_head(backend):
    """Scaled and projected."""
    kappa = torch.tensor([1.0, 2, 3, 4, 5, 6])
    got = sphere.posterior_score(X, HEAD, TABLE, kappa)
    exact, _ = truth(X, HEAD, TABLE, "cauchy")
    torch.testing.assert_close(got.double(), exact * kappa.unsqueeze(-1), rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_the_score_is_differentiable_in_everything():
    leaves = (X[:1, :2], TABLE[:7], LOGITS[:1, :2, :7], torch.tensor(3.0))
    assert torch.autograd.gradcheck(
        lambda x, table, logits, kappa: sphere.posterior_score(x, logits, table, kappa),
        [t.double().requires_grad_() for t in leaves],
    )
