"""Score entropy (SEDD) for absorbing and uniform noise, and the analytic reverse step.

The network gives log-scores, log s(y) with s(y) = p_t(z with y at l) / p_t(z) for every token y; the entry at
z itself counts as 0, whatever stands there. With `mask_id` the noise is absorbing and only masked positions
have a score; without it the noise is uniform. SEDD writes the noise as σ with α = exp(-σ); here it is alpha
(``float | Tensor``, broadcast to z's shape, best in float64) and dalpha = dα/dt, so σ' = -α'/α.

An exact score makes score entropy the NELBO: `entropy` of `denoiser_to_log_score` equals `masked.nelbo`, and
of `uniform.loo_to_log_score` equals `uniform.nelbo`; the analytic step is then the exact bridge.

Source: SEDD, arXiv 2310.16834.

Example:
    A loss of absorbing noise at α = 1 - t, whose mean over t bounds -log p(x), and a sample in eight steps.

    >>> import torch
    >>> from dlcore.process import masked, score
    >>> network = torch.nn.Sequential(torch.nn.Embedding(9, 16), torch.nn.Linear(16, 9))
    >>> absorbing = dict(mask_id=8, scaled=True)
    >>> x, alpha = torch.randint(8, (2, 6)), torch.rand(2, 1, dtype=torch.float64)
    >>> z = masked.corrupt(x, alpha, mask_id=8)
    >>> score.entropy(network(z), z, x, alpha, -1.0, **absorbing).mean().backward()
    >>> z = torch.full((2, 6), 8)
    >>> for step in range(8):
    ...     z = score.step(network(z), z, step / 8, (step + 1) / 8, **absorbing)
    >>> bool((z < 8).all())
    True
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import categorical
from dlcore.linear_logits import LinearLogits
from dlcore.process import _rows as rows

__all__ = ["bridge_log_probs", "denoiser_to_log_score", "entropy", "step"]

Logits = Tensor | LinearLogits


def _observed(op: str, log_score: Logits, z: Tensor, mask_id: int | None, scaled: bool) -> int:
    """V, after checks of what every function takes."""
    h = categorical.head(op, log_score, "log_score")
    rows.tokens(op, "z", z, h)
    if h.vocab < 2:
        raise ValueError(f"{op}: log_score must be (..., V) with V >= 2, got V = {h.vocab}")
    checks.token_id(op, "mask_id", mask_id, h.vocab)
    if scaled and mask_id is None:
        raise ValueError(f"{op}: scaled is of absorbing noise and needs mask_id")
    return h.vocab


def _offset(alpha: Tensor, vocab: int, scaled: bool) -> Tensor:
    """What makes log s - log k of the network's output: with k = α/(1-α), masked scores are at most k."""
    if scaled:
        return torch.full_like(alpha, -math.log(vocab - 1))
    odd = (alpha == 0) | (alpha == 1)
    inside = torch.where(odd, 0.5, alpha)
    return torch.where(odd, 0, torch.log1p(-inside) - inside.log())


def denoiser_to_log_score(logits: Logits, z: Tensor, alpha: float | Tensor, mask_id: int) -> Tensor:
    """Log-scores of absorbing noise from a masked denoiser: log p(y) + log(α/(1-α)) where z is masked.

    Rows that hold a token have 0 at it and -inf elsewhere: no reverse rate leaves them. For uniform noise see
    `uniform.loo_to_log_score`.

    Args:
        logits: (..., V), need not be normalised; the mask token has probability 0.
        z: (...) int64 observed tokens.
        alpha: in [0, 1], below 1 where z is masked.
        mask_id: the mask token.

    Returns:
        (..., V) in nats, float32 or wider. Differentiable in logits.

    Example:
        >>> import torch
        >>> from dlcore.process import score
        >>> score.denoiser_to_log_score(torch.zeros(1, 3), torch.tensor([2]), 0.8, mask_id=2).exp()
        tensor([[2., 2., 1.]])
    """
    op = "score.denoiser_to_log_score"
    checks.integer(op, "mask_id", mask_id)
    _observed(op, logits, z, mask_id, False)
    a = rows.level(op, "alpha", alpha, z.shape, z.device)
    is_masked = z == mask_id
    _below_one(op, a, is_masked)
    column = rows.column(mask_id, z)
    log_p = torch.log_softmax(rows.dense(op, logits).index_fill(-1, column, -torch.inf), -1)
    log_k = torch.where(a < 1, a.log() - torch.log1p(-torch.where(a < 1, a, 0)), 0)
    scores = (log_p + log_k.to(log_p.dtype).unsqueeze(-1)).index_fill(-1, column, 0)
    return torch.where(is_masked.unsqueeze(-1), scores, rows.point(scores, z))


