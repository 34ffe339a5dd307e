"""The NELBO, and the training loss with weights of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import categorical
from dlcore.linear_logits import LinearLogits
from dlcore.process import _rows as rows
from dlcore.process.hybrid.levels import Level, checked

Logits = Tensor | LinearLogits


def nelbo(logits: Logits, z: Tensor, x: Tensor, at: Level, mask_id: int) -> Tensor:
    """The continuous-time NELBO's integrand, w·[KL(q(·|x) || q(·|p)) + r - log r - 1], in nats per token.

    r = q(z|x)/q(z|p), and w, the rate of noise into z over q(z|x), is `mask_rate` where z is masked,
    `uniform_rate` where it is another token, and uniform_rate·u/(α + u), u = υ/N, where it is x. With c = α/u
    and ℓ(y) = log1p(c·p(y)), KL = α·[log1p(c) - ℓ(x)] + u·[log1p(c) - Σ_y ℓ(y)]: one sum over the vocabulary,
    in plain torch over logits that a `LinearLogits` is multiplied out to.

    Args:
        logits: (..., V).
        z, x: (...) int64 observed and clean tokens; x is never the mask.
        at: the level, broadcast to z.shape, with a finite rate into z.
        mask_id: the mask token; it has probability 0.

    Returns:
        (...) float32 (float64 for float64 logits), differentiable in logits (or hidden, weight, bias).

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, levels, an infinite rate.

    Source:
        GIDD, arXiv 2503.04482.

    Example:
        >>> import torch
        >>> from dlcore.process import hybrid
        >>> z, x = torch.tensor([4, 1, 1]), torch.tensor([2, 1, 0])
        >>> hybrid.nelbo(torch.zeros(3, 5), z, x, hybrid.schedule(0.5, p_uniform=0.2), mask_id=4)
        tensor([1.3183, 0.2735, 1.5231])
    """
    op = "hybrid.nelbo"
    weight, divergence, _ = _elbo(op, logits, z, x, at, mask_id)
    checks.within(op, "at's rate into z", weight, 0, torch.inf, "[)")
    return (weight * divergence).to(_dtype(logits))


WEIGHTINGS = ("clip", "dynamic")


def loss(
    logits: Logits,
    z: Tensor,
    x: Tensor,
    at: Level,
    mask_id: int,
    *,
    weighting: str = "dynamic",
    max_weight: float | Tensor = 2.0,
) -> Tensor:
    """The training loss: `nelbo` with the weights that train better than the NELBO's own.

    "clip": min(w, max_weight). "dynamic": min(w', max_weight) with w' = 2 where z is masked, 1 where it is
    another token and υ/(N·α) where it is x; for gamma = 1 that is GIDD's (B/N)·exp(-λ/2), λ = log((1-t)/t).

    Args:
        logits, z, x, at, mask_id: as in `nelbo`.
        weighting: "clip" or "dynamic".
        max_weight: positive.

    Returns:
        (...) float32 (float64 for float64 logits), differentiable in logits (or hidden, weight, bias).

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, levels, an unknown weighting.

    Source:
        GIDD, arXiv 2503.04482. (Its code has sigmoid(-t) where λ should stand.)

    Example:
        >>> import torch
        >>> from dlcore.process import hybrid
        >>> z, x = torch.tensor([4, 1, 1]), torch.tensor([2, 1, 0])
        >>> hybrid.loss(torch.zeros(3, 5), z, x, hybrid.schedule(0.5, p_uniform=0.2), mask_id=4)
        tensor([0.6592, 0.1539, 0.7615])
    """
    op = "hybrid.loss"
    checks.option(op, "weighting", weighting, WEIGHTINGS)
    weight, divergence, odds = _elbo(op, logits, z, x, at, mask_id)
    most = checks.within(
        op, "max_weight", checks.number(op, "max_weight", max_weight, z.shape, z.device), 0, torch.inf, "(]"
    )
    if weighting == "dynamic":
        weight = torch.where(z == x, odds, torch.where(z == mask_id, 2.0, 1.0).double())
    else:
        checks.within(op, "at's rate into z", weight, 0, torch.inf)
    return (torch.minimum(weight, most) * divergence).to(_dtype(logits))


def _dtype(logits: Logits) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _elbo(
    op: str, logits: Logits, z: Tensor, x: Tensor, at: Level, mask_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """w, KL + r - log r - 1, and 1/c = υ/(N·α), each float64 per token."""
    is_masked = rows.masked(op, logits, z, mask_id)
    h = categorical.head(op, logits)
    rows.tokens(op, "x", x, h)
    if checks.reads_data(x) and bool((x == mask_id).any()):
        raise ValueError(f"{op}: x must not be the mask token {mask_id}")
    noise = checked(op, "at", at, z.shape, z.device)
    alpha, each = noise.alpha, noise.uniform / (h.vocab - 1)
    log_p = torch.log_softmax(rows.without(op, logits, mask_id), -1)
    log_px, log_pz = (rows.gather(log_p, torch.where(is_masked, x, i)).double() for i in (x, z))
    log_alpha, log_each = alpha.log(), each.log()

    def against(log_q: Tensor, log_p: Tensor) -> Tensor:
        """log of q over α·p + υ/N; without α both are the noise alone."""
        return torch.where(alpha > 0, log_q - rows.logaddexp(log_alpha + log_p, log_each), 0)

    gain = against((alpha + each).log(), log_px)
    spread = each > 0
    log_c = torch.where(spread, log_alpha - torch.where(spread, each, 1).log(), 0)
    total = rows.log1p_scaled(log_c.to(log_p.dtype).unsqueeze(-1) + log_p).sum(-1).double()
    kl = alpha * gain + torch.where(spread, each * (rows.log1p_scaled(log_c) - total), 0)
    log_r = torch.where(z == x, gain, against(log_each, log_pz))
    log_r = torch.where(is_masked, 0, log_r)
    share = torch.where(z == x, each / torch.where(alpha + each > 0, alpha + each, 1), 1)
    weight = torch.where(is_masked, noise.mask_rate, noise.uniform_rate * share)
    odds = torch.where(alpha > 0, each / torch.where(alpha > 0, alpha, 1), torch.inf)
    return weight, kl + torch.expm1(log_r) - log_r, odds
