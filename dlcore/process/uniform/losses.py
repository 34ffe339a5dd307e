"""The NELBO and the denoising cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import categorical
from dlcore.process import _rows as rows
from dlcore.process.uniform import _terms as terms
from dlcore.process.uniform._terms import Logits


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
    size = terms.observed(op, logits, z)
    checks.option(op, "parameterization", parameterization, rows.PARAMETERIZATIONS)
    h = categorical.head(op, logits)
    rows.tokens(op, "x", x, h)
    a = rows.level(op, "alpha", alpha, z.shape, z.device, "()")
    da = rows.slope(op, dalpha, z.shape, z.device)
    shift = _as_number(terms.shift(parameterization, a, size), h)
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
    size = terms.observed(op, logits, z)
    checks.option(op, "parameterization", parameterization, rows.PARAMETERIZATIONS)
    h = categorical.head(op, logits)
    rows.tokens(op, "x", x, h)
    a = rows.level(op, "alpha", alpha, z.shape, z.device)
    if parameterization == "denoiser":
        return -categorical.log_probs(op, logits, x, target_name="x")[0]
    target = torch.where(a < 1, x, -1)
    log_d = categorical.log_probs(op, logits, target, index=z, shift=_as_number(terms.lift(a, size), h))[0]
    return torch.where((a < 1) | (x == z), -log_d, torch.inf)
