"""Every function of the C library against the Python op of its name: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from c_library import Library
from torch import Tensor

import dlcore
from dlcore import _C, LinearLogits, attention, bits, categorical, rng, sphere
from dlcore.cpu import choose_capability
from dlcore.process import uniform
from dlcore.sphere import cauchy, vmf

pytestmark = pytest.mark.slow

KEY = rng.key(-7, 11)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = 5


@pytest.fixture(autouse=True)
def baseline() -> Any:
    """Python at the level of the library under test."""
    before = _C.capability()
    choose_capability("baseline")
    with dlcore.use_backend("cpu"):
        yield
    choose_capability(before)


def _normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return rng.normal(rng.key(seed), shape).to(dtype)


def _strided(x: Tensor) -> Tensor:
    """The same rows with gaps that hold NaN, which no kernel may read."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Results that would show if they were not written."""
    fill = torch.nan if dtype.is_floating_point else -(2**31)
    return torch.full(shape, fill, dtype=dtype)


def _same(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    assert torch.equal(got.nan_to_num(nan=-1e9), wanted.nan_to_num(nan=-1e9))


# --- rng ---


def test_fold_in(c: Library) -> None:
    data = torch.tensor([0, 5, -(2**62)])
    for key in (KEY, rng.split(KEY, 3)):
        out = _empty(3, 2, dtype=torch.int64)
        c.rng_fold_in(c.keys_of(key), c.ints(data=data, stride=1), 3, out)
        _same(out, rng.fold_in(key, data))
    out = _empty(3, 2, dtype=torch.int64)
    c.rng_fold_in(c.keys_of(rng.split(KEY, 3)), c.ints(data=data[1:], stride=0), 3, out)
    _same(out, rng.fold_in(rng.split(KEY, 3), 5))


@pytest.mark.parametrize("name", ["uniform", "normal", "gumbel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise(c: Library, name: str, dtype: torch.dtype) -> None:
    keys, out = rng.split(KEY, 3), _empty(3, 5001, dtype=dtype)
    kind = {torch.float32: c.FLOAT32, torch.float64: c.FLOAT64}[dtype]
    getattr(c, f"rng_{name}")(keys, 3, 5001, kind, out, 0)
    _same(out, getattr(rng, name)(keys, 5001, dtype=dtype))


# --- categorical ---

Head = Tensor | LinearLogits


def _dense(vocab: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return _strided(3 * _normal(1, ROWS, vocab).to(dtype))


def _linear(vocab: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> LinearLogits:
    hidden, weight = _strided(_normal(2, ROWS, 24, dtype=dtype)), _strided(_normal(3, vocab, 24, dtype=dtype))
    return LinearLogits(hidden, weight, _normal(4, vocab, dtype=dtype) if bias else None)


HEADS: dict[str, Callable[[], Head]] = {
    "float32": lambda: _dense(1000),
    "bfloat16": lambda: _dense(1000, torch.bfloat16),
    "float16": lambda: _dense(1000, torch.float16),
    "several segments": lambda: _dense(140_001),
    "one token": lambda: _dense(1),
    "linear": lambda: _linear(1000),
    "linear, several tiles": lambda: _linear(420_000, torch.bfloat16),
    "linear, float16, no bias": lambda: _linear(700, torch.float16, bias=False),
}
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def _logits(c: Library, head: Head) -> Any:
    if isinstance(head, Tensor):
        return c.logits(values=c.matrix_of(head))
    return c.logits(values=c.matrix_of(head.hidden), weight=c.matrix_of(head.weight), bias=head.bias)


def _softmax(c: Library, head: Head, index: Tensor | None = None, **given: Any) -> Any:
    members = {name: c.row_numbers(given.get(name)) for name in ("shift", "temperature")}
    exclude = given.get("exclude")
    return c.categorical(
        logits=_logits(c, head),
        index=index,
        softcap=given.get("softcap") or 0.0,
        exclude=None if exclude is None else torch.tensor(exclude),
        threads=given.get("threads", 0),
        **members,
    )


def _index(head: Head) -> Tensor:
    return torch.arange(ROWS) * 37 % head.shape[-1]


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
    index = _index(logits)
    argmax, numbers = _empty(ROWS, dtype=torch.int64), _empty(c.NUM_STATS, ROWS)
    c.categorical_stats(_softmax(c, logits, index, **given), argmax, numbers)
    wanted = categorical.row_numbers(
        "test", logits, index, *(given.get(n) for n in ("shift",)), given.get("temperature", 1.0),
        given.get("softcap"), given.get("exclude"),
    )  # fmt: skip
    _same(argmax, wanted[0])
    _same(numbers, wanted[1])


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
    tokens, argmax = _empty(ROWS, dtype=torch.int64), _empty(ROWS, dtype=torch.int64)
    numbers, index = _empty(c.NUM_SAMPLE_STATS, ROWS), _index(logits)
    how = c.sampling(
        keys=c.keys_of(key),
        top_k=c.row_numbers(cut.get("top_k"), torch.int64),
        top_p=c.row_numbers(cut.get("top_p")),
        min_p=c.row_numbers(cut.get("min_p")),
    )
    c.categorical_sample(_softmax(c, logits, index, **given), how, tokens, argmax, numbers)
    draw = categorical.sample(logits, index, **given, **cut, key=key)
    _same(tokens, draw.tokens)
    _same(argmax, draw.stats.argmax)
    _same(numbers, draw._numbers)
    alone = torch.empty_like(tokens)
    c.categorical_sample(_softmax(c, logits, index, **given), how, alone, None, None)
    _same(alone, tokens)


@heads
@pytest.mark.parametrize("prior", ["uniform", 0])
def test_sample_mixture(c: Library, head: Callable[[], Head], prior: Any) -> None:
    logits = head()
    z, exclude = _index(logits), None if logits.shape[-1] == 1 else 3
    # A draw, what is kept unread, the prior, and what depends on p(z).
    routes = [[1, 0, 0, 0, 1, 0], [1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 1, 0, 0.3, 0, 0.4]]
    table = torch.tensor([*routes, [1, 0.1, 0.3, 0, 0.4, 0]], dtype=torch.float64)
    for coefficients in (table, table[0], table[3]):
        how = c.mixture(
            keys=c.keys_of(KEY),
            coefficients=c.doubles(data=coefficients, stride=6 if coefficients.dim() > 1 else 0),
            prior=None if prior == "uniform" else torch.tensor(prior),
        )
        tokens = _empty(ROWS, dtype=torch.int64)
        softmax = _softmax(c, logits, z, temperature=0.9, shift=2.0, exclude=exclude)
        c.categorical_sample_mixture(softmax, how, tokens)
        wanted = categorical.sample_mixture(
            logits, z, coefficients, prior=prior, temperature=0.9, shift=2.0, exclude=exclude, key=KEY
        )
        _same(tokens, wanted)


@heads
def test_log_probs(c: Library, head: Callable[[], Head]) -> None:
    logits = head()
    target, index, shift = _index(logits), _index(logits).flip(0), torch.linspace(-1, 1, ROWS)
    target[1] = -100
    numbers = _empty(3, ROWS, dtype=torch.float64)
    c.categorical_log_probs(_softmax(c, logits, index, shift=shift, softcap=6.0), target, numbers)
    ops = torch.ops.dlcore
    parts = categorical.head("test", logits)
    wanted = ops.categorical_log_probs(*parts, target.clamp(min=-1), index, shift, 6.0, None)
    _same(numbers, wanted)
    c.categorical_log_probs(_softmax(c, logits), target, numbers)
    _same(-numbers[0].float(), categorical.cross_entropy(logits, target))
    # At a temperature, which Python's cross-entropy has not: as the statistics have it.
    c.categorical_log_probs(_softmax(c, logits, temperature=0.5), target.clamp(min=0), numbers)
    at = categorical.stats(logits, target.clamp(min=0), temperature=0.5).index_logprob
    _same(numbers[0].float(), at)


@pytest.mark.parametrize("vocab", [1000, 420_000])
def test_kl(c: Library, vocab: int) -> None:
    temperature = torch.linspace(0.5, 2, ROWS)
    pairs = [
        (_dense(vocab), _dense(vocab).flip(0)),
        (_dense(vocab), _linear(vocab)),
        (_linear(vocab), _dense(vocab)),
        (_linear(vocab), _linear(vocab, bias=False)),
    ]
    for p, q in pairs:
        numbers = _empty(3, ROWS, dtype=torch.float64)
        c.categorical_kl(_logits(c, p), _logits(c, q), c.row_numbers(temperature), numbers, 0)
        heads = (*categorical.head("test", p), *categorical.head("test", q))
        _same(numbers, torch.ops.dlcore.categorical_kl(*heads, temperature))


@heads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expectations(c: Library, head: Callable[[], Head], dtype: torch.dtype) -> None:
    logits = head()
    table = _strided(_normal(6, logits.shape[-1], 20, dtype=dtype))
    given = {"temperature": torch.linspace(0.5, 2, ROWS), "softcap": 9.0}
    softmax, mean = _softmax(c, logits, **given), _empty(ROWS, 20)
    c.categorical_expectation(softmax, c.matrix_of(table), mean)
    _same(mean, categorical.expectation(logits, table, **given))
    again, tokens, argmax = _empty(ROWS, 20), _empty(ROWS, dtype=torch.int64), _empty(ROWS, dtype=torch.int64)
    numbers = _empty(c.NUM_SAMPLE_STATS, ROWS)
    c.categorical_sample_expectation(
        softmax, c.matrix_of(table), c.keys_of(KEY), again, tokens, argmax, numbers
    )
    draw, soft = categorical.sample_expectation(logits, table, **given, key=KEY)
    _same(again, soft)
    _same(tokens, draw.tokens)
    _same(argmax, draw.stats.argmax)
    _same(numbers, draw._numbers)


@heads
def test_nelbo(c: Library, head: Callable[[], Head]) -> None:
    logits = head()
    z, x = _index(logits), _index(logits)
    x[2:] = x[2:].flip(0)
    alpha, dalpha = torch.linspace(0.1, 0.9, ROWS).double(), -torch.linspace(1, 2, ROWS).double()
    vocab = logits.shape[-1]
    for parameterization in ("loo", "denoiser"):
        shift = -torch.log1p(vocab * alpha / (1 - alpha)) if parameterization == "denoiser" else None
        loss = _empty(ROWS)
        softmax = _softmax(c, logits, z, shift=shift)
        c.uniform_nelbo(softmax, x, c.doubles_of(alpha), c.doubles_of(dalpha), loss)
        _same(loss, uniform.nelbo(logits, z, x, alpha, dalpha, parameterization=parameterization))


def test_a_broken_row_is_no_error(c: Library) -> None:
    logits = _normal(1, 3, 300)
    logits[1, 7] = torch.nan
    tokens, numbers = _empty(3, dtype=torch.int64), _empty(c.NUM_SAMPLE_STATS, 3)
    c.categorical_sample(_softmax(c, logits), c.sampling(keys=c.keys_of(KEY)), tokens, None, numbers)
    draw = categorical.sample(logits, key=KEY)
    _same(tokens, draw.tokens)
    _same(numbers, draw._numbers)
    assert tokens[1] == -1


def test_threads_change_nothing(c: Library) -> None:
    for logits in (_normal(1, 64, 3000), LinearLogits(_normal(2, 64, 24), _normal(3, 9000, 24))):
        drawn = []
        for threads in (0, 1, 2, 7):
            tokens, numbers = _empty(64, dtype=torch.int64), _empty(c.NUM_SAMPLE_STATS, 64)
            how = c.sampling(keys=c.keys_of(KEY), top_k=c.row_numbers(50, torch.int64))
            c.categorical_sample(_softmax(c, logits, threads=threads), how, tokens, None, numbers)
            drawn.append((tokens, numbers))
        for tokens, numbers in drawn[1:]:
            _same(tokens, drawn[0][0])
            _same(numbers, drawn[0][1])


# --- bits ---


def _state(
    c: Library, x: Tensor, residual: Tensor | None, sigma: float | Tensor, coding: str, clip: float
) -> Any:
    return c.bits(
        x=c.matrix_of(x),
        residual=c.matrix_of(residual),
        sigma=c.doubles_of(sigma),
        coding=["01", "pm1"].index(coding),
        clip=clip,
    )


@pytest.mark.parametrize("order", ["msb", "lsb"])
@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("coding", ["01", "pm1"])
@pytest.mark.parametrize("width", [1, 17, 62])
def test_codes(c: Library, order: str, gray: bool, coding: str, width: int) -> None:
    tokens = torch.arange(1000) * (2**62 // 1000) % 2**width
    code = c.bit_code(
        width=width, order=["msb", "lsb"].index(order), gray=gray, coding=["01", "pm1"].index(coding)
    )
    written = _empty(1000, width)
    c.bits_encode(code, tokens, 1000, written, 0)
    _same(written, bits.encode(tokens, width, order=order, gray=gray, coding=coding))
    noisy = _strided(written + 0.3 * _normal(1, 1000, width))
    noisy[3, 0] = torch.nan
    for vocab in (0, 2**width // 2 + 1):
        read = _empty(1000, dtype=torch.int64)
        c.bits_decode(code, c.matrix_of(noisy), vocab, read, 0)
        _same(read, bits.decode(noisy, vocab_size=vocab or None, order=order, gray=gray, coding=coding))


LEVELS: dict[str, float | Tensor] = {"shared": 0.7, "per row": torch.linspace(0.3, 2, ROWS).double()}
levels = pytest.mark.parametrize("sigma", LEVELS.values(), ids=LEVELS)


@levels
@pytest.mark.parametrize("coding", ["01", "pm1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [33, 9000])
def test_posteriors(c: Library, sigma: Any, coding: str, dtype: torch.dtype, columns: int) -> None:
    for make in (lambda x: x, _strided):
        x, residual = (make(_normal(s, ROWS, columns, dtype=dtype)) for s in (1, 2))
        out = _empty(ROWS, columns)
        c.bits_matched_filter(_state(c, x, None, sigma, coding, 0), out)
        _same(out, bits.matched_filter(x, sigma, coding=coding))
        for given in (None, residual):
            c.bits_posterior(_state(c, x, given, sigma, coding, 3.0), out)
            _same(out, bits.posterior(x, sigma, given, coding=coding, clip=3.0))


@levels
@pytest.mark.parametrize("coding", ["01", "pm1"])
@pytest.mark.parametrize("gamma", [None, 0.2], ids=["plain", "churned"])
def test_step(c: Library, sigma: Any, coding: str, gamma: float | None) -> None:
    for make in (lambda x: x, _strided):
        x, residual = make(_normal(1, ROWS, 700)), make(_normal(2, ROWS, 700, dtype=torch.bfloat16))
        following, probs = _empty(ROWS, 700), _empty(ROWS, 700)
        update = c.bits_update(
            sigma_next=c.doubles_of(0.25),
            gamma_next=c.doubles_of(gamma),
            noise_scale=c.doubles_of(None if gamma is None else 1.01),
            keys=c.keys_of(KEY),
        )
        c.bits_step(_state(c, x, residual, sigma, coding, 0), update, following, probs)
        churn = {} if gamma is None else {"gamma_next": gamma, "noise_scale": 1.01}
        wanted = bits.step(x, residual, sigma, 0.25, **churn, coding=coding, key=KEY)
        _same(following, wanted[0])
        _same(probs, wanted[1])


@levels
def test_perturb(c: Library, sigma: Any) -> None:
    x, out = _strided(_normal(1, ROWS, 700, dtype=torch.float16)), _empty(ROWS, 700)
    for key in (KEY, rng.split(KEY, ROWS)):
        c.bits_perturb(c.matrix_of(x), c.doubles_of(sigma), c.keys_of(key), out, 0)
        _same(out, bits.corrupt(x, sigma, key=key))


@levels
@pytest.mark.parametrize("kind", ["squared", "bce"])
@pytest.mark.parametrize("columns", [33, 9000])
def test_bits_loss(c: Library, sigma: Any, kind: str, columns: int) -> None:
    x, residual = _strided(_normal(1, ROWS, columns)), _strided(_normal(2, ROWS, columns))
    clean, loss = (_normal(3, ROWS, columns) > 0).to(torch.bfloat16), _empty(ROWS)
    state = _state(c, x, residual, sigma, "01", 0)
    c.bits_loss(state, c.matrix_of(clean), ["squared", "bce"].index(kind), loss)
    _same(loss, bits.loss(residual, x, clean, sigma, kind=kind))


# --- sphere ---

MAPS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "normalize": (1, sphere.normalize),
    "project": (2, sphere.project),
    "angle": (2, sphere.angle),
    "log_map": (2, sphere.log_map),
    "exp_map": (2, sphere.exp_map),
    "rotate": (3, sphere.rotate),
}


def _points(seed: int, dtype: torch.dtype, columns: int = 70) -> Tensor:
    return _strided(sphere.normalize(_normal(seed, ROWS, columns)).to(dtype))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps(c: Library, name: str, dtype: torch.dtype) -> None:
    count, op = MAPS[name]
    x = [_points(seed, dtype) for seed in range(count)]
    out = _empty(ROWS) if name == "angle" else _empty(ROWS, 70, dtype=dtype)
    getattr(c, f"sphere_{name}")(*(c.matrix_of(p) for p in x), out, 0)
    _same(out, op(*x))


@pytest.mark.parametrize("t", [0.3, torch.linspace(0, 1, ROWS)], ids=["shared", "per row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slerp_and_step(c: Library, t: Any, dtype: torch.dtype) -> None:
    x, y, out = _points(1, dtype), _points(2, dtype), _empty(ROWS, 70, dtype=dtype)
    pair = c.matrix_of(x), c.matrix_of(y)
    c.sphere_slerp(*pair, c.row_numbers(t), out, 0)
    _same(out, sphere.slerp(x, y, t))
    for code, retraction in enumerate(("exp", "normalize")):
        c.sphere_step(*pair, c.row_numbers(t), code, out, 0)
        _same(out, sphere.step(x, y, t, retraction=retraction))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_on_the_sphere(c: Library, dtype: torch.dtype) -> None:
    x, y, out = _points(1, dtype), _points(2, dtype), _empty(ROWS, 70, dtype=dtype)
    for size, key in ((0.125, KEY), (torch.linspace(0, 1, ROWS), rng.split(KEY, ROWS))):
        c.sphere_correct(c.matrix_of(x), c.matrix_of(y), c.doubles_of(size), c.keys_of(key), out, 0)
        _same(out, sphere.correct(x, y, size, key=key))
        kappa = 100 * torch.as_tensor(size).double()
        for law, draw in ((c.VON_MISES_FISHER, vmf.sample), (c.SPHERICAL_CAUCHY, cauchy.sample)):
            c.sphere_sample(c.matrix_of(x), c.doubles_of(kappa), law, c.keys_of(key), out, 0)
            _same(out, draw(x, kappa, key=key))


# --- attention ---


def _heads(c: Library, x: Tensor) -> Any:
    strides = dict(zip(("batch_stride", "row_stride", "head_stride"), x.stride(), strict=False))
    return c.heads(data=x, **({} if x.is_contiguous() else strides))


def _attention(c: Library, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Any:
    return c.attention(
        dtype=DTYPES.index(q.dtype),
        batch=q.shape[0],
        rows=q.shape[1],
        heads=q.shape[2],
        keys=k.shape[1],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        q=_heads(c, q),
        k=_heads(c, k),
        v=_heads(c, v),
        **given,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_intervals(c: Library, dtype: torch.dtype, shared: bool) -> None:
    batch, rows, keys = 2, 37, 150
    q = _normal(1, batch, 4, rows, 40, dtype=dtype).transpose(1, 2)
    k, v = _normal(2, batch, keys, 2, 40, dtype=dtype), _normal(3, batch, keys, 2, 24, dtype=dtype)
    row = torch.arange(rows).expand(1 if shared else batch, rows)
    stops = torch.stack([row + 1, 60 + 2 * row], -1).to(torch.int32)
    starts = torch.stack([row // 8, 50 + row], -1).to(torch.int32)
    out, lse = _empty(batch, rows, 4, 24, dtype=dtype), _empty(batch, 4, rows)
    c.attention_intervals(_attention(c, q, k, v), starts, stops, int(shared), out, lse)
    wanted = attention.intervals(q, k, v, starts, stops, return_lse=True)
    _same(out, wanted[0])
    _same(lse, wanted[1])
    c.attention_intervals(
        _attention(c, q, k, v, scale=0.2, softcap=3.0), starts, stops, int(shared), out, lse
    )
    wanted = attention.intervals(q, k, v, starts, stops, softmax_scale=0.2, softcap=3.0, return_lse=True)
    _same(out, wanted[0])
    _same(lse, wanted[1])


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
        cache.write(0, _normal(8, batch, 30, 2, 40), _normal(9, batch, 30, 2, 24))
        cache.commit(torch.tensor([30, 17]))
    q, k, v = _normal(1, batch, rows, 4, 40), _normal(2, batch, rows, 2, 40), _normal(3, batch, rows, 2, 24)
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
    out, lse = _empty(batch, rows, 4, 24), _empty(batch, 4, rows)
    c.attention_decode(_attention(c, q, k, v), how, out, lse)
    wanted = attention.decode(q, k, v, theirs, 0, **given, return_lse=True)
    _same(out, wanted[0])
    _same(lse, wanted[1])
    for a, b in zip(mine.view(0), theirs.view(0), strict=True):
        _same(a, b)
