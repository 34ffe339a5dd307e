"""What the C library refuses: by status, and by a message that names the argument and what it takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from c_library import CError, Library
from torch import Tensor

pytestmark = pytest.mark.slow

ROWS, VOCAB = 3, 6


def _matrix(c: Library, columns: int = VOCAB) -> Any:
    return c.matrix_of(torch.zeros(ROWS, columns))


def _ids(*values: int) -> Tensor:
    return torch.tensor(values)


def _keys(c: Library) -> Any:
    return c.keys(data=_ids(7, 0))


def _logits(c: Library) -> Any:
    return c.logits(values=_matrix(c))


def _softmax(c: Library, temperature: float | None = 1.0) -> Any:
    return c.categorical(
        logits=_logits(c),
        index=_ids(0, 1, 2),
        shift=c.row_numbers(torch.zeros(ROWS)),
        temperature=c.row_numbers(None if temperature is None else torch.full((ROWS,), temperature)),
    )


def _grad(c: Library) -> Any:
    return c.logits_grad(values=_out())


def _linear(c: Library) -> Any:
    logits = c.logits(
        values=_matrix(c, 4), weight=c.matrix_of(torch.zeros(VOCAB, 4)), bias=torch.zeros(VOCAB)
    )
    return c.categorical(logits=logits)


def _state(c: Library) -> Any:
    return c.bits(x=_matrix(c), residual=_matrix(c), sigma=c.doubles_of(0.5))


def _code(c: Library) -> Any:
    return c.bit_code(width=VOCAB)


def _attention(c: Library) -> Any:
    x = torch.zeros(2, 4, 2, 8)
    heads = {"batch_stride": 64, "row_stride": 16, "head_stride": 8}
    sizes = {"batch": 2, "rows": 4, "keys": 4, "heads": 2, "kv_heads": 2, "head_dim": 8}
    return c.attention(**sizes, **{name: c.heads(data=x, **heads) for name in "qkv"})


def _cache(c: Library) -> Any:
    store = torch.zeros(2, 10, 2, 8)
    lengths = torch.tensor([3, 6], dtype=torch.int32)
    return c.cache(keys=store, values=store.clone(), lengths=lengths, max_len=10)


def _pages(c: Library) -> Any:
    store = torch.zeros(6, 4, 2, 8)
    table = torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32)
    cache = _cache(c)
    cache.keys, cache.values, cache.page_table = store.data_ptr(), store.data_ptr(), table.data_ptr()
    cache.pages, cache.page_size, cache.num_pages = 3, 4, 6
    cache.held += [store, table]
    return cache


def _similarity(c: Library) -> Any:
    x = torch.zeros(2, 4, 2, 8)
    sizes = {"batch": 2, "rows": 4, "heads": 2, "columns": 8, "cached_rows": 4}
    return c.similarity(**sizes, fresh=c.heads(data=x), cached=c.heads(data=x))


def _guided(c: Library) -> Any:
    row = torch.tensor([2.0, 1, 0, 0.5, 1, 0], dtype=torch.float64)
    coefficients = c.doubles(data=row.repeat(ROWS, 1), stride=6)
    streams = {"cond": _matrix(c), "uncond": _matrix(c)}
    return c.guided_step(**streams, z=_ids(0, 1, 2), coefficients=coefficients, keys=_keys(c))


def _out(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(512, dtype=dtype)


def _bounds() -> Tensor:
    return torch.tensor([[[0, 2], [0, 2], [0, 2], [0, 2]]], dtype=torch.int32)


#: A call of every function that is taken.
CALLS: dict[str, Callable[[Library], list[Any]]] = {
    "choose_cpu_capability": lambda c: [b"baseline"],
    "rng_fold_in": lambda c: [_keys(c), c.ints(data=_ids(1, 2, 3), stride=1), ROWS, _out()],
    **{
        f"rng_{name}": lambda c: [_ids(7, 0), 1, 5, c.FLOAT32, _out(), 0]
        for name in ("uniform", "normal", "gumbel")
    },
    "categorical_stats": lambda c: [_softmax(c), _out(), _out()],
    "categorical_summary": lambda c: [_softmax(c), c.part(first=256, keys=_keys(c)), _out(), _out()],
    "categorical_sample": lambda c: [_softmax(c), c.sampling(keys=_keys(c)), _out(), _out(), _out()],
    "categorical_sample_mixture": lambda c: [
        _softmax(c),
        c.mixture(keys=_keys(c), coefficients=c.doubles(data=torch.ones(6, dtype=torch.float64))),
        _out(),
    ],
    "categorical_log_probs": lambda c: [_softmax(c), _ids(0, 1, -1), _out()],
    "categorical_log_probs_backward": lambda c: [
        _softmax(c, None),
        _ids(0, 1, -1),
        *(_out(), _out(), _grad(c)),
    ],
    "categorical_kl": lambda c: [_logits(c), _logits(c), c.floats(), _out(), 0],
    "categorical_kl_backward": lambda c: [
        *(_logits(c), _logits(c), c.floats(), _out(), _out()),
        *(_grad(c), _grad(c), 0),
    ],
    "categorical_expectation": lambda c: [_softmax(c), c.matrix_of(torch.zeros(VOCAB, 4)), _out(), _out()],
    "categorical_expectation_backward": lambda c: [
        *(_softmax(c), c.matrix_of(torch.zeros(VOCAB, 4)), _out(), _out(), _out()),
        *(_grad(c), _out()),
    ],
    "categorical_sample_expectation": lambda c: [
        _softmax(c),
        c.matrix_of(torch.zeros(VOCAB, 4)),
        _keys(c),
        *(_out(), _out(), _out(), _out(), _out()),
    ],
    "uniform_nelbo": lambda c: [
        c.categorical(logits=_logits(c), index=_ids(0, 1, 2)),
        _ids(0, 0, 0),
        c.doubles_of(0.5),
        c.doubles_of(-1.0),
        *(_out(), _out()),
    ],
    "uniform_nelbo_backward": lambda c: [
        c.categorical(logits=_logits(c), index=_ids(0, 1, 2)),
        _ids(0, 0, 0),
        c.doubles_of(0.5),
        c.doubles_of(-1.0),
        *(_out(), _out(), _grad(c)),
    ],
    "bits_encode": lambda c: [_code(c), _ids(0, 1, 63), ROWS, _out(), 0],
    "bits_decode": lambda c: [_code(c), _matrix(c), 0, _out(), 0],
    "bits_matched_filter": lambda c: [c.bits(x=_matrix(c), sigma=c.doubles_of(0.5)), _out()],
    "bits_posterior": lambda c: [_state(c), _out()],
    "bits_step": lambda c: [
        _state(c),
        c.bits_update(sigma_next=c.doubles_of(0.2), gamma_next=c.doubles_of(0.1), keys=_keys(c)),
        _out(),
        _out(),
    ],
    "bits_perturb": lambda c: [_matrix(c), c.doubles_of(0.5), _keys(c), _out(), 0],
    "bits_loss": lambda c: [_state(c), _matrix(c), 0, _out()],
    "bits_loss_backward": lambda c: [_state(c), _matrix(c), 0, _out(), _out(), _out()],
    "sphere_normalize": lambda c: [_matrix(c), _out(), 0],
    **{
        f"sphere_{name}": lambda c: [_matrix(c), _matrix(c), _out(), 0]
        for name in ("project", "angle", "log_map", "exp_map")
    },
    "sphere_slerp": lambda c: [_matrix(c), _matrix(c), c.row_numbers(0.5), _out(), 0],
    "sphere_rotate": lambda c: [_matrix(c), _matrix(c), _matrix(c), _out(), 0],
    "sphere_step": lambda c: [_matrix(c), _matrix(c), c.row_numbers(0.5), 0, _out(), 0],
    "sphere_correct": lambda c: [_matrix(c), _matrix(c), c.doubles_of(0.5), _keys(c), _out(), 0],
    "sphere_sample": lambda c: [_matrix(c), c.doubles_of(0.5), 0, _keys(c), _out(), 0],
    "sphere_normalize_backward": lambda c: [_matrix(c), _matrix(c), _out(), 0],
    "sphere_angle_backward": lambda c: [_out(), _matrix(c), _matrix(c), _out(), _out(), 0],
    "sphere_slerp_backward": lambda c: [
        *(_matrix(c), _matrix(c), _matrix(c), c.row_numbers(0.5)),
        *(_out(), _out(), _out(), 0),
    ],
    **{
        f"sphere_{name}_backward": lambda c: [_matrix(c), _matrix(c), _matrix(c), _out(), _out(), 0]
        for name in ("project", "log_map", "exp_map")
    },
    "sphere_rotate_backward": lambda c: [*(_matrix(c) for _ in range(4)), _out(), _out(), _out(), 0],
    "sphere_velocity": lambda c: [
        *(_logits(c), _matrix(c, 4), c.matrix_of(torch.zeros(VOCAB, 4)), c.doubles_of(2.0)),
        *(_out(), _out(), _out(), 0),
    ],
    "sphere_velocity_backward": lambda c: [
        *(_logits(c), _matrix(c, 4), c.matrix_of(torch.zeros(VOCAB, 4)), c.doubles_of(2.0)),
        *(_out(), _out(), _out(), _out(), _grad(c), _out(), _out(), 0),
    ],
    "sphere_largest": lambda c: [_logits(c), 2, _out(), 0],
    "attention_intervals_backward": lambda c: [
        *(_attention(c), _bounds(), _bounds() + 2, 1),
        *(_out() for _ in range(7)),
    ],
    "attention_intervals": lambda c: [_attention(c), _bounds(), _bounds() + 2, 1, _out(), _out()],
    "attention_decode": lambda c: [_attention(c), _cache(c), _out(), _out()],
    "similarity_cosine": lambda c: [_similarity(c), _out()],
    "guidance_cfg_uniform_step": lambda c: [_guided(c), _out(torch.int64)],
}
calls = pytest.mark.parametrize("name", CALLS)
QUESTIONS = {"version", "last_error", "cpu_capability"}


def _refused(c: Library, name: str, arguments: list[Any], status: str, message: str) -> None:
    with pytest.raises(CError, match=message) as error:
        getattr(c, name)(*arguments)
    assert error.value.status == status
    assert error.value.message.startswith(f"dlcore_{name}: ")


def test_every_function_is_here(c: Library) -> None:
    assert {f"dlcore_{name}" for name in (*CALLS, *QUESTIONS)} == set(c.functions)


@calls
def test_what_is_taken(c: Library, name: str) -> None:
    getattr(c, name)(*CALLS[name](c))


#: Arguments that may be NULL: by function, and by place.
OPTIONAL = {
    ("categorical_sample", 3),
    ("categorical_sample", 4),
    ("categorical_sample_expectation", 4),
    ("categorical_sample_expectation", 6),
    ("categorical_sample_expectation", 7),
    ("categorical_expectation", 3),
    ("categorical_expectation_backward", 6),
    ("uniform_nelbo", 5),
    ("bits_loss_backward", 5),
    ("sphere_normalize_backward", 2),
    *((f"sphere_{name}_backward", place) for name in ("project", "log_map", "exp_map") for place in (3, 4)),
    *(("sphere_angle_backward", place) for place in (3, 4)),
    *((f"sphere_{name}_backward", place) for name in ("slerp", "rotate") for place in (4, 5, 6)),
    *(("sphere_velocity", place) for place in (5, 6)),
    *(("sphere_velocity_backward", place) for place in (9, 10)),
}
#: Numbers per row with a default.
DEFAULTS = {
    *((f"categorical_kl{suffix}", 2) for suffix in ("", "_backward")),
    *((f"sphere_velocity{suffix}", 3) for suffix in ("", "_backward")),
}


@calls
def test_null_is_refused_wherever_it_is_not_a_default(c: Library, name: str) -> None:
    given = CALLS[name](c)
    for place, value in enumerate(given):
        arguments = CALLS[name](c)
        if isinstance(value, (Tensor, bytes)) or type(value).__name__ not in _BY_VALUE:
            if isinstance(value, int) or (name, place) in OPTIONAL:
                continue
            arguments[place] = None
        elif (name, place) in DEFAULTS:
            continue
        else:
            arguments[place].data = None
        _refused(c, name, arguments, "NULL_POINTER", "must not be NULL")


_BY_VALUE = ("dlcore_floats", "dlcore_doubles", "dlcore_ints", "dlcore_keys")


@calls
def test_negative_threads_are_refused(c: Library, name: str) -> None:
    arguments = CALLS[name](c)
    structs = [a for a in arguments if isinstance(a, ctypes.Structure) and hasattr(a, "threads")]
    for struct in structs:
        struct.threads = -1
    if not structs:
        if c.functions[f"dlcore_{name}"].argtypes[-1] is not ctypes.c_int32:
            assert name in ("choose_cpu_capability", "rng_fold_in")
            return
        arguments[-1] = -1
    _refused(c, name, arguments, "INVALID_VALUE", "threads must be at least 0, got -1")


MATRICES = [
    ("dtype", 3, "INVALID_DTYPE", r"\.dtype must be DLCORE_FLOAT32.* got 3 \(float64\)"),
    ("dtype", -1, "INVALID_DTYPE", r"\.dtype must be DLCORE_FLOAT32.* got -1 \(an unknown dtype\)"),
    ("rows", -1, "INVALID_SHAPE", r"\.rows must be at least 0, got -1"),
    ("columns", 0, "INVALID_SHAPE", r"\.columns must be at least 1, got 0"),
    ("row_stride", 2, "INVALID_SHAPE", r"\.row_stride must be at least \d, got 2"),
    ("row_stride", -6, "INVALID_SHAPE", r"\.row_stride must be at least \d, got -6"),
    ("rows", 2**62, "INVALID_SHAPE", r"too large for any memory"),
    ("data", None, "NULL_POINTER", r"\.data must not be NULL"),
]


def _matrices(struct: Any) -> list[Any]:
    """All matrices in an argument."""
    if not isinstance(struct, ctypes.Structure):
        return []
    if type(struct).__name__ == "dlcore_matrix":
        return [struct]
    return [m for name, _ in struct._fields_ for m in _matrices(getattr(struct, name))]


@calls
@pytest.mark.parametrize("wrong", MATRICES, ids=lambda wrong: f"{wrong[0]} {wrong[1]}")
def test_matrices(c: Library, name: str, wrong: tuple[str, Any, str, str]) -> None:
    member, value, status, message = wrong
    found = [m for a in CALLS[name](c) for m in _matrices(a)]
    for place, matrix in enumerate(found):
        if matrix.columns == 0:  # none is given
            continue
        arguments = CALLS[name](c)
        setattr([m for a in arguments for m in _matrices(a)][place], member, value)
        _refused(c, name, arguments, status, message)


Change = Callable[[Library, list[Any]], None]


def _set(place: int, path: str, value: Any) -> Change:
    """Arguments with a member, or with "" the argument itself, replaced."""

    def change(c: Library, arguments: list[Any]) -> None:
        made = value(c) if callable(value) else value
        if not path:
            arguments[place] = made
            return
        *parents, last = path.split(".")
        struct = arguments[place]
        for parent in parents:
            struct = getattr(struct, parent)
        arguments[place].held.append(made)
        setattr(struct, last, made.data_ptr() if isinstance(made, Tensor) else made)

    return change


def _coefficient(place: int, value: float) -> Change:
    row = torch.tensor([2.0, 1, 0, 0.5, 1, 0], dtype=torch.float64)
    row[place] = value
    return _set(0, "coefficients", lambda c: c.doubles(data=row, stride=0))


def _numbers(*values: float) -> Callable[[Library], Any]:
    return lambda c: c.row_numbers(torch.tensor(values))


def _wide(*values: float) -> Callable[[Library], Any]:
    return lambda c: c.doubles_of(torch.tensor(values, dtype=torch.float64))


NAN, INF = float("nan"), float("inf")
DRAWS = ("categorical_sample", "categorical_sample_mixture")
SOFTMAXES = (*DRAWS, "categorical_stats", "categorical_log_probs", "categorical_expectation")
MAPS = ("sphere_slerp", "sphere_log_map", "sphere_rotate", "sphere_correct", "sphere_sample")
GRADIENTS = ("categorical_log_probs_backward", "uniform_nelbo_backward")
VELOCITIES = ("sphere_velocity", "sphere_velocity_backward")
_one = torch.tensor

CASES: list[tuple[str | tuple[str, ...], Change, str, str]] = [
    (SOFTMAXES, _set(0, "index", _ids(0, 6, 2)), "INVALID_VALUE", r"index must lie in \[0, 6\), got 6"),
    (SOFTMAXES, _set(0, "index", _ids(0, 1, -1)), "INVALID_VALUE", r"index must lie in \[0, 6\), got -1"),
    (SOFTMAXES, _set(0, "index", None), "INVALID_VALUE", "shift needs index"),
    (SOFTMAXES, _set(0, "temperature", _numbers(1, -1, 1)), "INVALID_VALUE", r"temperature .*got -1"),
    (SOFTMAXES, _set(0, "temperature", _numbers(1, 1, NAN)), "INVALID_VALUE", r"temperature .*got nan"),
    (SOFTMAXES, _set(0, "temperature", _numbers(1, INF, 1)), "INVALID_VALUE", r"temperature .*got inf"),
    (SOFTMAXES, _set(0, "temperature.stride", -1), "INVALID_SHAPE", "temperature.stride must be at least 0"),
    ("categorical_stats", _set(0, "temperature", _numbers(1, 1, 0)), "INVALID_VALUE", "temperature .*got 0"),
    (SOFTMAXES, _set(0, "shift.stride", -1), "INVALID_SHAPE", "shift.stride must be at least 0"),
    (SOFTMAXES, _set(0, "softcap", -1.0), "INVALID_VALUE", "softcap must lie in .* got -1"),
    (SOFTMAXES, _set(0, "softcap", NAN), "INVALID_VALUE", "softcap must lie in .* got nan"),
    (SOFTMAXES, _set(0, "exclude", _ids(6)), "INVALID_VALUE", r"exclude must lie in \[0, 6\), got 6"),
    (SOFTMAXES, _set(0, "logits.bias", _ids(6)), "INVALID_VALUE", "logits.bias needs a weight"),
    (
        "categorical_summary",
        _set(0, "index", _ids(0, 6, -1)),
        "INVALID_VALUE",
        "index must lie in .*, got -1",
    ),
    ("categorical_summary", _set(0, "exclude", _ids(-1)), "INVALID_VALUE", "exclude must lie in .*, got -1"),
    ("categorical_summary", _set(1, "keys.stride", 2), "INVALID_SHAPE", "keys.stride must be 0 or 1, got 2"),
    *(
        (
            "categorical_summary",
            _set(1, "first", first),
            "INVALID_VALUE",
            f"first must be .*, got {first} and 6",
        )
        for first in (-256, 251, 2**63 - 1)
    ),
    ("categorical_sample", _set(1, "keys.stride", 2), "INVALID_SHAPE", "keys.stride must be 0 or 1, got 2"),
    ("categorical_sample", _set(1, "keys.data", None), "NULL_POINTER", "keys.data must not be NULL"),
    (
        "categorical_sample",
        _set(1, "top_k", lambda c: c.ints(data=_ids(0))),
        "INVALID_VALUE",
        "top_k .*got 0",
    ),
    ("categorical_sample", _set(1, "top_p", _numbers(0.5, 1.5, 1)), "INVALID_VALUE", "top_p .*got 1.5"),
    ("categorical_sample", _set(1, "min_p", _numbers(0.5, NAN, 1)), "INVALID_VALUE", "min_p .*got nan"),
    (
        "categorical_sample_mixture",
        _set(1, "coefficients.stride", 5),
        "INVALID_SHAPE",
        "coefficients.stride must be 0 or at least 6, got 5",
    ),
    (
        "categorical_sample_mixture",
        _set(1, "coefficients.data", _one([1, 0, 1, 0, INF, 0]).double()),
        "INVALID_VALUE",
        "coefficients .*got inf",
    ),
    ("categorical_sample_mixture", _set(1, "coefficients.data", None), "NULL_POINTER", "coefficients"),
    ("categorical_sample_mixture", _set(1, "prior", _ids(-1)), "INVALID_VALUE", r"prior .*\[0, 6\), got -1"),
    ("categorical_log_probs", _set(1, "", _ids(0, 6, 2)), "INVALID_VALUE", "target must lie in .* got 6"),
    ("categorical_kl", _set(1, "values.rows", 2), "INVALID_SHAPE", "q must have the rows .* 3 and 6, got 2"),
    ("categorical_kl", _set(1, "values.columns", 5), "INVALID_SHAPE", "q must have the rows .* got 3 and 5"),
    ("categorical_kl", _set(1, "values.dtype", 1), "INVALID_DTYPE", "q.values.dtype must be that of p"),
    ("categorical_kl", _set(2, "", _numbers(1, 0, 1)), "INVALID_VALUE", "temperature .*got 0"),
    ("categorical_expectation", _set(1, "rows", 5), "INVALID_SHAPE", "table->rows must be the .*, 6, got 5"),
    ("uniform_nelbo", _set(0, "index", None), "NULL_POINTER", "index must not be NULL"),
    ("uniform_nelbo", _set(0, "softcap", 1.0), "INVALID_VALUE", "temperature, softcap and exclude"),
    ("uniform_nelbo", _set(1, "", _ids(0, 0, 6)), "INVALID_VALUE", r"x must lie in \[0, 6\), got 6"),
    ("uniform_nelbo", _set(2, "", _wide(0.5, 1, 0.5)), "INVALID_VALUE", "alpha .*got 1"),
    ("uniform_nelbo", _set(2, "", _wide(0.5, 0, 0.5)), "INVALID_VALUE", "alpha .*got 0"),
    ("uniform_nelbo", _set(3, "", _wide(-1, 1, -1)), "INVALID_VALUE", "dalpha .*got 1"),
    ("bits_encode", _set(0, "width", 63), "INVALID_VALUE", r"code->width must lie in \[1, 62\], got 63"),
    ("bits_encode", _set(0, "order", 2), "INVALID_VALUE", r"code->order must lie in \[0, 1\], got 2"),
    ("bits_encode", _set(0, "gray", -1), "INVALID_VALUE", r"code->gray must lie in \[0, 1\], got -1"),
    ("bits_encode", _set(0, "coding", 2), "INVALID_VALUE", r"code->coding must lie in \[0, 1\], got 2"),
    ("bits_encode", _set(1, "", _ids(0, 64, 1)), "INVALID_VALUE", r"tokens must lie in \[0, 64\), got 64"),
    ("bits_encode", _set(2, "", -1), "INVALID_SHAPE", "count must be at least 0, got -1"),
    ("bits_decode", _set(0, "width", 5), "INVALID_SHAPE", "bits->columns must be code->width, 5, got 6"),
    ("bits_decode", _set(2, "", 65), "INVALID_VALUE", r"vocab_size must lie in \[0, 2\^6\], got 65"),
    ("bits_matched_filter", _set(0, "residual", _matrix), "INVALID_VALUE", "residual must be none"),
    ("bits_posterior", _set(0, "coding", 2), "INVALID_VALUE", r"coding must lie in \[0, 1\], got 2"),
    ("bits_posterior", _set(0, "clip", -1.0), "INVALID_VALUE", "clip .*got -1"),
    (
        "bits_posterior",
        _set(0, "residual.rows", 2),
        "INVALID_SHAPE",
        r"residual must be \(3, 6\), got \(2, 6\)",
    ),
    ("bits_posterior", _set(0, "sigma", _wide(1, -1, 1)), "INVALID_VALUE", "sigma .*got -1"),
    ("bits_posterior", _set(0, "sigma.data", None), "NULL_POINTER", "sigma must not be NULL"),
    ("bits_step", _set(0, "sigma", _wide(1, 0, 1)), "INVALID_VALUE", "sigma .*got 0"),
    ("bits_step", _set(1, "sigma_next", _wide(1, INF, 1)), "INVALID_VALUE", "sigma_next .*got inf"),
    ("bits_step", _set(1, "gamma_next", _wide(1, -1, 1)), "INVALID_VALUE", "gamma_next .*got -1"),
    ("bits_step", _set(1, "noise_scale", _wide(1, NAN, 1)), "INVALID_VALUE", "noise_scale .*got nan"),
    ("bits_step", _set(1, "keys.data", None), "NULL_POINTER", "keys.data must not be NULL"),
    ("bits_perturb", _set(1, "", _wide(1, -1, 1)), "INVALID_VALUE", "spread .*got -1"),
    ("bits_loss", _set(2, "", 2), "INVALID_VALUE", r"kind must lie in \[0, 1\], got 2"),
    ("bits_loss", _set(1, "columns", 5), "INVALID_SHAPE", r"bits must be \(3, 6\), got \(3, 5\)"),
    (MAPS, _set(0, "columns", 1), "INVALID_SHAPE", "columns must be at least 2, got 1"),
    ("sphere_project", _set(1, "dtype", 1), "INVALID_DTYPE", "u->dtype must be that of the first argument"),
    ("sphere_rotate", _set(2, "rows", 2), "INVALID_SHAPE", r"target must be \(3, 6\), got \(2, 6\)"),
    ("sphere_slerp", _set(2, "", _numbers(0, INF, 1)), "INVALID_VALUE", "t must lie in .* got inf"),
    ("sphere_step", _set(3, "", 2), "INVALID_VALUE", r"retraction must lie in \[0, 1\], got 2"),
    ("sphere_correct", _set(2, "", _wide(1, -1, 1)), "INVALID_VALUE", "step_size .*got -1"),
    ("sphere_sample", _set(1, "", _wide(1, 1e39, 1)), "INVALID_VALUE", r"kappa .*got 1e\+39"),
    ("sphere_sample", _set(2, "", -1), "INVALID_VALUE", r"law must lie in \[0, 1\], got -1"),
    (
        "categorical_log_probs_backward",
        _set(0, "temperature", _numbers(1, 1, 1)),
        "INVALID_VALUE",
        "temperature must be none",
    ),
    *(
        (GRADIENTS, _set(-1, member, _one([0.0])), "INVALID_VALUE", f"logits_grad->{member} must be NULL")
        for member in ("weight", "bias")
    ),
    (GRADIENTS, _set(-1, "values", None), "NULL_POINTER", "logits_grad->values must not be NULL"),
    ("categorical_kl_backward", _set(6, "bias", _one([0.0])), "INVALID_VALUE", "q_grad->bias must be NULL"),
    (VELOCITIES, _set(1, "columns", 3), "INVALID_SHAPE", r"x must be \(3, 4\), got \(3, 3\)"),
    (VELOCITIES, _set(2, "rows", 5), "INVALID_SHAPE", "table->rows must be the vocabulary, 6, got 5"),
    (VELOCITIES, _set(3, "", _wide(1, NAN, 1)), "INVALID_VALUE", "kappa .*got nan"),
    (VELOCITIES, _set(3, "", _wide(1, 1e9, 1)), "INVALID_VALUE", r"kappa .*got 1e\+09"),
    ("sphere_largest", _set(1, "", 0), "INVALID_VALUE", r"count must lie in \[1, 6\], got 0"),
    ("sphere_largest", _set(1, "", 7), "INVALID_VALUE", r"count must lie in \[1, 6\], got 7"),
    ("sphere_slerp_backward", _set(0, "dtype", 1), "INVALID_DTYPE", "grad->dtype must be that of the first"),
    ("rng_fold_in", _set(2, "", -1), "INVALID_SHAPE", "count must be at least 0, got -1"),
    ("rng_fold_in", _set(1, "stride", -1), "INVALID_SHAPE", "data.stride must be at least 0, got -1"),
    ("rng_normal", _set(1, "", -1), "INVALID_SHAPE", "num_keys must be at least 0, got -1"),
    ("rng_normal", _set(2, "", 2**62), "INVALID_SHAPE", "out is too large for any memory"),
    ("rng_normal", _set(3, "", 1), "INVALID_DTYPE", "dtype must be DLCORE_FLOAT32 or DLCORE_FLOAT64, got 1"),
]

ATTENTION: list[tuple[str, Any, str, str]] = [
    ("dtype", 3, "INVALID_DTYPE", "dtype must be DLCORE_FLOAT32"),
    ("batch", -1, "INVALID_SHAPE", "batch must be at least 0, got -1"),
    ("rows", 2**31, "INVALID_SHAPE", "rows must lie in"),
    ("keys", -1, "INVALID_SHAPE", "keys must lie in"),
    ("heads", 3, "INVALID_SHAPE", "heads must be a multiple of kv_heads, 2, got 3"),
    ("kv_heads", 0, "INVALID_SHAPE", "kv_heads must be at least 1, got 0"),
    ("head_dim", 513, "INVALID_SHAPE", r"head_dim must lie in \[1, 512\], got 513"),
    ("value_dim", -1, "INVALID_SHAPE", r"value_dim must lie in \[0, 512\], got -1"),
    ("scale", NAN, "INVALID_VALUE", "scale .*got nan"),
    ("softcap", -1.0, "INVALID_VALUE", "softcap .*got -1"),
    ("q.data", None, "NULL_POINTER", "q.data must not be NULL"),
    ("k.row_stride", 7, "INVALID_SHAPE", "k.row_stride must be at least 8, got 7"),
    ("v.head_stride", -8, "INVALID_SHAPE", "v.head_stride must be at least 8, got -8"),
]
CASES += [
    (("attention_intervals", "attention_decode"), _set(0, path, value), status, message)
    for path, value, status, message in ATTENTION
]
_int32 = torch.int32
CASES += [
    (
        "attention_intervals",
        _set(1, "", _bounds() - 1),
        "INVALID_VALUE",
        r"starts must lie in \[0, 4\], got -1",
    ),
    (
        "attention_intervals",
        _set(2, "", _bounds() + 3),
        "INVALID_VALUE",
        r"stops must lie in \[0, 4\], got 5",
    ),
    ("attention_intervals", _set(1, "", _bounds() * 0), "INVALID_VALUE", "must not overlap"),
    ("attention_intervals", _set(3, "", 2), "INVALID_VALUE", "shared_bounds must lie in"),
    ("guidance_cfg_uniform_step", _set(0, "cond.dtype", 3), "INVALID_DTYPE", "cond.dtype must be"),
    ("guidance_cfg_uniform_step", _set(0, "uncond.columns", 5), "INVALID_SHAPE", "uncond"),
    ("guidance_cfg_uniform_step", _set(0, "z", None), "NULL_POINTER", "z must not be NULL"),
    (
        "guidance_cfg_uniform_step",
        _set(0, "z", _ids(0, 6, 0)),
        "INVALID_VALUE",
        r"z must lie in \[0, 6\)",
    ),
    ("guidance_cfg_uniform_step", _set(0, "exclude", _ids(6)), "INVALID_VALUE", "exclude must lie in"),
    ("guidance_cfg_uniform_step", _set(0, "coefficients.stride", 5), "INVALID_SHAPE", "at least 6, got 5"),
    (
        "guidance_cfg_uniform_step",
        _set(0, "coefficients.data", None),
        "NULL_POINTER",
        "coefficients must not",
    ),
    *(
        ("guidance_cfg_uniform_step", _coefficient(place, value), "INVALID_VALUE", f"coefficients: {name}")
        for place, name, value in (
            (0, "gamma", torch.inf),
            (1, "temperature", 0.0),
            (2, "shift", torch.nan),
            (3, "alpha_s", 1.5),
            (4, "bonus", torch.inf),
            (5, "keep", torch.nan),
        )
    ),
    ("guidance_cfg_uniform_step", _set(0, "threads", -1), "INVALID_VALUE", "threads must"),
    ("similarity_cosine", _set(0, "dtype", 3), "INVALID_DTYPE", "dtype must be DLCORE_FLOAT32, .*, got 3"),
    ("similarity_cosine", _set(0, "batch", -1), "INVALID_SHAPE", "batch must be at least 0, got -1"),
    ("similarity_cosine", _set(0, "rows", 2**60), "INVALID_SHAPE", "too large for any memory"),
    ("similarity_cosine", _set(0, "cached_rows", -1), "INVALID_SHAPE", "cached_rows must be at least 0"),
    ("similarity_cosine", _set(0, "columns", 0), "INVALID_SHAPE", "columns must be at least 1, got 0"),
    ("similarity_cosine", _set(0, "heads", 0), "INVALID_SHAPE", "heads must be at least 1, got 0"),
    ("similarity_cosine", _set(0, "fresh.data", None), "NULL_POINTER", "fresh.data must not be NULL"),
    ("similarity_cosine", _set(0, "cached.data", None), "NULL_POINTER", "cached.data must not be NULL"),
    ("similarity_cosine", _set(0, "fresh.row_stride", 3), "INVALID_SHAPE", "fresh.batch_stride must be"),
    ("similarity_cosine", _set(0, "page_table", _ids(9)), "INVALID_SHAPE", "page_size must be at least 1"),
    *(
        ("attention_decode", _set(1, path, value), status, message)
        for path, value, status, message in [
            ("keys", None, "NULL_POINTER", "cache->keys must not be NULL"),
            ("values", None, "NULL_POINTER", "cache->values must not be NULL"),
            ("lengths", None, "NULL_POINTER", "lengths must not be NULL"),
            ("lengths", _one([-1, 2], dtype=_int32), "INVALID_VALUE", "lengths must be at least 0, got -1"),
            ("lengths", _one([3, 7], dtype=_int32), "INVALID_VALUE", "cache is full: max_len is 10, 11 are"),
            ("num_commit", 5, "INVALID_VALUE", r"num_commit must lie in \[0, 4\], got 5"),
            ("window", -1, "INVALID_VALUE", "window must lie in"),
            ("window_by_row", 2, "INVALID_VALUE", "window_by_row must lie in"),
            ("shared_causal", 2, "INVALID_VALUE", "shared_causal must lie in"),
        ]
    ),
]
PAGED: list[tuple[str, Any, str, str]] = [
    (
        "page_table",
        _one([[0, 1, 2], [3, 4, 6]], dtype=_int32),
        "INVALID_VALUE",
        r"page_table .*\[0, 6\), got 6",
    ),
    ("page_size", 0, "INVALID_SHAPE", "page_size must be at least 1, got 0"),
    ("pages", 2, "INVALID_SHAPE", "max_len must be at most pages·page_size, 8, got 10"),
]
TABLE = [
    (name, change, status, message)
    for names, change, status, message in CASES
    for name in ([names] if isinstance(names, str) else names)
]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: f"{case[0]}: {case[3]}")
def test_bad_input(c: Library, case: tuple[str, Change, str, str]) -> None:
    name, change, status, message = case
    arguments = CALLS[name](c)
    change(c, arguments)
    _refused(c, name, arguments, status, message)


@pytest.mark.parametrize("wrong", PAGED, ids=lambda wrong: wrong[3])
def test_bad_pages(c: Library, wrong: tuple[str, Any, str, str]) -> None:
    path, value, status, message = wrong
    arguments = [_attention(c), _pages(c), _out(), _out()]
    c.attention_decode(*arguments)
    _set(1, path, value)(c, arguments)
    _refused(c, "attention_decode", arguments, status, message)


@pytest.mark.parametrize(
    ("path", "value", "status", "message"),
    [
        ("logits.weight.columns", 3, "INVALID_SHAPE", "weight.columns must be those of the values, 4, got 3"),
        ("logits.weight.dtype", 1, "INVALID_DTYPE", "weight.dtype must be that of the values, 0, got 1"),
        ("logits.weight.rows", 0, "INVALID_SHAPE", "weight.rows must be at least 1, got 0"),
        ("logits.weight.data", None, "NULL_POINTER", "weight.data must not be NULL"),
        ("index", _ids(0, 6, 0), "INVALID_VALUE", r"index must lie in \[0, 6\), got 6"),
    ],
)
def test_bad_heads(c: Library, path: str, value: Any, status: str, message: str) -> None:
    arguments = [_linear(c), _out(), _out()]
    c.categorical_stats(*arguments)
    _set(0, path, value)(c, arguments)
    _refused(c, "categorical_stats", arguments, status, message)


def test_exclude_leaves_a_token(c: Library) -> None:
    softmax = c.categorical(logits=c.logits(values=_matrix(c, 1)), exclude=_ids(0))
    _refused(c, "categorical_stats", [softmax, _out(), _out()], "INVALID_VALUE", "leaves no token")


def test_what_no_memory_holds_is_an_error(c: Library) -> None:
    arguments = [_softmax(c), _out(), _out()]
    arguments[0].logits.values.rows = 2**45
    arguments[0].logits.values.row_stride = 0
    arguments[0].index = arguments[0].shift.data = arguments[0].temperature.data = None
    _refused(c, "categorical_stats", arguments, "OUT_OF_MEMORY", "out of memory")


@calls
def test_no_rows_need_no_arrays(c: Library, name: str) -> None:
    if name == "choose_cpu_capability":
        return
    arguments = CALLS[name](c)
    for place, argument in enumerate(arguments):
        for matrix in _matrices(argument):
            if matrix.rows == ROWS:
                matrix.rows, matrix.data = 0, None
        if isinstance(argument, Tensor):
            arguments[place] = None
        elif type(argument).__name__ == "dlcore_attention":
            argument.rows = argument.keys = 0
            argument.q.data = None
        elif type(argument).__name__ == "dlcore_similarity":
            argument.rows = 0
            argument.fresh.data = None
    for place in {"rng_fold_in": [2], "bits_encode": [2]}.get(name, [1, 2] if name.startswith("rng") else []):
        arguments[place] = 0
    getattr(c, name)(*arguments)
