"""What the CUDA functions of the C library refuse, their kernels on the host: by status and by message."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from c_arguments import KEY, MAPS, ROWS, between_margins, index_of, margins_kept
from c_library import CError, Library
from torch import Tensor

pytestmark = pytest.mark.slow

VOCAB = 301
INDEX = index_of(torch.empty(ROWS, VOCAB))


@pytest.fixture(autouse=True)
def margins() -> Iterator[None]:
    with margins_kept():
        yield


def _out() -> Tensor:
    """Results, or a workspace."""
    return between_margins(8 * ROWS * VOCAB).view(torch.float64).zero_()


def _matrix(c: Library, columns: int = VOCAB) -> Any:
    return c.matrix_of(torch.zeros(ROWS, columns))


def _softmax(c: Library, **members: Any) -> Any:
    return c.categorical(**{"logits": c.logits(values=_matrix(c)), "index": INDEX, **members})


def _mixture(c: Library) -> Any:
    return c.mixture(keys=c.keys_of(KEY), coefficients=c.doubles(data=torch.ones(6).double()))


def _state(c: Library) -> Any:
    return c.bits(x=_matrix(c), residual=_matrix(c), sigma=c.doubles_of(0.5))


def _grad(c: Library) -> Any:
    return c.logits_grad(values=_out())


def _guided(c: Library) -> Any:
    given = {"cond": _matrix(c), "uncond": _matrix(c), "z": INDEX, "keys": c.keys_of(KEY)}
    return c.guided_step(**given, coefficients=c.doubles(data=torch.ones(6).double()))


#: A call of every function that is taken.
CALLS: dict[str, Callable[[Library], list[Any]]] = {
    "rng_fold_in": lambda c: [c.keys_of(KEY), c.ints(data=INDEX, stride=1), ROWS, _out(), 0],
    **{
        f"rng_{name}": lambda c: [KEY, 1, 5, c.FLOAT32, _out(), 0] for name in ("uniform", "normal", "gumbel")
    },
    "categorical_workspace": lambda c: [_softmax(c), c.sampling(), _out()],
    "categorical_stats": lambda c: [_softmax(c), _out(), _out(), _out(), 0],
    "categorical_summary": lambda c: [_softmax(c), c.part(first=256), _out(), _out(), _out(), 0],
    "categorical_sample": lambda c: [
        *(_softmax(c), c.sampling(keys=c.keys_of(KEY)), _out(), _out(), _out(), 0)
    ],
    "categorical_sample_mixture": lambda c: [_softmax(c), _mixture(c), _out(), _out(), 0],
    "categorical_log_probs": lambda c: [_softmax(c), INDEX, _out(), _out(), 0],
    "categorical_log_probs_backward": lambda c: [_softmax(c), INDEX, _out(), _out(), _grad(c), 0],
    "categorical_kl_workspace": lambda c: [c.logits(values=_matrix(c)), _out()],
    "categorical_kl": lambda c: [
        *(c.logits(values=_matrix(c)), c.logits(values=_matrix(c)), c.floats(), _out(), _out(), 0)
    ],
    "categorical_kl_backward": lambda c: [
        *(c.logits(values=_matrix(c)), c.logits(values=_matrix(c)), c.floats()),
        *(_out(), _out(), _grad(c), _grad(c), 0),
    ],
    "uniform_nelbo": lambda c: [
        *(_softmax(c), INDEX, c.doubles_of(0.5), c.doubles_of(-1.0)),
        *(_out(), _out(), _out(), 0),
    ],
    "uniform_nelbo_backward": lambda c: [
        *(_softmax(c), INDEX, c.doubles_of(0.5), c.doubles_of(-1.0)),
        *(_out(), _out(), _grad(c), 0),
    ],
    "guidance_workspace": lambda c: [_matrix(c), _out()],
    "guidance_cfg_uniform_step": lambda c: [_guided(c), _out(), _out(), 0],
    "bits_workspace": lambda c: [_matrix(c), _out()],
    "bits_encode": lambda c: [c.bit_code(width=9), INDEX, ROWS, _out(), 0],
    "bits_decode": lambda c: [c.bit_code(width=9), _matrix(c, 9), 0, _out(), 0],
    "bits_matched_filter": lambda c: [c.bits(x=_matrix(c), sigma=c.doubles_of(0.5)), _out(), _out(), 0],
    "bits_posterior": lambda c: [_state(c), _out(), _out(), 0],
    "bits_step": lambda c: [
        *(_state(c), c.bits_update(sigma_next=c.doubles_of(0.2)), _out(), _out(), _out(), 0)
    ],
    "bits_perturb": lambda c: [_matrix(c), c.doubles_of(0.5), c.keys_of(KEY), _out(), _out(), 0],
    "bits_loss": lambda c: [_state(c), _matrix(c), 0, _out(), _out(), 0],
    "bits_loss_backward": lambda c: [_state(c), _matrix(c), 0, _out(), _out(), _out(), _out(), 0],
    **{
        f"sphere_{name}": lambda c, name=name: [
            *(_matrix(c) for _ in range(MAPS[name])),
            *([c.row_numbers(0.5)] if name == "slerp" else []),
            *(_out(), 0),
        ]
        for name in MAPS
    },
    **{
        f"sphere_{name}_backward": lambda c, name=name: [
            _out() if name == "angle" else _matrix(c),
            *(_matrix(c) for _ in range(MAPS[name])),
            *([c.row_numbers(0.5)] if name == "slerp" else []),
            *(_out() for _ in range(MAPS[name] + (name == "slerp"))),
            0,
        ]
        for name in MAPS
    },
    "sphere_step": lambda c: [_matrix(c), _matrix(c), c.row_numbers(0.5), 0, _out(), 0],
    "sphere_correct": lambda c: [_matrix(c), _matrix(c), c.doubles_of(0.5), c.keys_of(KEY), _out(), 0],
    "sphere_correct_backward": lambda c: [
        *(_matrix(c), _matrix(c), _matrix(c), c.doubles_of(0.5), c.keys_of(KEY)),
        *(_out(), _out(), _out(), 0),
    ],
    "sphere_sample": lambda c: [_matrix(c), c.doubles_of(0.5), 0, c.keys_of(KEY), _out(), 0],
}
calls = pytest.mark.parametrize("name", CALLS)

#: Arguments that may be NULL: by function, and by place.
OPTIONAL = {
    ("categorical_workspace", 1),
    ("uniform_nelbo", 5),
    ("bits_loss_backward", 5),
    *(
        (f"sphere_{name}_backward", 1 + n + (name == "slerp") + i)
        for name, n in MAPS.items()
        for i in range(n + 1)
    ),
}


def test_every_function_is_here(cuda_c: Library) -> None:
    known = {f"dlcore_cuda_{name}" for name in CALLS}
    assert known == {name for name in cuda_c.functions if name.startswith("dlcore_cuda_")}


def _refused(c: Library, name: str, arguments: list[Any], status: str, message: str) -> None:
    """Before anything is queued."""
    arrays = [x for x in arguments if isinstance(x, Tensor)]
    before = [x.clone() for x in arrays]
    with pytest.raises(CError, match=f"dlcore_cuda_{name}: {message}") as error:
        getattr(c, f"cuda_{name}")(*arguments)
    assert error.value.status == status
    assert all(torch.equal(x, y) for x, y in zip(arrays, before, strict=True))


@calls
def test_null_is_refused_wherever_it_is_not_a_default(cuda_c: Library, name: str) -> None:
    c = cuda_c
    for place, value in enumerate(CALLS[name](c)):
        arguments = CALLS[name](c)
        if isinstance(value, int) or (name, place) in OPTIONAL:
            continue
        by_value = type(value).__name__ in ("dlcore_floats", "dlcore_doubles", "dlcore_ints", "dlcore_keys")
        if by_value and name.startswith("categorical_kl"):
            continue
        if by_value:
            arguments[place].data = None
        else:
            arguments[place] = None
        _refused(c, name, arguments, "NULL_POINTER", ".* must not be NULL")


@calls
def test_no_rows_need_no_arrays(cuda_c: Library, name: str) -> None:
    c = cuda_c
    arguments = CALLS[name](c)
    for place, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and not name.endswith("workspace"):
            arguments[place] = None
        elif isinstance(argument, ctypes.Structure):
            _empty_matrices(argument)
    counts = {"bits_encode": 2, "rng_fold_in": 2}.get(name, 1 if name.startswith("rng") else None)
    if counts is not None:
        arguments[counts] = 0
    getattr(c, f"cuda_{name}")(*arguments)


def _empty_matrices(struct: Any) -> None:
    for name, _ in struct._fields_:
        member = getattr(struct, name)
        if name == "rows":
            struct.rows, struct.data = 0, None
        elif isinstance(member, ctypes.Structure):
            _empty_matrices(member)


@pytest.mark.parametrize("name", [n for n in CALLS if n.startswith(("categorical", "uniform"))])
def test_what_devices_do_not_take(cuda_c: Library, name: str) -> None:
    c, arguments = cuda_c, CALLS[name](cuda_c)
    kl = "kl" in name
    for part, value in (("weight", _matrix(c)), ("bias", _out())):
        head = c.logits(values=_matrix(c), **{part: value})
        arguments[0] = head if kl else _softmax(c, logits=head)
        _refused(c, name, arguments, "UNSUPPORTED", f".*{part} must be none on CUDA")
    if name.endswith("backward"):
        arguments = CALLS[name](c)
        place = next(i for i, a in enumerate(arguments) if type(a).__name__ == "dlcore_logits_grad")
        arguments[place] = c.logits_grad(values=_out(), bias=_out())
        _refused(c, name, arguments, "UNSUPPORTED", ".*bias must be NULL on CUDA")
    if kl:
        return
    # A part of a vocabulary may exclude a token that is elsewhere.
    outside = -1 if name in ("categorical_workspace", "categorical_summary") else VOCAB
    for members, message in (
        ({"softcap": -1.0}, "softcap must lie in"),
        ({"exclude": torch.tensor(outside)}, "exclude must lie in"),
    ):
        arguments = CALLS[name](c)
        arguments[0] = _softmax(c, **members)
        _refused(c, name, arguments, "INVALID_VALUE", message)


#: Functions whose workspace comes last but for the stream.
WITH_WORKSPACE = [
    *(f"categorical_{name}" for name in ("stats", "summary", "sample", "sample_mixture", "log_probs", "kl")),
    *(f"bits_{name}" for name in ("matched_filter", "posterior", "step", "perturb", "loss", "loss_backward")),
    "uniform_nelbo",
    "guidance_cfg_uniform_step",
]


@pytest.mark.parametrize("name", WITH_WORKSPACE)
def test_a_workspace_is_aligned(cuda_c: Library, name: str) -> None:
    arguments = CALLS[name](cuda_c)
    arguments[-2] = arguments[-2][1:]
    message = "workspace must be aligned to 256 bytes, got 8 beyond"
    _refused(cuda_c, name, arguments, "INVALID_VALUE", message)


def test_nelbo_needs_its_tokens(cuda_c: Library) -> None:
    arguments = CALLS["uniform_nelbo"](cuda_c)
    arguments[0] = _softmax(cuda_c, index=None)
    _refused(cuda_c, "uniform_nelbo", arguments, "NULL_POINTER", "index must not be NULL")


def test_a_corrector_of_long_rows_has_no_gradient(cuda_c: Library) -> None:
    c, x = cuda_c, torch.zeros(ROWS, 4097)
    vectors, out = [c.matrix_of(x)] * 3, torch.zeros(ROWS, 4097)
    step, keys = c.doubles_of(0.1), c.keys_of(KEY)
    with pytest.raises(CError, match="x->columns must be at most 4096, got 4097") as error:
        c.cuda_sphere_correct_backward(*vectors, step, keys, out, out, out, None)
    assert error.value.status == "UNSUPPORTED"
