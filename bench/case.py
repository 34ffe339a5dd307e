"""What a benchmark is: an op, a shape, and for every provider a function of the same inputs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
Function = Callable[..., Any]

#: For names on the command line.
ASCII = str.maketrans({"×": "x", "α": "a", "ψ": "psi", "κ": "kappa"})
#: Rows of the result that are compared with torch in float64.
COMPARED = 4
#: Providers that torch compiles, too slow for smoke tests.
COMPILED = ("compile", "flex_attention")


@dataclass(frozen=True)
class Work:
    """Inputs, and what is done to them.

    Args:
        inputs: every provider's arguments; reading the first one once is the unit of "reads".
        functions: provider -> function of the inputs; "compile" is made of "eager".
        check: raises AssertionError unless it likes (result, *inputs).
        bytes: the least traffic of the op; 0 where the time is not one of memory.
        flops: of its matrix products.
        pairs: of queries and keys that they see, over all heads and sequences, if it is an attention.
        differentiate: how many of the inputs, from the first on, get gradients.
        prepare: runs before every timed call, itself untimed.
        own: provider -> its arguments where it likes another layout than `inputs`.
        unlike: providers that compute something else, there for scale; their results are not checked.
    """

    inputs: tuple[Tensor, ...]
    functions: dict[str, Function]
    check: Callable[..., None]
    bytes: int
    flops: int = 0
    differentiate: int = 0
    prepare: dict[str, Callable[[], None]] = field(default_factory=dict)
    own: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    unlike: tuple[str, ...] = ()
    pairs: int = 0

    def call(self, provider: str) -> Callable[[], Any]:
        """What is timed."""
        function = self.functions["eager" if provider == "compile" else provider]
        if provider == "compile":
            torch.compiler.reset()
            function = torch.compile(function, dynamic=False)
        if self.differentiate:
            return lambda: self._with_gradients(function)
        inputs = self.own.get(provider, self.inputs)
        return lambda: function(*inputs)

    def _with_gradients(self, function: Function) -> tuple[Tensor, ...]:
        wanted = [x.requires_grad_() for x in self.inputs[: self.differentiate]]
        rows = function(*self.inputs)
        return (rows.detach(), *torch.autograd.grad(rows.sum(), wanted))


@dataclass(frozen=True)
class Case:
    """A group of benchmarks: `build` makes its work for a shape, or for the `tiny` one of a smoke test."""

    op: str
    shape: Shape
    tiny: Shape
    build: Callable[[Shape], Work]
    note: str = ""
    kernel: str = ""
    providers: tuple[str, ...] = ("dlcore", "eager", "compile")

    @property
    def group(self) -> str:
        """Its name in tables."""
        return " ".join(filter(None, (self.op, "×".join(map(str, self.shape)), self.note)))


def rows(cases: tuple[Case, ...]) -> list[tuple[Case, str]]:
    """Every case with each of its providers."""
    return [(case, provider) for case in cases for provider in case.providers]


def name(value: Case | str) -> str:
    """The id of a case or a provider in pytest's names."""
    text = value if isinstance(value, str) else value.group
    return re.sub(r"[^\w.=]+", "-", text.translate(ASCII)).strip("-")


def normal(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_tokens(shape: Shape, vocab: int, seed: int = 1) -> Tensor:
    """Uniform tokens, the same in every run."""
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def nbytes(*tensors: Tensor) -> int:
    """The size of tensors in memory."""
    return sum(x.numel() * x.element_size() for x in tensors)


def tokens_in_range(result: Tensor, logits: Tensor, *_: Tensor) -> None:
    """One token of the vocabulary per row."""
    assert result.dtype == torch.int64
    assert result.shape == logits.shape[:-1]
    assert int(result.min()) >= 0
    assert int(result.max()) < logits.shape[-1]


def close(got: Tensor, want: Tensor, share: float = 2e-3) -> None:
    """Equal up to a share of the largest entry: posteriors are too small for absolute tolerances."""
    assert bool(got.isfinite().all())
    error = float((got.double() - want.double()).abs().max())
    assert error <= share * float(want.abs().max()) + 1e-12, error


def rows_agree(function: Function, differentiated: int = 0) -> Callable[..., None]:
    """A check that the first rows, and their gradients, are those of `function` in float64."""

    def check(result: Any, *inputs: Tensor) -> None:
        got = result if isinstance(result, tuple) else (result,)
        few = tuple(_first_rows(x, inputs[0].dim() - 1) for x in inputs)
        with torch.enable_grad():
            leaves = [x.requires_grad_() for x in few[:differentiated]]
            want = function(*few)
            want = want if isinstance(want, tuple) else (want,)
            if differentiated:
                want = (*want, *torch.autograd.grad(want[0].sum(), leaves))
        for a, b in zip(got, want, strict=True):
            assert bool(a.detach().isfinite().all())
            close(_first_rows(a, inputs[0].dim() - 1), b.detach())

    return check


def _first_rows(x: Tensor, lead: int) -> Tensor:
    """The first rows of a tensor with `lead` leading dimensions, in float64 if it is floating."""
    few = x.detach().reshape(-1, *x.shape[lead:])[:COMPARED]
    return few.double() if few.is_floating_point() else few
