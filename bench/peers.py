"""The eager torch chains that dlcore is measured against, in the form and precision of the public code.

Each is written from its source's formulas and computes as that code does: float64 where it casts, one-hots
where it makes them. What a caller may prepare once is prepared; nothing is made slower on purpose. All take
logits (..., V) and give tokens (...) or numbers per row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Numbers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def at(x: Tensor, index: Tensor) -> Tensor:
    """x (..., V) at index (...)."""
    return x.gather(-1, index.unsqueeze(-1)).squeeze(-1)


# Draws from probabilities.


def race(p: Tensor) -> Tensor:
    """The exponential race of serving engines (vLLM, gpt-fast)."""
    return (p / torch.empty_like(p).exponential_()).argmax(-1)


def clipped_race(p: Tensor) -> Tensor:
    """The race as diffusion code has it (MDLM, SEDD, Duo): clipped logarithms of uniforms, in p's dtype."""
    return (p / (1e-10 - (torch.rand_like(p) + 1e-10).log())).argmax(-1)


def gumbel_max(log_p: Tensor) -> Tensor:
    """Gumbel-max (leave-one-out diffusion's code)."""
    return (log_p - (-torch.rand_like(log_p).log()).log()).argmax(-1)


# The categorical family.


def sample(logits: Tensor) -> Tensor:
    """Softmax and the exponential race, in float32."""
    return race(torch.softmax(logits, -1, dtype=torch.float32))


def sample_clipped(logits: Tensor) -> Tensor:
    """Softmax and the race with clipped logarithms, in float32."""
    return clipped_race(torch.softmax(logits, -1, dtype=torch.float32))


def sample_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest kept (Hugging Face's warper), then the race."""
    last = logits.topk(k, -1).values[..., -1:]
    return sample(logits.masked_fill(logits < last, -torch.inf))


def sample_top_p(logits: Tensor, top_p: float) -> Tensor:
    """The nucleus by a full sort, the crossing token kept (Hugging Face's warper), then the race."""
    ascending, order = logits.sort(-1)
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    drop[..., -1:] = False
    return sample(logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf))


def stats(logits: Tensor) -> Numbers:
    """logsumexp, argmax, its log-probability, margin and entropy."""
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    p = log_p.exp()
    top, ids = p.topk(2, -1)
    logsumexp = torch.logsumexp(logits, -1)
    entropy = -(p * log_p).sum(-1)
    return logsumexp, ids[..., 0], top[..., 0].log(), top[..., 0] - top[..., 1], entropy


def sample_mixture(logits: Tensor, z: Tensor, keep: float, draw: float) -> Tensor:
    """The mixture written out, keep·δ_z + draw·p + rest·uniform, then the race."""
    q = draw * torch.softmax(logits, -1) + (1 - keep - draw) / logits.shape[-1]
    q.scatter_add_(-1, z.unsqueeze(-1), torch.full_like(q[..., :1], keep))
    return race(q)


def sample_expectation(logits: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A denoising step's soft embedding, draw, argmax and entropy, all from one softmax."""
    p = torch.softmax(logits, -1, dtype=torch.float32)
    return p.to(table.dtype) @ table, race(p), p.argmax(-1), torch.special.entr(p).sum(-1)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """torch's own."""
    return F.cross_entropy(logits, target, reduction="none")


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p‖q) by torch's kl_div of two log-softmaxes."""
    log_p, log_q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def expectation(logits: Tensor, table: Tensor) -> Tensor:
    """The soft embedding."""
    return torch.softmax(logits, -1) @ table


# Uniform-state diffusion.


def loo_step(logits: Tensor, z: Tensor, alpha_t: float, alpha_s: float) -> Tensor:
    """The leave-one-out plug-in bridge (arXiv 2605.22765): float64, two (..., V) factors, Gumbel-max."""
    vocab, ratio = logits.shape[-1], alpha_t / alpha_s
    p = torch.log_softmax(logits.double(), -1).exp()
    forward = torch.full_like(p, (1 - ratio) / vocab)
    forward.scatter_add_(-1, z.unsqueeze(-1), torch.full_like(p[..., :1], ratio))
    total = alpha_t * at(p, z) + (1 - alpha_t) / vocab
    bridge = (alpha_s * p + (1 - alpha_s) / vocab) * forward / total.unsqueeze(-1)
    return gumbel_max(bridge.log())


def loo_step_of_denoiser(logits: Tensor, z: Tensor, alpha_t: float, alpha_s: float) -> Tensor:
    """The same from a denoiser's logits: first a copy with log1p(c) taken off the entry at z."""
    lift = math.log1p(logits.shape[-1] * alpha_t / (1 - alpha_t))
    shifted = logits.double()
    shifted.scatter_add_(-1, z.unsqueeze(-1), torch.full_like(shifted[..., :1], -lift))
    return loo_step(shifted, z, alpha_t, alpha_s)


