"""Classifier-free guidance against enumeration and exact laws; what both kinds share."""

import pytest
import torch
from oracles import (
    ROWS,
    V,
    bridge_given_clean,
    check_compiled,
    fits,
    fits_given,
    law,
    point,
    uniform_kernel,
)
from torch import Tensor

import dlcore
from dlcore import LinearLogits
from dlcore.cpu import linear_logits
from dlcore.process import _rows as rows
from dlcore.process import guidance, masked
from dlcore.process.guidance import classifier_free

MASK = V
LEVELS = [(0.4, 0.7), (0.0, 0.3), (0.2, 1.0), (0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (0.3, 1 - 1e-12)]
PARAMETERIZATIONS = ["loo", "denoiser"]


def geometric(c: Tensor, u: Tensor, gamma: float) -> Tensor:
    """c^γ·u^(1-γ), normalised."""
    weight = c**gamma * u ** (1 - gamma)
    return weight / weight.sum(-1, keepdim=True)


def tempered(p: Tensor, temperature: float) -> Tensor:
    return p ** (1 / temperature) / (p ** (1 / temperature)).sum(-1, keepdim=True)


def denoiser_of(p: Tensor, z: Tensor, alpha: float) -> Tensor:
    joint = p * uniform_kernel(alpha, p.shape[-1]).T[z]
    return joint / joint.sum(-1, keepdim=True)


def bridge(p: Tensor, z: Tensor, alpha_t: float, alpha_s: float) -> Tensor:
    """The bridge of leave-one-out laws (..., V), by Bayes' rule over the clean token."""
    vocab = p.shape[-1]
    if alpha_t == alpha_s:
        return point(z, vocab)
    given = bridge_given_clean(alpha_t, alpha_s, vocab)
    return torch.einsum("zx,xzy->zy", denoiser_of(p, z, alpha_t), given[:, z])


def subs(p: Tensor) -> Tensor:
    """Logits of p (..., V) with a column for the mask, large: it must not count."""
    return torch.cat([p.log(), torch.full_like(p[..., :1], 5.0)], -1)


def network(p: Tensor, z: Tensor, alpha: float, parameterization: str) -> Tensor:
    return (p if parameterization == "loo" else denoiser_of(p, z, alpha)).log()


def heads(vocab: int, *lead: int, seed: int, bias: bool = False) -> LinearLogits:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, 8, generator=g)
    return LinearLogits(
        torch.randn(*lead, 8, generator=g), weight, torch.randn(vocab, generator=g) if bias else None
    )


