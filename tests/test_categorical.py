"""Statistics and draws: parity, exact laws, tails, determinism, hostile rows, bad input."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from conftest import levels
from goodness import chi_square, count_score

import dlcore
from dlcore import categorical, rng
from dlcore.cpu import choose_capability
from dlcore.reference import categorical as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around lanes, groups and segments, and ragged.
VOCABULARIES = [1, 2, 15, 16, 17, 127, 255, 256, 257, 1000, 65536 + 5, 2 * 65536]
KEY = rng.key(20261121)


def rows(
    vocab: int, dtype: torch.dtype = torch.float32, lead: tuple[int, ...] = (3, 5), seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + vocab)
    return (3 * torch.randn(*lead, vocab, generator=generator)).to(dtype)


def ids(vocab: int, lead: tuple[int, ...] = (3, 5), seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocab, lead, generator=torch.Generator().manual_seed(seed))


# What softmax takes beside the logits, as (index?, keywords).
PARAMETERS = {
    "plain": (False, {}),
    "index": (True, {}),
    "shift": (True, {"shift": torch.tensor([[0.7], [-3.0], [9.0]])}),
    "temperature": (True, {"temperature": torch.tensor([0.3, 1.0, 2.0, 0.9, 0.05])}),
    "softcap": (True, {"softcap": 4.0}),
    "exclude": (True, {"exclude": 0}),
    "all": (True, {"shift": -1.5, "temperature": 0.7, "softcap": 2.5, "exclude": 1}),
}


def numbers_of(stats: categorical.Stats) -> list[torch.Tensor]:
    return [x for name, x in stats._asdict().items() if x is not None and name != "argmax"]


@pytest.mark.parametrize("vocab", VOCABULARIES[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PARAMETERS)
def test_parity(vocab, dtype, case, poisoned):
    """Against float64: at most twice the error of the same formula in float32 torch; the same tokens."""
    indexed, kw = PARAMETERS[case]
    if "exclude" in kw and vocab <= kw["exclude"] + 1:
        pytest.skip("nothing left to draw")
    logits, index = rows(vocab, dtype), ids(vocab) if indexed else None
    draw = categorical.sample(logits, index, key=KEY, **kw)
    assert dlcore.last_backend("categorical.sample") != "reference"
    stats = categorical.stats(logits, index, **kw)
    with dlcore.use_backend("reference"):
        same = categorical.sample(logits, index, key=KEY, **kw)
        truth = categorical.sample(logits.double(), index, key=KEY, **kw)
    assert torch.equal(draw.tokens, truth.tokens)
    assert torch.equal(stats.argmax, truth.stats.argmax)
    assert torch.equal(draw.stats.argmax, truth.stats.argmax)
    mine = [draw.logprob, *numbers_of(draw.stats)]
    for got, torch_own, exact in zip(
        mine, [same.logprob, *numbers_of(same.stats)], [truth.logprob, *numbers_of(truth.stats)], strict=True
    ):
        assert_close_as_torch(got, torch_own, exact)
    for got, again in zip(numbers_of(stats), numbers_of(draw.stats), strict=True):
        assert_close_as_torch(got, again, again.double())


def assert_close_as_torch(got: torch.Tensor, torch_own: torch.Tensor, exact: torch.Tensor) -> None:
    """Error at most twice torch's own, or an ulp and a half of the largest magnitude."""
    finite = torch.isfinite(exact)
    assert torch.equal(got[~finite].double(), exact[~finite])
    if not finite.any():
        return
    exact = exact[finite]
    error, allowed = (x[finite].double().sub(exact).abs().max().item() for x in (got, torch_own))
    # Logits of magnitude 20 carry rounding of their own into every difference.
    ulp = 2.0**-24 * max(exact.abs().max().item(), 20.0)
    assert error <= max(2 * allowed, 3 * ulp)


@pytest.mark.parametrize("vocab", [5, 256, 700, 1024])
def test_draws_follow_softmax(vocab, backend):
    """Chi-square on many rows that share one row of memory (stride 0)."""
    count = 200_000 if backend == "cpu" else 2_000
    logits = rows(vocab, lead=(), seed=3)
    p = torch.softmax(logits.double(), -1)
    tokens = categorical.sample(logits.expand(count, -1), key=KEY).tokens
    assert chi_square(tokens, p) > 1e-4


