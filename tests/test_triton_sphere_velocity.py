"""The vocabulary drifts in Triton: against float64 over several tiles, gradients, edges, what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE
from numpy.polynomial import chebyshev
from sphere_points import turned, unit
from test_linear_logits import Largest
from test_sphere_velocity_kernels import HEAD, KINDS, LOGITS, PATHS, TABLE, VOCAB, X, normal, special, truth
from torch import Tensor
from triton_variants import missed

import dlcore
from dlcore import LinearLogits, sphere
from dlcore.reference import sphere_velocity as reference
from dlcore.triton import linear_logits, sphere_series
from dlcore.triton import sphere_velocity as compiled

HEADS = {"dense": LOGITS, "linear": HEAD}
#: What most tests walk; κ per row, a system to solve for each, is slow in the interpreter.
OWN = {name: PATHS[name] for name in ("slerp", "vmf")}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tiles of 256 tokens, the last one ragged."""
    monkeypatch.setattr(linear_logits, "_TILE", 1)


@pytest.fixture(params=OWN)
def path(request: pytest.FixtureRequest) -> dict[str, Any]:
    return OWN[request.param]


def there(value: Any) -> Any:
    if isinstance(value, LinearLogits):
        assert value.bias is not None
        return LinearLogits(*(t.to(DEVICE) for t in (value.hidden, value.weight, value.bias)))
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def drift(x: Tensor, logits: Tensor | LinearLogits, table: Tensor, **options: Any) -> Tensor:
    with dlcore.use_backend("triton"):
        own = {k: there(v) for k, v in options.items()}
        return sphere.velocity(there(x), there(logits), there(table), **own).cpu()


def agree(x: Tensor, logits: Tensor | LinearLogits, table: Tensor, share: float = 1e-6, **path: Any) -> None:
    got = drift(x, logits, table, **path)
    exact, scale = truth(x, logits, table, **path)
    assert got.dtype == torch.float32
    assert ((got.double() - exact).norm(dim=-1, keepdim=True) / scale).max().item() <= share


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("head", HEADS)
def test_against_float64(name: str, head: str) -> None:
    agree(X, HEADS[head], TABLE, **PATHS[name])
    if name != "cauchy":
        assert dlcore.last_backend("sphere.velocity") == "triton"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(path: dict[str, Any], dtype: torch.dtype) -> None:
    """Read as it is: the truth is that of the rounded numbers."""
    x, table, logits = X.to(dtype), TABLE.to(dtype), LOGITS.to(dtype)
    agree(x, logits, table, **path)
    agree(X, LinearLogits(*(t.to(dtype) for t in (HEAD.hidden, HEAD.weight, HEAD.bias))), table, **path)


@pytest.mark.parametrize("kind", KINDS)
def test_edges(path: dict[str, Any], kind: str) -> None:
    agree(*special(kind), share=2e-6, **path)


@pytest.mark.parametrize("rest", [0.5, 0.1, 2e-3, 1e-4])
def test_next_to_the_antipode(rest: float) -> None:
    """At an angle π - rest errors grow as 0.5/rest; below 1.4e-3 the weight is capped."""
    x = turned(TABLE[:4], torch.pi - rest)
    logits = torch.full((4, VOCAB), -torch.inf)
    logits[torch.arange(4), torch.arange(4)] = 0
    v = drift(x, logits, TABLE)
    with dlcore.use_backend("reference"):
        exact = sphere.log_map(x.double(), TABLE[:4].double())
    if rest > 1.4e-3:
        assert (v.double() - exact).norm(dim=-1).max() < 1e-6 * max(1, 0.5 / rest) * torch.pi / rest
    else:
        torch.testing.assert_close(
            v.norm(dim=-1), torch.full((4,), torch.pi * rest * 2**9.5), rtol=1e-2, atol=0
        )


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_invalid_rows_are_nan_and_alone(path: dict[str, Any]) -> None:
    x, logits = X.flatten(0, 1).clone(), LOGITS.flatten(0, 1).clone()
    rows = {k: v[[0, 1, 2, 3, 4, 5] * 2] if isinstance(v, Tensor) else v for k, v in path.items()}
    clean = drift(x, logits, TABLE, **rows)
    x[1, 3] = torch.nan
    logits[4, 900], logits[6, 0], logits[8] = torch.nan, torch.inf, -torch.inf
    # Before its first logit a row has seen nothing.
    logits[9, :300] = -torch.inf
    bad = torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor([1, 4, 6, 8]), True)
    for top_k in (None, 3):
        got = drift(x, logits, TABLE, top_k=top_k, **rows)
        assert got[bad].isnan().all()
        assert got[~bad].isfinite().all()
        if top_k is None:
            bad[9] = True
            assert torch.equal(got[~bad], clean[~bad])
            bad[9] = False


def leaves_of(linear: bool, dtype: torch.dtype) -> list[Tensor]:
    logits = (HEAD.hidden, HEAD.weight, HEAD.bias) if linear else (LOGITS,)
    return [t.detach().to(dtype) for t in (X, TABLE, *logits)]


def gradients(leaves: list[Tensor], pull: Tensor, **path: Any) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in leaves]
    x, table, *logits = leaves
    given = logits[0] if len(logits) == 1 else LinearLogits(*logits)
    v = sphere.velocity(x, given, table, **path)
    return torch.autograd.grad((v * pull).sum(), leaves)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["slerp", "vmf", "vmf per row"])