# --- classifier-free ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.7])
def test_masked_law(gamma: float) -> None:
    c, u = law(V, seed=1), law(V, seed=2)
    logits = guidance.cfg(subs(c), subs(u), gamma)
    wanted = geometric(c, u, gamma)
    torch.testing.assert_close(torch.softmax(logits[:V], -1), wanted)
    if gamma in (0.0, 1.0):
        assert logits.equal(subs(c) if gamma else subs(u))
    z = torch.full((ROWS // 4,), MASK)
    drawn = masked.step(logits.float().expand(len(z), V + 1), z, 0.2, 0.6, MASK, key=dlcore.rng.key(3))
    assert fits(drawn, torch.cat([wanted / 2, torch.tensor([0.5], dtype=torch.float64)]))


def test_lladas_scale_is_one_less() -> None:
    c, u, s = torch.randn(2, 5), torch.randn(2, 5), 1.5
    torch.testing.assert_close(guidance.cfg(c, u, s + 1), u + (s + 1) * (c - u))


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.5])
@pytest.mark.parametrize(("alpha_t", "alpha_s"), LEVELS)
def test_uniform_law(alpha_t: float, alpha_s: float, gamma: float, parameterization: str) -> None:
    z = torch.arange(V)
    c, u = law((V, V), seed=4), law((V, V), seed=5)
    wanted = geometric(bridge(c, z, alpha_t, alpha_s), bridge(u, z, alpha_t, alpha_s), gamma)
    wanted = wanted.nan_to_num(0)  # 0/0 where the row stays
    streams = (network(x, z, alpha_t, parameterization) for x in (c, u))
    found = guidance.cfg_uniform_log_probs(
        *streams, z, alpha_t, alpha_s, gamma, parameterization=parameterization
    )
    torch.testing.assert_close(found.exp(), wanted if alpha_t < alpha_s else point(z, V))


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize(("gamma", "temperature"), [(0.0, 1.0), (0.5, 1.0), (1.0, 0.6), (2.5, 1.4)])
@pytest.mark.parametrize(("alpha_t", "alpha_s"), [(0.4, 0.7), (0.2, 1.0), (0.5, 0.5)])
def test_uniform_step_draws_from_the_law(
    alpha_t: float, alpha_s: float, gamma: float, temperature: float, parameterization: str
) -> None:
    c, u = law((V, V), seed=6), law((V, V), seed=7)
    z = torch.arange(V)
    streams = [network(x, z, alpha_t, parameterization).float() for x in (c, u)]
    each = z.repeat(ROWS // (2 * V))
    drawn = guidance.cfg_uniform_step(
        *(x[each] for x in streams),
        each,
        alpha_t,
        alpha_s,
        gamma,
        parameterization=parameterization,
        temperature=temperature,
        key=dlcore.rng.key(8),
    )
    wanted = point(z, V)
    if alpha_t < alpha_s:
        two = (bridge(tempered(x, temperature), z, alpha_t, alpha_s) for x in (c, u))
        wanted = geometric(*two, gamma)
    assert fits_given(each, drawn, wanted)


def test_excluded_token_is_as_if_it_were_not_there() -> None:
    c, u, z = law((4, 4), seed=9), law((4, 4), seed=10), torch.arange(4)
    wide = [torch.cat([x[:, :2], torch.full((4, 1), 9.0), x[:, 2:]], -1).log() for x in (c, u)]
    moved = z + (z >= 2).long()
    found = guidance.cfg_uniform_log_probs(*wide, moved, 0.3, 0.6, 1.8, exclude=2).exp()
    wanted = guidance.cfg_uniform_log_probs(c.log(), u.log(), z, 0.3, 0.6, 1.8).exp()
    assert bool((found[:, 2] == 0).all())
    torch.testing.assert_close(found[:, [0, 1, 3, 4]], wanted)
    count = ROWS // 16
    drawn = guidance.cfg_uniform_step(
        *(x.float().repeat(count, 1) for x in wide),
        moved.repeat(count),
        0.3,
        0.6,
        1.8,
        exclude=2,
        key=dlcore.rng.key(11),
    )
    assert fits_given(z.repeat(count), drawn, found)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 3.0, -1.0])
def test_impossible_tokens_make_no_nan(gamma: float) -> None:
    never = -torch.inf
    c = torch.tensor([[never, 0.0, 1.0, never], [0.0, 1.0, 2.0, 3.0]])
    u = torch.tensor([[never, never, 1.0, 0.5], [never, 1.0, 1.0, 1.0]])
    found = guidance.cfg(c, u, gamma)
    if gamma in (0.0, 1.0):
        assert found.equal(c if gamma else u)
    else:
        assert found.isneginf().equal(c.isneginf() | u.isneginf())
    z = torch.zeros(2, dtype=torch.int64)
    for alpha_s in (0.6, 1.0):
        log_q = guidance.cfg_uniform_log_probs(c, u, z, 0.3, alpha_s, gamma)
        assert not bool(log_q.isnan().any())
        torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(2))
        assert bool((guidance.cfg_uniform_step(c, u, z, 0.3, alpha_s, gamma) >= 0).all())


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("alpha_s", [0.6, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 3.0, -1.0])
def test_uniform_step_is_a_draw_from_its_log_probs(
    gamma: float, alpha_s: float, parameterization: str
) -> None:
    """Token by token under one key, impossible tokens included; what it is given is left as it was."""
    g = torch.Generator().manual_seed(42)
    c, u = (2 * torch.randn(600, 300, generator=g) for _ in range(2))
    for x in (c, u):
        x[torch.rand(x.shape, generator=g) < 0.2] = -torch.inf
    z = torch.randint(300, (600,), generator=g)
    arguments = (c, u, z, 0.3, alpha_s, gamma)
    options = {"parameterization": parameterization, "temperature": 0.8, "exclude": 7}
    z[z == 7] = 8
    before, key = [c.clone(), u.clone()], dlcore.rng.key(43)
    drawn = guidance.cfg_uniform_step(*arguments, key=key, **options)
    law = guidance.cfg_uniform_log_probs(*arguments, **options)
    assert drawn.equal(dlcore.categorical.sample(law, key=key).tokens)
    assert c.equal(before[0])
    assert u.equal(before[1])


