"""Moves at one noise level: the informed corrector and its neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import categorical, rng
from dlcore.process import _rows as rows
from dlcore.process import unmask
from dlcore.process.uniform import _terms as terms
from dlcore.process.uniform import conversions
from dlcore.process.uniform._terms import Logits

SCORES = ("margin", "current", "max", "random")


def _selection_score(score: str, numbers: Tensor, at_argmax: Tensor, alpha: Tensor, size: int) -> Tensor:
    """How ill a token fits its conditional π = α·p + (1-α)/V, in nats."""

    def log_pi(log_p: Tensor) -> Tensor:
        return rows.logaddexp(alpha.log() + log_p.double(), torch.log1p(-alpha) - math.log(size))

    _, top, _, _, at, runner_up = numbers.unbind(0)
    if score == "current":
        return -log_pi(at)
    if score == "max":
        return -log_pi(top)
    return log_pi(torch.where(at_argmax, runner_up, top)) - log_pi(at)


def correct(
    logits: Logits,
    z: Tensor,
    alpha: float | Tensor,
    num_positions: int | Tensor,
    *,
    score: str = "margin",
    tau: float | Tensor = 1.0,
    parameterization: str = "loo",
    temperature: float | Tensor = 1.0,
    exclude: int | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Informed corrector at one noise level: choose positions, redraw them from π(y) = α·p(y) + (1-α)/V.

    π is the exact conditional of the noisy token given the others, so redrawing one position, chosen at
    random, leaves the noisy law invariant; choosing by score, or several at once, does so approximately.
    Positions are chosen without replacement, by Gumbel-top-k on score/tau.

    Args:
        logits: (B, L, V) at z.
        z: (B, L) int64 observed tokens.
        alpha: in [0, 1], broadcast to z.shape. Clean positions (alpha = 1, a prompt) are never chosen.
        num_positions: how many per sequence, an int or (B,); sequences with fewer noisy positions redraw all.
        score: "margin" = max_{y≠z} log π(y) - log π(z), "current" = -log π(z), "max" = -max log π, or
            "random".
        tau: positive; lower chooses more greedily. Broadcast to z.shape, as alpha.
        parameterization, exclude, key: as in `step`.
        temperature: as in `step`, but positive; the law is invariant at 1 only.

    Returns:
        (B, L) int64.

    Raises:
        TypeError: dtypes. ValueError: z is not (B, L), other shapes, ids, levels, score, tau, temperature.

    Source:
        arXiv 2605.22765, predictor-corrector sampling.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import uniform
        >>> z = torch.randint(1000, (2, 8))
        >>> moved = uniform.correct(torch.randn(2, 8, 1000), z, 0.5, 3, key=dlcore.rng.key(7)) != z
        >>> bool((moved.sum(-1) <= 3).all())
        True
    """
    op = "uniform.correct"
    size = terms.observed(op, logits, z, exclude)
    checks.option(op, "parameterization", parameterization, rows.PARAMETERIZATIONS)
    checks.option(op, "score", score, SCORES)
    checks.sequences(op, "z", z)
    a = rows.level(op, "alpha", alpha, z.shape, z.device)
    greed = rows.positive(op, "tau", tau, z.shape, z.device)
    rows.positive(op, "temperature", temperature, z.shape, z.device)
    keys = rows.row_keys(op, key, generator, z.shape, z.device, logits)
    shift = terms.shift(parameterization, a, size)
    priority = rng.gumbel(keys, (), dtype=torch.float64)
    if score != "random":
        argmax, numbers = categorical.row_numbers(op, logits, z, shift, temperature, None, exclude)
        priority = priority + _selection_score(score, numbers, argmax == z, a, size) / greed
    chosen = unmask.largest(op, "num_positions", num_positions, priority, (a < 1).expand(z.shape))
    redraw = rows.coefficients(1.0, 0.0, 0.0, 0.0, a, 0.0, keep=~chosen)
    return categorical.sample_mixture(
        logits, z, redraw, shift=shift, temperature=temperature, exclude=exclude, key=keys
    )