def _below_one(op: str, alpha: Tensor, is_masked: Tensor) -> None:
    if checks.reads_data(alpha) and bool((is_masked & (alpha == 1)).any()):
        raise ValueError(f"{op}: alpha must be below 1 where z is masked, got 1")


def entropy(
    log_score: Logits,
    z: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    dalpha: float | Tensor,
    *,
    mask_id: int | None = None,
    scaled: bool = False,
) -> Tensor:
    """Denoising score entropy at one noise level, σ'·Σ_{y≠z} Q(y, z)·[s - r·log s + r·(log r - 1)], in nats.

    r(y) = q(y|x)/q(z|x). Its mean over t ~ U(0, 1) and z ~ q(z|x) bounds -log p(x), as that of a NELBO does.
    One read: with absorbing noise a log-sum-exp and an entry of the masked rows, and
    -α'/(1-α)·[Σ_y s_y/k - log(s_x/k) - 1] with k = α/(1-α); with uniform noise also the sum of the
    log-scores, which a `LinearLogits` has from the sum of its weight's rows.

    Args:
        log_score: (..., V).
        z, x: (...) int64 observed and clean tokens.
        alpha: in (0, 1), broadcast to z.shape; with scaled 0 is accepted, and 1 where z is not masked.
        dalpha: dα/dt <= 0, broadcast to z.shape.
        mask_id: the absorbing token; None for uniform noise.
        scaled: log_score is a network's output a in SEDD's absorbing parametrisation, which stands for
            log s = a + log(α/(1-α)) - log(V-1), so that a = 0 is a uniform guess at any noise level.

    Returns:
        (...) float32 (float64 for float64 log-scores), differentiable in log_score.

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, levels, scaled without mask_id.

    Source:
        SEDD, arXiv 2310.16834.

    Example:
        >>> import torch
        >>> from dlcore.process import score
        >>> z, x = torch.tensor([4, 1]), torch.tensor([2, 1])
        >>> score.entropy(torch.zeros(2, 5), z, x, 0.5, -1.0, mask_id=4, scaled=True)
        tensor([2.7726, 0.0000])
    """
    op = "score.entropy"
    vocab = _observed(op, log_score, z, mask_id, scaled)
    h = categorical.head(op, log_score, "log_score")
    rows.tokens(op, "x", x, h)
    a = rows.level(
        op, "alpha", alpha, z.shape, z.device, "[]" if scaled else "(]" if mask_id is not None else "()"
    )
    da = rows.slope(op, dalpha, z.shape, z.device)
    if mask_id is None:
        return _uniform_entropy(op, log_score, z, x, a, da)
    is_masked = z == mask_id
    _below_one(op, a, is_masked)
    log_px, _, lse = categorical.log_probs(
        op, log_score, torch.where(is_masked, x, -1), exclude=mask_id, target_name="x"
    ).unbind(0)
    total = lse.double() + _offset(a, vocab, scaled)
    loss = -da / torch.where(is_masked, 1 - a, 1) * (torch.expm1(total) - total - log_px.double())
    return torch.where(is_masked, loss, 0).to(log_px.dtype)