def duo_posterior(p: Tensor, z: Tensor, alpha_t: float, alpha_s: float) -> Tensor:
    """Duo's posterior (arXiv 2506.10892) with a one-hot of z."""
    vocab, ratio = p.shape[-1], alpha_t / alpha_s
    seen = F.one_hot(z, vocab).to(p.dtype)
    numerator = (
        alpha_t * vocab * p * seen
        + (ratio - alpha_t) * seen
        + (alpha_s - alpha_t) * p
        + (1 - ratio) * (1 - alpha_s) / vocab
    )
    return numerator / (alpha_t * vocab * at(p, z) + 1 - alpha_t).unsqueeze(-1)


def duo_step(logits: Tensor, z: Tensor, alpha_t: float, alpha_s: float) -> Tensor:
    """Duo's ancestral step: float32 log-softmax, float64 posterior and race."""
    p = torch.log_softmax(logits, -1).double().exp()
    return clipped_race(duo_posterior(p, z, alpha_t, alpha_s))


def duo_psi_step(logits: Tensor, z: Tensor, alpha_t: float, alpha_s: float, kappa: float) -> Tensor:
    """Duo's ψ step (arXiv 2602.21185): two posteriors, one pushed forward to s, mixed by kappa."""
    p = torch.log_softmax(logits, -1).double().exp()
    ancestral = duo_posterior(p, z, alpha_t, alpha_s)
    clean = duo_posterior(p, z, alpha_t, 1.0)
    renoised = alpha_s * clean + (1 - alpha_s) / p.shape[-1]
    return clipped_race(kappa * ancestral + (1 - kappa) * renoised)


def duo_nelbo(logits: Tensor, z: Tensor, x: Tensor, alpha: float, dalpha: float) -> Tensor:
    """Duo's closed form of the uniform NELBO, nats per token."""
    vocab = logits.shape[-1]
    mixed = vocab * alpha * torch.log_softmax(logits, -1).exp() + 1 - alpha
    at_z, at_x = at(mixed, z), at(mixed, x)
    same = (x == z).to(mixed.dtype)
    const = (1 - alpha) / (vocab * alpha + 1 - alpha)
    rates = vocab * (1 / (1 - alpha + vocab * alpha * same) - 1 / at_z)
    logs = -(same * const + 1 - same) * (mixed.log().sum(-1) - vocab * at_z.log())
    logs = logs - vocab * alpha / (1 - alpha) * (at_x.log() - at_z.log()) * (1 - same)
    offset = ((vocab - 1) * const * same - (1 - same) / const) * math.log(const)
    return dalpha / (vocab * alpha) * (rates - logs - offset)


def corrector(logits: Tensor, z: Tensor, alpha: float, count: int, tau: float) -> Tensor:
    """One sweep of the informed corrector (arXiv 2605.22765), margin score, in float64."""
    vocab, seen = logits.shape[-1], z.unsqueeze(-1)
    log_p = torch.log_softmax(logits.double(), -1)
    noise = torch.full((), math.log1p(-alpha) - math.log(vocab), dtype=log_p.dtype)
    log_pi = torch.logaddexp(log_p + math.log(alpha), noise)
    best_other = log_pi.scatter(-1, seen, -torch.inf).amax(-1)
    score = best_other - at(log_pi, z)
    gumbel = -(-torch.rand_like(score).log()).log()
    chosen = (score / tau + gumbel).topk(count, -1).indices
    rows = log_pi.gather(1, chosen.unsqueeze(-1).expand(-1, -1, vocab)).exp()
    drawn = torch.multinomial(rows.flatten(0, 1), 1).view_as(chosen)
    return z.scatter(-1, chosen, drawn)


# The absorbing-state reformulation of uniform diffusion (arXiv 2605.22765).


def absorbing_denoiser(logits: Tensor, u: Tensor, alpha: float) -> Tensor:
    """Log-probabilities of the denoiser where z = u, float64."""
    lifted = logits.double()
    lifted.scatter_add_(-1, u.unsqueeze(-1), torch.full_like(lifted[..., :1], -math.log1p(-alpha)))
    return torch.log_softmax(lifted, -1)


def absorbing_step(logits: Tensor, z: Tensor, u: Tensor, alpha_t: float, alpha_s: float) -> Tensor:
    """A draw of ((α_s - α_t)·D + (1 - α_s)·δ_u)/(1 - α_t) where z = u."""
    q = absorbing_denoiser(logits, u, alpha_t).exp() * ((alpha_s - alpha_t) / (1 - alpha_t))
    stay = (1 - alpha_s) / (1 - alpha_t)
    q.scatter_add_(-1, u.unsqueeze(-1), torch.full_like(q[..., :1], stay))
    return torch.where(z == u, gumbel_max(q.log()), z)


