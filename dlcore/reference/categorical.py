"""The meaning of the categorical family, in plain torch over (..., V) logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dlcore.reference import rng
from dlcore.reference.rng import Domain

GROUP = 256


def wide(x: Tensor) -> Tensor:
    """At least float32: the dtype that results are given in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def materialize(logits: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Dense logits as they are; a linear head's as hidden @ weight.T + bias in float32 or wider."""
    if weight is None:
        return logits
    product = wide(logits) @ wide(weight).mT
    return product if bias is None else product + wide(bias)


def transform(
    logits: Tensor,
    index: Tensor | None = None,
    shift: Tensor | None = None,
    temperature: Tensor | None = None,
    softcap: float | None = None,
    exclude: int | None = None,
) -> Tensor:
    """(softcap(logits) + shift·1[index]) / temperature, with -inf at `exclude`; temperature 0 counts as 1."""
    x = wide(logits)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    if shift is not None and index is not None:
        bonus = shift.to(x.dtype).expand(index.shape).unsqueeze(-1)
        x = x.scatter_add(-1, index.unsqueeze(-1), bonus)
    if exclude is not None:
        x = x.index_fill(-1, torch.tensor([exclude], device=x.device), -torch.inf)
    if temperature is not None:
        t = temperature.to(x.dtype)
        x = x / torch.where(t == 0, 1, t).unsqueeze(-1)
    return x


def _broken(logits: Tensor, x: Tensor, exclude: int | None = None) -> Tensor:
    """Rows with NaN or +inf before or after the transformation; what stands at `exclude` does not matter."""
    if exclude is not None:
        logits = logits.index_fill(-1, torch.tensor([exclude], device=logits.device), 0)
    return (torch.isnan(logits) | torch.isposinf(logits) | torch.isnan(x) | torch.isposinf(x)).any(-1)


def _invalid(logits: Tensor, x: Tensor, exclude: int | None = None) -> Tensor:
    """Broken rows, and those with nothing but -inf."""
    return _broken(logits, x, exclude) | torch.isneginf(x).all(-1)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """The entry of each row of x (..., n) at index (...)."""
    return x.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def first_largest(x: Tensor) -> Tensor:
    """The lowest index among the largest entries."""
    return (x == x.amax(-1, keepdim=True)).int().argmax(-1)


def _statistics(x: Tensor, index: Tensor | None, invalid: Tensor) -> tuple[Tensor, Tensor]:
    """argmax (...,) and (logsumexp, argmax_logprob, margin, entropy, index_logprob, runner_up_logprob)."""
    lse = torch.logsumexp(x, -1)
    log_p = x - lse.unsqueeze(-1)
    argmax = first_largest(x)
    top = gather(log_p, argmax)
    rest = log_p.scatter(-1, argmax.unsqueeze(-1), -torch.inf).amax(-1)
    entropy = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1)
    at = torch.full_like(lse, torch.nan) if index is None else gather(log_p, index)
    numbers = torch.stack([lse, top, top.exp() - rest.exp(), entropy, at, rest])
    return argmax.masked_fill(invalid, -1), numbers.masked_fill(invalid, torch.nan)


def draw(x: Tensor, key: Tensor) -> Tensor:
    """One token per row of softmax(x): a Gumbel-max over groups of 256, then within the winning group."""
    return winner(x, key)[1]


