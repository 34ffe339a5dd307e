"""Between the leave-one-out posterior, the denoiser and the score."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import categorical
from dlcore.process import _rows as rows
from dlcore.process.uniform import _terms as terms
from dlcore.process.uniform._terms import Logits


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
    size = terms.observed(op, logits, z)
    x = rows.dense(op, logits)
    a = rows.level(op, "alpha", alpha, z.shape, x.device)
    lifted = torch.log_softmax(terms.add_at(x, z, terms.lift(a, size)), -1)
    return torch.where((a < 1).unsqueeze(-1), lifted, rows.point(lifted, z))


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
    size = terms.observed(op, logits, z)
    x = rows.dense(op, logits)
    a = rows.level(op, "alpha", alpha, z.shape, x.device)
    return torch.log_softmax(terms.add_at(x, z, -terms.lift(a, size)), -1)


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
    size = terms.observed(op, logits, z)
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