def absorbing_remask_step(
    logits: Tensor, z: Tensor, u: Tensor, alpha_t: float, alpha_s: float
) -> tuple[Tensor, Tensor]:
    """A draw of the denoiser, one of the bridge to it written out, and the noise token's law given both."""
    vocab = logits.shape[-1]
    clean = torch.where(z == u, gumbel_max(absorbing_denoiser(logits, u, alpha_t)), z)
    bridge = duo_posterior(F.one_hot(clean, vocab).double(), z, alpha_t, alpha_s)
    z_s = gumbel_max(bridge.log())
    other = (z_s + torch.randint_like(z_s, 1, vocab)) % vocab
    renew = torch.rand(z.shape) * (1 + (vocab - 1) * alpha_s) >= 1
    return z_s, torch.where((z_s == clean) & renew, other, z_s)


# Masked diffusion.


def subs(logits: Tensor, z: Tensor, mask_id: int) -> Tensor:
    """MDLM's log-probabilities: the mask never drawn (the logits lose it in place), other rows one-hot."""
    logits[..., mask_id] = -1e6
    log_p = logits - torch.logsumexp(logits, -1, keepdim=True)
    is_masked = (z == mask_id).unsqueeze(-1)
    log_p = log_p.masked_fill(~is_masked, -1e6)
    return log_p.scatter(-1, z.unsqueeze(-1), torch.where(is_masked, at(log_p, z).unsqueeze(-1), 0.0))


def mdlm_step(logits: Tensor, z: Tensor, alpha_t: float, alpha_s: float, mask_id: int) -> Tensor:
    """MDLM's ancestral step (arXiv 2406.07524), float32."""
    q = subs(logits, z, mask_id).exp() * (alpha_s - alpha_t)
    q[..., mask_id] = 1 - alpha_s
    return torch.where(z == mask_id, clipped_race(q), z)


def remdm_step(
    logits: Tensor, z: Tensor, alpha_t: float, alpha_s: float, mask_id: int, sigma: float
) -> Tensor:
    """ReMDM's step (arXiv 2503.00307): the laws of kept and of masked rows written out, drawn in float64."""
    p = subs(logits, z, mask_id).exp()
    kept = p * (1 - sigma)
    kept[..., mask_id] = sigma
    moved = p * ((alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t))
    moved[..., mask_id] = (1 - alpha_s - sigma * alpha_t) / (1 - alpha_t)
    return clipped_race(torch.where((z != mask_id).unsqueeze(-1), kept, moved).double())


def mdlm_nelbo(logits: Tensor, z: Tensor, x: Tensor, alpha: float, dalpha: float, mask_id: int) -> Tensor:
    """MDLM's NELBO: every row's log-softmax, gathered at x. The mask's logit is lowered out of place."""
    is_mask = torch.arange(logits.shape[-1]) == mask_id
    log_p = torch.log_softmax(logits.masked_fill(is_mask, -torch.inf), -1)
    return torch.where(z == mask_id, dalpha / (1 - alpha) * at(log_p, x), 0)


def _llada_draw(logits: Tensor, z: Tensor, mask_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """LLaDA's float64 draw at temperature 1 and its float32 confidence; -inf where nothing is masked."""
    exact = logits.double()
    drawn = (exact.exp() / -torch.rand_like(exact).log()).argmax(-1)
    is_masked = z == mask_id
    confidence = torch.where(is_masked, at(torch.softmax(logits, -1), drawn), -torch.inf)
    return torch.where(is_masked, drawn, z), confidence, is_masked


def llada_step(logits: Tensor, z: Tensor, mask_id: int, count: int) -> Tensor:
    """LLaDA's low-confidence remasking: per sequence, the `count` most confident draws are kept."""
    drawn, confidence, is_masked = _llada_draw(logits, z, mask_id)
    chosen = torch.zeros_like(is_masked)
    for row in range(len(z)):
        chosen[row, confidence[row].topk(count).indices] = True
    return torch.where(chosen, drawn, z)


def threshold_step(logits: Tensor, z: Tensor, mask_id: int, threshold: float) -> Tensor:
    """Fast-dLLM's rule (arXiv 2505.22618): every draw at least so confident, and the best one."""
    drawn, confidence, is_masked = _llada_draw(logits, z, mask_id)
    chosen = is_masked & ((confidence >= threshold) | (confidence == confidence.amax(-1, keepdim=True)))
    return torch.where(chosen, drawn, z)