def test_broken_rows_and_rows_that_stay() -> None:
    good, bad = torch.randn(2, 5), torch.full((2, 5), torch.nan)
    z = torch.tensor([1, 2])
    for c, u in ((good, bad), (bad, good)):
        assert guidance.cfg_uniform_step(c, u, z, 0.2, 0.4, 1.5).tolist() == [-1, -1]
        assert guidance.cfg_uniform_step(c, u, z, 0.4, 0.4, 1.5).equal(z)
        assert guidance.cfg_uniform_step(c, u, z, 1.0, 1.0, 1.5).equal(z)
        assert guidance.cbg_uniform_step(c, u, z, 0.2, 0.4, 1.5).tolist() == [-1, -1]
        assert guidance.cbg_uniform_step(c, u, z, 0.4, 0.4, 1.5).equal(z)
        assert guidance.cbg_masked_step(c, u, z, 0.2, 0.4, 2, 1.5).tolist() == [1, -1]
        assert guidance.cbg_masked_step(c, u, z, 0.4, 0.4, 2, 1.5).equal(z)


def test_linear_streams_stay_linear() -> None:
    gamma = torch.tensor([[0.0, 1.0, 2.5], [-0.5, 0.3, 4.0]])
    g = torch.Generator().manual_seed(12)
    for bias in (False, True):
        one = heads(11, 2, 3, seed=13, bias=bias)
        two = LinearLogits(torch.randn(2, 3, 8, generator=g), one.weight, one.bias)
        for other in (two, heads(11, 2, 3, seed=14, bias=bias)):
            found = guidance.cfg(one, other, gamma)
            assert isinstance(found, LinearLogits)
            assert (found.weight is one.weight) == (other is two)
            dense = guidance.cfg(one.materialize(), other.materialize(), gamma)
            torch.testing.assert_close(found.materialize(), dense, rtol=1e-5, atol=1e-5)
    z, key = torch.randint(11, (2, 3), generator=g), dlcore.rng.key(15)
    whole = guidance.cfg_uniform_step(one, two, z, 0.4, 0.6, gamma, key=key)
    dense = guidance.cfg_uniform_step(one.materialize(), two.materialize(), z, 0.4, 0.6, gamma, key=key)
    assert whole.equal(dense)


def test_half_precision_streams_are_blended_in_float32() -> None:
    c, u = torch.randn(3, 6).bfloat16(), torch.randn(3, 6).bfloat16()
    torch.testing.assert_close(guidance.cfg(c, u, 2.0), u.float() + 2 * (c.float() - u.float()))