def _uniform_entropy(
    op: str, log_score: Logits, z: Tensor, x: Tensor, alpha: Tensor, dalpha: Tensor
) -> Tensor:
    vocab = categorical.head(op, log_score).vocab
    # A shift of -inf at z leaves the sum over the others.
    log_px, _, lse = categorical.log_probs(
        op, log_score, x, index=z, shift=alpha.new_full((), -torch.inf, dtype=torch.float32), target_name="x"
    ).unbind(0)
    at_x, others = torch.where(x == z, 0, log_px + lse).double(), lse.double().exp()
    logs = _others_sum(log_score, z).double()
    c = vocab * alpha / (1 - alpha)
    lam = torch.log1p(c)
    same = others - (logs + (vocab - 1) * (lam + 1)) / (1 + c)
    other = others - logs - c * at_x - (vocab - 2) + (1 + c) * (lam - 1)
    loss = -dalpha / (vocab * alpha) * torch.where(z == x, same, other)
    return loss.to(log_px.dtype)


def _others_sum(log_score: Logits, z: Tensor) -> Tensor:
    """Σ_{y≠z} of the entries, float32 or wider."""
    rows.whole("score.dwdse_loss", log_score, "log_score")
    if isinstance(log_score, LinearLogits):
        wide = torch.promote_types(log_score.dtype, torch.float32)
        hidden, weight = log_score.hidden.to(wide), log_score.weight.to(wide)
        total = hidden @ weight.sum(0) - (hidden * weight[z]).sum(-1)
        bias = log_score.bias
        return total if bias is None else total + bias.to(wide).sum() - bias.to(wide)[z]
    wide_score = log_score.to(torch.promote_types(log_score.dtype, torch.float32))
    return wide_score.scatter(-1, z.unsqueeze(-1), 0).sum(-1)


def bridge_log_probs(
    log_score: Logits,
    z: Tensor,
    alpha_t: float | Tensor,
    alpha_s: float | Tensor,
    *,
    mask_id: int | None = None,
    scaled: bool = False,
) -> Tensor:
    """The law that `step` draws from: the reverse step by discrete Tweedie, written out.

    The score is carried from t to s as a ratio of probabilities, e^{-Q·dσ}·s, and met with the transition
    from s to z. With e^{-dσ} = α_t/α_s = r: uniform, [s(y) - (1-r)/V·Σs]·[r·1[y=z] + (1-r)/V]/r; absorbing,
    a masked position takes y with mass s(y)·(1/r - 1) and stays with the rest. Masses that come out negative
    (no law has this score) count as 0 and the others are normalised.

    Arguments and raises: as in `step`.

    Returns:
        (..., V) in nats, float32 or wider. Differentiable in log_score.

    Example:
        >>> import torch
        >>> from dlcore.process import score, uniform
        >>> log_score = uniform.loo_to_log_score(torch.tensor([10.0, 15.0, 11.0]).log(), torch.tensor(0), 0.4)
        >>> score.bridge_log_probs(log_score, torch.tensor(0), 0.4, 0.7).exp()
        tensor([0.6760, 0.1798, 0.1441])
    """
    op = "score.bridge_log_probs"
    vocab = _observed(op, log_score, z, mask_id, scaled)
    t, s = _levels(op, alpha_t, alpha_s, z, scaled)
    scores = rows.dense(op, log_score, "log_score")
    if mask_id is None:
        return _tweedie(scores, z, rows.ratio(t, s))
    column = rows.column(mask_id, z)
    raw = scores.index_fill(-1, column, -torch.inf)
    total = torch.logsumexp(raw, -1)
    reveal = _reveal(total.double(), t, s, vocab, scaled).to(raw.dtype)
    moves = reveal > 0
    log_reveal = torch.where(moves, reveal, 1).log().masked_fill(~moves, -torch.inf)
    law = raw - (total - log_reveal).unsqueeze(-1)
    law = torch.where(
        (torch.arange(vocab, device=z.device) == mask_id), torch.log1p(-reveal).unsqueeze(-1), law
    )
    return torch.where((z == mask_id).unsqueeze(-1), law, rows.point(law, z))