@pytest.mark.parametrize(
    "broken",
    [
        {"temperature": 0.97},
        {"exclude": True},
        {"shift": 0.1},
    ],
)
def test_the_chi_square_notices(broken):
    logits = rows(700, lead=(), seed=3)
    count = 200_000
    index = torch.full((count,), int(logits.argmax())) if "shift" in broken else None
    if "exclude" in broken:
        broken = {"exclude": int(logits.topk(30).indices[-1])}
    tokens = categorical.sample(logits.expand(count, -1), index, key=KEY, **broken).tokens
    assert chi_square(tokens, torch.softmax(logits.double(), -1)) < 1e-4


def tail_hits(gap: float, draws: int, vocab: int = 262_144) -> tuple[int, float]:
    """How often one token `gap` above all others loses, and how often it should."""
    logits = torch.full((vocab,), -gap)
    logits[7] = 0.0
    tokens = categorical.sample(logits.expand(draws, -1), key=KEY).tokens
    tail = (vocab - 1) * math.exp(-gap)
    return int((tokens != 7).sum()), draws * tail / (1 + tail)


@pytest.mark.slow
@pytest.mark.parametrize(("gap", "draws"), [(14.0, 4_000), (18.0, 40_000), (20.0, 200_000)])
def test_tail_is_drawn_as_often_as_it_should_be(gap, draws):
    """V = 262,144: one float32 Gumbel number per token, 16.6 at most, would never return the tail at gap 20.

    The two-level draw needs less of its noise: a group's log-sum-exp lies only 14.5 below the head here.
    """
    hits, expected = tail_hits(gap, draws)
    assert expected > 80
    assert abs(count_score(hits, expected)) < 4
    # The injected bug, noise that never lifts a token by the gap, would be noticed.
    assert abs(count_score(0, expected)) > 4


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_lane_past_the_end_wins(vocab, dtype, level):
    """All logits far below 0: an unmasked lane, read as 0, would win every draw and every argmax."""
    low = -1e4 - torch.rand(8, vocab, generator=torch.Generator().manual_seed(2)) * 100
    logits = low.to(dtype)
    draw = categorical.sample(logits, key=KEY)
    assert ((draw.tokens >= 0) & (draw.tokens < vocab)).all()
    assert torch.equal(draw.stats.argmax, logits.float().argmax(-1))
    torch.testing.assert_close(
        draw.stats.logsumexp, torch.logsumexp(logits.double(), -1).float(), rtol=1e-6, atol=0
    )


def test_tokens_are_equal_over_levels_threads_and_chunks():
    logits = torch.cat([rows(66_000, lead=(40,)), 8 * rows(66_000, lead=(24,), seed=4)])
    expected = categorical.sample(logits, key=KEY).tokens
    keys = rng.fold_in(KEY, torch.arange(64))
    assert torch.equal(expected, categorical.sample(logits, key=keys).tokens)
    assert torch.equal(expected.view(8, 8), categorical.sample(logits.view(8, 8, -1), key=KEY).tokens)
    for part in (slice(0, 1), slice(3, 20), slice(20, 64)):
        assert torch.equal(expected[part], categorical.sample(logits[part], key=keys[part]).tokens)
    threads = torch.get_num_threads()
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        drawn = categorical.sample(logits, key=KEY)
        few = categorical.sample(logits[:2], key=KEY)
        torch.set_num_threads(threads)
        assert torch.equal(expected, drawn.tokens)
        assert torch.equal(expected[:2], few.tokens)


