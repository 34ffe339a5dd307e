"""Exact laws by enumeration, and the statistics that compare draws with them: shared by the process tests."""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch._dynamo.testing
from goodness import chi_square
from scipy.stats import chi2
from torch import Tensor

import dlcore

#: A joint law of two tokens over three symbols, and its entropy in nats.
JOINT = torch.tensor([[6, 1, 1], [1, 4, 2], [0, 3, 2]], dtype=torch.float64) / 20
ENTROPY = 1.8775242811493909
V = 3

_COMPILED = not dlcore.backends("categorical.sample_mixture")["cpu"]
#: Rows of a statistical test: what the reference draws in seconds, and more where a kernel draws.
ROWS = int(os.environ.get("DLCORE_TEST_ROWS", 200_000 if _COMPILED else 5_000))
#: A test that holds fails by chance once in ten thousand seeds; the seeds are fixed.
MIN_P = 1e-4


class Posteriors(NamedTuple):
    """Of every pair of observations (S, S): its mass, and per position l the two laws of x_l (S, S, 2, V)."""

    mass: Tensor
    loo: Tensor
    denoiser: Tensor
    joint: Tensor
    """q(x_1, x_2, o_1, o_2): (V, V, S, S)."""


def uniform_kernel(alpha: float, vocab: int = V) -> Tensor:
    """q(z | x) as (V, V)."""
    return alpha * torch.eye(vocab, dtype=torch.float64) + (1 - alpha) / vocab


def mask_kernel(alpha: float) -> Tensor:
    """q(z | x) as (V, V + 1), the mask last."""
    eye = torch.eye(V, dtype=torch.float64)
    return torch.cat([alpha * eye, torch.full((V, 1), 1 - alpha, dtype=torch.float64)], -1)


def absorbing_kernel(alpha: float, vocab: int = V) -> Tensor:
    """q(z, u | x) as (V, V·V), entry z·V + u."""
    eye = torch.eye(vocab, dtype=torch.float64)
    return ((alpha * eye.unsqueeze(-1) + (1 - alpha) * eye) / vocab).flatten(1)


def posteriors(kernel: Tensor) -> Posteriors:
    """Bayes, by summing the joint of clean and observed tokens."""
    joint = torch.einsum("ab,ai,bj->abij", JOINT, kernel, kernel)
    mass = joint.sum((0, 1))
    first, second = joint.sum(1).permute(1, 2, 0), joint.sum(0).permute(1, 2, 0)
    denoiser = torch.stack([first, second], 2) / mass[..., None, None]
    # Leave one out: the other token's observation alone.
    given_second = torch.einsum("ab,bj->ja", JOINT, kernel).unsqueeze(0).expand_as(first)
    given_first = torch.einsum("ab,ai->ib", JOINT, kernel).unsqueeze(1).expand_as(second)
    loo = torch.stack([given_second, given_first], 2)
    return Posteriors(mass, loo / loo.sum(-1, keepdim=True), denoiser, joint)


def pairs(size: int) -> Tensor:
    """All observation pairs (size, size, 2)."""
    grid = torch.arange(size)
    return torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)


def bridge_given_clean(alpha_t: float, alpha_s: float, vocab: int) -> Tensor:
    """q(z_s = y | z_t = z, x) by Bayes from the two forward kernels: (x, z, y)."""
    late = uniform_kernel(1.0 if alpha_s == 0 else alpha_t / alpha_s, vocab)
    joint = torch.einsum("xy,yz->xzy", uniform_kernel(alpha_s, vocab), late)
    return joint / joint.sum(-1, keepdim=True)


def point(z: Tensor, vocab: int) -> Tensor:
    """The law that is all at z, (..., vocab) float64."""
    return torch.nn.functional.one_hot(z, vocab).double()


def law(shape: int | tuple[int, ...], seed: int, zeros: bool = False) -> Tensor:
    """Random distributions over the last dimension, float64."""
    weight = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) ** 2 + 0.05
    if zeros:
        weight[..., 0] = 0
    return weight / weight.sum(-1, keepdim=True)


def fits(drawn: Tensor, expected: Tensor) -> bool:
    """χ² of tokens (N,) against one law (V,); nothing of probability 0 may be drawn."""
    return chi_square(drawn, expected) > MIN_P


def fits_given(given: Tensor, drawn: Tensor, expected: Tensor) -> bool:
    """χ² of tokens (N,) against a law (S, V) per condition (N,), pooled."""
    states, vocab = expected.shape
    if bool((drawn < 0).any()) or bool((drawn >= vocab).any()):
        return False
    counts = torch.bincount(given.flatten() * vocab + drawn.flatten(), minlength=states * vocab).double()
    counts = counts.view(states, vocab)
    wanted = expected * counts.sum(-1, keepdim=True)
    possible = expected > 1e-12
    if bool((counts[~possible] > 0).any()):
        return False
    seen = counts.sum(-1) > 0
    statistic = ((counts - wanted) ** 2 / wanted)[possible & seen.unsqueeze(-1)].sum()
    freedom = int((possible.sum(-1) - 1)[seen].sum())
    return freedom == 0 or bool(chi2.sf(float(statistic), freedom) > MIN_P)


def quadrature(count: int = 64) -> tuple[Tensor, Tensor]:
    """Nodes t in (0, 1) and weights, dense towards 0, where the integrands have a logarithm."""
    from numpy.polynomial.legendre import leggauss

    nodes, weights = (torch.from_numpy(a) for a in leggauss(count))
    s = (nodes + 1) / 2
    return s**3, weights / 2 * 3 * s**2


def check_compiled(function: Callable[..., tuple[Tensor, ...]], calls: Sequence[tuple[Tensor, ...]]) -> None:
    """One graph without breaks that agrees with eager, and that no later call compiles again."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    first = None
    for arguments in calls:
        for got, wanted in zip(compiled(*arguments), function(*arguments), strict=True):
            torch.testing.assert_close(got, wanted)
        # The first call may trace twice: that is dynamo's own restart.
        first = first or counter.frame_count
    assert counter.frame_count == first
