"""Every function of the C library against the Python op of its name: the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from c_arguments import (
    DTYPES,
    GUIDED,
    KEY,
    MAPS,
    ROWS,
    Head,
    attention_of,
    bits_of,
    dense,
    empty,
    guided_step_of,
    heads,
    index_of,
    levels,
    linear,
    logits_of,
    margins_kept,
    normal,
    points,
    python_at_baseline,
    same,
    softmax_of,
    strided,
)
from c_library import Library

from dlcore import LinearLogits, attention, bits, categorical, rng, similarity, sphere
from dlcore.process import uniform
from dlcore.sphere import cauchy, vmf

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def baseline() -> Iterator[None]:
    """Python at the level of the library under test."""
    with python_at_baseline(), margins_kept():
        yield


# --- rng ---


def test_fold_in(c: Library) -> None:
    data = torch.tensor([0, 5, -(2**62)])
    for key in (KEY, rng.split(KEY, 3)):
        out = empty(3, 2, dtype=torch.int64)
        c.rng_fold_in(c.keys_of(key), c.ints(data=data, stride=1), 3, out)
        same(out, rng.fold_in(key, data))
    out = empty(3, 2, dtype=torch.int64)
    c.rng_fold_in(c.keys_of(rng.split(KEY, 3)), c.ints(data=data[1:], stride=0), 3, out)
    same(out, rng.fold_in(rng.split(KEY, 3), 5))


@pytest.mark.parametrize("name", ["uniform", "normal", "gumbel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise(c: Library, name: str, dtype: torch.dtype) -> None:
    keys, out = rng.split(KEY, 3), empty(3, 5001, dtype=dtype)
    kind = {torch.float32: c.FLOAT32, torch.float64: c.FLOAT64}[dtype]
    getattr(c, f"rng_{name}")(keys, 3, 5001, kind, out, 0)
    same(out, getattr(rng, name)(keys, 5001, dtype=dtype))


# --- categorical ---

SOFTMAX: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "softcap": 5.0},
    {"temperature": torch.linspace(0.5, 2, ROWS), "shift": torch.linspace(-2, 2, ROWS)},
    {"exclude": 0, "shift": 1.5, "temperature": 1.5},
]
softmaxes = pytest.mark.parametrize("given", SOFTMAX, ids=lambda given: ",".join(given) or "plain")


def _applies(head: Head, given: dict[str, Any]) -> None:
    if "exclude" in given and head.shape[-1] == 1:
        pytest.skip("exclude leaves no token")


@heads
@softmaxes
def test_stats(c: Library, head: Callable[[], Head], given: dict[str, Any]) -> None:
    logits = head()
    _applies(logits, given)
    index = index_of(logits)
    argmax, numbers = empty(ROWS, dtype=torch.int64), empty(c.NUM_STATS, ROWS)
    c.categorical_stats(softmax_of(c, logits, index, **given), argmax, numbers)
    wanted = categorical.row_numbers(
        "test", logits, index, *(given.get(n) for n in ("shift",)), given.get("temperature", 1.0),
        given.get("softcap"), given.get("exclude"),
    )  # fmt: skip
    same(argmax, wanted[0])
    same(numbers, wanted[1])


@heads
@pytest.mark.parametrize("each", [False, True], ids=["one key", "a key per row"])
def test_summary(c: Library, head: Callable[[], Head], each: bool) -> None:
    """Of tokens from 512 on, with ids here and elsewhere, and of all, with nothing beside."""
    logits, key = head(), rng.split(KEY, ROWS) if each else KEY
    parts = (
        (logits.hidden, logits.weight, logits.bias)
        if isinstance(logits, LinearLogits)
        else (logits, None, None)
    )
    index, target = 500 + index_of(logits), torch.tensor([512, -1, 600, 3, 2**40])
    skip, temperature = torch.tensor([0, 0, 2, 0, 0], dtype=torch.uint8), torch.tensor([0.5, 1, 1, 0, 2])
    full = {"temperature": temperature, "shift": 1.5, "softcap": 8.0, "exclude": 512}
    whole = c.part(first=512, target=target, skip=skip, keys=c.keys_of(key))
    numbered = (512, index, torch.tensor(1.5), target, temperature, 8.0, 512, skip, key)
    for softmax, part, given in (
        (softmax_of(c, logits, index, **full), whole, numbered),
        (softmax_of(c, logits), c.part(), (0, *(None,) * 8)),
    ):
        tokens, numbers = empty(2, ROWS, dtype=torch.int64), empty(c.NUM_SUMMARY, ROWS, dtype=torch.float64)
        c.categorical_summary(softmax, part, tokens, numbers)
        wanted = torch.ops.dlcore.categorical_summary(*parts, *given)
        same(tokens, wanted[0])
        same(numbers, wanted[1])


def test_summary_inside_of_a_group(c: Library) -> None:
    logits = dense(100)
    tokens, numbers = empty(2, ROWS, dtype=torch.int64), empty(c.NUM_SUMMARY, ROWS, dtype=torch.float64)
    c.categorical_summary(softmax_of(c, logits), c.part(first=301, keys=c.keys_of(KEY)), tokens, numbers)
    wanted = torch.ops.dlcore.categorical_summary(logits, None, None, 301, *(None,) * 7, KEY)
    same(tokens, wanted[0])
    same(numbers, wanted[1])


TRUNCATION: list[dict[str, Any]] = [
    {},
    {"top_k": 3},
    {"top_p": torch.linspace(0.1, 0.9, ROWS)},
    {"min_p": 0.2},
    {"top_k": torch.arange(1, ROWS + 1), "top_p": 0.8, "min_p": 0.01},
]


@heads
@pytest.mark.parametrize("cut", TRUNCATION, ids=lambda cut: ",".join(cut) or "whole")
@pytest.mark.parametrize("each", [False, True], ids=["one key", "a key per row"])
def test_sample(c: Library, head: Callable[[], Head], cut: dict[str, Any], each: bool) -> None:
    logits, key = head(), rng.split(KEY, ROWS) if each else KEY
    # A row's temperature of 0 is its argmax.
    given = {"temperature": torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0]), "shift": 1.0, "softcap": 8.0}
    tokens, argmax = empty(ROWS, dtype=torch.int64), empty(ROWS, dtype=torch.int64)
    numbers, index = empty(c.NUM_SAMPLE_STATS, ROWS), index_of(logits)
    how = c.sampling(
        keys=c.keys_of(key),
        top_k=c.row_numbers(cut.get("top_k"), torch.int64),
        top_p=c.row_numbers(cut.get("top_p")),
        min_p=c.row_numbers(cut.get("min_p")),
    )
    c.categorical_sample(softmax_of(c, logits, index, **given), how, tokens, argmax, numbers)
    draw = categorical.sample(logits, index, **given, **cut, key=key)
    same(tokens, draw.tokens)
    same(argmax, draw.stats.argmax)
    same(numbers, draw._numbers)
    alone = torch.empty_like(tokens)
    c.categorical_sample(softmax_of(c, logits, index, **given), how, alone, None, None)
    same(alone, tokens)


@heads
@pytest.mark.parametrize("prior", ["uniform", 0])
def test_sample_mixture(c: Library, head: Callable[[], Head], prior: Any) -> None:
    logits = head()
    z, exclude = index_of(logits), None if logits.shape[-1] == 1 else 3
    # A draw, what is kept unread, the prior, and what depends on p(z).
    routes = [[1, 0, 0, 0, 1, 0], [1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 1, 0, 0.3, 0, 0.4]]
    table = torch.tensor([*routes, [1, 0.1, 0.3, 0, 0.4, 0]], dtype=torch.float64)
    for coefficients in (table, table[0], table[3]):
        how = c.mixture(
            keys=c.keys_of(KEY),
            coefficients=c.doubles(data=coefficients, stride=6 if coefficients.dim() > 1 else 0),
            prior=None if prior == "uniform" else torch.tensor(prior),
        )
        tokens = empty(ROWS, dtype=torch.int64)
        softmax = softmax_of(c, logits, z, temperature=0.9, shift=2.0, exclude=exclude)
        c.categorical_sample_mixture(softmax, how, tokens)
        wanted = categorical.sample_mixture(
            logits, z, coefficients, prior=prior, temperature=0.9, shift=2.0, exclude=exclude, key=KEY
        )
        same(tokens, wanted)


@heads
def test_log_probs(c: Library, head: Callable[[], Head]) -> None:
    logits = head()
    target, index, shift = index_of(logits), index_of(logits).flip(0), torch.linspace(-1, 1, ROWS)
    target[1] = -100
    numbers = empty(3, ROWS, dtype=torch.float64)
    c.categorical_log_probs(softmax_of(c, logits, index, shift=shift, softcap=6.0), target, numbers)
    ops = torch.ops.dlcore
    parts = categorical.head("test", logits)
    wanted = ops.categorical_log_probs(*parts, target.clamp(min=-1), index, shift, 6.0, None)
    same(numbers, wanted)
    c.categorical_log_probs(softmax_of(c, logits), target, numbers)
    same(-numbers[0].float(), categorical.cross_entropy(logits, target))
    # At a temperature, which Python's cross-entropy has not: as the statistics have it.
    c.categorical_log_probs(softmax_of(c, logits, temperature=0.5), target.clamp(min=0), numbers)
    at = categorical.stats(logits, target.clamp(min=0), temperature=0.5).index_logprob
    same(numbers[0].float(), at)


@pytest.mark.parametrize("vocab", [1000, 420_000])
def test_kl(c: Library, vocab: int) -> None:
    temperature = torch.linspace(0.5, 2, ROWS)
    pairs = [
        (dense(vocab), dense(vocab).flip(0)),
        (dense(vocab), linear(vocab)),
        (linear(vocab), dense(vocab)),
        (linear(vocab), linear(vocab, bias=False)),
    ]
    for p, q in pairs:
        numbers = empty(3, ROWS, dtype=torch.float64)
        c.categorical_kl(logits_of(c, p), logits_of(c, q), c.row_numbers(temperature), numbers, 0)
        heads = (*categorical.head("test", p), *categorical.head("test", q))
        same(numbers, torch.ops.dlcore.categorical_kl(*heads, temperature))


@heads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expectations(c: Library, head: Callable[[], Head], dtype: torch.dtype) -> None:
    logits = head()
    table = strided(normal(6, logits.shape[-1], 20, dtype=dtype))
    given = {"temperature": torch.linspace(0.5, 2, ROWS), "softcap": 9.0}
    softmax, mean = softmax_of(c, logits, **given), empty(ROWS, 20)
    lse = empty(ROWS, dtype=torch.float64)
    c.categorical_expectation(softmax, c.matrix_of(table), mean, lse)
    same(mean, categorical.expectation(logits, table, **given))
    torch.testing.assert_close(lse.float(), categorical.stats(logits, **given).logsumexp)
    again, tokens, argmax = empty(ROWS, 20), empty(ROWS, dtype=torch.int64), empty(ROWS, dtype=torch.int64)
    numbers = empty(c.NUM_SAMPLE_STATS, ROWS)
    c.categorical_sample_expectation(
        softmax, c.matrix_of(table), c.keys_of(KEY), again, None, tokens, argmax, numbers
    )
    draw, soft = categorical.sample_expectation(logits, table, **given, key=KEY)
    same(again, soft)
    same(tokens, draw.tokens)
    same(argmax, draw.stats.argmax)
    same(numbers, draw._numbers)


@heads
def test_nelbo(c: Library, head: Callable[[], Head]) -> None:
    logits = head()
    z, x = index_of(logits), index_of(logits)
    x[2:] = x[2:].flip(0)
    alpha, dalpha = torch.linspace(0.1, 0.9, ROWS).double(), -torch.linspace(1, 2, ROWS).double()
    vocab = logits.shape[-1]
    for parameterization in ("loo", "denoiser"):
        shift = -torch.log1p(vocab * alpha / (1 - alpha)) if parameterization == "denoiser" else None
        loss = empty(ROWS)
        softmax = softmax_of(c, logits, z, shift=shift)
        c.uniform_nelbo(softmax, x, c.doubles_of(alpha), c.doubles_of(dalpha), loss, None)
        same(loss, uniform.nelbo(logits, z, x, alpha, dalpha, parameterization=parameterization))


def test_a_broken_row_is_no_error(c: Library) -> None:
    logits = normal(1, 3, 300)
    logits[1, 7] = torch.nan
    tokens, numbers = empty(3, dtype=torch.int64), empty(c.NUM_SAMPLE_STATS, 3)
    c.categorical_sample(softmax_of(c, logits), c.sampling(keys=c.keys_of(KEY)), tokens, None, numbers)
    draw = categorical.sample(logits, key=KEY)
    same(tokens, draw.tokens)
    same(numbers, draw._numbers)
    assert tokens[1] == -1


def test_threads_change_nothing(c: Library) -> None:
    for logits in (normal(1, 64, 3000), LinearLogits(normal(2, 64, 24), normal(3, 9000, 24))):
        drawn = []
        for threads in (0, 1, 2, 7):
            tokens, numbers = empty(64, dtype=torch.int64), empty(c.NUM_SAMPLE_STATS, 64)
            how = c.sampling(keys=c.keys_of(KEY), top_k=c.row_numbers(50, torch.int64))
            c.categorical_sample(softmax_of(c, logits, threads=threads), how, tokens, None, numbers)
            drawn.append((tokens, numbers))
        for tokens, numbers in drawn[1:]:
            same(tokens, drawn[0][0])
            same(numbers, drawn[0][1])


# --- bits ---


@pytest.mark.parametrize("order", ["msb", "lsb"])
@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("coding", ["01", "pm1"])
@pytest.mark.parametrize("width", [1, 17, 62])
def test_codes(c: Library, order: str, gray: bool, coding: str, width: int) -> None:
    tokens = torch.arange(1000) * (2**62 // 1000) % 2**width
    code = c.bit_code(
        width=width, order=["msb", "lsb"].index(order), gray=gray, coding=["01", "pm1"].index(coding)
    )
    written = empty(1000, width)
    c.bits_encode(code, tokens, 1000, written, 0)
    same(written, bits.encode(tokens, width, order=order, gray=gray, coding=coding))
    noisy = strided(written + 0.3 * normal(1, 1000, width))
    noisy[3, 0] = torch.nan
    for vocab in (0, 2**width // 2 + 1):
        read = empty(1000, dtype=torch.int64)
        c.bits_decode(code, c.matrix_of(noisy), vocab, read, 0)
        same(read, bits.decode(noisy, vocab_size=vocab or None, order=order, gray=gray, coding=coding))


@levels
@pytest.mark.parametrize("coding", ["01", "pm1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [33, 9000])
def test_posteriors(c: Library, sigma: Any, coding: str, dtype: torch.dtype, columns: int) -> None:
    for make in (lambda x: x, strided):
        x, residual = (make(normal(s, ROWS, columns, dtype=dtype)) for s in (1, 2))
        out = empty(ROWS, columns)
        c.bits_matched_filter(bits_of(c, x, None, sigma, coding, 0), out)
        same(out, bits.matched_filter(x, sigma, coding=coding))
        for given in (None, residual):
            c.bits_posterior(bits_of(c, x, given, sigma, coding, 3.0), out)
            same(out, bits.posterior(x, sigma, given, coding=coding, clip=3.0))


@levels
@pytest.mark.parametrize("coding", ["01", "pm1"])
@pytest.mark.parametrize("gamma", [None, 0.2], ids=["plain", "churned"])
def test_step(c: Library, sigma: Any, coding: str, gamma: float | None) -> None:
    for make in (lambda x: x, strided):
        x, residual = make(normal(1, ROWS, 700)), make(normal(2, ROWS, 700, dtype=torch.bfloat16))
        following, probs = empty(ROWS, 700), empty(ROWS, 700)
        update = c.bits_update(
            sigma_next=c.doubles_of(0.25),
            gamma_next=c.doubles_of(gamma),
            noise_scale=c.doubles_of(None if gamma is None else 1.01),
            keys=c.keys_of(KEY),
        )
        c.bits_step(bits_of(c, x, residual, sigma, coding, 0), update, following, probs)
        churn = {} if gamma is None else {"gamma_next": gamma, "noise_scale": 1.01}
        wanted = bits.step(x, residual, sigma, 0.25, **churn, coding=coding, key=KEY)
        same(following, wanted[0])
        same(probs, wanted[1])


@levels
def test_perturb(c: Library, sigma: Any) -> None:
    x, out = strided(normal(1, ROWS, 700, dtype=torch.float16)), empty(ROWS, 700)
    for key in (KEY, rng.split(KEY, ROWS)):
        c.bits_perturb(c.matrix_of(x), c.doubles_of(sigma), c.keys_of(key), out, 0)
        same(out, bits.corrupt(x, sigma, key=key))


@levels
@pytest.mark.parametrize("kind", ["squared", "bce"])
@pytest.mark.parametrize("columns", [33, 9000])
def test_bits_loss(c: Library, sigma: Any, kind: str, columns: int) -> None:
    x, residual = strided(normal(1, ROWS, columns)), strided(normal(2, ROWS, columns))
    clean, loss = (normal(3, ROWS, columns) > 0).to(torch.bfloat16), empty(ROWS)
    state = bits_of(c, x, residual, sigma, "01", 0)
    c.bits_loss(state, c.matrix_of(clean), ["squared", "bce"].index(kind), loss)
    same(loss, bits.loss(residual, x, clean, sigma, kind=kind))


# --- sphere ---


@pytest.mark.parametrize("name", [name for name in MAPS if name != "slerp"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps(c: Library, name: str, dtype: torch.dtype) -> None:
    x = [points(seed, dtype) for seed in range(MAPS[name])]
    out = empty(ROWS) if name == "angle" else empty(ROWS, 70, dtype=dtype)
    getattr(c, f"sphere_{name}")(*(c.matrix_of(p) for p in x), out, 0)
    same(out, getattr(sphere, name)(*x))


@pytest.mark.parametrize("t", [0.3, torch.linspace(0, 1, ROWS)], ids=["shared", "per row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slerp_and_step(c: Library, t: Any, dtype: torch.dtype) -> None:
    x, y, out = points(1, dtype), points(2, dtype), empty(ROWS, 70, dtype=dtype)
    pair = c.matrix_of(x), c.matrix_of(y)
    c.sphere_slerp(*pair, c.row_numbers(t), out, 0)
    same(out, sphere.slerp(x, y, t))
    for code, retraction in enumerate(("exp", "normalize")):
        c.sphere_step(*pair, c.row_numbers(t), code, out, 0)
        same(out, sphere.step(x, y, t, retraction=retraction))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_on_the_sphere(c: Library, dtype: torch.dtype) -> None:
    x, y, out = points(1, dtype), points(2, dtype), empty(ROWS, 70, dtype=dtype)
    for size, key in ((0.125, KEY), (torch.linspace(0, 1, ROWS), rng.split(KEY, ROWS))):
        c.sphere_correct(c.matrix_of(x), c.matrix_of(y), c.doubles_of(size), c.keys_of(key), out, 0)
        same(out, sphere.correct(x, y, size, key=key))
        kappa = 100 * torch.as_tensor(size).double()
        for law, draw in ((c.VON_MISES_FISHER, vmf.sample), (c.SPHERICAL_CAUCHY, cauchy.sample)):
            c.sphere_sample(c.matrix_of(x), c.doubles_of(kappa), law, c.keys_of(key), out, 0)
            same(out, draw(x, kappa, key=key))


# --- attention ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_intervals(c: Library, dtype: torch.dtype, shared: bool) -> None:
    batch, rows, keys = 2, 37, 150
    q = normal(1, batch, 4, rows, 40, dtype=dtype).transpose(1, 2)
    k, v = normal(2, batch, keys, 2, 40, dtype=dtype), normal(3, batch, keys, 2, 24, dtype=dtype)
    row = torch.arange(rows).expand(1 if shared else batch, rows)
    stops = torch.stack([row + 1, 60 + 2 * row], -1).to(torch.int32)
    starts = torch.stack([row // 8, 50 + row], -1).to(torch.int32)
    out, lse = empty(batch, rows, 4, 24, dtype=dtype), empty(batch, 4, rows)
    c.attention_intervals(attention_of(c, q, k, v), starts, stops, int(shared), out, lse)
    wanted = attention.intervals(q, k, v, starts, stops, return_lse=True)
    same(out, wanted[0])
    same(lse, wanted[1])
    c.attention_intervals(
        attention_of(c, q, k, v, scale=0.2, softcap=3.0), starts, stops, int(shared), out, lse
    )
    wanted = attention.intervals(q, k, v, starts, stops, softmax_scale=0.2, softcap=3.0, return_lse=True)
    same(out, wanted[0])
    same(lse, wanted[1])


DECODE: list[dict[str, Any]] = [
    {},
    {"num_commit": 3, "causal": True},
    {"num_commit": 2, "causal": torch.tensor([True, False])},
    {"window": 6},
    {"window": 6, "window_anchor": "row"},
]


@pytest.mark.parametrize("page_size", [None, 8], ids=["whole", "paged"])
@pytest.mark.parametrize("given", DECODE, ids=lambda given: ",".join(given) or "plain")
def test_decode(c: Library, page_size: int | None, given: dict[str, Any]) -> None:
    batch, rows, max_len = 2, 9, 45
    caches = [
        attention.KVCache(1, batch, max_len, 2, 40, v_head_dim=24, page_size=page_size) for _ in range(2)
    ]
    for cache in caches:
        for store in cache.view(0):
            store.fill_(torch.nan)
        cache.write(0, normal(8, batch, 30, 2, 40), normal(9, batch, 30, 2, 24))
        cache.commit(torch.tensor([30, 17]))
    q, k, v = normal(1, batch, rows, 4, 40), normal(2, batch, rows, 2, 40), normal(3, batch, rows, 2, 24)
    mine, theirs = caches
    keys, values = mine.view(0)
    causal = given.get("causal")
    table = mine.page_table
    how = c.cache(
        keys=keys,
        values=values,
        lengths=mine.lengths,
        max_len=max_len,
        page_table=table,
        pages=0 if table is None else table.shape[1],
        page_size=page_size or 0,
        num_pages=0 if table is None else table.numel(),
        num_commit=given.get("num_commit", 0),
        causal=None if causal is None else torch.as_tensor(causal).to(torch.uint8).reshape(-1),
        shared_causal=int(causal is True),
        window=given.get("window", 0),
        window_by_row=int(given.get("window_anchor") == "row"),
    )
    out, lse = empty(batch, rows, 4, 24), empty(batch, 4, rows)
    c.attention_decode(attention_of(c, q, k, v), how, out, lse)
    wanted = attention.decode(q, k, v, theirs, 0, **given, return_lse=True)
    same(out, wanted[0])
    same(lse, wanted[1])
    for a, b in zip(mine.view(0), theirs.view(0), strict=True):
        same(a, b)


# --- guidance ---


@pytest.mark.parametrize("each", [False, True], ids=["one key", "a key per row"])
@pytest.mark.parametrize("vocab", [1, 33, 700])
def test_guided_step(c: Library, vocab: int, each: bool) -> None:
    cond = strided(normal(5, ROWS, vocab, dtype=torch.bfloat16))
    uncond, z = strided(normal(6, ROWS, vocab)), torch.arange(ROWS) % vocab
    key, exclude = rng.split(KEY, ROWS) if each else KEY, None if vocab == 1 else 3
    for coefficients in (GUIDED, GUIDED[3]):
        args = (cond, uncond, z, coefficients, exclude, key)
        tokens = empty(ROWS, dtype=torch.int64)
        c.guidance_cfg_uniform_step(guided_step_of(c, *args), tokens)
        same(tokens, torch.ops.dlcore.guidance_cfg_uniform_step(*args))


# --- similarity ---


@pytest.mark.parametrize("page_size", [None, 8], ids=["whole", "paged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cosine(c: Library, dtype: torch.dtype, page_size: int | None) -> None:
    cache = attention.KVCache(1, 2, 45, 2, 40, v_head_dim=24, page_size=page_size, dtype=dtype)
    cache.write(0, normal(8, 2, 45, 2, 40, dtype=dtype), normal(9, 2, 45, 2, 24, dtype=dtype))
    fresh, values, table = normal(1, 2, 9, 2, 24, dtype=dtype), cache.view(0)[1], cache.page_table
    positions = torch.stack([torch.arange(9) * 5, torch.arange(9) + 2])
    outside = torch.tensor([-1, 48, -(2**63), 2**63 - 1, 48, 49, 50, 51, -2]).expand(2, 9).contiguous()
    for at in (positions, None, outside):
        out = empty(2, 9)
        rows = c.similarity(
            dtype=DTYPES.index(dtype),
            batch=2,
            rows=9,
            heads=2,
            columns=24,
            fresh=c.heads(data=fresh),
            cached=c.heads(data=values),
            cached_rows=0 if page_size else 45,
            positions=at,
            page_table=table,
            pages=0 if table is None else table.shape[1],
            page_size=page_size or 0,
            num_pages=0 if table is None else table.numel(),
        )
        c.similarity_cosine(rows, out)
        if at is outside:
            assert out.isnan().all()
        else:
            same(out, similarity.cosine(fresh, values, at, page_table=table))
