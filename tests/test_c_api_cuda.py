"""The CUDA functions of the C library, their kernels on the host: the bits of Python on such kernels."""

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
    between_margins,
    bits_of,
    empty,
    guided_step_of,
    index_of,
    levels,
    logits_of,
    margins_kept,
    normal,
    points,
    same,
    softmax_of,
    strided,
)
from c_library import Library
from conftest import DEVICE
from torch import Tensor

import dlcore
from dlcore import bits, categorical, rng, sphere
from dlcore._dispatch import run
from dlcore.bits.levels import slope
from dlcore.process import uniform
from dlcore.sphere import cauchy, vmf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        DEVICE == "cuda", reason="on a GPU Python's kernels run there, the library's on the host"
    ),
]

VOCAB = 3001
INDEX = index_of(torch.empty(ROWS, VOCAB))


@pytest.fixture(autouse=True)
def cuda_python(cuda_kernels: None) -> Iterator[None]:
    """Python's ops on the CUDA kernels of the host, and nothing written beside results."""
    with dlcore.use_backend("cuda"), margins_kept():
        yield


def _inputs(make: Callable[[], Any]) -> Any:
    """What is made on the CPU's backend."""
    with dlcore.use_backend("cpu"):
        return make()


def _logits(dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return _inputs(lambda: strided((3 * normal(seed, ROWS, VOCAB)).to(dtype)))


def _rows(seed: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return _inputs(lambda: strided(normal(seed, ROWS, columns, dtype=dtype)))


def _per_row_keys() -> Tensor:
    return _inputs(lambda: rng.split(KEY, ROWS))


def _workspace(query: Callable[..., None], *given: Any) -> Tensor:
    """As much as is asked for, poisoned."""
    size = torch.zeros(1, dtype=torch.int64)
    query(*given, size)
    return between_margins(int(size)).fill_(0xFF)


@pytest.mark.parametrize("name", ["uniform", "normal", "gumbel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_noise(cuda_c: Library, name: str, dtype: torch.dtype) -> None:
    c, keys, out = cuda_c, _per_row_keys(), empty(ROWS, 501, dtype=dtype)
    kind = {torch.float32: c.FLOAT32, torch.float64: c.FLOAT64}[dtype]
    getattr(c, f"cuda_rng_{name}")(keys, ROWS, 501, kind, out, None)
    same(out, getattr(rng, name)(keys, 501, dtype=dtype))


def test_fold_in(cuda_c: Library) -> None:
    c, data = cuda_c, torch.tensor([0, 5, -(2**62), 7, 9])
    for key in (KEY, _per_row_keys()):
        out = empty(ROWS, 2, dtype=torch.int64)
        c.cuda_rng_fold_in(c.keys_of(key), c.ints(data=data, stride=1), ROWS, out, None)
        same(out, rng.fold_in(key, data))


def _softmax_memory(c: Library, softmax: Any, how: Any = None) -> Tensor:
    return _workspace(c.cuda_categorical_workspace, softmax, how)


GIVEN: dict[str, Any] = {
    "temperature": torch.linspace(0.5, 1.5, ROWS),
    "softcap": 8.0,
    "shift": 1.5,
    "exclude": 3,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [{}, GIVEN], ids=["plain", "all"])
def test_draws_and_statistics(cuda_c: Library, dtype: torch.dtype, given: dict[str, Any]) -> None:
    c, logits = cuda_c, _logits(dtype)
    softmax = softmax_of(c, logits, INDEX, **given)
    workspace, argmax = _softmax_memory(c, softmax), empty(ROWS, dtype=torch.int64)
    numbers = empty(c.NUM_STATS, ROWS)
    c.cuda_categorical_stats(softmax, argmax, numbers, workspace, None)
    wanted = run("categorical.stats", *_op_arguments(logits, given))
    same(argmax, wanted[0])
    same(numbers, wanted[1])
    draw = categorical.sample(logits, INDEX, **given, key=KEY)
    tokens, numbers = empty(2, ROWS, dtype=torch.int64), empty(c.NUM_SAMPLE_STATS, ROWS)
    c.cuda_categorical_sample(softmax, c.sampling(keys=c.keys_of(KEY)), tokens, numbers, workspace, None)
    same(tokens, draw._tokens)
    same(numbers, draw._numbers)


@pytest.mark.parametrize("first", [0, 768])
@pytest.mark.parametrize("given", [{}, GIVEN], ids=["plain", "all"])
def test_summaries(cuda_c: Library, given: dict[str, Any], first: int) -> None:
    """Of the logits as tokens from `first` on; with a target and a row that is skipped, or without."""
    c, logits = cuda_c, _logits()
    softmax = softmax_of(c, logits, INDEX, **given)
    tokens, numbers = empty(2, ROWS, dtype=torch.int64), empty(c.NUM_SUMMARY, ROWS, dtype=torch.float64)
    target = first + INDEX.flip(0) if given else None
    skip = torch.tensor([0, 1, 0, 0, 0], dtype=torch.uint8) if given else None
    part = c.part(first=first, target=target, skip=skip, keys=c.keys_of(KEY))
    c.cuda_categorical_summary(softmax, part, tokens, numbers, _softmax_memory(c, softmax), None)
    _, _, _, index, shift, *row = _op_arguments(logits, given)
    wanted = run("categorical.summary", logits, None, None, first, index, shift, target, *row, skip, KEY)
    same(tokens, wanted[0])
    same(numbers, wanted[1])


def _op_arguments(logits: Tensor, given: dict[str, Any]) -> tuple[Any, ...]:
    shift = None if "shift" not in given else torch.tensor(given["shift"])
    return (
        logits,
        None,
        None,
        INDEX,
        shift,
        given.get("temperature"),
        given.get("softcap"),
        given.get("exclude"),
    )


CUTS: list[dict[str, Any]] = [
    {"top_k": 3},
    {"top_p": torch.linspace(0.1, 0.9, ROWS)},
    {"min_p": 0.2},
    {"top_k": torch.arange(1, ROWS + 1) * 20, "top_p": 0.5, "min_p": 0.01},
]


@pytest.mark.parametrize("cut", CUTS, ids=",".join)
def test_truncated_draws(cuda_c: Library, cut: dict[str, Any]) -> None:
    c, logits = cuda_c, _logits(torch.bfloat16)
    softmax = softmax_of(c, logits, INDEX, **GIVEN)
    tokens, numbers = empty(2, ROWS, dtype=torch.int64), empty(c.NUM_SAMPLE_STATS, ROWS)
    how = c.sampling(
        keys=c.keys_of(KEY),
        top_k=c.row_numbers(cut.get("top_k"), torch.int64),
        top_p=c.row_numbers(cut.get("top_p")),
        min_p=c.row_numbers(cut.get("min_p")),
    )
    c.cuda_categorical_sample(softmax, how, tokens, numbers, _softmax_memory(c, softmax, how), None)
    draw = categorical.sample(logits, INDEX, **GIVEN, **cut, key=KEY)
    same(tokens, draw._tokens)
    same(numbers, draw._numbers)


@pytest.mark.parametrize("prior", [None, 5], ids=["uniform", "a token"])
def test_mixtures(cuda_c: Library, prior: int | None) -> None:
    c, logits = cuda_c, _logits()
    softmax = softmax_of(c, logits, INDEX, **GIVEN)
    # A draw, what is kept unread, the prior, and what depends on p(z).
    routes = [[1, 0, 0, 0, 1, 0], [1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 1, 0, 0.3, 0, 0.4]]
    coefficients = torch.tensor([*routes, routes[0]], dtype=torch.float64)
    for key in (KEY, _per_row_keys()):
        how = c.mixture(
            keys=c.keys_of(key),
            coefficients=c.doubles(data=coefficients, stride=6),
            prior=None if prior is None else torch.tensor(prior),
        )
        tokens = empty(ROWS, dtype=torch.int64)
        c.cuda_categorical_sample_mixture(softmax, how, tokens, _softmax_memory(c, softmax), None)
        wanted = categorical.sample_mixture(
            logits, INDEX, coefficients, prior="uniform" if prior is None else prior, **GIVEN, key=key
        )
        same(tokens, wanted)


def _doubles(*shape: int) -> Tensor:
    return _inputs(lambda: normal(5, *shape).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs(cuda_c: Library, dtype: torch.dtype) -> None:
    c, logits, target = cuda_c, _logits(dtype), INDEX.flip(0).clone()
    target[2] = -1
    shift = torch.linspace(-1, 1, ROWS)
    given = (logits, None, None, target, INDEX, shift, 6.0, None)
    softmax, numbers = (
        softmax_of(c, logits, INDEX, shift=shift, softcap=6.0),
        empty(3, ROWS, dtype=torch.float64),
    )
    c.cuda_categorical_log_probs(softmax, target, numbers, _softmax_memory(c, softmax), None)
    same(numbers, run("categorical.log_probs", *given))
    grad, logits_grad = _doubles(3, ROWS), empty(ROWS, VOCAB, dtype=dtype)
    grads = c.logits_grad(values=logits_grad)
    c.cuda_categorical_log_probs_backward(softmax, target, grad, numbers, grads, None)
    same(logits_grad, run("categorical.log_probs_backward", grad, numbers, *given)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [None, torch.linspace(0.5, 2, ROWS)], ids=["plain", "per row"])
def test_kl(cuda_c: Library, dtype: torch.dtype, temperature: Tensor | None) -> None:
    c, p, q = cuda_c, _logits(dtype), _logits(dtype, seed=2)
    pair = logits_of(c, p), logits_of(c, q), c.row_numbers(temperature)
    numbers = empty(3, ROWS, dtype=torch.float64)
    memory = _workspace(c.cuda_categorical_kl_workspace, pair[0])
    c.cuda_categorical_kl(*pair, numbers, memory, None)
    given = (p, None, None, q, None, None, temperature)
    same(numbers, run("categorical.kl", *given))
    grad, grads = _doubles(3, ROWS), [empty(ROWS, VOCAB, dtype=dtype) for _ in range(2)]
    structs = [c.logits_grad(values=g) for g in grads]
    c.cuda_categorical_kl_backward(*pair, grad, numbers, *structs, None)
    wanted = run("categorical.kl_backward", grad, numbers, *given)
    same(grads[0], wanted[0])
    same(grads[1], wanted[3])


@pytest.mark.parametrize("parameterization", ["loo", "denoiser"])
def test_nelbo(cuda_c: Library, parameterization: str) -> None:
    c, logits, x = cuda_c, _logits(), INDEX.flip(0)
    alpha, dalpha = torch.linspace(0.1, 0.9, ROWS).double(), torch.tensor(-1.5).double()
    shift = -torch.log1p(VOCAB * alpha / (1 - alpha)) if parameterization == "denoiser" else None
    softmax, levels = softmax_of(c, logits, INDEX, shift=shift), (c.doubles_of(alpha), c.doubles_of(dalpha))
    loss, saved = empty(ROWS), empty(5, ROWS, dtype=torch.float64)
    memory = _softmax_memory(c, softmax)
    c.cuda_uniform_nelbo(softmax, x, *levels, loss, None, memory, None)
    same(loss, uniform.nelbo(logits, INDEX, x, alpha, dalpha, parameterization=parameterization))
    c.cuda_uniform_nelbo(softmax, x, *levels, loss, saved, memory, None)
    given = (logits, None, None, INDEX, x, alpha, dalpha, None if shift is None else shift.float())
    same(saved, run("uniform.nelbo", *given)[1])
    grad, logits_grad = _rows(5, 1).flatten().contiguous(), empty(ROWS, VOCAB)
    grads = c.logits_grad(values=logits_grad)
    c.cuda_uniform_nelbo_backward(softmax, x, *levels, grad, saved, grads, None)
    same(logits_grad, run("uniform.nelbo_backward", grad, saved, *given)[0])


# --- guidance ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guided_draws(cuda_c: Library, dtype: torch.dtype) -> None:
    c, cond, uncond = cuda_c, _logits(dtype), _logits(seed=2)
    workspace = _workspace(c.cuda_guidance_workspace, c.matrix_of(cond))
    for key, k, exclude in ((KEY, GUIDED[3], None), (_per_row_keys(), GUIDED, 3)):
        args = (cond, uncond, INDEX, k, exclude, key)
        tokens = empty(ROWS, dtype=torch.int64)
        c.cuda_guidance_cfg_uniform_step(guided_step_of(c, *args), tokens, workspace, None)
        same(tokens, run("guidance.cfg_uniform_step", *args))


# --- bits ---


@pytest.mark.parametrize("order", ["msb", "lsb"])
@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("coding", ["01", "pm1"])
@pytest.mark.parametrize("width", [1, 17, 62])
def test_codes(cuda_c: Library, order: str, gray: bool, coding: str, width: int) -> None:
    c, tokens = cuda_c, torch.arange(300) * (2**62 // 300) % 2**width
    code = c.bit_code(
        width=width, order=["msb", "lsb"].index(order), gray=gray, coding=["01", "pm1"].index(coding)
    )
    written = empty(300, width)
    c.cuda_bits_encode(code, tokens, 300, written, None)
    same(written, bits.encode(tokens, width, order=order, gray=gray, coding=coding))
    noisy = _inputs(lambda: strided(written + 0.3 * normal(1, 300, width)))
    noisy[3, 0] = torch.nan
    for vocab in (0, 2**width // 2 + 1):
        read = empty(300, dtype=torch.int64)
        c.cuda_bits_decode(code, c.matrix_of(noisy), vocab, read, None)
        same(read, bits.decode(noisy, vocab_size=vocab or None, order=order, gray=gray, coding=coding))


def _bits_memory(c: Library, x: Tensor) -> Tensor:
    return _workspace(c.cuda_bits_workspace, c.matrix_of(x))


@levels
@pytest.mark.parametrize("coding", ["01", "pm1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [33, 5000])
def test_posteriors(cuda_c: Library, sigma: Any, coding: str, dtype: torch.dtype, columns: int) -> None:
    c = cuda_c
    for make in (lambda x: x, lambda x: x.contiguous()):
        x, residual = (make(_rows(seed, columns, dtype)) for seed in (1, 2))
        out, memory = empty(ROWS, columns), _bits_memory(c, x)
        c.cuda_bits_matched_filter(bits_of(c, x, None, sigma, coding, 0), out, memory, None)
        same(out, bits.matched_filter(x, sigma, coding=coding))
        for given in (None, residual):
            c.cuda_bits_posterior(bits_of(c, x, given, sigma, coding, 3.0), out, memory, None)
            same(out, bits.posterior(x, sigma, given, coding=coding, clip=3.0))


@levels
@pytest.mark.parametrize("coding", ["01", "pm1"])
@pytest.mark.parametrize("gamma", [None, 0.2], ids=["plain", "churned"])
@pytest.mark.parametrize("scale", [None, 1.01], ids=["default", "scaled"])
def test_step(cuda_c: Library, sigma: Any, coding: str, gamma: float | None, scale: float | None) -> None:
    c, x, residual = cuda_c, _rows(1, 700), _rows(2, 700, torch.bfloat16)
    following, probs = empty(ROWS, 700), empty(ROWS, 700)
    update = c.bits_update(
        sigma_next=c.doubles_of(0.25),
        gamma_next=c.doubles_of(gamma),
        noise_scale=c.doubles_of(scale),
        keys=c.keys_of(KEY),
    )
    state = bits_of(c, x, residual, sigma, coding, 0)
    c.cuda_bits_step(state, update, following, probs, _bits_memory(c, x), None)
    churn = {} if gamma is None else {"gamma_next": gamma, "key": KEY}
    churn |= {} if scale is None else {"noise_scale": scale}
    wanted = bits.step(x, residual, sigma, 0.25, **churn, coding=coding)
    same(following, wanted[0])
    same(probs, wanted[1])


@levels
def test_perturb(cuda_c: Library, sigma: Any) -> None:
    c, x, out = cuda_c, _rows(1, 700, torch.float16), empty(ROWS, 700)
    for key in (KEY, _per_row_keys()):
        spread = c.doubles_of(sigma), c.keys_of(key)
        c.cuda_bits_perturb(c.matrix_of(x), *spread, out, _bits_memory(c, x), None)
        same(out, bits.corrupt(x, sigma, key=key))


@levels
@pytest.mark.parametrize("kind", ["squared", "bce"])
@pytest.mark.parametrize("columns", [33, 20_000])
def test_bits_loss(cuda_c: Library, sigma: Any, kind: str, columns: int) -> None:
    c, x, residual = cuda_c, _rows(1, columns), _rows(2, columns, torch.bfloat16)
    clean, loss = (_rows(3, columns) > 0).to(torch.bfloat16), empty(ROWS)
    state, memory = bits_of(c, x, residual, sigma, "01", 0), _bits_memory(c, x)
    what = c.matrix_of(clean), ["squared", "bce"].index(kind)
    c.cuda_bits_loss(state, *what, loss, memory, None)
    same(loss, bits.loss(residual, x, clean, sigma, kind=kind))
    gain = torch.as_tensor(slope(sigma, (0.0, 1.0))).float()
    gain = gain.unsqueeze(-1) if gain.dim() else gain
    grad = _rows(4, 1).flatten().contiguous()
    for with_x in (True, False):
        residual_grad, x_grad = empty(ROWS, columns, dtype=residual.dtype), empty(ROWS, columns)
        c.cuda_bits_loss_backward(state, *what, grad, residual_grad, x_grad if with_x else None, memory, None)
        wanted = run(
            "bits.loss_backward", grad, residual, x, clean, gain, 0.0, 1.0, 30.0, kind == "squared", with_x
        )
        same(residual_grad, wanted[0])
        same(x_grad, wanted[1] if with_x else torch.full_like(x_grad, torch.nan))


# --- sphere ---


def _points(seed: int, dtype: torch.dtype) -> Tensor:
    return _inputs(lambda: points(seed, dtype))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps(cuda_c: Library, name: str, dtype: torch.dtype) -> None:
    c, x = cuda_c, [_points(seed, dtype) for seed in range(MAPS[name])]
    t = [torch.linspace(0.1, 0.9, ROWS)] if name == "slerp" else []
    numbers, vectors = [c.row_numbers(v) for v in t], [c.matrix_of(v) for v in x]
    out = empty(ROWS) if name == "angle" else empty(ROWS, 70, dtype=dtype)
    getattr(c, f"cuda_sphere_{name}")(*vectors, *numbers, out, None)
    same(out, getattr(sphere, name)(*x, *t))
    grad = _rows(9, 1).flatten().contiguous() if name == "angle" else _rows(9, 70, dtype)
    backward, count = getattr(c, f"cuda_sphere_{name}_backward"), len(x) + len(t)
    for needed in ([True] * count, [i == count - 1 for i in range(count)]):
        found = run(f"sphere.{name}_backward", grad, needed, *x, *t)
        wanted = found if isinstance(found, tuple) else (found,)
        like = [*x, *(torch.empty(ROWS) for _ in t)]
        mine = [empty(*v.shape, dtype=v.dtype) if n else None for v, n in zip(like, needed, strict=True)]
        backward(grad if name == "angle" else c.matrix_of(grad), *vectors, *numbers, *mine, None)
        for got, right in zip(mine, wanted, strict=True):
            if got is not None:
                same(got, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_and_draws_on_the_sphere(cuda_c: Library, dtype: torch.dtype) -> None:
    c, x, y, out = cuda_c, _points(1, dtype), _points(2, dtype), empty(ROWS, 70, dtype=dtype)
    pair = c.matrix_of(x), c.matrix_of(y)
    for code, retraction in enumerate(("exp", "normalize")):
        c.cuda_sphere_step(*pair, c.row_numbers(0.3), code, out, None)
        same(out, sphere.step(x, y, 0.3, retraction=retraction))
    for size, key in ((torch.tensor(0.125), KEY), (torch.linspace(0, 1, ROWS), _per_row_keys())):
        step, keys = c.doubles_of(size), c.keys_of(key)
        c.cuda_sphere_correct(*pair, step, keys, out, None)
        same(out, sphere.correct(x, y, size, key=key))
        grad, grads = _rows(9, 70, dtype), [empty(ROWS, 70, dtype=dtype) for _ in range(2)]
        by_step = empty(ROWS, dtype=torch.float64)
        c.cuda_sphere_correct_backward(c.matrix_of(grad), *pair, step, keys, *grads, by_step, None)
        wanted = run("sphere.correct_backward", grad, x, y, size.double(), key)
        for got, right in zip((*grads, by_step), wanted, strict=True):
            same(got, right)
        kappa = 100 * size.double()
        for law, draw in ((c.VON_MISES_FISHER, vmf.sample), (c.SPHERICAL_CAUCHY, cauchy.sample)):
            c.cuda_sphere_sample(pair[0], c.doubles_of(kappa), law, keys, out, None)
            same(out, draw(x, kappa, key=key))


# --- the library ---


def test_an_id_out_of_range_is_read_nowhere(cuda_c: Library) -> None:
    c = cuda_c
    softmax = softmax_of(c, _logits(), INDEX + 2**40)
    argmax, numbers = torch.zeros(ROWS, dtype=torch.int64), empty(c.NUM_STATS, ROWS)
    c.cuda_categorical_stats(softmax, argmax, numbers, _softmax_memory(c, softmax), None)
    assert numbers[c.INDEX_LOGPROB].isnan().all()
    assert numbers[c.ENTROPY].isfinite().all()


def test_the_cpus_functions_are_there_too(cuda_c: Library) -> None:
    out = torch.zeros(3)
    cuda_c.rng_normal(KEY, 1, 3, cuda_c.FLOAT32, out, 0)
    same(out, _inputs(lambda: rng.normal(KEY, 3)))
