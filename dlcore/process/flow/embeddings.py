"""Flows whose clean states are embeddings: LangFlow's matched filter, FLM in d dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import rng
from dlcore.linear_logits import LinearLogits
from dlcore.process import _rows as rows
from dlcore.process.flow import paths


def _table(op: str, table: Tensor) -> None:
    checks.floating(op, "table", table)
    if table.dim() != 2:
        raise ValueError(f"{op}: table must be (V, d), got {tuple(table.shape)}")


def matched_filter(
    x: Tensor, table: Tensor, t: float | Tensor, *, path: str = "lognsr", scale: float | Tensor = 1.0
) -> LinearLogits:
    """What a noisy embedding alone says of its token: logits (α/σ²)⟨x, E_k⟩, never formed.

    With rows of one norm and a uniform prior, softmax of these is the exact posterior of the token given
    x = αE_k + σ·noise: the bias of LangFlow and Plaid (a norm that differs would add -α²‖E_k‖²/(2σ²)).
    On "lognsr" α/σ² = exp((softplus(-γ) - γ)/2). To add them to a network's own head without a second
    product, join the two: ``LinearLogits(torch.cat([h, m.hidden], -1), torch.cat([W, E], -1))``.

    Args:
        x: (..., d) state at t.
        table: (V, d), rows of one norm (LangFlow: √d); not checked.
        t: time, broadcast to x.shape[:-1]; σ > 0 there.
        path: "linear", "edm", "vp" or "lognsr"; by default LangFlow's, whose filter this is, where the other
            functions of this module have "linear".
        scale: of the noise, > 0.

    Returns:
        LinearLogits of (..., V): x scaled by α/σ², and the table, in one dtype, float32 or wider (a narrower
        table is copied). Differentiable.

    Raises:
        TypeError, ValueError: dtypes, shapes or values that do not fit, or σ = 0.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import flow
        >>> m = flow.matched_filter(torch.tensor([2.0, 0.0]), torch.eye(2), 0.0)
        >>> dlcore.categorical.stats(m).argmax, m.hidden
        (tensor(0), tensor([2.8284, 0.0000]))
    """
    op = "flow.matched_filter"
    way = paths.find(op, path)
    _table(op, table)
    checks.floating(op, "x", x)
    if x.shape[-1] != table.shape[-1]:
        raise ValueError(f"{op}: x must be (..., {table.shape[-1]}) as table's rows, got {tuple(x.shape)}")
    x = x.to(torch.promote_types(torch.promote_types(x.dtype, table.dtype), torch.float32))
    at = paths.time(op, "t", t, x, way)
    size = checks.within(
        op, "scale", checks.number(op, "scale", scale, x.shape[:-1], x.device), 0, torch.inf, "()"
    )
    sigma = checks.within(op, "σ(t)", way.sigma(at), 0, torch.inf, "(]")
    gain = way.alpha(at) / sigma / sigma / size**2
    return LinearLogits(paths.per_row(gain, x) * x, table.to(x.dtype))


def flm_factor(table: Tensor) -> Tensor:
    """A factor F (d, d) with F·Fᵀ = EᵀE, once per table, for `flm_noise`.

    FLM's state z is one-hot plus noise in V dimensions, but its network reads y = zE alone, and
    y' = (1-c)y + c·pE is closed in d dimensions: z is never needed. Noise on z is N(0, EᵀE) on y, so

    - start: y = flm_noise(F, (B, L)), at γ = 0;
    - step: ``step(y, categorical.expectation(logits, table), γ, γ_next)``;
    - training: ``interpolate(table[x], γ, noise=flm_noise(F, x.shape))``, the same law with V/d times less
      noise.

    (Not for FMLM's first-stage student, whose correction lives in V dimensions.)

    Args:
        table: (V, d) floating, E. Its rank may be less than d.

    Returns:
        (d, d), float32 or wider; computed in float64: Cholesky's, or where EᵀE is singular a symmetric root.

    Raises:
        TypeError, ValueError: table does not fit.

    Example:
        >>> import torch
        >>> from dlcore.process import flow
        >>> flow.flm_factor(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))
        tensor([[5.0000, 0.0000],
                [1.6000, 1.2000]])
    """
    op = "flow.flm_factor"
    _table(op, table)
    gram = table.double().T @ table.double()
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0:
        values, vectors = torch.linalg.eigh(gram)
        factor = vectors * values.clamp_min(0).sqrt()
    return factor.to(torch.promote_types(table.dtype, torch.float32))


def _lead(op: str, shape: object) -> torch.Size:
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"{op}: shape must be a tuple of ints, got {checks.describe(shape)}")
    for size in shape:
        checks.integer(op, "shape", size)
    if any(size < 0 for size in shape):
        raise ValueError(f"{op}: shape must not be negative, got {tuple(shape)}")
    return torch.Size(shape)


def flm_noise(
    factor: Tensor,
    shape: tuple[int, ...],
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Noise of y = zE: N(0, EᵀE) per row, the state at γ = 0.

    Args:
        factor: (d, d) of `flm_factor`.
        shape: of the rows, (B, L), say.
        key: int64 (2,) or one per row (*shape, 2), see `dlcore.rng`; else from `generator` or torch's own.

    Returns:
        (*shape, d) in factor's dtype.

    Raises:
        TypeError, ValueError: what does not fit.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import flow
        >>> flow.flm_noise(torch.eye(4), (2, 3), key=dlcore.rng.key(7)).shape
        torch.Size([2, 3, 4])
    """
    op = "flow.flm_noise"
    checks.floating(op, "factor", factor)
    if factor.dim() != 2 or factor.shape[0] != factor.shape[1]:
        raise ValueError(f"{op}: factor must be (d, d), got {tuple(factor.shape)}")
    keys = rows.row_keys(op, key, generator, _lead(op, shape), factor.device)
    dtype = torch.float64 if factor.dtype == torch.float64 else torch.float32
    with torch.autocast(factor.device.type, enabled=False):
        return rng.normal(keys, factor.shape[:1], dtype=dtype) @ factor.to(dtype).T