def _levels(
    op: str, alpha_t: float | Tensor, alpha_s: float | Tensor, z: Tensor, scaled: bool
) -> tuple[Tensor, Tensor]:
    """alpha_t and alpha_s; a score at alpha_t = 0 tells nothing, unless it is scaled."""
    t, s = rows.levels(op, alpha_t, alpha_s, z.shape, z.device)
    checks.within(op, "alpha_t", t, 0, 1, "[]" if scaled else "(]")
    return t, s


def _reveal(lse: Tensor, alpha_t: Tensor, alpha_s: Tensor, vocab: int, scaled: bool) -> Tensor:
    """The probability to unmask, Σs·(1/r - 1) = Σ(s/k)·(α_s-α_t)/(1-α_t); 1 in the last step."""
    share = (alpha_s - alpha_t) / torch.where(alpha_t < 1, 1 - alpha_t, 1)
    mass = (lse + _offset(alpha_t, vocab, scaled)).exp() * share
    return torch.where((alpha_s == 1) & (alpha_t < 1), 1, mass.clamp(max=1))


def _tweedie(scores: Tensor, z: Tensor, ratio: Tensor) -> Tensor:
    vocab = scores.shape[-1]
    at_z = z.unsqueeze(-1)
    r = ratio.to(scores.dtype).unsqueeze(-1)
    spread = ((1 - ratio) / vocab).to(scores.dtype).unsqueeze(-1)
    carried = torch.softmax(scores.scatter(-1, at_z, 0), -1) - spread
    mass = carried * torch.where(torch.arange(vocab, device=z.device) == at_z, r + spread, spread)
    possible = mass > 0
    log_mass = torch.where(possible, mass, 1).log().masked_fill(~possible, -torch.inf)
    return torch.log_softmax(log_mass, -1)


def step(
    log_score: Logits,
    z: Tensor,
    alpha_t: float | Tensor,
    alpha_s: float | Tensor,
    *,
    mask_id: int | None = None,
    scaled: bool = False,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One analytic reverse step (Tweedie τ-leaping) from alpha_t to alpha_s: a draw from `bridge_log_probs`.

    alpha_s = 1 is SEDD's final denoising: with absorbing noise every masked position is unmasked. Absorbing
    noise takes one read of log_score; with uniform noise the law (..., V) is written out: it is the draw of
    the score less a uniform part, and so no mixture.

    Args:
        log_score: (..., V).
        z: (...) int64 observed tokens.
        alpha_t, alpha_s: in [0, 1], alpha_s >= alpha_t, broadcast to z.shape. alpha_t is positive unless
            scaled.
        mask_id, scaled: as in `entropy`.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        z_s (...) int64; -1 where a row that had to be read is broken (see `dlcore.categorical`).

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, levels, alpha_s below alpha_t, scaled without mask_id.

    Source:
        SEDD, arXiv 2310.16834.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import score
        >>> z = torch.full((2, 8), 999)
        >>> out = torch.randn(2, 8, 1000)
        >>> score.step(out, z, 0.0, 0.5, mask_id=999, scaled=True, key=dlcore.rng.key(7)).shape
        torch.Size([2, 8])
    """
    op = "score.step"
    vocab = _observed(op, log_score, z, mask_id, scaled)
    t, s = _levels(op, alpha_t, alpha_s, z, scaled)
    keys = rows.row_keys(op, key, generator, z.shape, z.device, log_score)
    if mask_id is None:
        law = _tweedie(rows.dense(op, log_score, "log_score"), z, rows.ratio(t, s))
        return categorical.sample(law, key=keys).tokens
    draw = categorical.sample(log_score, exclude=mask_id, key=keys)
    (route,) = rows.uniforms(keys, 1)
    reveal = _reveal(draw.stats.logsumexp.double(), t, s, vocab, scaled)
    # A broken row has no sum, and is broken whatever the route.
    moves = (z == mask_id) & ((route < reveal) | (draw.tokens < 0))
    return torch.where(moves, draw.tokens, z)