def test_gradients() -> None:
    c, u = (law((3, 4), seed=i).log().requires_grad_() for i in (16, 17))
    z = torch.tensor([0, 3, 1])
    gamma = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    alpha = torch.tensor([0.7, 1.0, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: torch.softmax(guidance.cfg(a, b, gamma), -1), (c, u))
    assert torch.autograd.gradcheck(
        lambda a, b: guidance.cfg_uniform_log_probs(a, b, z, 0.3, alpha, gamma).exp(), (c, u)
    )
    assert torch.autograd.gradcheck(lambda a, b: torch.softmax(guidance.cbg(a, b, gamma), -1), (c, u))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_guided_uniform_step_multiplies_out_once(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Each stream's rows once, few at a time, by the CPU's product where it takes them."""
    one, two = (heads(700, 2, 3, seed=s, bias=True) for s in (45, 46))
    one, two = (LinearLogits(*(x.to(dtype) for x in (h.hidden, h.weight, h.bias))) for h in (one, two))
    z, key = torch.arange(6).view(2, 3), dlcore.rng.key(47)
    gamma = torch.tensor([0.5, 2.0, 1.0])
    dense = [x.materialize() for x in (one, two)]
    wanted = guidance.cfg_uniform_step(*dense, z, 0.4, 0.6, gamma, exclude=699, key=key)
    made: list[int] = []
    product, plain = linear_logits.matmul, LinearLogits.materialize

    def multiply(a: Tensor, *args: Tensor, **options: Tensor | None) -> None:
        made.append(len(a))
        product(a, *args, **options)

    def materialize(head: LinearLogits) -> Tensor:
        made.append(-len(head.hidden))
        return plain(head)

    monkeypatch.setattr(linear_logits, "matmul", multiply)
    monkeypatch.setattr(LinearLogits, "materialize", materialize)
    monkeypatch.setattr(classifier_free, "_LINEAR_CHUNK", 4 * 700)
    assert guidance.cfg_uniform_step(one, two, z, 0.4, 0.6, gamma, exclude=699, key=key).equal(wanted)
    sign = -1 if dtype == torch.float64 else 1
    assert made == [4 * sign, 4 * sign, 2 * sign, 2 * sign]
    # One stream linear, the other not; one row's keys instead of one for all.
    keys = dlcore.rng.split(key, (2, 3))
    mixed = guidance.cfg_uniform_step(one, dense[1], z, 0.4, 0.6, gamma, exclude=699, key=keys)
    assert mixed.equal(wanted)


def test_streams_of_two_dtypes() -> None:
    c, u, z = law((4, 9), seed=48).log(), law((4, 9), seed=49).log().bfloat16(), torch.arange(4)
    key = dlcore.rng.key(50)
    for one, two in ((c, u), (u, c), (c.float(), u), (u, c.half())):
        both = (x.double() for x in (one, two))
        drawn = guidance.cfg_uniform_step(one, two, z, 0.3, 0.6, 1.5, key=key)
        assert drawn.equal(guidance.cfg_uniform_step(*both, z, 0.3, 0.6, 1.5, key=key))


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_uniform_step_compiles(parameterization: str) -> None:
    """One graph, dense and linear, for any levels, weight and temperature."""
    c, u = (torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(i)) for i in (51, 52))
    weight, z, key = torch.eye(11, 9), torch.tensor([[1, 2, 3], [4, 5, 6]]), dlcore.rng.key(53)

    def everything(t: Tensor, gamma: Tensor, heat: Tensor) -> tuple[Tensor, ...]:
        options = {"parameterization": parameterization, "temperature": heat, "exclude": 8, "key": key}
        at = (z, t, t + 0.2, gamma)
        heads = (LinearLogits(c, weight), LinearLogits(u, weight))
        return (
            guidance.cfg_uniform_step(c, u, *at, **options),
            guidance.cfg_uniform_step(*heads, *at, **options),
        )

    levels = [torch.tensor(x) for x in (0.1, 0.3, 0.8)]
    check_compiled(everything, [(t, 2 * t, t + 1) for t in levels])


# --- noise, compilation, errors ----------------------------------------------------------------------------


def test_tokens_follow_the_key_and_no_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(34)
    c, u = torch.randn(4, 6, 9, generator=g), torch.randn(4, 6, 9, generator=g)
    z, key = torch.randint(9, (4, 6), generator=g), dlcore.rng.key(35)
    per_row = dlcore.rng.fold_in(key, torch.arange(24).view(4, 6))
    for call in (
        lambda k, i: guidance.cfg_uniform_step(c[i], u[i], z[i], 0.2, 0.6, 1.5, key=k),
        lambda k, i: guidance.cbg_uniform_step(c[i], u[i], z[i], 0.2, 0.6, 1.5, key=k),
        lambda k, i: guidance.cbg_masked_step(c[i], u[i], z[i] * 0 + 8, 0.2, 0.6, 8, 1.5, key=k),
    ):
        whole = call(key, slice(None))
        assert whole.equal(call(per_row, slice(None)))
        assert whole.equal(torch.cat([call(per_row[i], i) for i in (slice(0, 1), slice(1, 4))]))
        assert not whole.equal(call(dlcore.rng.key(36), slice(None)))
        with monkeypatch.context() as patch:
            patch.setattr(rows, "CHUNK", 20)
            assert whole.equal(call(key, slice(None)))


def test_compiles_whole_and_once() -> None:
    g = torch.Generator().manual_seed(37)
    z, u = torch.randint(9, (2, 6), generator=g), torch.randn(2, 6, 9, generator=g)

    def everything(c: Tensor, t: Tensor, s: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        mixed = guidance.cfg(c, u, s)
        assert isinstance(mixed, Tensor)
        return (
            mixed,
            guidance.cfg_uniform_step(c, u, z, t, s, 1.5, key=k),
            guidance.cfg_uniform_log_probs(c, u, z, t, s, 1.5, parameterization="denoiser"),
            guidance.cbg_uniform_step(c, u, z, t, s, s, key=k),
            guidance.cbg_masked_step(c, u, z, t, s, 8, s, key=k),
        )

    logits, key = torch.randn(2, 6, 9, generator=g), dlcore.rng.key(38)
    levels = torch.linspace(0.1, 0.8, 3, dtype=torch.float64).unbind()
    check_compiled(everything, [(logits, t, t + 0.1, key) for t in levels])


def test_no_rows() -> None:
    none, z = torch.zeros(0, 3, 5), torch.zeros(0, 3, dtype=torch.int64)
    assert guidance.cfg(none, none, 2.0).shape == (0, 3, 5)
    for step in (guidance.cfg_uniform_step, guidance.cbg_uniform_step):
        assert step(none, none, z, 0.2, 0.4, 2.0).shape == (0, 3)
    assert guidance.cbg_masked_step(none, none, z, 0.2, 0.4, 4, 2.0).shape == (0, 3)
    head = LinearLogits(torch.zeros(0, 3, 2), torch.eye(5, 2))
    assert guidance.cfg_uniform_step(head, head, z, 0.2, 0.4, 2.0).shape == (0, 3)
    assert guidance.exact_guide(lambda t: t[:, 0].float(), z, 5).shape == (0, 3, 5)
    assert guidance.taylor_guide(lambda e: e.sum((1, 2)), z, torch.eye(5)).shape == (0, 3, 5)


Z, LOGITS = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 4)
BAD = [
    (
        lambda: guidance.cfg(LOGITS, LOGITS[:1], 1.0),
        ValueError,
        r"cfg: uncond must have the shape of cond \(2, 3, 4\), got \(1, 3, 4\)",
    ),
    (
        lambda: guidance.cfg(LOGITS, LOGITS, torch.inf),
        ValueError,
        r"cfg: gamma must lie in \(-inf, inf\), got inf",
    ),
    (
        lambda: guidance.cfg(LOGITS, LOGITS, torch.zeros(7)),
        ValueError,
        r"cfg: gamma must broadcast to \(2, 3\), got \(7,\)",
    ),
    (lambda: guidance.cfg(LOGITS.long(), LOGITS, 1.0), TypeError, "cfg: cond must be float32"),
    (
        lambda: guidance.cfg_uniform_step(LOGITS, LOGITS, Z, 0.4, 0.3, 1.0),
        ValueError,
        "cfg_uniform_step: alpha_s must be at least alpha_t",
    ),
    (
        lambda: guidance.cfg_uniform_step(LOGITS, LOGITS, Z + 4, 0.2, 0.3, 1.0),
        ValueError,
        r"cfg_uniform_step: z must lie in \[0, 4\), got 4",
    ),
    (
        lambda: guidance.cfg_uniform_step(LOGITS, LOGITS, Z, 0.2, 0.3, 1.0, temperature=0.0),
        ValueError,
        r"cfg_uniform_step: temperature must lie in \(0, inf\), got 0.0",
    ),
    (
        lambda: guidance.cfg_uniform_log_probs(LOGITS, LOGITS, Z, 0.2, 0.3, 1.0, parameterization="x0"),
        ValueError,
        "cfg_uniform_log_probs: parameterization must be one of",
    ),
    (
        lambda: guidance.cbg(LOGITS, LOGITS[..., :3], 1.0),
        ValueError,
        r"cbg: guide must have the shape of logits \(2, 3, 4\), got \(2, 3, 3\)",
    ),
    (
        lambda: guidance.cbg_masked_step(LOGITS, LOGITS, Z, 0.2, 0.3, 4, 1.0),
        ValueError,
        r"cbg_masked_step: mask_id must lie in \[0, 4\), got 4",
    ),
    (
        lambda: guidance.cbg_uniform_step(LOGITS, LOGITS, Z[0], 0.2, 0.3, 1.0),
        ValueError,
        r"cbg_uniform_step: z must have shape \(2, 3\), got \(3,\)",
    ),
    (
        lambda: guidance.exact_guide(lambda t: t, Z, 4),
        ValueError,
        r"exact_guide: classifier must return \(24,\), got \(24, 3\)",
    ),
    (
        lambda: guidance.exact_guide(lambda t: t, Z, 4, where=Z),
        TypeError,
        r"exact_guide: where must be a bool Tensor, got int64",
    ),
    (
        lambda: guidance.exact_guide(lambda t: t, Z, 4, where=[True]),
        TypeError,
        r"exact_guide: where must be a bool Tensor, got list \[True\]",
    ),
    (
        lambda: guidance.exact_guide(lambda t: t, Z, 4, where=torch.zeros_like(Z, dtype=torch.bool)[:1]),
        ValueError,
        r"exact_guide: where must have shape \(2, 3\), got \(1, 3\)",
    ),
    (
        lambda: guidance.exact_guide(lambda t: t, Z, 4, where=torch.zeros(2, 3, device="meta").bool()),
        ValueError,
        "exact_guide: where must be on cpu, got meta",
    ),
    (
        lambda: guidance.exact_guide(lambda t: t, Z, 4, chunk=0),
        ValueError,
        "exact_guide: chunk must be at least 1, got 0",
    ),
    (
        lambda: guidance.taylor_guide(lambda e: e, Z, torch.eye(4)),
        ValueError,
        r"taylor_guide: classifier must return \(2,\), got \(2, 3, 4\)",
    ),
    (
        lambda: guidance.taylor_guide(lambda e: e, Z + 4, torch.eye(4)),
        ValueError,
        r"taylor_guide: z must lie in \[0, 4\), got 4",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"guidance.{message}"):
        call()