def test_levels_agree(level):
    """AVX2 and AVX-512 by construction, the baseline but for scores that differ by rounding."""
    logits = rows(3001, lead=(4000,))
    tokens = categorical.sample(logits, key=KEY)
    choose_capability("baseline")
    baseline = categorical.sample(logits, key=KEY)
    choose_capability(level)
    assert torch.equal(tokens.tokens, baseline.tokens)
    for a, b in zip(numbers_of(tokens.stats), numbers_of(baseline.stats), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_wide_levels_are_bit_equal():
    """AVX2 and AVX-512 fuse the same operations in the same order: not only tokens, every number."""
    found: dict[str, list[torch.Tensor]] = {}
    logits, index = rows(70_000, torch.bfloat16, lead=(40,)), ids(70_000, (40,))
    for name in levels():
        choose_capability(name)
        draw = categorical.sample(logits, index, temperature=0.7, softcap=9.0, shift=1.0, top_p=0.9, key=KEY)
        found[name] = [draw.tokens, draw.logprob, *draw.stats]
    choose_capability(levels()[0])
    if "avx512" not in found:
        pytest.skip("this machine has one wide level at most")
    assert all(torch.equal(a, b) for a, b in zip(found["avx512"], found["avx2"], strict=True))
    assert torch.equal(found["avx512"][0], found["baseline"][0])


def test_statistics_are_bit_equal_over_threads():
    logits = rows(200_000, lead=(2,))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = categorical.sample(logits, key=KEY)
    torch.set_num_threads(4)
    four = categorical.sample(logits, key=KEY)
    torch.set_num_threads(threads)
    assert torch.equal(one.tokens, four.tokens)
    for a, b in zip(numbers_of(one.stats), numbers_of(four.stats), strict=True):
        assert torch.equal(a, b)


def test_python_threads_do_not_disturb_each_other():
    logits = [rows(5000, lead=(64,), seed=s) for s in range(4)]
    expected = [categorical.sample(x, key=KEY).tokens for x in logits]
    found: dict[int, list[torch.Tensor]] = {s: [] for s in range(4)}

    def work(s: int) -> None:
        for _ in range(10):
            found[s].append(categorical.sample(logits[s], key=KEY).tokens)

    workers = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(t, expected[s]) for s in range(4) for t in found[s])


def test_rows_are_independent():
    """Equal logits in neighbouring rows, one key: tokens of row r and r + 1 are a product law."""
    logits = torch.tensor([0.5, 0.0, -0.5]).expand(200_000, -1)
    tokens = categorical.sample(logits, key=KEY).tokens.view(-1, 2)
    p = torch.softmax(torch.tensor([0.5, 0.0, -0.5]).double(), -1)
    assert chi_square(tokens[:, 0] * 3 + tokens[:, 1], torch.outer(p, p).flatten()) > 1e-4
    assert chi_square(tokens[:, 0] * 4, torch.outer(p, p).flatten()) < 1e-4


def test_more_than_two_to_the_31_elements_by_stride_0():
    logits = rows(262_144, torch.bfloat16, lead=())
    count = 2**31 // 262_144 + 3
    big = logits.expand(count, -1)
    assert big.numel() > 2**31
    keys = rng.fold_in(KEY, torch.arange(count))
    tokens = categorical.sample(big, key=KEY).tokens
    assert torch.equal(tokens[-3:], categorical.sample(logits.expand(3, -1), key=keys[-3:]).tokens)


def test_strides_past_two_to_the_31():
    """Rows that lie 2^31 entries apart; only the touched pages of the buffer exist."""
    buffer = torch.empty(2**31 + 5000, dtype=torch.bfloat16)
    view = buffer.as_strided((2, 1000), (2**31, 1))
    view.copy_(rows(1000, torch.bfloat16, lead=(2,)))
    assert torch.equal(
        categorical.sample(view, key=KEY).tokens, categorical.sample(view.clone(), key=KEY).tokens
    )


def test_leading_strides_are_read_in_place(caplog):
    base = rows(300, lead=(4, 6, 3))
    for view in (base[:, ::2], base.transpose(0, 1), base[::3, 1:, 2], base.permute(2, 1, 0, 3)):
        assert torch.equal(
            categorical.sample(view, key=KEY).tokens, categorical.sample(view.clone(), key=KEY).tokens
        )
    assert not caplog.records


def test_a_strided_last_dimension_is_copied_and_logged(caplog):
    logits = rows(300, lead=(6,)).t().contiguous().t()
    assert logits.stride(-1) != 1
    with caplog.at_level("INFO", logger="dlcore"):
        tokens = categorical.sample(logits, key=KEY).tokens
    assert "copied" in caplog.text
    assert torch.equal(tokens, categorical.sample(logits.contiguous(), key=KEY).tokens)


HOSTILE = {
    "nan": float("nan"),
    "negative nan": -float("nan"),
    "+inf": float("inf"),
}


