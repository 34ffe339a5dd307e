"""States and updates: x' = α'x̂ + (σ'/σ)(x - αx̂) and what is made of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import _gaussian as gaussian
from dlcore.process import _rows as rows
from dlcore.process.flow import paths
from dlcore.process.flow.paths import Path

#: A network: (state (..., d), time in the state's dtype, broadcast to its rows) -> x̂ (..., d).
Denoiser = Callable[[Tensor, Tensor], Tensor]


def _scale(op: str, value: float | Tensor, x: Tensor) -> Tensor:
    scale = checks.number(op, "scale", value, x.shape[:-1], x.device)
    return checks.within(op, "scale", scale, 0, torch.inf, "[)")


def interpolate(
    clean: Tensor,
    t: float | Tensor,
    *,
    noise: Tensor | None = None,
    path: str = "linear",
    scale: float | Tensor = 1.0,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The state α(t)·clean + σ(t)·scale·noise, which training shows the network.

    Args:
        clean: (..., d) floating.
        t: time of the path, broadcast to clean.shape[:-1]. Where α = 0 the state is noise, where σ = 0 clean.
        noise: like clean; standard normal, drawn here, if None.
        path: "linear", "edm", "vp" or "lognsr" (table above).
        scale: of the noise, >= 0; ELF's is 2.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        (..., d), float32 or wider. Differentiable in clean, noise, and a tensor t.

    Raises:
        TypeError, ValueError: dtypes, shapes or values that do not fit; noise beside key or generator.

    Example:
        >>> import torch
        >>> from dlcore.process import flow
        >>> flow.interpolate(torch.ones(2), 0.75, noise=torch.zeros(2))
        tensor([0.7500, 0.7500])
    """
    op = "flow.interpolate"
    way = paths.find(op, path)
    if noise is None:
        (clean,) = gaussian.states(op, clean=clean)
    elif key is not None or generator is not None:
        raise ValueError(f"{op}: give noise, or key or generator, not both")
    else:
        clean, noise = gaussian.states(op, clean=clean, noise=noise)
    at = paths.time(op, "t", t, clean, way)
    signal = paths.per_row(way.alpha(at), clean) * clean
    spread = way.sigma(at) * _scale(op, scale, clean)
    if noise is None:
        return gaussian.perturb(op, signal, paths.per_row(spread, clean), key, generator)
    return signal.addcmul_(paths.per_row(spread, clean), noise)


def velocity_from_clean(
    x: Tensor, clean: Tensor, t: float | Tensor, *, path: str = "linear", floor: float | Tensor = 0.0
) -> Tensor:
    """dx/dt of the flow at x from x̂: α̇x̂ + (σ̇/σ)(x - αx̂); on the linear path (x̂ - x)/(1 - t).

    To move a state use `step`, which does not divide by what vanishes. A velocity is what a network of
    v-prediction learns; ELF learns it with 1 - t no less than floor = 0.05, its weight 1/max(1 - t, floor)².
    (Its Euler step x + (t' - t)·velocity then stops short of x̂ where 1 - t < floor; `step` reaches it.)

    Args:
        x, clean: (..., d) state and x̂.
        t: time, broadcast to x.shape[:-1].
        floor: the least that 1 - t is taken for; the linear path's alone.

    Returns:
        (..., d), float32 or wider, per unit of the path's own t. Differentiable.

    Raises:
        ValueError: shapes or values that do not fit, or a time where the velocity is unbounded: σ = 0
            (unless floor > 0), and t = 0 of "vp".

    Example:
        >>> import torch
        >>> from dlcore.process import flow
        >>> flow.velocity_from_clean(torch.zeros(2), torch.ones(2), 0.75)
        tensor([4., 4.])
    """
    op = "flow.velocity_from_clean"
    way = paths.find(op, path)
    x, clean = gaussian.states(op, x=x, clean=clean)
    at = paths.time(op, "t", t, x, way)
    least = rows.level(op, "floor", floor, x.shape[:-1], x.device)
    if path == "linear":
        at = torch.minimum(at, 1 - least)
    elif not isinstance(floor, (int, float)) or floor != 0:
        raise ValueError(f"{op}: floor belongs to path 'linear', got path {path!r}")
    of_x, of_clean = way.velocity(at)
    if checks.reads_data(of_x) and not bool((of_x.isfinite() & of_clean.isfinite()).all()):
        at = at.expand(of_x.shape)
        got = checks.first(at, ~(of_x.isfinite() & of_clean.isfinite()))
        raise ValueError(f"{op}: the velocity of path {path!r} is unbounded at t = {got:g}")
    return gaussian.combine(x, clean, paths.per_row(of_x, x), paths.per_row(of_clean, x))