@pytest.mark.parametrize("linear", [False, True], ids=["dense", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_against_float64(name: str, linear: bool, dtype: torch.dtype) -> None:
    path, pull, leaves = PATHS[name], normal(*X.shape, seed=8), leaves_of(linear, dtype)
    with dlcore.use_backend("triton"):
        own = {k: there(v) for k, v in path.items()}
        got = gradients([t.to(DEVICE) for t in leaves], pull.to(DEVICE), **own)
        assert dlcore.last_backend("sphere.velocity_backward") == "triton"
    wanted = gradients([t.double() for t in leaves], pull.double(), **path)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        assert (a.cpu().double() - b).norm() <= max(5e-6, torch.finfo(dtype).eps) * b.norm()


def test_only_what_is_wanted_has_a_gradient() -> None:
    """Each input alone; the others stay without."""
    leaves = [t.to(DEVICE) for t in leaves_of(False, torch.float32)]
    own, pull = PATHS["slerp"], normal(*X.shape, seed=8).to(DEVICE)
    with dlcore.use_backend("triton"):
        full = gradients(leaves, pull, **own)
        for i in range(3):
            alone = [t.clone().requires_grad_(i == j) for j, t in enumerate(leaves)]
            (sphere.velocity(alone[0], alone[2], alone[1], **own) * pull).sum().backward()
            torch.testing.assert_close(alone[i].grad, full[i])
            assert all(t.grad is None for j, t in enumerate(alone) if j != i)


@pytest.mark.parametrize("dim", [768, 16, 9, 2])
def test_series_is_the_references(dim: int) -> None:
    """Coefficients of the sum and of its derivative, at every κ."""
    kappa = torch.tensor([0, 1e-3, 1.0, 50.0, 1e4, 1e8], dtype=torch.float64)
    rows, terms = sphere_series.solve(kappa.to(DEVICE), dim)
    m, rest, sums = reference.vmf_series(kappa, dim)
    rows = rows.cpu().double()
    torch.testing.assert_close(rows[:, 0], m, rtol=1e-7, atol=0)
    torch.testing.assert_close(rows[:, 1], rest, rtol=1e-7, atol=0)
    torch.testing.assert_close(rows[:, 3 : 3 + terms], sums, rtol=1e-7, atol=1e-9)
    slope = torch.from_numpy(chebyshev.chebder(sums.numpy(), axis=1))
    torch.testing.assert_close(rows[:, 3 + terms : -1], slope, rtol=1e-6, atol=1e-6)


def test_largest_across_tiles_with_ties() -> None:
    hidden = torch.randint(-2, 3, (10, 3), generator=torch.Generator().manual_seed(7)).float()
    weight = torch.randint(-2, 3, (VOCAB, 3), generator=torch.Generator().manual_seed(8)).float()
    dense = hidden @ weight.T
    dense[0, 5:9] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    for k in (1, 17, 300, VOCAB):
        wanted = dense.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(compiled.largest(dense.to(DEVICE), None, None, k).cpu(), wanted)
        wanted = (hidden @ weight.T).sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(compiled.largest(hidden.to(DEVICE), weight.to(DEVICE), None, k).cpu(), wanted)
    low = dense.bfloat16()
    low[:, 1:] = -torch.inf
    low[0, -1], low[1, 5], low[2, 0] = torch.nan, torch.inf, -torch.inf
    got = compiled.largest(low.to(DEVICE), None, None, 3).cpu()
    assert (got[:3] == -1).all()
    assert torch.equal(got[3:], torch.arange(3).expand(7, 3))


@pytest.mark.parametrize("k", [1, 5])
def test_top_k(path: dict[str, Any], k: int) -> None:
    """Against -inf everywhere else."""
    kept = LOGITS.topk(k).indices
    alone = torch.full_like(LOGITS, -torch.inf).scatter(-1, kept, LOGITS.gather(-1, kept))
    got = drift(X, LOGITS, TABLE, top_k=k, **path)
    torch.testing.assert_close(got, drift(X, alone, TABLE, **path), rtol=1e-4, atol=1e-6)
    assert dlcore.last_backend("sphere.largest") == "triton"


def test_strides_and_no_rows(path: dict[str, Any]) -> None:
    """Transposed leading dimensions, a slice of columns, a table of spread columns, nothing."""
    expected = drift(X, LOGITS, TABLE, **path)
    logits = torch.full((X.shape[1], X.shape[0], VOCAB + 9), torch.nan)
    logits[..., 4:-5] = LOGITS.transpose(0, 1)
    x, table = torch.full((*X.shape[:-1], 2 * X.shape[-1]), torch.nan), TABLE.T.contiguous().T
    x[..., ::2] = X
    got = drift(x[..., ::2], logits[..., 4:-5].transpose(0, 1), table, **path)
    torch.testing.assert_close(got, expected)
    own = {k: v[3] if isinstance(v, Tensor) else v for k, v in path.items()}
    torch.testing.assert_close(
        drift(X[1, 3], LOGITS[1, 3], TABLE, **own), expected[1, 3], rtol=1e-4, atol=1e-6
    )
    assert drift(X[:0, 0], LOGITS[:0, 0], TABLE, **own).shape == (0, X.shape[-1])


def test_nothing_of_rows_times_vocabulary() -> None:
    rows, vocab = 12, 4000
    x, table = unit(rows, 8).to(DEVICE), unit(vocab, 8).to(DEVICE)
    head = (normal(rows, 6).to(DEVICE), normal(vocab, 6).to(DEVICE), None)
    with torch.no_grad():
        v, along, lse = compiled.velocity(*head, x, table, None)
    calls = [lambda: compiled.velocity(*head, x, table, None), lambda: compiled.largest(*head, 4)]
    calls += [lambda: compiled.velocity_backward(v, v, along, lse, *head, x, table, None, True, False)]
    for call in calls:
        with Largest() as seen:
            call()
        # The table and the head, (V, d).
        assert 0 < seen.numel <= 8 * vocab < rows * vocab


def test_every_variant_was_launched() -> None:
    assert missed("sphere_velocity", "sphere_series") == []
