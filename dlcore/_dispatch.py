"""Which backend runs an op: use_backend(...) > DLCORE_BACKEND, as it was at import > priority."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

Implementation = Callable[..., Any]
Reasons = Callable[..., list[str]]

logger = logging.getLogger("dlcore")

#: Read at import: a look at the environment costs a small call 3% of its time.
_variable = os.environ.get("DLCORE_BACKEND")

#: Every backend, the preferred first.
PRIORITY = ("cpu", "triton", "cuda", "reference")

#: The backends that are tried unasked for tensors of a device, the preferred first; an op may have a
#: preference of its own for CUDA tensors.
AT_HOME = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

#: The op that serves each public function without one of its own name.
SERVED_BY = {
    "attention.block_causal": "attention.intervals",
    "attention.block_diffusion": "attention.intervals",
    "bits.churn": "bits.perturb",
    "bits.corrupt": "bits.perturb",
    "categorical.cross_entropy": "categorical.log_probs",
    "vmf.sample": "sphere.sample",
    "cauchy.sample": "sphere.sample",
    "sphere.posterior_score": "categorical.expectation",
    "uniform.step": "categorical.sample_mixture",
    "uniform.cross_entropy": "categorical.log_probs",
    "uniform.correct": "categorical.sample_mixture",
    "masked.step": "categorical.sample_mixture",
    "masked.nelbo": "categorical.log_probs",
    "absorbing_uniform.step": "categorical.sample_mixture",
    "absorbing_uniform.remask_step": "categorical.sample_mixture",
    "absorbing_uniform.nelbo": "categorical.log_probs",
}


class Preference(NamedTuple):
    """Which of two backends goes first, and what says so."""

    first: str
    then: str
    because: str

    def __str__(self) -> str:
        return f"{self.first} before {self.then}: {self.because}"


_implementations: dict[str, dict[str, tuple[Implementation, Reasons]]] = {}
_preferences: dict[str, Preference] = {}
_chosen: ContextVar[str | None] = ContextVar("dlcore_backend", default=None)
_last: dict[str, str] = {}
_logged: set[tuple[str, str]] = set()


def implement(op: str, backend: str, function: Implementation, reasons: Reasons) -> None:
    """Stand `function` behind `op`; `reasons(*args)` lists why it cannot take these arguments."""
    _implementations.setdefault(op, {})[backend] = (function, reasons)


def prefer(op: str, preference: Preference) -> None:
    """Say which kernels run `op` on CUDA tensors unasked, where it has both kinds."""
    _preferences[op] = preference


def ops() -> list[str]:
    """The names of all ops."""
    return sorted(_implementations)


def _known(backend: str, source: str) -> str:
    if backend not in PRIORITY:
        raise ValueError(f"{source}: backend must be one of {', '.join(PRIORITY)}, got {backend!r}")
    return backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op on backend `name` inside the block; an op that cannot raises NotImplementedError.

    The choice belongs to the context (contextvars): a thread that starts inside the block begins without it
    and makes its own, a task of asyncio keeps it. A gradient is computed on the backend that was asked for
    around its forward pass, in whichever thread autograd runs it; if none was, on the one that is around the
    backward pass. A graph of torch.compile asks whenever it runs, forward and backward each anew, and
    autograd runs backward passes of CUDA tensors in threads of its own, which see no block: for these, set
    DLCORE_BACKEND.

    Raises:
        ValueError: no such backend.

    Example:
        >>> import torch, dlcore
        >>> with dlcore.use_backend("reference"):
        ...     _ = dlcore.categorical.stats(torch.zeros(2, 5))
        >>> dlcore.last_backend("categorical.stats")
        'reference'
    """
    token = _chosen.set(_known(name, "dlcore.use_backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def asked_for() -> str | None:
    """What use_backend says here, or None; None while tracing, as a graph asks whenever it runs."""
    return None if torch.compiler.is_compiling() else _chosen.get()


def _requested() -> str | None:
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    return _known(_variable, "DLCORE_BACKEND") if _variable else None


def _refusals(op: str, args: tuple[Any, ...]) -> dict[str, list[str]]:
    table = _implementations[op]
    return {b: table[b][1](*args) if b in table else ["not written for this op"] for b in PRIORITY}


def _summary(args: tuple[Any, ...]) -> str:
    shown = (f"{a.dtype} {tuple(a.shape)} on {a.device}" for a in args if isinstance(a, Tensor))
    return "; ".join(shown)


def _report(op: str, args: tuple[Any, ...]) -> str:
    lines = [f"{op}({_summary(args)})"]
    for backend, reasons in _refusals(op, args).items():
        lines.append(f"  {backend}: " + ("can run" if not reasons else "; ".join(reasons)))
    if args and args[0].is_cuda and op in _preferences:
        lines.append(f"  {_preferences[op]}")
    return "\n".join(lines)


def _at_home(op: str, x: Tensor) -> tuple[str, ...]:
    """The backends that are tried unasked, the preferred first."""
    # What a small call pays for is_cpu is half of what it pays for device.type.
    if x.is_cpu:
        return AT_HOME["cpu"]
    if x.is_cuda and op in _preferences:
        return (_preferences[op].first, _preferences[op].then, "reference")
    return AT_HOME.get(x.device.type, ("reference",))


def choose(op: str, args: tuple[Any, ...]) -> str:
    """The backend that takes these arguments; raises NotImplementedError with every backend's reasons."""
    table, requested = _implementations[op], _requested()
    candidates = (requested,) if requested is not None else _at_home(op, args[0])
    for backend in candidates:
        entry = table.get(backend)
        if entry is None:
            continue
        reasons = entry[1](*args)
        if not reasons:
            return backend
        if requested is None and (op, backend) not in _logged:
            _logged.add((op, backend))
            logger.info("%s: %s cannot run (%s); falling back", op, backend, "; ".join(reasons))
    wanted = "no backend can" if requested is None else f"backend {requested!r} was asked for and cannot"
    raise NotImplementedError(f"{wanted} run\n{_report(op, args)}")


def run(op: str, *args: Any) -> Any:
    """Call the chosen backend's implementation."""
    backend = choose(op, args)
    _last[op] = backend
    return _implementations[op][backend][0](*args)


def last_backend(op: str) -> str | None:
    """The backend that last ran `op` ("categorical.sample"), or None. ValueError for an unknown op."""
    return _last.get(known_op(op))


def known_op(op: str) -> str:
    """`op` itself if it exists, else ValueError with the op that serves it or the known names."""
    if op in SERVED_BY:
        raise ValueError(f"dlcore: {op} has no op of its own, ask for {SERVED_BY[op]}, which serves it")
    if op not in _implementations:
        known = ", ".join(name for name in ops() if not name.endswith("_backward"))
        raise ValueError(f"dlcore: op must be one of {known}, got {op!r}")
    return op


def backends(op: str | None = None) -> dict[str, list[str]] | list[str]:
    """The backends that exist, or, for one op, each backend with the reasons why it can run nothing here.

    Example:
        >>> import dlcore
        >>> dlcore.backends()
        ['cpu', 'triton', 'cuda', 'reference']
    """
    if op is None:
        return list(PRIORITY)
    return _refusals(known_op(op), ())


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Which backend would run `op` on these arguments, and why the others would not.

    Of CUDA tensors also why one kind of kernels goes before the other, where the op has both.

    Example:
        >>> import torch, dlcore
        >>> x = torch.zeros(2, 5, dtype=torch.float64)
        >>> print(dlcore.explain("categorical.stats", x))  # doctest: +ELLIPSIS
        categorical.stats(torch.float64 (2, 5) on cpu)
          cpu: takes float32, bfloat16, float16, got float64
          triton: takes ..., got float64
          cuda: ...
          reference: can run
          chosen: reference
    """
    name = known_op(op).replace(".", "_")
    places = [a.name for a in getattr(torch.ops.dlcore, name).default._schema.arguments]
    # As the op takes them: the first tensor, the logits or the key, decides.
    named = sorted(kwargs, key=lambda n: places.index(n) if n in places else len(places))
    values = [*args, *(kwargs[n] for n in named)]
    tensors = tuple(t for v in values for t in (v, getattr(v, "hidden", None), getattr(v, "weight", None)))
    tensors = tuple(t for t in tensors if isinstance(t, Tensor))
    report = _report(op, tensors)
    try:
        return f"{report}\n  chosen: {choose(op, tensors)}"
    except NotImplementedError:
        return f"{report}\n  chosen: none, the call would raise NotImplementedError"