def _move(x: Tensor, clean: Tensor, keep: Tensor, take: Tensor, way: Path) -> Tensor:
    """keep·x + take·clean; in one pass where the two add up to one, with either end exact."""
    if way.affine:
        return gaussian.lerp(x, clean, paths.per_row(keep, x))
    return gaussian.combine(x, clean, paths.per_row(keep, x), paths.per_row(take, x))


def _coefficients(op: str, now: Tensor, after: Tensor, way: Path) -> tuple[Tensor, Tensor]:
    """(σ'/σ, α' - (σ'/σ)α): what a step keeps of x and takes of x̂."""
    what = "a clean state (σ = 0 at t) cannot become noisy at t_next: its noise is unknown"
    keep = paths.ratio(op, what, way.sigma(after), way.sigma(now))
    return keep, way.alpha(after) - keep * way.alpha(now)


def step(
    x: Tensor,
    clean: Tensor,
    t: float | Tensor,
    t_next: float | Tensor,
    *,
    path: str = "linear",
    refresh: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Move x from t to t_next along the flow: α'x̂ + (σ'/σ)(x - αx̂), in one pass over x on affine paths.

    It is Euler's step of rectified flow, ELF and FLM (linear), of EDM and CoBit (edm), DDIM's (vp),
    LangFlow's (lognsr) and the flow-map step of FMLM* (linear, x̂ of a network that knows t_next). It is exact
    for any t and t_next if x̂ does not change on the way.

    Edges: σ' = 0 gives α'x̂, so t_next = 1 on the linear path and 0 on edm give x̂ itself; t_next = t gives
    x, also where σ = 0: clean rows (a prompt) stay if their t and t_next are both clean, whatever refresh is
    (and x̂, if finite). α = 0 is not special. A t_next noisier than t inverts the flow.

    Args:
        x, clean: (..., d) state at t and x̂ there.
        t, t_next: times, broadcast to x.shape[:-1].
        path: "linear", "edm", "vp" or "lognsr".
        refresh: the share r in [0, 1] of the noise direction that is drawn anew, α'x̂ + σ'(√(1-r²)·ε + r·new)
            with ε = (x - αx̂)/σ (the γ of consistency-trajectory sampling). 0 draws nothing. A row of σ = 0
            has no noise to draw anew.
        scale: of the noise, as in `interpolate`; it matters to refresh alone.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        (..., d), float32 or wider. Differentiable.

    Raises:
        TypeError, ValueError: dtypes, shapes or values that do not fit, or a step from σ = 0 to σ' > 0.

    Example:
        >>> import torch
        >>> from dlcore.process import flow
        >>> flow.step(torch.zeros(2), torch.ones(2), 0.5, 0.75)
        tensor([0.5000, 0.5000])
    """
    op = "flow.step"
    way = paths.find(op, path)
    x, clean = gaussian.states(op, x=x, clean=clean)
    now, after = paths.time(op, "t", t, x, way), paths.time(op, "t_next", t_next, x, way)
    keep, take = _coefficients(op, now, after, way)
    if isinstance(refresh, (int, float)) and refresh == 0:
        _scale(op, scale, x)
        checks.unused_key(op, key, generator, x.shape[:-1])
        return _move(x, clean, keep, take, way)
    new = rows.level(op, "refresh", refresh, x.shape[:-1], x.device)
    keep = torch.where(way.sigma(now) > 0, keep * gaussian.root((1 - new) * (1 + new)), keep)
    take = way.alpha(after) - keep * way.alpha(now)
    spread = way.sigma(after) * new * _scale(op, scale, x)
    moved = gaussian.combine(x, clean, paths.per_row(keep, x), paths.per_row(take, x))
    return gaussian.perturb(op, moved, paths.per_row(spread, x), key, generator)


def heun_step(
    x: Tensor, denoise: Denoiser, t: float | Tensor, t_next: float | Tensor, *, path: str = "linear"
) -> Tensor:
    """`step`, corrected by the average of both ends' velocities: second order for two network calls.

    With x̂ at t and x̂' at the end of the plain step, x' = step(x, x̂ + (x̂' - x̂)/(2r)) where r = τ'/τ. That
    is Heun's rule in the time in which the path is affine, τ = 1 - t or σ (EDM, Algorithm 2), and in DDIM's
    τ = σ/α on vp and lognsr. Where r = 0, as in a last step, the plain step remains; if it is in all rows,
    the network is called once.

    Args:
        x: (..., d) state at t.
        denoise: (state (..., d), time) -> x̂ (..., d). The time is a tensor of the state's dtype that
            broadcasts to x.shape[:-1].
        t, t_next: times, broadcast to x.shape[:-1].

    Returns:
        (..., d), float32 or wider. Differentiable.

    Raises:
        TypeError, ValueError: as `step`.

    Example:
        >>> import torch
        >>> from dlcore.process import flow
        >>> flow.heun_step(torch.full((2,), 4.0), lambda x, sigma: x / (1 + sigma**2), 2.0, 1.0, path="edm")
        tensor([2.6000, 2.6000])
    """
    op = "flow.heun_step"
    way = paths.find(op, path)
    (x,) = gaussian.states(op, x=x)
    now, after = paths.time(op, "t", t, x, way), paths.time(op, "t_next", t_next, x, way)
    keep, take = _coefficients(op, now, after, way)
    x, clean = gaussian.states(op, x=x, clean=denoise(x, now.to(x.dtype)))
    moved = _move(x, clean, keep, take, way)
    left = keep
    if not way.affine:
        left = torch.where(way.alpha(after) > 0, keep * way.alpha(now) / way.alpha(after), 0)
    if checks.reads_data(left) and bool((left == 0).all()):
        return moved
    moved, later = gaussian.states(op, x=moved, clean=denoise(moved, after.to(moved.dtype)))
    return gaussian.heun(moved, clean, later, left.unsqueeze(-1), take.unsqueeze(-1))


def renoise(
    x: Tensor,
    t: float | Tensor,
    t_back: float | Tensor,
    *,
    path: str = "linear",
    scale: float | Tensor = 1.0,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Take x from t to the noisier t_back so that the marginal is that of t_back, whatever the data.

    x_back = r·x + √(σ_b² - r²σ²)·scale·noise with r = α_b/α. On the path edm this is EDM's and CoBit's churn
    to σ̂ = σ(1 + γ); t_back = t changes nothing, nor does a row that is all noise (α = 0) at both.

    Args:
        x: (..., d) state at t.
        t, t_back: times, broadcast to x.shape[:-1].
        scale: of the noise, as in `interpolate`; on edm EDM's S_noise.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        (..., d), float32 or wider. Differentiable; where no noise is added its spread counts as constant.

    Raises:
        TypeError, ValueError: dtypes, shapes or values that do not fit, or a t_back less noisy than t.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import flow
        >>> x = torch.zeros(2, 512)
        >>> flow.renoise(x, 3.0, 5.0, path="edm", key=dlcore.rng.key(7)).std().round()
        tensor(4.)
    """
    op = "flow.renoise"
    way = paths.find(op, path)
    (x,) = gaussian.states(op, x=x)
    now, back = paths.time(op, "t", t, x, way), paths.time(op, "t_back", t_back, x, way)
    what = "a state of pure noise (α = 0 at t) cannot gain signal at t_back"
    keep = paths.ratio(op, what, way.alpha(back), way.alpha(now))
    before, needed = keep * way.sigma(now), way.sigma(back)
    if checks.reads_data(now) and checks.reads_data(back) and bool((needed < before * (1 - 1e-12)).any()):
        raise ValueError(f"{op}: t_back must be at least as noisy as t, got {t_back!r} after {t!r}")
    spread = gaussian.root((needed - before) * (needed + before)) * _scale(op, scale, x)
    return gaussian.perturb(op, paths.per_row(keep, x) * x, paths.per_row(spread, x), key, generator)


def sde_step(
    x: Tensor,
    denoise: Denoiser,
    t: float | Tensor,
    t_next: float | Tensor,
    gamma: float | Tensor,
    *,
    exact: bool = True,
    scale: float | Tensor = 1.0,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """ELF's stochastic step on the linear path: back to a·t with new noise, then `step` to t_next.

    a = 1 - γ(t_next - t), cut to [0, 1]. The state goes back to a·x + s·scale·noise:

    - exact=True: s = √((1-a)(1 + a - 2at)), the one that keeps the marginal law (`renoise` to a·t);
    - exact=False: s = 1 - a as ELF's official code has it. Its noise falls short, to a variance of
      a²(1-t)² + (1-a)² where (1-at)² is due, so the network sees less noise than it is told.

    Official sampling takes its last step with γ = 0, which is `step` with a call of the network.

    Args:
        x: (..., d) state at t.
        denoise: (state (..., d), time) -> x̂ (..., d), called once, at a·t; the time is a tensor of the
            state's dtype that broadcasts to x.shape[:-1].
        t, t_next: times, t_next >= t, broadcast to x.shape[:-1].
        gamma: γ >= 0; ELF's is 1.5 at 32 steps and 1 at 64.
        exact: which noise.
        scale: of the noise, as in `interpolate`; ELF's is 2.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        (..., d), float32 or wider. Differentiable; where none is added, exact noise counts as constant.

    Raises:
        TypeError, ValueError: dtypes, shapes or values that do not fit.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import flow
        >>> x = torch.zeros(2, 8)
        >>> flow.sde_step(x, lambda x, t: x, 0.0, 0.5, gamma=1.0, key=dlcore.rng.key(7)).shape
        torch.Size([2, 8])
    """
    op = "flow.sde_step"
    way = paths.PATHS["linear"]
    (x,) = gaussian.states(op, x=x)
    now, after = paths.time(op, "t", t, x, way), paths.time(op, "t_next", t_next, x, way)
    if checks.reads_data(now) and checks.reads_data(after) and bool((after < now).any()):
        raise ValueError(f"{op}: t_next must be at least t, got {t_next!r} after {t!r}")
    rate = checks.within(
        op, "gamma", checks.number(op, "gamma", gamma, x.shape[:-1], x.device), 0, torch.inf, "[)"
    )
    kept = (1 - rate * (after - now)).clamp(0, 1)
    lost = 1 - kept
    spread = gaussian.root(lost * (1 + kept - 2 * kept * now)) if exact else lost
    spread = spread * _scale(op, scale, x)
    x = gaussian.perturb(op, paths.per_row(kept, x) * x, paths.per_row(spread, x), key, generator)
    back = kept * now
    x, clean = gaussian.states(op, x=x, clean=denoise(x, back.to(x.dtype)))
    keep, take = _coefficients(op, back, after, way)
    return _move(x, clean, keep, take, way)


def guide(cond: Tensor, uncond: Tensor, weight: float | Tensor) -> Tensor:
    """Classifier-free guidance uncond + weight·(cond - uncond), in one pass.

    Every update here is affine in x̂ with coefficients that do not depend on it, so guiding x̂, the velocity,
    the score or the noise prediction gives the same step; so does guiding probabilities (CoBit) where x̂ is
    linear in them: bits, or p·E of embeddings. Guiding logits is another method: softmax is not linear.
    Self-conditioning guidance (ELF) is this with uncond = the pass without the previous x̂.

    Args:
        cond, uncond: (..., d), both predictions.
        weight: broadcast to cond.shape[:-1]. 0 is uncond, 1 cond, above 1 extrapolates: guided probabilities
            may then leave [0, 1]. Where papers write (1 + g)·cond - g·uncond, weight = 1 + g.

    Returns:
        (..., d), float32 or wider. Differentiable.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit.

    Example:
        >>> import torch
        >>> from dlcore.process import flow
        >>> flow.guide(torch.ones(2), torch.zeros(2), 3.0)
        tensor([3., 3.])
    """
    op = "flow.guide"
    cond, uncond = gaussian.states(op, cond=cond, uncond=uncond)
    amount = checks.number(op, "weight", weight, cond.shape[:-1], cond.device)
    checks.within(op, "weight", amount, -torch.inf, torch.inf, "()")
    return torch.lerp(uncond, cond, paths.per_row(amount, cond))
