"""The guided draw: its reference against probabilities by hand, its kernels against that in float64."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conftest import expected_backend, levels
from goodness import chi_square
from torch import Tensor

import dlcore
from dlcore import rng
from dlcore._ops.guidance import COEFFICIENTS
from dlcore.cpu import choose_capability
from dlcore.reference import categorical as reference

OP = "guidance.cfg_uniform_step"
KEY = rng.key(20261126, 3)
ROWS = 24
#: Within a sixteen, a group of 256, one group, ragged ones, more than a sixteen of groups.
VOCABS = [1, 5, 32, 255, 256, 257, 1000, 5003]
GAMMAS = [-1.5, 0.0, 0.4, 1.0, 2.0, 7.5]
ALPHAS = [0.0, 0.3, 1 - 1e-12, 1.0]


def coefficients(count: int | None = None, **values: float | Tensor) -> Tensor:
    """A row, or `count` rows of coefficients."""
    usual = dict.fromkeys(COEFFICIENTS, 0.0) | {"gamma": 2.0, "temperature": 1.0, "alpha_s": 0.5}
    columns = [torch.as_tensor(v, dtype=torch.float64) for v in (usual | values).values()]
    one = torch.stack(torch.broadcast_tensors(*columns), -1)
    return one if count is None else one.expand(count, -1).contiguous()


def streams(vocab: int, count: int = ROWS, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Tensor]:
    """Two of logits that agree on much."""
    g = torch.Generator().manual_seed(seed)
    common = 2 * torch.randn(count, vocab, generator=g)
    return [(common + torch.randn(count, vocab, generator=g)).to(dtype) for _ in range(2)]


def ids(vocab: int, count: int = ROWS, exclude: int | None = None) -> Tensor:
    z = torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(2))
    return z if exclude is None else torch.where(z == exclude, (z + 1) % vocab, z)


def step(c: Tensor, u: Tensor, z: Tensor, k: Tensor, exclude: int | None = None, key: Tensor = KEY) -> Tensor:
    tokens: Tensor = torch.ops.dlcore.guidance_cfg_uniform_step(c, u, z, k, exclude, key)
    return tokens


def exact(c: Tensor, u: Tensor, *args: Any) -> Tensor:
    with dlcore.use_backend("reference"):
        return step(c.double(), u.double(), *args)


def mass(x: Tensor, z: Tensor, k: Tensor, exclude: int | None) -> Tensor:
    """α_s·p + (1-α_s)/V of one stream, in probabilities."""
    _, temperature, shift, alpha_s, _, _ = k.expand(len(z), -1).unsqueeze(1).unbind(-1)
    weight = x.double().exp()
    weight = weight.scatter(-1, z.unsqueeze(-1), weight.gather(-1, z.unsqueeze(-1)) * shift.exp())
    if exclude is not None:
        weight[:, exclude] = 0
    p = weight ** (1 / temperature)
    return alpha_s * p / p.sum(-1, keepdim=True) + (1 - alpha_s) / (x.shape[-1] - (exclude is not None))


def law(c: Tensor, u: Tensor, z: Tensor, k: Tensor, exclude: int | None = None) -> Tensor:
    """The guided probabilities (n, V), from their definition."""
    gamma, bonus = k.expand(len(z), -1)[:, [0, 4]].unsqueeze(1).unbind(-1)
    weight = mass(c, z, k, exclude) ** gamma * mass(u, z, k, exclude) ** (1 - gamma)
    weight = weight.scatter(-1, z.unsqueeze(-1), weight.gather(-1, z.unsqueeze(-1)) * bonus.exp())
    if exclude is not None:
        weight[:, exclude] = 0
    return weight / weight.sum(-1, keepdim=True)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha_s", ALPHAS)
@pytest.mark.parametrize("vocab", [2, 32, 700])
def test_it_is_a_draw_from_the_law_by_hand(backend: str, vocab: int, alpha_s: float, gamma: float) -> None:
    """The tokens that the house's draw takes from probabilities made without a logarithm."""
    (c, u), z = streams(vocab), ids(vocab, exclude=1 if vocab > 2 else None)
    k = coefficients(gamma=gamma, alpha_s=alpha_s, temperature=0.7, shift=-1.2, bonus=1.5)
    for exclude in (None, 1) if vocab > 2 else (None,):
        drawn = step(c, u, z, k, exclude)
        assert drawn.equal(reference.draw(law(c, u, z, k, exclude).log(), KEY))
    assert dlcore.last_backend(OP) == expected_backend(OP, backend)


