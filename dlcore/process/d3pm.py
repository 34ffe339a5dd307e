"""D3PM: the discrete-time bound of T steps, with absorbing or uniform noise.

A step from t to the earlier s is given by its two noise levels alpha (``float | Tensor``, broadcast to z's
shape, best in float64). The bound on -log p(x) is the sum of `loss` over the T steps, the last of which has
alpha_s = 1 (the reconstruction term); one step drawn at random gives the estimate T·loss. As T grows it
becomes the NELBO of `masked` and `uniform`. D3PM's auxiliary term is `categorical.cross_entropy` times a
constant.

Source: D3PM, arXiv 2107.03006.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import categorical
from dlcore.linear_logits import LinearLogits
from dlcore.process import _rows as rows
from dlcore.process import masked, uniform

__all__ = ["loss", "step"]

Logits = Tensor | LinearLogits


def _observed(op: str, logits: Logits, z: Tensor, mask_id: int | None, subs: bool) -> int:
    """V, after checks of logits, z, mask_id and subs."""
    h = categorical.head(op, logits)
    rows.tokens(op, "z", z, h)
    checks.token_id(op, "mask_id", mask_id, h.vocab)
    if subs and mask_id is None:
        raise ValueError(f"{op}: subs is of absorbing noise and needs mask_id")
    return h.vocab


def loss(
    logits: Logits,
    z: Tensor,
    x: Tensor,
    alpha_t: float | Tensor,
    alpha_s: float | Tensor,
    *,
    mask_id: int | None = None,
    subs: bool = False,
) -> Tensor:
    """KL(q(z_s | z, x) || p(z_s | z)) of one step, in nats per token: (...), differentiable.

    p is the bridge with softmax(logits) plugged in for x. With absorbing noise only masked rows have a loss
    and are read, and the network may give the mask mass m = p(mask): with w = (α_s-α_t)/(1-α_t),
    log(1 + α_t·m/(1-α_t)) - w·log p(x) - (1-w)·log(1 + α_s·m/(1-α_s)). With uniform noise and
    c = Vα/(1-α) it takes log1p(c_t·p(z)), log1p(c_s·p(x)) and Σ_y log1p(c_s·p(y)), never a posterior.

    Args:
        logits: (..., V). A `LinearLogits` is multiplied out for uniform noise.
        z, x: (...) int64 observed and clean tokens.
        alpha_t, alpha_s: in [0, 1], alpha_s >= alpha_t, broadcast to z.shape; alpha_t is below 1 where
            absorbing noise has masked, and anywhere with uniform noise.
        mask_id: the absorbing token; None for uniform noise.
        subs: the mask has probability 0 under the network, as in MDLM.

    Returns:
        (...) float32 (float64 for float64 logits), differentiable in logits (or hidden, weight, bias).

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, levels, alpha_s below alpha_t, subs without mask_id.

    Example:
        >>> import torch
        >>> from dlcore.process import d3pm
        >>> z, x = torch.tensor([4, 1]), torch.tensor([2, 1])
        >>> 10 * d3pm.loss(torch.zeros(2, 5), z, x, 0.5, 0.6, mask_id=4, subs=True)
        tensor([2.7726, 0.0000])
    """
    op = "d3pm.loss"
    _observed(op, logits, z, mask_id, subs)
    rows.tokens(op, "x", x, categorical.head(op, logits))
    t, s = rows.levels(op, alpha_t, alpha_s, z.shape, z.device)
    noisy = torch.ones_like(z, dtype=torch.bool) if mask_id is None else z == mask_id
    if checks.reads_data(t) and bool((noisy & (t == 1)).any()):
        where = "" if mask_id is None else " where z is masked"
        raise ValueError(f"{op}: alpha_t must be below 1{where}, got 1")
    if mask_id is None:
        return _uniform(rows.dense(op, logits), z, x, t, s)
    return _absorbing(op, logits, noisy, x, t, s, mask_id, subs)


def _absorbing(
    op: str, logits: Logits, is_masked: Tensor, x: Tensor, t: Tensor, s: Tensor, mask_id: int, subs: bool
) -> Tensor:
    log_px, log_pm, _ = categorical.log_probs(
        op,
        logits,
        torch.where(is_masked, x, -1),
        index=torch.full_like(x, mask_id),
        exclude=mask_id if subs else None,
        target_name="x",
    ).unbind(0)
    mass = torch.zeros_like(log_pm).double() if subs else log_pm.double().exp()
    noise_t = torch.where(t < 1, 1 - t, 1)
    # At alpha_s = 1 nothing stays masked.
    stays = torch.where(s < 1, torch.log1p(s * mass / torch.where(s < 1, 1 - s, 1)), 0)
    shown = (s - t) * torch.where(s > t, log_px, 0).double()
    kl = torch.log1p(t * mass / noise_t) - (shown + (1 - s) * stays) / noise_t
    return torch.where(is_masked, kl, 0).to(log_px.dtype)


def _uniform(logits: Tensor, z: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    vocab = logits.shape[-1]
    log_p = torch.log_softmax(logits, -1)
    log_pz, log_px = (rows.gather(log_p, i).double() for i in (z, x))
    r, same, last = rows.ratio(t, s), z == x, s == 1
    # q(y | z, x) = rest + above_x·1[y=x] + above_z·1[y=z].
    den = torch.where(same, 1 - t + vocab * t, 1 - t)
    rest = (1 - s) * (1 - r) / (vocab * den)
    above_x = torch.where(same, 1 - vocab * rest, s * (1 - r) / den)
    above_z = torch.where(same, 0, r * (1 - s) / den)
    log_c, log_c_t = (rows.log_odds(level, vocab) for level in (torch.where(last, 0.5, s), t))
    match = (above_x + rest) * rows.log1p_scaled(log_c) - above_x * rows.log1p_scaled(log_c + log_px)
    match = match - above_z * rows.log1p_scaled(log_c + log_pz)
    match = match - rest * rows.log1p_scaled(log_c.to(log_p.dtype).unsqueeze(-1) + log_p).sum(-1).double()
    marginal = rows.log1p_scaled(log_c_t + log_pz) - torch.where(same, rows.log1p_scaled(log_c_t), 0)
    return (torch.where(last, -log_px, match) + marginal).to(log_p.dtype)


def step(
    logits: Logits,
    z: Tensor,
    alpha_t: float | Tensor,
    alpha_s: float | Tensor,
    *,
    mask_id: int | None = None,
    subs: bool = False,
    temperature: float | Tensor = 1.0,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A draw of p(z_s | z), the bridge with softmax(logits) plugged in for x; one read of the logits.

    Absorbing, with the mask's mass m = p(mask): a masked position takes y with probability
    (α_s-α_t)·p(y)/(1-α_t+α_t·m), else stays masked, in the last step (alpha_s = 1) too: give that one
    subs=True, which leaves no mask. Uniform: `uniform.step`.

    Args:
        logits, z, mask_id, subs: as in `loss`.
        alpha_t, alpha_s: in [0, 1], alpha_s >= alpha_t, broadcast to z.shape.
        temperature: non-negative; at 0 the argmax.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        z_s (...) int64; -1 where a row that had to be read is broken (see `dlcore.categorical`).

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, levels, alpha_s below alpha_t, subs without mask_id.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import d3pm
        >>> z = torch.full((2, 8), 999)
        >>> d3pm.step(torch.randn(2, 8, 1000), z, 0.0, 0.5, mask_id=999, key=dlcore.rng.key(7)).shape
        torch.Size([2, 8])
    """
    op = "d3pm.step"
    _observed(op, logits, z, mask_id, subs)
    t, s = rows.levels(op, alpha_t, alpha_s, z.shape, z.device)
    if mask_id is None:
        return uniform.step(logits, z, t, s, temperature=temperature, key=key, generator=generator)
    if subs:
        return masked.step(logits, z, t, s, mask_id, temperature=temperature, key=key, generator=generator)
    return categorical.sample_mixture(
        logits,
        z,
        rows.coefficients(1 - t, t, 1 - s, t, s - t, 0.0, keep=z != mask_id),
        prior=mask_id,
        temperature=temperature,
        key=rows.key(op, key, generator, logits),
    )
