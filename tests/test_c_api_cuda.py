"""The CUDA functions of the C library, their kernels on the host: what the CPU functions give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from c_library import CError, Library
from torch import Tensor

from dlcore import categorical, rng
from dlcore.process import uniform

pytestmark = pytest.mark.slow

ROWS, VOCAB = 4, 3001
KEY = rng.key(-7, 11)
INDEX = torch.arange(ROWS) * 37


def _logits(dtype: torch.dtype = torch.float32) -> Tensor:
    wide = torch.full((ROWS, VOCAB + 5), torch.nan, dtype=dtype)
    wide[:, :VOCAB] = 3 * rng.normal(rng.key(1), (ROWS, VOCAB))
    return wide[:, :VOCAB]


def _softmax(c: Library, logits: Tensor, index: Tensor | None = None, **given: Any) -> Any:
    members = {name: c.row_numbers(given[name]) for name in ("shift", "temperature") if name in given}
    exclude = torch.tensor(given["exclude"]) if "exclude" in given else None
    softcap = given.get("softcap", 0.0)
    values = c.logits(values=c.matrix_of(logits))
    return c.categorical(logits=values, index=index, exclude=exclude, softcap=softcap, **members)


def _workspace(c: Library, softmax: Any, how: Any = None) -> Tensor:
    size = torch.zeros(1, dtype=torch.int64)
    c.cuda_categorical_workspace(softmax, how, size)
    return torch.full((int(size) // 8,), -1, dtype=torch.int64)


def _numbers(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((count, ROWS), torch.nan, dtype=dtype)


GIVEN: dict[str, Any] = {
    "temperature": torch.tensor([0.5, 1.0, 1.5, 0.7]),
    "softcap": 8.0,
    "shift": 1.5,
    "exclude": 3,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [{}, GIVEN], ids=["plain", "all"])
def test_draws_and_statistics(cuda_c: Library, dtype: torch.dtype, given: dict[str, Any]) -> None:
    c, logits = cuda_c, _logits(dtype)
    softmax = _softmax(c, logits, INDEX, **given)
    workspace, argmax = _workspace(c, softmax), torch.full((ROWS,), -7)
    numbers = _numbers(c.NUM_STATS)
    c.cuda_categorical_stats(softmax, argmax, numbers, workspace, None)
    draw = categorical.sample(logits, INDEX, **given, key=KEY)
    assert torch.equal(argmax, draw.stats.argmax)
    torch.testing.assert_close(numbers, draw._numbers[:6])
    tokens, numbers = torch.full((2, ROWS), -7), _numbers(c.NUM_SAMPLE_STATS)
    c.cuda_categorical_sample(softmax, c.sampling(keys=c.keys_of(KEY)), tokens, numbers, workspace, None)
    assert torch.equal(tokens, draw._tokens)
    torch.testing.assert_close(numbers, draw._numbers)


CUTS: list[dict[str, Any]] = [
    {"top_k": 3},
    {"top_p": torch.linspace(0.1, 0.9, ROWS)},
    {"min_p": 0.2},
    {"top_k": torch.arange(1, ROWS + 1) * 20, "top_p": 0.5, "min_p": 0.01},
]


@pytest.mark.parametrize("cut", CUTS, ids=",".join)
def test_truncated_draws(cuda_c: Library, cut: dict[str, Any]) -> None:
    c, logits = cuda_c, _logits(torch.bfloat16)
    softmax = _softmax(c, logits, INDEX, **GIVEN)
    tokens, numbers = torch.full((2, ROWS), -7), _numbers(c.NUM_SAMPLE_STATS)
    how = c.sampling(
        keys=c.keys_of(KEY),
        top_k=c.row_numbers(cut.get("top_k"), torch.int64),
        top_p=c.row_numbers(cut.get("top_p")),
        min_p=c.row_numbers(cut.get("min_p")),
    )
    c.cuda_categorical_sample(softmax, how, tokens, numbers, _workspace(c, softmax, how), None)
    draw = categorical.sample(logits, INDEX, **GIVEN, **cut, key=KEY)
    assert torch.equal(tokens, draw._tokens)
    torch.testing.assert_close(numbers, draw._numbers)


@pytest.mark.parametrize("prior", [None, 5], ids=["uniform", "a token"])
def test_mixtures(cuda_c: Library, prior: int | None) -> None:
    c, logits = cuda_c, _logits()
    softmax = _softmax(c, logits, INDEX, **GIVEN)
    # A draw, what is kept unread, the prior, and what depends on p(z).
    routes = [[1, 0, 0, 0, 1, 0], [1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 1, 0, 0.3, 0, 0.4]]
    coefficients = torch.tensor(routes, dtype=torch.float64)
    for key in (KEY, rng.split(KEY, ROWS)):
        how = c.mixture(
            keys=c.keys_of(key),
            coefficients=c.doubles(data=coefficients, stride=6),
            prior=None if prior is None else torch.tensor(prior),
        )
        tokens = torch.full((ROWS,), -7)
        c.cuda_categorical_sample_mixture(softmax, how, tokens, _workspace(c, softmax), None)
        wanted = categorical.sample_mixture(
            logits, INDEX, coefficients, prior="uniform" if prior is None else prior, **GIVEN, key=key
        )
        assert torch.equal(tokens, wanted)


def test_losses(cuda_c: Library) -> None:
    c, logits, target = cuda_c, _logits(), INDEX.flip(0).clone()
    target[2] = -100
    softmax, numbers = _softmax(c, logits), _numbers(3, torch.float64)
    c.cuda_categorical_log_probs(softmax, target, numbers, _workspace(c, softmax), None)
    torch.testing.assert_close(-numbers[0].float(), categorical.cross_entropy(logits, target))
    x, alpha, dalpha = INDEX.flip(0), torch.linspace(0.1, 0.9, ROWS).double(), torch.tensor(-1.5).double()
    softmax, loss = _softmax(c, logits, INDEX), _numbers(1)[0]
    levels = c.doubles_of(alpha), c.doubles_of(dalpha)
    c.cuda_uniform_nelbo(softmax, x, *levels, loss, _workspace(c, softmax), None)
    torch.testing.assert_close(loss, uniform.nelbo(logits, INDEX, x, alpha, dalpha))


def test_an_id_out_of_range_is_read_nowhere(cuda_c: Library) -> None:
    c = cuda_c
    softmax = _softmax(c, _logits(), INDEX + 2**40)
    argmax, numbers = torch.zeros(ROWS, dtype=torch.int64), _numbers(c.NUM_STATS)
    c.cuda_categorical_stats(softmax, argmax, numbers, _workspace(c, softmax), None)
    assert numbers[c.INDEX_LOGPROB].isnan().all()
    assert numbers[c.ENTROPY].isfinite().all()


def test_the_cpus_functions_are_there_too(cuda_c: Library) -> None:
    out = torch.zeros(3)
    cuda_c.rng_normal(KEY, 1, 3, cuda_c.FLOAT32, out, 0)
    assert torch.equal(out, rng.normal(KEY, 3))


def _out() -> Tensor:
    return torch.zeros(8 * ROWS, dtype=torch.float64)


CALLS: dict[str, Callable[[Library], list[Any]]] = {
    "workspace": lambda c: [c.sampling(), _out()],
    "stats": lambda c: [_out(), _out(), _out(), 0],
    "sample": lambda c: [c.sampling(keys=c.keys_of(KEY)), _out(), _out(), _out(), 0],
    "sample_mixture": lambda c: [
        c.mixture(keys=c.keys_of(KEY), coefficients=c.doubles(data=torch.ones(6).double())),
        *(_out(), _out(), 0),
    ],
    "log_probs": lambda c: [INDEX, _out(), _out(), 0],
}
calls = pytest.mark.parametrize("name", CALLS)


@calls
def test_bad_input(cuda_c: Library, name: str) -> None:
    c, function = cuda_c, getattr(cuda_c, f"cuda_categorical_{name}")

    def refused(arguments: list[Any], status: str, message: str) -> None:
        with pytest.raises(CError, match=f"dlcore_cuda_categorical_{name}: {message}") as error:
            function(*arguments)
        assert error.value.status == status

    def softmax(**members: Any) -> Any:
        return c.categorical(**{"logits": c.logits(values=c.matrix_of(_logits())), "index": INDEX, **members})

    refused([None, *CALLS[name](c)], "NULL_POINTER", "softmax must not be NULL")
    for place in range(len(CALLS[name](c))):
        if (name, place) == ("workspace", 0) or isinstance(CALLS[name](c)[place], int):
            continue
        given = CALLS[name](c)
        given[place] = None
        refused([softmax(), *given], "NULL_POINTER", ".* must not be NULL")
    head = c.logits(values=c.matrix_of(_logits()), weight=c.matrix_of(_logits()))
    refused([softmax(logits=head), *CALLS[name](c)], "UNSUPPORTED", "logits.weight must be none on CUDA")
    refused([softmax(softcap=-1.0), *CALLS[name](c)], "INVALID_VALUE", "softcap must lie in")
    refused([softmax(exclude=torch.tensor(VOCAB)), *CALLS[name](c)], "INVALID_VALUE", "exclude must lie in")


def test_nelbo_needs_its_tokens(cuda_c: Library) -> None:
    c, half = cuda_c, cuda_c.doubles_of(0.5)
    for index, x in ((None, INDEX), (INDEX, None)):
        softmax = _softmax(c, _logits(), index)
        with pytest.raises(CError, match=r"(index|x) must not be NULL"):
            c.cuda_uniform_nelbo(softmax, x, half, half, _out(), _workspace(c, softmax), None)