def test_statistics(backend: str) -> None:
    """Token by token over many rows, without the house's draw to compare with."""
    vocab, count = 300, 4000 if backend == "reference" else 60_000
    (c, u), z, k = streams(vocab, 1), torch.tensor([17]), coefficients(gamma=1.7, bonus=1.0, shift=-0.5)
    drawn = step(c.expand(count, -1), u.expand(count, -1), z.expand(count).contiguous(), k, 4)
    assert chi_square(drawn, law(c, u, z, k, 4)[0]) > 1e-4


def test_rows_that_stay_are_not_read(backend: str) -> None:
    c, u = torch.full((4, 9), torch.nan), torch.full((4, 9), torch.inf)
    z = torch.tensor([3, 0, 8, 5])
    k = coefficients(4)
    k[[0, 2], -1] = 1
    assert step(c, u, z, k).tolist() == [3, -1, 8, -1]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("vocab", [5, 300, 1000])
def test_broken_rows(backend: str, vocab: int, bad: float, gamma: float) -> None:
    """Broken in either stream, whatever its weight; what stands at `exclude` is not looked at."""
    (c, u), z = streams(vocab), ids(vocab, exclude=2)
    k = coefficients(gamma=gamma)
    clean = step(c, u, z, k, 2)
    c[:, 2], u[:, 2] = bad, torch.nan
    assert step(c, u, z, k, 2).equal(clean)
    if bad == -torch.inf:
        c[3], u[7] = bad, bad
    else:
        c[3, 4], u[7, vocab - 1] = bad, bad
    found = step(c, u, z, k, 2)
    broken = torch.zeros(ROWS, dtype=torch.bool).scatter(0, torch.tensor([3, 7]), True)
    assert found.equal(clean.masked_fill(broken, -1))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_impossible_tokens(backend: str, gamma: float) -> None:
    """At α_s = 1 what a stream of non-zero weight excludes is never drawn, below it everything may be."""
    (c, u), z = streams(700), ids(700)
    g = torch.Generator().manual_seed(5)
    for x in (c, u):
        x[torch.rand(x.shape, generator=g) < 0.6] = -torch.inf
    c[0, 350:], u[0, :350] = -torch.inf, -torch.inf
    for alpha_s in (1e-3, 0.4, 1.0):
        k = coefficients(gamma=gamma, alpha_s=alpha_s)
        found = step(c, u, z, k)
        assert found.equal(exact(c, u, z, k, None, KEY))
        if alpha_s == 1 and gamma not in (0, 1):
            assert found[0] == -1
        drawn = found.clamp(min=0).unsqueeze(-1)
        seen = (c.gather(-1, drawn) if gamma else u.gather(-1, drawn))[found >= 0]
        if alpha_s != 0.4:
            assert bool(seen.isneginf().any()) == (alpha_s < 1)


def test_keys_and_coefficients_of_rows(backend: str) -> None:
    """One of each per row is as one call per row; a shared key numbers the rows."""
    (c, u), z = streams(300), ids(300)
    g = torch.Generator().manual_seed(6)
    k = coefficients(ROWS, gamma=torch.randn(ROWS, generator=g), alpha_s=torch.rand(ROWS, generator=g))
    keys = rng.split(KEY, ROWS)
    whole = step(c, u, z, k)
    assert step(c, u, z, k, key=keys).equal(whole)
    at = [slice(r, r + 1) for r in range(ROWS)]
    assert torch.cat([step(c[r], u[r], z[r], k[r], key=keys[r]) for r in at]).equal(whole)
    shape = (4, 2, 3)
    split = step(c.view(*shape, -1), u.view(*shape, -1), z.view(shape), k.view(*shape, -1))
    assert split.equal(whole.view(shape))
    assert step(c[:0], u[:0], z[:0], k[:0]).shape == (0,)