@pytest.mark.parametrize("kind", [*HOSTILE, "-inf row"])
@pytest.mark.parametrize("at", [0, 200, 511, 512, 599])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_hostile_rows(kind, at, dtype, softcap, backend):
    """Token -1 and NaN numbers in that row; the others as if it weren't there."""
    logits = rows(600, dtype, lead=(4,))
    clean = categorical.sample(logits, key=KEY, softcap=softcap)
    logits = logits.clone()
    if kind == "-inf row":
        logits[1] = -torch.inf
    else:
        logits[1, at] = HOSTILE[kind]
    if kind == "-inf row" and softcap is not None:
        return  # capped, such a row is uniform
    draw = categorical.sample(logits, key=KEY, softcap=softcap)
    assert draw.tokens[1] == draw.stats.argmax[1] == -1
    assert draw.logprob[1].isnan()
    assert all(x[1].isnan() for x in numbers_of(draw.stats))
    others = torch.tensor([0, 2, 3])
    assert torch.equal(draw.tokens[others], clean.tokens[others])
    mixed = categorical.sample_mixture(
        logits,
        torch.zeros(4, dtype=torch.int64),
        torch.tensor([1.0, 0, 0, 0, 1, 0]),
        softcap=softcap,
        key=KEY,
    )
    assert mixed[1] == -1
    assert torch.equal(mixed[others], clean.tokens[others])


def test_minus_infinity_entries_are_never_drawn(backend):
    logits = torch.full((2000, 600), -torch.inf)
    logits[:, [3, 300, 599]] = torch.tensor([1.0, 2.0, -80.0])
    draw = categorical.sample(logits, key=KEY)
    assert set(draw.tokens.tolist()) == {3, 300}
    torch.testing.assert_close(draw.stats.entropy, torch.full((2000,), 0.582203), rtol=1e-5, atol=0)


def test_finite_sums_that_overflow_are_not_hostile():
    logits = torch.full((1, 600), 3e38)
    assert categorical.stats(logits).entropy.item() == pytest.approx(math.log(600), rel=1e-5)


def test_ties_go_to_the_lowest_id(backend):
    logits = torch.zeros(2, 900)
    logits[1, [400, 401, 800]] = 1.0
    stats = categorical.stats(logits)
    assert stats.argmax.tolist() == [0, 400]
    assert stats.margin.tolist() == [0, 0]


def test_temperature_0_is_argmax_with_unsaturated_statistics(backend):
    logits = rows(700, lead=(6,))
    temperature = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0, 0.5])
    draw = categorical.sample(logits, temperature=temperature, key=KEY)
    cold = temperature == 0
    assert torch.equal(draw.tokens[cold], logits.argmax(-1)[cold])
    plain = categorical.stats(logits)
    torch.testing.assert_close(draw.stats.entropy[cold], plain.entropy[cold])
    torch.testing.assert_close(draw.logprob[cold], plain.argmax_logprob[cold])


