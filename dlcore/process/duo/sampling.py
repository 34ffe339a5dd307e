"""Duo's sampling beside `uniform.step`: where its steps lie, its κ, and its greedy end."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import categorical
from dlcore.linear_logits import LinearLogits
from dlcore.process import _rows as rows
from dlcore.process.uniform import _terms

RULES = ("constant", "cap", "rescale", "remdm")


def kappa(
    rule: str,
    alpha_t: float | Tensor,
    alpha_s: float | Tensor,
    eta: float | Tensor,
    *,
    published: bool = False,
) -> Tensor:
    """κ of a ψ-sampler's step for `uniform.step`: how much of it is ancestral.

    "constant": κ = eta; 1 is ancestral sampling, 0 the pure predictor-corrector. The others are ReMDM's σ
    as κ = 1 - σ/(1 - α_s), cut to [0, 1]: "remdm" has σ = eta, "cap" σ = min(eta, σ_max), "rescale"
    σ = eta·σ_max, with σ_max = min(1, (1-α_s)/α_t). As κ is cut at 0, which σ reaches before σ_max, "cap"
    and "remdm" are one. In the last step, α_s = 1, every κ gives the same law; 1 is returned.

    Args:
        rule: one of the four.
        alpha_t, alpha_s: in [0, 1], alpha_s >= alpha_t.
        eta: in [0, 1]; the three broadcast together.
        published: Duo's code has eta·min(eta, (1-α_s)/α_t) for "rescale", which is ReMDM's only where the
            bound is below eta; this asks for it.

    Returns:
        float64 of the broadcast shape.

    Raises:
        TypeError, ValueError: what does not fit.

    Source:
        The Diffusion Duality, Chapter II, arXiv 2602.21185; ReMDM, arXiv 2503.00307.

    Example:
        >>> from dlcore.process import duo
        >>> duo.kappa("rescale", 0.5, 0.6, 0.05), duo.kappa("constant", 0.5, 0.6, 0.05)
        (tensor(0.9000, dtype=torch.float64), tensor(0.0500, dtype=torch.float64))
    """
    op = "duo.kappa"
    checks.option(op, "rule", rule, RULES)
    if published and rule != "rescale":
        raise ValueError(f"{op}: published is about rule 'rescale', got rule {rule!r}")
    lead, device = rows.together(op, alpha_t=alpha_t, alpha_s=alpha_s, eta=eta)
    t, s = rows.levels(op, alpha_t, alpha_s, lead, device)
    share = rows.level(op, "eta", eta, lead, device)
    noise_s = 1 - s
    if rule == "constant":
        return torch.where(noise_s > 0, share, 1).expand(lead)
    sigma = share
    if rule == "rescale":
        bound = rows.largest_remask(t, s)
        sigma = share * (torch.minimum(bound, share) if published else bound)
    kept = 1 - sigma / torch.where(noise_s > 0, noise_s, 1)
    return torch.where(noise_s > 0, kept.clamp(0, 1), 1).expand(lead)


def _sections(op: str, count: int, high: float, middle: float) -> tuple[int, int]:
    """How many of `count` points belong to the noisy and to the middle section."""
    checks.real(op, "high", high, 0, 1)
    checks.real(op, "middle", middle, 0, 1)
    first, second = round(high * count), round(middle * count)
    if first + second > count:
        raise ValueError(f"{op}: high + middle must be at most 1, got {high} + {middle}")
    return first, second


def alpha_profile(
    steps: int, *, plateau: float | None = None, high: float = 0.2, middle: float = 0.6
) -> Tensor:
    """Noise levels α of a sampler, from 0 to 1: (steps + 1,) float64, on the CPU.

    Linear, or with a plateau linear, constant, linear: a share `high` of the levels rises from 0 to the
    plateau, a share `middle` stays there (where κ < 1 corrects), the rest rises to 1.

    Args:
        steps: >= 1.
        plateau: α in (0, 1), or None.
        high, middle: shares in [0, 1], together at most 1; only with a plateau.

    Raises:
        TypeError, ValueError: what does not fit.

    Source:
        arXiv 2602.21185, where it is a profile of time; as time here is α itself, the plateau is their "inv".

    Example:
        >>> from dlcore.process import duo
        >>> duo.alpha_profile(9, plateau=0.9).float()
        tensor([0.0000, 0.9000, 0.9000, 0.9000, 0.9000, 0.9000, 0.9000, 0.9000, 0.9000, 1.0000])
    """
    op = "duo.alpha_profile"
    checks.integer(op, "steps", steps)
    if steps < 1:
        raise ValueError(f"{op}: steps must be at least 1, got {steps}")
    if plateau is None:
        return torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    checks.real(op, "plateau", plateau)
    if not 0 < plateau < 1:
        raise ValueError(f"{op}: plateau must lie in (0, 1), got {plateau:g}")
    first, second = _sections(op, steps + 1, high, middle)
    rest = steps + 1 - first - second
    if first < 1 or rest < 1:
        raise ValueError(
            f"{op}: high and what high and middle leave must hold a level each, got {first}, {rest}"
        )
    return torch.cat(
        [
            torch.linspace(0, plateau, first, dtype=torch.float64),
            torch.full((second,), plateau, dtype=torch.float64),
            # The ends of the profile are exact however few levels a section has.
            torch.linspace(1, plateau, rest, dtype=torch.float64).flip(0),
        ]
    )


def kappa_profile(
    alphas: Tensor,
    noisy: tuple[str, float],
    between: tuple[str, float],
    clean: tuple[str, float],
    *,
    high: float = 0.2,
    middle: float = 0.6,
    published: bool = False,
) -> Tensor:
    """κ of each step between consecutive `alphas`, by one rule per section: (steps,) float64.

    Args:
        alphas: (steps + 1,) rising levels, of `alpha_profile`, say.
        noisy, between, clean: (rule, eta) of `kappa` for the first, the middle and the last steps.
        high, middle: the first two sections' shares of the levels, as in `alpha_profile`.
        published: of `kappa`, for those sections with rule "rescale".

    Raises:
        TypeError, ValueError: what does not fit.

    Example:
        >>> from dlcore.process import duo
        >>> alphas = duo.alpha_profile(9, plateau=0.9)
        >>> duo.kappa_profile(alphas, ("constant", 1.0), ("remdm", 0.01), ("constant", 1.0)).float()
        tensor([1.0000, 1.0000, 0.9000, 0.9000, 0.9000, 0.9000, 0.9000, 0.9000, 1.0000])
    """
    op = "duo.kappa_profile"
    checks.floating(op, "alphas", alphas)
    if alphas.dim() != 1 or len(alphas) < 2:
        raise ValueError(f"{op}: alphas must be (steps + 1,), steps >= 1, got {tuple(alphas.shape)}")
    first, second = _sections(op, len(alphas), high, middle)
    step = torch.arange(len(alphas) - 1, device=alphas.device)
    start, plateau, end = (
        kappa(rule, alphas[:-1], alphas[1:], eta, published=published and rule == "rescale")
        for rule, eta in (noisy, between, clean)
    )
    return torch.where(step < first, start, torch.where(step < first + second, plateau, end))


def greedy(
    logits: Tensor | LinearLogits,
    z: Tensor,
    alpha: float | Tensor,
    *,
    parameterization: str = "loo",
    published: bool = False,
) -> Tensor:
    """The last step's greedy tail: the likeliest token of the denoiser D(·|z), (...) int64.

    Args:
        logits: (..., V).
        z: (...) int64 observed tokens.
        alpha: in [0, 1], broadcast to z.shape. At 1 z is kept.
        parameterization: as in `uniform.step`.
        published: Duo's code takes the argmax of the network's own output, which for leave-one-out
            networks is not the denoiser's: z then has no say.

    Returns:
        (...) int64; -1 where a row is broken (see `dlcore.categorical`).

    Raises:
        TypeError, ValueError: what does not fit.

    Source:
        The Diffusion Duality, arXiv 2506.10892.

    Example:
        >>> import torch
        >>> from dlcore.process import duo
        >>> loo, z = torch.tensor([[0.2, 0.3, 0.5]]).log(), torch.tensor([0])
        >>> duo.greedy(loo, z, 0.9), duo.greedy(loo, z, 0.9, published=True)
        (tensor([0]), tensor([2]))
    """
    op = "duo.greedy"
    h = categorical.head(op, logits)
    rows.tokens(op, "z", z, h)
    checks.option(op, "parameterization", parameterization, rows.PARAMETERIZATIONS)
    a = rows.level(op, "alpha", alpha, z.shape, z.device)
    if published or parameterization == "denoiser":
        likeliest = categorical.stats(logits).argmax
    else:
        likeliest = categorical.stats(logits, z, shift=_terms.lift(a, h.vocab)).argmax
    return likeliest if published else torch.where(a < 1, likeliest, z)
