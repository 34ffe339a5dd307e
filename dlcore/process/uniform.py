"""Uniform-state diffusion: q(z | x) = α·1[z = x] + (1 - α)/V.

Two predictors describe the clean token x_l of a noisy sequence z: the denoiser D(v) = q(x_l = v | z), which
has seen z_l, and the leave-one-out (LOO) posterior p(v) = q(x_l = v | z without z_l), which has not. With
c = Vα/(1 - α) they are related by D(v) ∝ p(v)·(1 + c·1[v = z_l]): one shifted logit. Networks of either
`parameterization` ("loo" or "denoiser") serve every function here.

Noise levels alpha are ``float | Tensor``, broadcast to z's shape, and are best given in float64: 1 - α is
what matters, and a float32 α near 1 has already lost it. A position with α = 1 is clean (a prompt).

Sources: leave-one-out uniform diffusion, arXiv 2605.22765; The Diffusion Duality, arXiv 2506.10892 and
2602.21185; UDLM, arXiv 2412.10193.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import categorical, rng
from dlcore.linear_logits import LinearLogits
from dlcore.process import _rows as rows
from dlcore.process import unmask

__all__ = [
    "bridge_log_probs",
    "correct",
    "corrupt",
    "cross_entropy",
    "denoiser_to_loo",
    "log_score_to_loo",
    "loo_to_denoiser",
    "loo_to_log_score",
    "nelbo",
    "step",
]

Logits = Tensor | LinearLogits


def _observed(op: str, logits: Logits, z: Tensor, exclude: int | None = None) -> int:
    """The number of tokens that noise may take, after checks of logits and z."""
    h = categorical.head(op, logits)
    rows.tokens(op, "z", z, h)
    return rows.vocabulary(op, h.vocab, exclude)


def _lift(alpha: Tensor, size: int) -> Tensor:
    """log1p(c): what a token's own observation adds to its logit; 0 where alpha = 1, beyond any shift."""
    noisy = alpha < 1
    return torch.where(noisy, torch.log1p(size * alpha / torch.where(noisy, 1 - alpha, 1)), 0)