@pytest.mark.parametrize("linear", [False, True])
def test_temperature_0_is_argmax_of_many_parts(backend, linear):
    """Whatever a row is read in: segments, or a head's tiles."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(600, 8, generator=generator), torch.randn(200_000, 8, generator=generator)
    head = dlcore.LinearLogits(hidden, weight[:5000]) if linear else hidden[:4] @ weight.T
    logits = hidden @ weight[:5000].T if linear else head
    for truncation in ({}, {"top_k": 3}):
        tokens = categorical.sample(head, temperature=0.0, key=KEY, **truncation).tokens
        assert torch.equal(tokens, logits.argmax(-1))


def kept(logits: torch.Tensor, **truncation) -> torch.Tensor:
    """The law of a truncated draw, by sorting in float64."""
    pack = {
        name: torch.tensor(truncation[name]) if name in truncation else None
        for name in ("top_k", "top_p", "min_p")
    }
    return torch.softmax(reference.truncate(logits.double(), **pack), -1)


TRUNCATIONS = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10_000},
    {"top_p": 0.0},
    {"top_p": 0.6},
    {"top_p": 1.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 7, "top_p": 0.8},
    {"top_k": 9, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.slow
@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("ties", [False, True])
def test_truncation_law(truncation, ties):
    logits = rows(600, lead=(), seed=8)
    if ties:
        logits = (logits / 2).round() * 2
    p = kept(logits, **truncation)
    draw = categorical.sample(logits.expand(100_000, -1), key=KEY, **truncation)
    assert dlcore.last_backend("categorical.sample") != "reference"
    assert p[draw.tokens].min() > 0
    assert chi_square(draw.tokens, p) > 1e-4
    whole = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(draw.logprob.double(), whole[draw.tokens], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_truncation_parity(truncation, dtype):
    logits, index = rows(66_000, dtype, lead=(4, 5)), ids(66_000, (4, 5))
    kw = dict(temperature=torch.rand(5) + 0.5, softcap=9.0, shift=1.0, exclude=3, key=KEY, **truncation)
    tokens = categorical.sample(logits, index, **kw).tokens
    with dlcore.use_backend("reference"):
        assert torch.equal(tokens, categorical.sample(logits.double(), index, **kw).tokens)


# d0, d1, k0, k1, p0, p1: with and without need of p(z).
MIXTURES = [
    (1, 0, 0.3, 0, 0.5, 0),
    (2, 3, 0.5, 1, 0.5, 1),
    (1, 4, 0, 2, 0.7, 1),
    (1, 0, 0, 0, 1, 0),
    (1, 0, 1, 0, 0, 0),
]


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("prior", ["uniform", 3])
@pytest.mark.parametrize("exclude", [None, 2])
def test_mixture_law(mixture, prior, exclude, backend):
    count, vocab = (100_000 if backend == "cpu" else 2_000), 7
    logits, z = rows(vocab, lead=(), seed=5), 4
    masked = (
        logits.double()
        if exclude is None
        else logits.double().index_fill(0, torch.tensor([exclude]), -torch.inf)
    )
    p = torch.softmax(masked, -1)
    d0, d1, k0, k1, p0, p1 = mixture
    total = d0 + d1 * p[z]
    keep, take = (k0 + k1 * p[z]) / total, (p0 + p1 * p[z]) / total
    fallback = torch.zeros(vocab, dtype=torch.float64)
    if prior == "uniform":
        fallback[:] = 1 / (vocab - (exclude is not None))
        if exclude is not None:
            fallback[exclude] = 0
    else:
        fallback[prior] = 1
    law = take * p + (1 - keep - take) * fallback
    law[z] += keep
    tokens = categorical.sample_mixture(
        logits.expand(count, -1),
        torch.full((count,), z),
        torch.tensor(mixture, dtype=torch.float64),
        prior=prior,
        exclude=exclude,
        key=KEY,
    )
    assert chi_square(tokens, law.clamp(min=0)) > 1e-4
    if mixture == MIXTURES[0] and backend == "cpu":
        assert chi_square(tokens, p) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [2, 300, 66_000])
def test_mixture_parity(dtype, vocab):
    logits, z = rows(vocab, dtype, lead=(6, 50)), ids(vocab, (6, 50))
    coefficients = torch.rand(6, 50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    coefficients[..., :2] = 2
    coefficients[:3, :, 1::2] = 0
    temperature = torch.ones(50)
    temperature[::5] = 0
    kw = dict(
        shift=torch.randn(50, generator=torch.Generator().manual_seed(1)), temperature=temperature, key=KEY
    )
    tokens = categorical.sample_mixture(logits, z, coefficients, **kw)
    assert dlcore.last_backend("categorical.sample_mixture") != "reference"
    with dlcore.use_backend("reference"):
        assert torch.equal(tokens, categorical.sample_mixture(logits.double(), z, coefficients, **kw))


def test_mixture_does_not_read_settled_rows(backend):
    logits = torch.full((3, 300), torch.nan)
    z = torch.tensor([5, 6, 7])
    keep, prior = [1.0, 0, 1, 0, 0, 0], [1.0, 0, 0, 0, 0, 0]
    coefficients = torch.tensor([keep, prior, [1.0, 0, 0, 0, 1, 0]])
    assert categorical.sample_mixture(logits, z, coefficients, prior=9, key=KEY).tolist() == [5, 9, -1]


def test_mixture_without_mass_keeps_z(backend):
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    coefficients = torch.tensor([0.0, 5, 0, 5, 0, 0])
    assert categorical.sample_mixture(logits, torch.tensor([1]), coefficients, key=KEY).tolist() == [1]


def test_every_parameter_matters():
    logits, index = rows(500, lead=(200,)), ids(500, (200,))
    base = categorical.sample(logits, index, key=KEY)
    changes = dict(
        shift=3.0, temperature=2.0, softcap=1.0, exclude=int(base.tokens[0]), top_k=2, top_p=0.2, min_p=0.9
    )
    for name, value in changes.items():
        assert not torch.equal(
            base.tokens, categorical.sample(logits, index, key=KEY, **{name: value}).tokens
        ), name
    assert not torch.equal(base.tokens, categorical.sample(logits, index, key=rng.key(1)).tokens)


def test_the_excluded_entry_is_never_read(backend):
    logits = rows(600, lead=(3,))
    clean = categorical.sample(logits, exclude=5, key=KEY)
    logits[:, 5] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    draw = categorical.sample(logits, exclude=5, key=KEY)
    assert torch.equal(draw.tokens, clean.tokens)
    assert torch.equal(draw.stats.entropy, clean.stats.entropy)
    far = torch.cat([logits, torch.full((3, 512), 3e38)], -1)
    assert (categorical.sample(far, exclude=5, key=KEY).tokens >= 600).all()


def test_many_leading_dimensions_and_unpacking():
    logits = rows(50, lead=(1, 2, 1, 1, 3, 1, 1, 1, 1, 2))
    tokens, logprob, stats = categorical.sample(logits, key=KEY)
    assert tokens.shape == logprob.shape == stats.entropy.shape == logits.shape[:-1]


def test_autocast_does_not_touch_precision(backend):
    logits = rows(300)
    plain = categorical.stats(logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = categorical.stats(logits)
    for a, b in zip(plain, inside, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_empty_and_single():
    assert categorical.sample(torch.zeros(0, 5)).tokens.shape == (0,)
    assert categorical.sample(torch.zeros(5)).tokens.shape == ()
    one = categorical.sample(torch.zeros(2, 1))
    assert one.tokens.tolist() == [0, 0]
    assert one.stats.margin.tolist() == [1, 1]


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("size", [1e3, 1e5, 1e7, 1e10, 1e20, 1e37])
def test_large_logits_and_small_temperatures(level, size, restored_level):
    """Whether the logits are large or the temperature is small, at every level, against float64."""
    choose_capability(level)
    spread = rows(1000, lead=(4,))
    for logits, temperature in ((spread, 1 / size), (torch.full((4, 1000), size), 1.0), (spread + size, 1.0)):
        stats = categorical.stats(logits, temperature=temperature)
        top, heat = logits.double().amax(-1), torch.tensor(temperature).double()
        with dlcore.use_backend("reference"):
            truth = categorical.stats(logits.double() - top.unsqueeze(-1), temperature=heat)
        assert torch.equal(stats.argmax, truth.argmax)
        for name in ("argmax_logprob", "entropy", "margin"):
            torch.testing.assert_close(
                getattr(stats, name).double(), getattr(truth, name), rtol=1e-5, atol=1e-5, msg=name
            )
        whole = (top / heat + truth.logsumexp).float()
        torch.testing.assert_close(stats.logsumexp, whole, rtol=1e-6, atol=0)


def test_numbers_of_certain_rows_keep_their_bounds():
    """Rounding makes no probability exceed 1 and no entropy negative."""
    logits = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0)) * 30
    draw = categorical.sample(logits, key=KEY)
    assert draw.logprob.max() <= 0
    assert draw.stats.argmax_logprob.max() <= 0
    assert draw.stats.entropy.min() >= 0
    assert draw.stats.margin.max() <= 1


@pytest.mark.parametrize("vocab", [65537, 2 * 65536 + 1])
def test_a_token_alone_in_an_excluded_segment(vocab, backend):
    """It has probability 0, which is no reason to keep it."""
    logits, z = rows(vocab, lead=(6,)), torch.full((6,), vocab - 1)
    assert (categorical.stats(logits, z, exclude=vocab - 1).index_logprob == -math.inf).all()
    assert (categorical.cross_entropy(logits, z, exclude=vocab - 1) == math.inf).all()
    keep_by_p = torch.tensor([1.0, 3.0, 0.0, 3.0, 1.0, 0.0])
    assert (categorical.sample_mixture(logits, z, keep_by_p, exclude=vocab - 1, key=KEY) != z).all()