def confidence_step(
    logits: Logits,
    z: Tensor,
    alpha: float | Tensor,
    num_positions: int | Tensor,
    *,
    parameterization: str = "loo",
    exclude: int | None = None,
) -> Tensor:
    """Greedy refinement: the positions that the denoiser would change most surely take its argmax.

    Ranked by log max D - log D(z), the denoiser's gain; a position that already holds the argmax gains 0 and
    stays. For `steps` steps over L positions the field takes num_positions = ceil(L/steps). Nothing is drawn.

    Args:
        logits: (B, L, V) at z.
        z: (B, L) int64 observed tokens.
        alpha: in [0, 1], broadcast to z.shape; "denoiser" logits need no conversion and only have it checked.
            Clean positions (alpha = 1) are never chosen.
        num_positions: how many per sequence, an int or (B,); ties go to the lowest position.
        parameterization, exclude: as in `step`.

    Returns:
        (B, L) int64; -1 where a chosen row is broken.

    Raises:
        TypeError: dtypes. ValueError: z is not (B, L), other shapes, ids, levels.

    Source:
        arXiv 2605.22765, confidence-based sampling.

    Example:
        >>> import torch
        >>> from dlcore.process import uniform
        >>> logits = torch.tensor([[[0.0, 3.0], [0.0, 1.0], [5.0, 0.0]]])
        >>> uniform.confidence_step(logits, torch.zeros(1, 3, dtype=torch.int64), 0.1, 1)
        tensor([[1, 0, 0]])
    """
    op = "uniform.confidence_step"
    size = terms.observed(op, logits, z, exclude)
    checks.option(op, "parameterization", parameterization, rows.PARAMETERIZATIONS)
    checks.sequences(op, "z", z)
    a = rows.level(op, "alpha", alpha, z.shape, z.device)
    seen = terms.lift(a, size) if parameterization == "loo" else None
    argmax, numbers = categorical.row_numbers(op, logits, z, seen, 1.0, None, exclude)
    gain = numbers[1] - numbers[4]
    chosen = unmask.largest(op, "num_positions", num_positions, gain, (a < 1).expand(z.shape))
    return torch.where(chosen, argmax, z)


def loo_probe(
    model: Callable[[Tensor], Logits],
    z: Tensor,
    alpha: float | Tensor,
    *,
    positions: Tensor | None = None,
    parameterization: str = "loo",
    exclude: int | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """How far a network is from a leave-one-out one: total variation of p_l when z_l alone changes.

    One position l per sequence takes another token, uniform among the others, and the network is called
    again. A leave-one-out posterior has not seen z_l, so the distance is 0 for the exact one.

    Args:
        model: (B, L) tokens -> (B, L, V) logits; called twice.
        z: (B, L) int64 observed tokens.
        alpha: in [0, 1), broadcast to z.shape; it converts "denoiser" logits, and "loo" ones only have it
            checked.
        positions: (B,) int64, the l of each sequence; drawn uniformly if None.
        parameterization, exclude: as in `step`.
        key: int64 (2,) or one per sequence (B, 2), see `dlcore.rng`; else from `generator` or torch's own.

    Returns:
        (B,) in [0, 1], float32 or wider; not differentiable.

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, levels, a vocabulary of one token.

    Source:
        arXiv 2605.22765, leave-one-out sensitivity.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import uniform
        >>> z = torch.zeros(2, 3, dtype=torch.int64)
        >>> uniform.loo_probe(lambda z: torch.zeros(2, 3, 5), z, 0.5, key=dlcore.rng.key(7))
        tensor([0., 0.])
    """
    op = "uniform.loo_probe"
    checks.tokens(op, "z", z)
    checks.sequences(op, "z", z)
    checks.option(op, "parameterization", parameterization, rows.PARAMETERIZATIONS)
    a = rows.level(op, "alpha", alpha, z.shape, z.device, "[)").expand(z.shape)
    where, which = rows.uniforms(rows.row_keys(op, key, generator, z.shape[:1], z.device), 2)
    if positions is None:
        positions = (where * z.shape[1]).long()
    checks.tokens(op, "positions", positions, z.shape[:1], z.device)
    checks.token_range(op, "positions", positions, z.shape[1])
    index = torch.arange(len(z), device=z.device), positions

    def law(tokens: Tensor) -> tuple[Tensor, int]:
        logits = model(tokens)
        size = terms.observed(op, logits, tokens, exclude)
        x = rows.without(op, rows.take(logits, index), exclude)
        if parameterization == "denoiser":
            return conversions.denoiser_to_loo(x, tokens[index], a[index]).exp(), size
        return torch.softmax(x, -1), size

    with torch.no_grad():
        before, size = law(z)
        if size < 2:
            raise ValueError(f"{op}: the vocabulary must have at least 2 tokens, got {size}")
        hop = 1 + (which * (size - 1)).long()
        other = rows.expand_ids((rows.compact_ids(z[index], exclude) + hop) % size, exclude)
        after, _ = law(z.index_put(index, other))
    return rows.total_variation(before, after)