def corrupt(
    x: Tensor,
    alpha: float | Tensor,
    vocab_size: int,
    *,
    exclude: int | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keep x with probability alpha, else take a uniform token. Returns z (...) int64.

    Args:
        x: (...) int64 clean tokens.
        alpha: in [0, 1], broadcast to x.shape.
        vocab_size: V.
        exclude: a token id that noise never takes and that does not count in V (a mask token, say).
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Raises:
        TypeError: x is not int64. ValueError: shapes, ids or alpha do not fit.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import uniform
        >>> x = torch.arange(6).view(2, 3)
        >>> uniform.corrupt(x, 1.0, vocab_size=6).equal(x)
        True
    """
    op = "uniform.corrupt"
    size = rows.vocabulary(op, vocab_size, exclude)
    checks.tokens(op, "x", x)
    checks.token_range(op, "x", x, vocab_size)
    a = rows.level(op, "alpha", alpha, x.shape, x.device)
    route, which = rows.uniforms(rows.row_keys(op, key, generator, x.shape, x.device), 2)
    return torch.where(route < a, x, rows.uniform_tokens(which, size, exclude))


def loo_to_denoiser(logits: Logits, z: Tensor, alpha: float | Tensor) -> Tensor:
    """Log-probabilities of the denoiser from leave-one-out logits: add log1p(c) at z, normalise.

    Args:
        logits: (..., V), need not be normalised.
        z: (...) int64 observed tokens.
        alpha: in [0, 1]. At 1 the denoiser is the point mass at z.

    Returns:
        (..., V) in nats, float32 or wider. Differentiable in logits.

    Example:
        >>> import torch
        >>> from dlcore.process import uniform
        >>> loo = torch.tensor([20.0, 9.0, 5.0]).div(34).log()
        >>> uniform.loo_to_denoiser(loo, torch.tensor(0), 0.4).exp() * 74
        tensor([60.0000,  9.0000,  5.0000])
    """
    op = "uniform.loo_to_denoiser"
    size = _observed(op, logits, z)
    x = rows.dense(op, logits)
    a = rows.level(op, "alpha", alpha, z.shape, x.device)
    lifted = torch.log_softmax(_add_at(x, z, _lift(a, size)), -1)
    point = torch.full_like(lifted, -torch.inf).scatter(-1, z.unsqueeze(-1), 0)
    return torch.where((a < 1).unsqueeze(-1), lifted, point)


def denoiser_to_loo(logits: Logits, z: Tensor, alpha: float | Tensor) -> Tensor:
    """Log-probabilities of the leave-one-out posterior from denoiser logits: take log1p(c) off z, normalise.

    Accurate however close D(z) is to 1, for the normaliser is a log-sum-exp over the shifted row.

    Args:
        logits: (..., V), need not be normalised.
        z: (...) int64 observed tokens.
        alpha: in [0, 1]. At 1 the denoiser tells nothing of the others' evidence, so the posterior is
            undetermined; such a row is returned normalised and unshifted.

    Returns:
        (..., V) in nats, float32 or wider. Differentiable in logits.

    Example:
        >>> import torch
        >>> from dlcore.process import uniform
        >>> denoiser = torch.tensor([60.0, 9.0, 5.0]).log()
        >>> uniform.denoiser_to_loo(denoiser, torch.tensor(0), 0.4).exp() * 34
        tensor([20.0000,  9.0000,  5.0000])
    """
    op = "uniform.denoiser_to_loo"
    size = _observed(op, logits, z)
    x = rows.dense(op, logits)
    a = rows.level(op, "alpha", alpha, z.shape, x.device)
    return torch.log_softmax(_add_at(x, z, -_lift(a, size)), -1)


def loo_to_log_score(logits: Logits, z: Tensor, alpha: float | Tensor) -> Tensor:
    """Log of the score s(y) = p_t(z with y at l) / p_t(z) = (1 + c·p(y)) / (1 + c·p(z)); 0 at z.

    Args:
        logits: (..., V) leave-one-out logits, need not be normalised.
        z: (...) int64 observed tokens.
        alpha: in [0, 1]. At 1 the score is p(y) / p(z).

    Returns:
        (..., V) in nats, float32 or wider. Differentiable in logits.

    Example:
        >>> import torch
        >>> from dlcore.process import uniform
        >>> loo = torch.tensor([10.0, 15.0, 11.0]).log()
        >>> uniform.loo_to_log_score(loo, torch.tensor(0), 0.4).exp()
        tensor([1.0000, 1.1786, 1.0357])
    """
    op = "uniform.loo_to_log_score"
    size = _observed(op, logits, z)
    log_p = torch.log_softmax(rows.dense(op, logits), -1)
    a = rows.level(op, "alpha", alpha, z.shape, log_p.device)
    noisy = a < 1
    odds = torch.where(noisy, size * a / torch.where(noisy, 1 - a, 1), 1)
    lifted = torch.logaddexp(odds.log().to(log_p.dtype).unsqueeze(-1) + log_p, log_p.new_zeros(()))
    log_mass = torch.where(noisy.unsqueeze(-1), lifted, log_p)
    return log_mass - rows.gather(log_mass, z).unsqueeze(-1)


def log_score_to_loo(log_score: Tensor, z: Tensor, alpha: float | Tensor) -> Tensor:
    """Log-probabilities of the leave-one-out posterior: p(y) = (s(y)/Σs - (1 - α)/V)/α, normalised.

    The difference cancels where p(y) is small against 1/c, so such entries are known only to about
    eps/c; those that come out negative (no LOO posterior has this score) get probability 0.

    Args:
        log_score: (..., V). The entry at z is taken as 0, whatever stands there.
        z: (...) int64 observed tokens.
        alpha: in (0, 1]; at 0 every score is 1 and the posterior is undetermined.

    Returns:
        (..., V) in nats, float32 or wider. Differentiable in log_score.

    Example:
        >>> import torch
        >>> from dlcore.process import uniform
        >>> log_score = torch.tensor([0.0, 1.178571428571, 1.035714285714]).log()
        >>> uniform.log_score_to_loo(log_score, torch.tensor(0), 0.4).exp() * 36
        tensor([10.0000, 15.0000, 11.0000])
    """
    op = "uniform.log_score_to_loo"
    checks.floating(op, "log_score", log_score)
    h = categorical.Head(log_score, None, None)
    rows.tokens(op, "z", z, h)
    x = rows.dense(op, log_score, "log_score")
    a = rows.level(op, "alpha", alpha, z.shape, x.device, "(]")
    # p(y) + 1/c rather than its multiple by alpha: no rescaling of the difference afterwards.
    share = torch.softmax(x.scatter(-1, z.unsqueeze(-1), 0), -1) / a.to(x.dtype).unsqueeze(-1)
    p = share - ((1 - a) / (h.vocab * a)).to(x.dtype).unsqueeze(-1)
    possible = p > 0
    log_p = torch.where(possible, p, 1).log().masked_fill(~possible, -torch.inf)
    return torch.log_softmax(log_p, -1)


def _add_at(x: Tensor, z: Tensor, shift: Tensor) -> Tensor:
    return x.scatter_add(-1, z.unsqueeze(-1), shift.to(x.dtype).expand(z.shape).unsqueeze(-1))


def _routes(alpha_t: Tensor, alpha_s: Tensor, kappa: Tensor, size: int) -> Tensor:
    """(..., 8): the weights (constant, slope in p(z)) of all, keep z, take a draw of p, take the prior.

    The ψ-mixture κ·bridge + (1 - κ)·[α_s·D + (1 - α_s)/V] over the common denominator 1 - α_t + V·α_t·p(z).
    """
    r, noise_t, noise_s, rest = rows.ratio(alpha_t, alpha_s), 1 - alpha_t, 1 - alpha_s, 1 - kappa
    seen = size * alpha_t
    keep = kappa * r * noise_s, seen * (kappa + rest * alpha_s)
    draw = kappa * (alpha_s - alpha_t) + rest * alpha_s * noise_t, 0.0
    prior = noise_s * (kappa * (1 - r) + rest * noise_t), noise_s * rest * seen
    settled = (noise_t == 0) | ((alpha_t == alpha_s) & (rest == 0))
    return rows.coefficients(noise_t, seen, *keep, *draw, *prior, keep=settled)


def _shift(parameterization: str, alpha: Tensor, size: int) -> Tensor | None:
    """What makes leave-one-out logits of the network's."""
    return None if parameterization == "loo" else -_lift(alpha, size)


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """torch.logaddexp whose gradient is 0, not NaN, where both are -inf."""
    empty = torch.isneginf(a) & torch.isneginf(b)
    return torch.logaddexp(torch.where(empty, 0, a), torch.where(empty, 0, b)).masked_fill(empty, -torch.inf)


def bridge_log_probs(
    logits: Logits,
    z: Tensor,
    alpha_t: float | Tensor,
    alpha_s: float | Tensor,
    *,
    parameterization: str = "loo",
    kappa: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    exclude: int | None = None,
) -> Tensor:
    """The law that `step` draws from, written out.

    With kappa = 1 the bridge q(z_s | z, x) averaged over the denoiser, which equals the bridge with the
    leave-one-out posterior p plugged in for x:
    q(y) = [α_s·p(y) + (1-α_s)/V]·[α_{t|s}·1[y=z] + (1-α_{t|s})/V] / [α_t·p(z) + (1-α_t)/V].
    With kappa < 1 the ψ-posterior κ·q + (1-κ)·[α_s·D + (1-α_s)/V].

    Args:
        logits, z, alpha_t, alpha_s, parameterization, kappa, exclude: as in `step`.
        temperature: positive, on the leave-one-out posterior before any conversion.

    Returns:
        (..., V) in nats, float32 or wider. Differentiable in logits.

    Example:
        >>> import torch
        >>> from dlcore.process import uniform
        >>> loo = torch.tensor([10.0, 15.0, 11.0]).log()
        >>> uniform.bridge_log_probs(loo, torch.tensor(0), 0.4, 0.7).exp()
        tensor([0.6760, 0.1798, 0.1441])
    """
    op = "uniform.bridge_log_probs"
    size = _observed(op, logits, z, exclude)
    checks.option(op, "parameterization", parameterization, rows.PARAMETERIZATIONS)
    x = rows.dense(op, logits)
    t, s = rows.levels(op, alpha_t, alpha_s, z.shape, x.device)
    k = rows.level(op, "kappa", kappa, z.shape, x.device)
    heat = checks.within(
        op,
        "temperature",
        checks.number(op, "temperature", temperature, z.shape, x.device),
        0,
        torch.inf,
        "(]",
    )
    shift = _shift(parameterization, t, size)
    if shift is not None:
        x = _add_at(x, z, shift)
    x = x / heat.to(x.dtype).unsqueeze(-1)
    if exclude is not None:
        x = x.index_fill(-1, torch.tensor([exclude], device=x.device), -torch.inf)
    log_p = torch.log_softmax(x, -1)
    log_pz = rows.gather(log_p, z).double()
    constant, slope = torch.unflatten(_routes(t, s, k, size).log(), -1, (4, 2)).unbind(-1)
    total, keep, draw, prior = _logaddexp(constant, slope + log_pz.unsqueeze(-1)).unbind(-1)
    keep, draw, prior = (w.to(log_p.dtype) for w in (keep - total, draw - total, prior - total - _log(size)))
    moved = _logaddexp(draw.unsqueeze(-1) + log_p, prior.unsqueeze(-1).expand_as(log_p))
    if exclude is not None:
        moved = moved.index_fill(-1, torch.tensor([exclude], device=x.device), -torch.inf)
    return moved.scatter(-1, z.unsqueeze(-1), _logaddexp(rows.gather(moved, z), keep).unsqueeze(-1))


def _log(n: int) -> Tensor:
    return torch.log(torch.tensor(n, dtype=torch.float64))


def step(
    logits: Logits,
    z: Tensor,
    alpha_t: float | Tensor,
    alpha_s: float | Tensor,
    *,
    parameterization: str = "loo",
    kappa: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    exclude: int | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One reverse step from alpha_t to alpha_s: a draw from `bridge_log_probs`, by one read of the logits.

    The plug-in bridge is a mixture of three: keep z, take a draw of the leave-one-out posterior p, take a
    uniform token, with weights V·α_t·p(z) + α_{t|s} - α_t, α_s - α_t and (1-α_{t|s})·(1-α_s) over their sum.
    Rows that are clean (alpha_t = 1) or that do not move (alpha_s = alpha_t, kappa = 1) keep z, unread.

    Args:
        logits: (..., V).
        z: (...) int64 observed tokens.
        alpha_t, alpha_s: in [0, 1], alpha_s >= alpha_t, broadcast to z.shape. At alpha_s = 1 this draws from
            the denoiser.
        parameterization: whether logits are the leave-one-out posterior's ("loo") or the "denoiser"'s.
        kappa: in [0, 1]; 1 is ancestral sampling, less is the ψ-sampler (predictor-corrector).
        temperature: non-negative, on the leave-one-out posterior, before any conversion; at 0 its argmax.
        exclude: a token id that has probability 0 and does not count in V.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        z_s (...) int64; -1 where a row that had to be read is broken (see `dlcore.categorical`).

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, levels outside [0, 1], alpha_s below alpha_t.

    Source:
        arXiv 2605.22765 (bridge with the leave-one-out posterior); ψ-samplers: arXiv 2602.21185.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import uniform
        >>> z = torch.randint(1000, (2, 8))
        >>> uniform.step(torch.randn(2, 8, 1000), z, 0.4, 0.5, key=dlcore.rng.key(7)).shape
        torch.Size([2, 8])
    """
    op = "uniform.step"
    size = _observed(op, logits, z, exclude)
    checks.option(op, "parameterization", parameterization, rows.PARAMETERIZATIONS)
    t, s = rows.levels(op, alpha_t, alpha_s, z.shape, z.device)
    k = rows.level(op, "kappa", kappa, z.shape, z.device)
    return categorical.sample_mixture(
        logits,
        z,
        _routes(t, s, k, size)[..., :6],
        shift=_shift(parameterization, t, size),
        temperature=temperature,
        exclude=exclude,
        key=checks.key(op, key, generator, z.shape),
    )


def nelbo(
    logits: Logits,
    z: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    dalpha: float | Tensor,
    *,
    parameterization: str = "loo",
) -> Tensor:
    """The continuous-time NELBO's integrand at one noise level, in nats per token: (...), differentiable.

    The rate-matching KL (β/V)·{Σ_{y≠z} (r_θ - r) + Σ_{y≠z} r·log(r/r_θ)} with β = -α'/α and
    r(y) = (V·α·1[y=x] + 1-α)/(V·α·1[z=x] + 1-α), r_θ the same with p in place of 1[·=x]. Its mean over
    t ~ U(0, 1) and z ~ q(z|x) bounds -log p(x). The optimum is the leave-one-out posterior.

    Args:
        logits: (..., V).
        z, x: (...) int64 observed and clean tokens.
        alpha: in (0, 1), broadcast to z.shape.
        dalpha: dα/dt <= 0, broadcast to z.shape.
        parameterization: as in `step`.

    Returns:
        (...) float32 (float64 for float64 logits), differentiable in logits (or hidden, weight, bias).

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, alpha outside (0, 1), positive dalpha.

    Source:
        UDLM, arXiv 2412.10193; in the form of Duo, arXiv 2506.10892.

    Example:
        >>> import torch
        >>> from dlcore.process import uniform
        >>> z, x = torch.tensor([0, 1]), torch.tensor([0, 0])
        >>> uniform.nelbo(torch.zeros(2, 4), z, x, 0.5, -1.0)
        tensor([0.7172, 2.0236])
    """
    op = "uniform.nelbo"
    size = _observed(op, logits, z)
    checks.option(op, "parameterization", parameterization, rows.PARAMETERIZATIONS)
    h = categorical.head(op, logits)
    rows.tokens(op, "x", x, h)
    a = rows.level(op, "alpha", alpha, z.shape, z.device, "()")
    da = rows.slope(op, dalpha, z.shape, z.device)
    shift = _as_number(_shift(parameterization, a, size), h)
    loss: Tensor = torch.ops.dlcore.uniform_nelbo(*h, z, x, a, da, shift)[0]
    return loss


def _as_number(shift: Tensor | None, h: categorical.Head) -> Tensor | None:
    """In the dtype of results: float32, or wider for wider logits."""
    return None if shift is None else shift.to(torch.promote_types(h.logits.dtype, torch.float32))


def cross_entropy(
    logits: Logits, z: Tensor, x: Tensor, alpha: float | Tensor, *, parameterization: str = "loo"
) -> Tensor:
    """-log D(x | z), the denoising cross-entropy, in nats per token: (...), differentiable.

    Args:
        logits: (..., V).
        z, x: (...) int64 observed and clean tokens.
        alpha: in [0, 1], broadcast to z.shape; "denoiser" logits need no conversion and only have it checked.
            Leave-one-out rows with alpha = 1 are not read: 0 where x = z, else inf.
        parameterization: as in `step`.

    Example:
        >>> import torch
        >>> from dlcore.process import uniform
        >>> z, x = torch.tensor([0, 1]), torch.tensor([0, 0])
        >>> uniform.cross_entropy(torch.zeros(2, 4), z, x, 0.5)
        tensor([0.4700, 2.0794])
    """
    op = "uniform.cross_entropy"
    size = _observed(op, logits, z)
    checks.option(op, "parameterization", parameterization, rows.PARAMETERIZATIONS)
    h = categorical.head(op, logits)
    rows.tokens(op, "x", x, h)
    a = rows.level(op, "alpha", alpha, z.shape, z.device)
    if parameterization == "denoiser":
        return -categorical.log_probs(op, logits, x, target_name="x")[0]
    target = torch.where(a < 1, x, -1)
    log_d = categorical.log_probs(op, logits, target, index=z, shift=_as_number(_lift(a, size), h))[0]
    return torch.where((a < 1) | (x == z), -log_d, torch.inf)


SCORES = ("margin", "current", "max", "random")


def _selection_score(score: str, numbers: Tensor, at_argmax: Tensor, alpha: Tensor, size: int) -> Tensor:
    """How ill a token fits its conditional π = α·p + (1-α)/V, in nats."""

    def log_pi(log_p: Tensor) -> Tensor:
        return _logaddexp(alpha.log() + log_p.double(), torch.log1p(-alpha) - _log(size).to(alpha.device))

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
    size = _observed(op, logits, z, exclude)
    checks.option(op, "parameterization", parameterization, rows.PARAMETERIZATIONS)
    checks.option(op, "score", score, SCORES)
    if z.dim() != 2:
        raise ValueError(f"{op}: z must be (B, L), got {tuple(z.shape)}")
    a = rows.level(op, "alpha", alpha, z.shape, z.device)
    greed = checks.within(op, "tau", checks.number(op, "tau", tau, z.shape, z.device), 0, torch.inf, "()")
    checks.within(
        op,
        "temperature",
        checks.number(op, "temperature", temperature, z.shape, z.device),
        0,
        torch.inf,
        "()",
    )
    keys = rows.row_keys(op, key, generator, z.shape, z.device)
    shift = _shift(parameterization, a, size)
    priority = rng.gumbel(keys, (), dtype=torch.float64)
    if score != "random":
        argmax, numbers = categorical.row_numbers(op, logits, z, shift, temperature, None, exclude)
        priority = priority + _selection_score(score, numbers, argmax == z, a, size) / greed
    chosen = unmask.largest(op, "num_positions", num_positions, priority, (a < 1).expand(z.shape))
    redraw = rows.coefficients(1.0, 0.0, 0.0, 0.0, a, 0.0, keep=~chosen)
    return categorical.sample_mixture(
        logits, z, redraw, shift=shift, temperature=temperature, exclude=exclude, key=keys
    )