def winner(x: Tensor, key: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """The score of the draw's group, float64, and the draw, of tokens [first, first + n); a row without any
    mass scores -inf."""
    lead, vocab = x.shape[:-1], x.shape[-1]
    keys = rng.row_keys(key, lead)
    # A vocabulary below one group needs no padding to it.
    size = min(GROUP, vocab)
    groups = F.pad(x, (0, -vocab % size), value=-torch.inf).unflatten(-1, (-1, size))
    count = groups.shape[-2]
    ids = first // GROUP + torch.arange(count, device=x.device)
    group_noise = rng.gumbel_noise(keys, Domain.GROUP, ids.expand(*lead, -1))
    score, best = (torch.logsumexp(groups, -1) + group_noise).max(-1)
    inside = groups.gather(-2, best[..., None, None].expand(*lead, 1, size)).squeeze(-2)
    tokens = first + best.unsqueeze(-1) * GROUP + torch.arange(size, device=x.device)
    return score, gather(tokens, (inside + rng.gumbel_noise(keys, Domain.TOKEN, tokens)).argmax(-1))


def truncate(x: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None) -> Tensor:
    """-inf outside the kept tokens: top_k first, then top_p of what is left, then min_p of the largest.

    Tokens are ordered by descending logit, then ascending id. top_p removes a token where the
    probability before it exceeds p, so the token that crosses p is kept.
    """
    ordered, order = torch.sort(x, dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_k is not None:
        keep &= torch.arange(x.shape[-1], device=x.device) < top_k.unsqueeze(-1)
    p = torch.softmax(ordered.masked_fill(~keep, -torch.inf), -1)
    if top_p is not None:
        keep &= p.cumsum(-1) - p <= top_p.unsqueeze(-1)
    if min_p is not None:
        keep &= p >= min_p.unsqueeze(-1) * p[..., :1]
    keep[..., 0] = True
    return x.masked_fill(~torch.zeros_like(keep).scatter(-1, order, keep), -torch.inf)


def stats(
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    shift: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
) -> tuple[Tensor, Tensor]:
    """The argmax of each row and its six numbers, which `dlcore.categorical.stats` names."""
    dense = materialize(logits, weight, bias)
    x = transform(dense, index, shift, temperature, softcap, exclude)
    return _statistics(x, index, _invalid(dense, x, exclude))


def summary(
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    first: int,
    index: Tensor | None,
    shift: Tensor | None,
    target: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
    skip: Tensor | None,
    key: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What tokens [first, first + n) of a vocabulary say of each row; parts of it merge.

    Ids are the vocabulary's; `first` is a multiple of 256, unless all n tokens lie in one group. numbers
    (8, ...) float64, of logits x scaled by 1/temperature: the largest, the largest other, Σ exp(x - largest),
    Σ exp(x - largest)·(x - largest), the score of the draw's group (logsumexp + Gumbel) and the draw's x, x
    at `index` and at `target` (NaN where they are elsewhere). tokens (2, ...): argmax and draw. Temperature 0
    counts as 1, but that the draw is the argmax, and its score the largest. Rows that `skip` marks, bool or
    uint8, or whose target is negative are not read: they are as ones with nothing but -inf, which have
    largest -inf, sums 0, score -inf and tokens -1, and know no x at `index` either. A row with NaN or +inf
    has a sum of NaN and tokens -1, and no other number means anything.
    """
    dense = materialize(logits, weight, bias)
    unread = torch.zeros(dense.shape[:-1], dtype=torch.bool, device=dense.device)
    if skip is not None:
        unread = unread | (skip != 0)
    if target is not None:
        unread = unread | (target < 0)
    x, broken = part(dense, first, index, shift, temperature, softcap, exclude)
    broken = broken & ~unread
    x = x.double().masked_fill(broken.unsqueeze(-1), 0).masked_fill(unread.unsqueeze(-1), -torch.inf)
    best = first_largest(x)
    top, second = gather(x, best), x.scatter(-1, best.unsqueeze(-1), -torch.inf).amax(-1)
    empty = torch.isneginf(top)
    drop = x - top.masked_fill(empty, 0).unsqueeze(-1)
    mass = drop.exp()
    weighted = torch.where(mass > 0, mass * drop, 0).sum(-1)
    score, drawn = torch.full_like(top, -torch.inf), torch.full_like(best, -1)
    token_logit = score
    if key is not None:
        score, drawn = winner(x, key, first)
        if temperature is not None:
            score, drawn = (
                torch.where(temperature == 0, a, b) for a, b in ((top, score), (first + best, drawn))
            )
        token_logit = gather(x, drawn - first)
    numbers = [top, second, mass.sum(-1).masked_fill(broken, torch.nan), weighted, score, token_logit]
    for ids in (index, target):
        place, found = inside(ids, first, x.shape[-1])
        nowhere = torch.full_like(top, torch.nan)
        known = nowhere if place is None or found is None else torch.where(found, gather(x, place), nowhere)
        numbers.append(known.masked_fill(unread, torch.nan))
    tokens = torch.stack([first + best, drawn]).masked_fill(empty | broken, -1)
    return tokens, torch.stack(numbers)


def part(
    dense: Tensor,
    first: int,
    index: Tensor | None,
    shift: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
) -> tuple[Tensor, Tensor]:
    """`transform` of the logits of tokens from `first` on, and which rows are broken; ids are global."""
    columns = dense.shape[-1]
    at, here = inside(index, first, columns)
    if shift is not None and here is not None:
        shift = torch.where(here, shift, 0)
    local = None if exclude is None or not first <= exclude < first + columns else exclude - first
    x = transform(dense, at, shift, temperature, softcap, local)
    return x, _broken(dense, x, local)


def inside(ids: Tensor | None, first: int, columns: int) -> tuple[Tensor | None, Tensor | None]:
    """Columns of token ids, 0 for those elsewhere, and which are here."""
    if ids is None:
        return None, None
    here = (ids >= first) & (ids < first + columns)
    return torch.where(here, ids - first, 0), here


def sample(
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    shift: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    key: Tensor,
) -> tuple[Tensor, Tensor]:
    """tokens (2, ...): drawn, argmax; numbers (7, ...): the statistics' and the draw's log-probability."""
    dense = materialize(logits, weight, bias)
    x = transform(dense, index, shift, temperature, softcap, exclude)
    invalid = _invalid(dense, x, exclude)
    argmax, numbers = _statistics(x, index, invalid)
    x = x.masked_fill(invalid.unsqueeze(-1), 0)
    kept = x if top_k is None and top_p is None and min_p is None else truncate(x, top_k, top_p, min_p)
    tokens = draw(kept, key)
    if temperature is not None:
        tokens = torch.where(temperature == 0, argmax.clamp(min=0), tokens)
    logprob = gather(x, tokens) - numbers[0]
    return torch.stack([tokens.masked_fill(invalid, -1), argmax]), torch.cat([numbers, logprob.unsqueeze(0)])


def sample_mixture(
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor,
    coefficients: Tensor,
    prior: int,
    shift: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
    key: Tensor,
) -> Tensor:
    """keep z, take a draw, or take the prior (a token id, or -1 for uniform), by one uniform number per row.

    A row whose outcome does not depend on its logits is settled without reading them.
    """
    dense = materialize(logits, weight, bias)
    x = transform(dense, z, shift, temperature, softcap, exclude)
    invalid = _invalid(dense, x, exclude)
    x = x.masked_fill(invalid.unsqueeze(-1), 0)
    log_p = torch.log_softmax(x, -1)
    tokens, p_z = draw(x, key), gather(log_p, z).double().exp()
    if temperature is not None:
        argmax = first_largest(x)
        tokens = torch.where(temperature == 0, argmax, tokens)
        p_z = torch.where(temperature == 0, (argmax == z).double(), p_z)
    return mix(z, coefficients, prior, x.shape[-1], exclude, key, tokens, p_z, invalid)


def mix(
    z: Tensor,
    coefficients: Tensor,
    prior: int,
    vocab: int,
    exclude: int | None,
    key: Tensor,
    tokens: Tensor,
    p_z: Tensor,
    invalid: Tensor,
) -> Tensor:
    """`sample_mixture` of rows that were read: a draw, the probability of z, and which are broken."""
    keys = rng.row_keys(key, z.shape)
    kept, taken, needs_p = _routes(coefficients, p_z, keys)
    result = torch.where(kept, z, torch.where(taken, tokens, _prior(keys, prior, vocab, exclude)))
    return result.masked_fill(invalid & (needs_p | taken), -1)


def settled(coefficients: Tensor, key: Tensor, lead: torch.Size) -> Tensor:
    """The rows (...) whose outcome does not depend on their logits."""
    keys = rng.row_keys(key, lead)
    _, taken, needs_p = _routes(coefficients, torch.zeros(lead, device=key.device), keys)
    return ~(needs_p | taken)


def _routes(coefficients: Tensor, p_z: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where z is kept, where a draw is taken, and where that depends on p(z)."""
    d0, d1, k0, k1, p0, p1 = coefficients.double().unbind(-1)
    needs_p = (d1 != 0) | (k1 != 0) | (p1 != 0)
    p_z = torch.where(needs_p, p_z.double(), 0)
    total, keep, take = d0 + d1 * p_z, k0 + k1 * p_z, p0 + p1 * p_z
    first = torch.zeros(*keys.shape[:-1], 1, dtype=torch.int64, device=keys.device)
    mark = rng.uniform_noise(keys, Domain.ROUTE, first).squeeze(-1) * total
    # A state without any mass (a clean position with p(z) = 0) stays what it is.
    kept = (mark < keep) | ~(total > 0)
    return kept, ~kept & (mark < keep + take), needs_p


def _prior(keys: Tensor, prior: int, vocab: int, exclude: int | None) -> Tensor:
    one = torch.ones(*keys.shape[:-1], 1, dtype=torch.int64, device=keys.device)
    if prior >= 0:
        return one.squeeze(-1) * prior
    if exclude is None:
        return rng.below(keys, Domain.ROUTE, one, vocab).squeeze(-1)
    drawn = rng.below(keys, Domain.ROUTE, one, vocab - 1).squeeze(-1)
    return drawn + (drawn >= exclude).long()


def log_probs(
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    index: Tensor | None,
    shift: Tensor | None,
    softcap: float | None,
    exclude: int | None,
) -> Tensor:
    """(3, ...): log p[target], log p[index], logsumexp, under a shift at `index`; 0 where target < 0."""
    dense = materialize(logits, weight, bias)
    # Rows without a target are not read: whatever they hold, even their gradient is 0.
    dense = dense.where((target >= 0).unsqueeze(-1), 0)
    x = transform(dense, index, shift, None, softcap, exclude)
    lse = torch.logsumexp(x, -1).masked_fill(_invalid(dense, x, exclude), torch.nan)
    at_target = gather(x, target.clamp(min=0)) - lse
    at_index = torch.zeros_like(lse) if index is None else gather(x, index) - lse
    return torch.stack([at_target, at_index, lse]).where(target >= 0, 0).double()


def log_probs_about(
    numbers: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    index: Tensor | None,
    shift: Tensor | None,
    softcap: float | None,
    exclude: int | None,
) -> Tensor:
    """What has the gradient of `log_probs` at its results, which may be of more tokens than here."""
    dense = materialize(logits, weight, bias).where((target >= 0).unsqueeze(-1), 0)
    x = transform(dense, index, shift, None, softcap, exclude)
    # Its gradient is that of the logsumexp: the probabilities.
    lse = (x - numbers[2].unsqueeze(-1)).exp().sum(-1)
    at_target = gather(x, target.clamp(min=0)) - lse
    at_index = torch.zeros_like(lse) if index is None else gather(x, index) - lse
    return torch.stack([at_target, at_index, lse]).where(target >= 0, 0).double()


def kl(
    p_logits: Tensor,
    p_weight: Tensor | None,
    p_bias: Tensor | None,
    q_logits: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    temperature: Tensor | None,
) -> Tensor:
    """(3, ...): KL(p || q), and the two logsumexps, -inf where a row has nothing but -inf: KL is NaN then."""
    p_dense, q_dense = materialize(p_logits, p_weight, p_bias), materialize(q_logits, q_weight, q_bias)
    p, q = transform(p_dense, temperature=temperature), transform(q_dense, temperature=temperature)
    p_lse = torch.logsumexp(p, -1).masked_fill(_broken(p_dense, p), torch.nan)
    q_lse = torch.logsumexp(q, -1).masked_fill(_broken(q_dense, q), torch.nan)
    log_p, log_q = p - p_lse.unsqueeze(-1), q - q_lse.unsqueeze(-1)
    # 0 · (-inf - log q) is 0: a token that p excludes costs nothing.
    gap = torch.where(torch.isneginf(log_p), 0, log_p) - torch.where(torch.isneginf(log_p), 0, log_q)
    return torch.stack([(log_p.exp() * gap).sum(-1), p_lse, q_lse]).double()


def kl_about(
    numbers: Tensor,
    p_logits: Tensor,
    p_weight: Tensor | None,
    p_bias: Tensor | None,
    q_logits: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    temperature: Tensor | None,
) -> Tensor:
    """What has the gradient of `kl` at its results, which may be of more tokens than here."""
    divergence, p_lse, q_lse = numbers.unsqueeze(-1)
    p = transform(materialize(p_logits, p_weight, p_bias), temperature=temperature)
    q = transform(materialize(q_logits, q_weight, q_bias), temperature=temperature)
    log_p, log_q = p - p_lse, q - q_lse
    pull = (log_p.exp() * (log_p - log_q - divergence)).masked_fill(torch.isneginf(p), 0).detach()
    push = (log_q.exp() - log_p.exp()).detach()
    both = (pull * p.masked_fill(torch.isneginf(p), 0) + push * q).sum(-1)
    return torch.stack([both, log_p.exp().sum(-1), log_q.exp().sum(-1)]).double()


def expectation(
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
) -> tuple[Tensor, Tensor]:
    """Σ_k softmax_k table[k] (..., E) and the logsumexp (...), -inf, and a mean of NaN, where all is -inf."""
    dense = materialize(logits, weight, bias)
    x = transform(dense, None, None, temperature, softcap, exclude)
    lse = torch.logsumexp(x, -1).masked_fill(_broken(dense, x, exclude), torch.nan)
    p = (x - lse.unsqueeze(-1)).exp()
    return p @ wide(table).to(p.dtype), lse.double()


def expectation_about(
    mean: Tensor,
    lse: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
) -> Tensor:
    """What has the gradient of `expectation` at its results, which may be of more tokens than here."""
    x = transform(materialize(logits, weight, bias), None, None, temperature, softcap, exclude)
    p = (x - lse.unsqueeze(-1).to(x.dtype)).exp()
    return p @ wide(table).to(p.dtype) - mean.to(p.dtype) * p.sum(-1, keepdim=True)


def sample_expectation(
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
    index: Tensor | None,
    key: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`expectation`'s mean and logsumexp, `sample`'s tokens and numbers."""
    row = (temperature, softcap, exclude)
    with torch.no_grad():
        drawn = sample(logits, weight, bias, index, None, *row, None, None, None, key)
    return *expectation(logits, weight, bias, table, *row), *drawn