# --- the kernel against the reference in float64 ---

EXCLUDES: list[int | None] = [None, 0, 700]
#: Rows in each of which something else is at an end.
EDGES = coefficients(
    gamma=torch.tensor([2.0, 2, 2, 2, 0.3, 1, 0, -3, 40, 2, 2, 2]),
    temperature=torch.tensor([1.0, 0.2, 3, 1, 1, 1, 1, 1, 1, 1, 1, 0.05]),
    shift=torch.tensor([0.0, 0, 0, -9, -30, 5, 0, 0, 0, 0, 0, 0]),
    alpha_s=torch.tensor([0.5, 0.5, 0.5, 0.5, 0.999, 1, 1, 1 - 1e-12, 0.9, 0, 1e-9, 1.0]),
    bonus=torch.tensor([0.0, 0, 0, 12, 25, 1, 1, 1, 1, 3, -2, 0]),
)
#: Flat, common and peaked logits, and what is added to all of them.
SHARPNESS = [(0.01, 0.0), (1.0, 0.0), (12.0, 0.0), (2.0, 3e4)]


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize("vocab", [*VOCABS, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel(dtype: torch.dtype, vocab: int, sharpness: tuple[float, float]) -> None:
    scale, offset = sharpness
    count = len(EDGES) * (2 if vocab > 5003 else 8)
    c, u = ((scale * x + offset).to(dtype) for x in streams(vocab, count))
    k = EDGES.repeat(count // len(EDGES), 1)
    for exclude in (e for e in EXCLUDES if e is None or e < vocab - 1):
        z = ids(vocab, count, exclude)
        drawn = step(c, u, z, k, exclude)
        assert dlcore.last_backend(OP) == "cpu"
        assert drawn.equal(exact(c, u, z, k, exclude, KEY))


@pytest.mark.usefixtures("poisoned")
def test_two_dtypes_and_any_strides() -> None:
    """Rows lie apart, between NaN; a stream whose columns lie apart is copied."""
    (c, u), z, k = streams(700), ids(700), coefficients()
    wide = torch.full((ROWS, 703), torch.nan, dtype=torch.bfloat16)
    wide[:, 1:701] = c
    wanted = exact(wide[:, 1:701], u, z, k, None, KEY)
    assert step(wide[:, 1:701], u, z, k).equal(wanted)
    assert step(u, wide[:, 1:701], z, k).equal(exact(u, wide[:, 1:701], z, k, None, KEY))
    assert step(wide[:, 1:701], u.T.contiguous().T, z, k).equal(wanted)
    assert step(c[:1].expand(ROWS, -1), u, z, k).equal(step(c[:1].repeat(ROWS, 1), u, z, k))
    apart = torch.stack([z, z + 1], -1)[:, 0]
    assert step(c, u, apart, k.expand(ROWS, -1)).equal(step(c, u, z, k))


def test_levels_agree_to_the_bit(restored_level: None) -> None:
    """All of AVX-512, AVX2 and, but for rounding, the baseline; with every dtype's own loads."""
    k = EDGES.repeat(40, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        (c, u), z, found = streams(1000, len(k), dtype), ids(1000, len(k)), {}
        for name in levels():
            choose_capability(name)
            found[name] = step(c, u, z, k)
        baseline = found.pop("baseline")
        assert all(x.equal(next(iter(found.values()))) for x in found.values())
        assert all((x == baseline).float().mean() > 0.99 for x in found.values())
        assert baseline.equal(exact(c, u, z, k, None, KEY))


def test_threads_change_nothing() -> None:
    (c, u), z, k = streams(3000, 50), ids(3000, 50), coefficients()
    threads, found = torch.get_num_threads(), []
    for n in (1, 3):
        torch.set_num_threads(n)
        found.append(step(c, u, z, k))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_whatever_is_given_a_token_comes_back() -> None:
    """Numbers that no caller checks, ids of no token: nothing is read elsewhere, and no other id is drawn."""
    wild = torch.tensor([0.0, 1, -1, 2, 1e-320, 1e300, -1e300, torch.inf, -torch.inf, torch.nan]).double()
    usual = coefficients()
    rows = [usual.clone().index_fill(0, torch.tensor([i]), v) for i in range(5) for v in wild.tolist()]
    rows += [torch.full((6,), v, dtype=torch.float64) for v in wild.tolist()]
    k = torch.stack(rows)
    for vocab in (5, 300, 1000):
        (c, u), tokens = streams(vocab, len(k)), torch.tensor([-1, -(2**62), vocab, 2**62])
        z = tokens.repeat(len(k))[: len(k)]
        kept = k[:, -1] != 0
        for exclude in (None, 3):
            drawn = step(c, u, z, k, exclude)
            assert drawn[kept].equal(z[kept])
            assert bool(((drawn[~kept] >= -1) & (drawn[~kept] < vocab)).all())


def test_ties_go_to_the_lowest_id(backend: str) -> None:
    """A weight so large that no noise shows: the first of the tokens that the condition favours most."""
    u, z, k = torch.zeros(3, 2000), torch.zeros(3, dtype=torch.int64), coefficients(gamma=1e30)
    c = torch.zeros(3, 2000)
    c[0, [300, 1999]], c[1, [1999, 1900]], c[2, [5, 0]] = 1.0, 1.0, 1.0
    assert step(c, u, z, k).tolist() == [300, 1900, 0]


def test_float64_runs_on_the_reference() -> None:
    (c, u), z = streams(40, dtype=torch.float64), ids(40)
    step(c, u, z, coefficients())
    assert dlcore.last_backend(OP) == "reference"


LOGITS, Z, ROW = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), coefficients()
BAD = [
    ((LOGITS[:, :1], LOGITS[:, :1], 0 * Z, ROW, 0, KEY), ValueError, "exclude leaves no token"),
    ((LOGITS.long(), LOGITS, Z, ROW, None, KEY), TypeError, "cond must be float32, bfloat16, float16"),
    ((LOGITS, LOGITS[:1], Z, ROW, None, KEY), ValueError, "uncond must have cond's shape (2, 5), got"),
    (
        (LOGITS, LOGITS.double(), Z, ROW, None, KEY),
        TypeError,
        "uncond must be float64 as cond is",
    ),
    ((LOGITS, LOGITS.int(), Z, ROW, None, KEY), TypeError, "uncond must be float64 as cond is"),
    ((LOGITS, LOGITS, Z.int(), ROW, None, KEY), TypeError, "z must be an int64 Tensor"),
    ((LOGITS, LOGITS, Z[:1], ROW, None, KEY), ValueError, "z must have shape (2,), got (1,)"),
    ((LOGITS, LOGITS, Z, ROW.float(), None, KEY), ValueError, "coefficients must be float64 (6,) or (2, 6)"),
    ((LOGITS, LOGITS, Z, ROW[:5], None, KEY), ValueError, "coefficients must be float64 (6,) or (2, 6)"),
    (
        (LOGITS, LOGITS, Z, ROW.expand(3, 6), None, KEY),
        ValueError,
        "coefficients must be float64 (6,) or (2, 6)",
    ),
    ((LOGITS, LOGITS, Z, ROW, 5, KEY), ValueError, "exclude must lie in [0, 5), got 5"),
    ((LOGITS, LOGITS, Z, ROW, None, KEY[:1]), ValueError, "key must have shape (2,) or (2, 2), got (1,)"),
]


@pytest.mark.parametrize(("args", "error", "text"), BAD)
def test_bad_input(args: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=rf"^guidance\.cfg_uniform_step: {re.escape(text)}"):
        torch.ops.dlcore.guidance_cfg_uniform_step(*args)
