"""The categorical family on the compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dlcore import _C
from dlcore._tensors import empty
from dlcore.cpu.linear_logits import Head, HeadGradient, matmul, tile_width, tiles, vocab_size
from dlcore.cpu.tensors import keyed, per_row, rows_contiguous, scratch, strided, threads, view, workspace


class Softmax:
    """Softmax's parameters for the compiled module; holds the tensors that they point to.

    `packed` is for logits as they are; a head's tiles may be asked for softcapped, by `cap`: `packed_capped`.
    """

    def __init__(
        self,
        head: Head,
        index: Tensor | None = None,
        shift: Tensor | None = None,
        temperature: Tensor | None = None,
        softcap: float | None = None,
        exclude: int | None = None,
    ) -> None:
        self.index = None if index is None else index.contiguous()
        self.shift = None if shift is None else per_row(shift, head[0].shape[:-1])
        self.temperature = None if temperature is None else per_row(temperature, head[0].shape[:-1])
        at_index = None if self.index is None else (self.index.data_ptr(), 1)
        row = (at_index, strided(self.shift), strided(self.temperature))
        self.packed = (*row, softcap, exclude)
        self.cap = None if head[1] is None else softcap
        self.packed_capped = self.packed if self.cap is None else (*row, None, exclude)


def scan(
    head: Head,
    softmax: Softmax,
    target: Tensor | None = None,
    key: Tensor | None = None,
    skip: int = 0,
    cuts: int = 0,
    state: str = "summaries",
    begin: int = 0,
) -> int:
    """One read of the logits, of tokens from `begin` on: the address of a summary per row, kept until the
    next scan of that name."""
    summaries = _summaries(head, state)
    if head[1] is None:
        _scan(rows_contiguous(head[0]), begin, True, softmax, summaries, target, key, skip, cuts)
        return summaries
    for _ in scanned_tiles(head, softmax, summaries, target, key, skip, cuts, begin=begin):
        pass
    return summaries


def _summaries(head: Head, name: str = "summaries") -> int:
    logits = head[0]
    return scratch(name, logits.numel() // logits.shape[-1] * _C.SUMMARY_BYTES)


def scanned_tiles(
    head: Head,
    softmax: Softmax,
    summaries: int,
    target: Tensor | None = None,
    key: Tensor | None = None,
    skip: int = 0,
    cuts: int = 0,
    width: int | None = None,
    begin: int = 0,
) -> Iterator[tuple[int, Tensor]]:
    """(first column, tile): each tile once the summaries know it. The head's tokens count from `begin`."""
    for first, tile in tiles(head, softcap=softmax.cap, width=width):
        _scan(tile, begin + first, first == 0, softmax, summaries, target, key, skip, cuts)
        yield first, tile


def _scan(
    tile: Tensor,
    first: int,
    start: bool,
    softmax: Softmax,
    summaries: int,
    target: Tensor | None,
    key: Tensor | None,
    skip: int,
    cuts: int,
) -> None:
    """Bring the summaries up to this tile."""
    _C.scan(
        view(tile),
        first,
        start,
        softmax.packed_capped,
        None if target is None else (target.data_ptr(), 1),
        None if key is None else keyed(key),
        skip,
        cuts,
        summaries,
        threads(tile.numel()),
    )


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
    """argmax (...) and its row's numbers (6, ...), by one read."""
    lead, head = logits.shape[:-1], (logits, weight, bias)
    softmax = Softmax(head, index, shift, temperature, softcap, exclude)
    state = scan(head, softmax)
    argmax = empty(lead, torch.int64)
    numbers = torch.empty(6, *lead, dtype=torch.float32)
    _C.finish_stats(state, argmax.numel(), argmax.data_ptr(), numbers.data_ptr())
    return argmax, numbers


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
    """Argmax and draw (2, ...) and what else merges (8, ...) of tokens from `first` on, by one read."""
    lead, head = logits.shape[:-1], (logits, weight, bias)
    softmax = Softmax(head, index, shift, temperature, softcap, exclude)
    target, skip, key = (None if x is None else x.contiguous() for x in (target, skip, key))
    state = scan(head, softmax, target, key, 0 if skip is None else skip.data_ptr(), begin=first)
    tokens = torch.empty(2, *lead, dtype=torch.int64)
    numbers = torch.empty(8, *lead, dtype=torch.float64)
    _C.finish_summary(state, lead.numel(), tokens.data_ptr(), numbers.data_ptr())
    return tokens, numbers


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
    """Tokens and argmax (2, ...), numbers (7, ...): one read; to truncate, a search and a second read."""
    lead, key = logits.shape[:-1], key.contiguous()
    head = (logits, weight, bias)
    softmax = Softmax(head, index, shift, temperature, softcap, exclude)
    if top_k is None and top_p is None and min_p is None:
        state = drawn = scan(head, softmax, key=key)
    else:
        state = scan(head, softmax)
        cuts = _cuts(head, softmax, state, top_k, top_p, min_p)
        drawn = scan(head, softmax, key=key, cuts=cuts, state="drawn summaries")
    return _drawn(state, drawn, lead)


def _drawn(state: int, drawn: int, lead: torch.Size) -> tuple[Tensor, Tensor]:
    """Tokens and argmax (2, ...), numbers (7, ...)."""
    tokens = torch.empty(2, *lead, dtype=torch.int64)
    numbers = torch.empty(7, *lead, dtype=torch.float32)
    _C.finish_sample(state, drawn, tokens.numel() // 2, tokens.data_ptr(), numbers.data_ptr())
    return tokens, numbers


def _cuts(
    head: Head,
    softmax: Softmax,
    state: int,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> int:
    """Per row the last entry that a truncated draw keeps. top_p counts within what top_k keeps."""
    lead = head[0].shape[:-1]
    top_k, top_p, min_p = per_row(top_k, lead), per_row(top_p, lead), per_row(min_p, lead)
    selections = 0
    if top_k is not None:
        selections = _select(head, softmax, state, top_k, None, 0, "selections")
    if top_p is not None:
        selections = _select(head, softmax, state, top_k, top_p, selections, "inner selections")
    rows = lead.numel()
    cuts = scratch("cuts", rows * _C.CUT_BYTES)
    _C.finish_selections(state, rows, strided(min_p), softmax.packed[2], selections, cuts)
    return cuts


def _select(
    head: Head,
    softmax: Softmax,
    state: int,
    top_k: Tensor | None,
    top_p: Tensor | None,
    within: int,
    name: str,
) -> int:
    """The last kept entry of every row, by a radix search over the logits' ordered bits."""
    rows = head[0].shape[:-1].numel()
    selections = scratch(name, rows * _C.SELECTION_BYTES)
    _C.start_selections(state, rows, strided(top_k), strided(top_p), within, selections)
    vocab = vocab_size(head[0], head[1])
    bins = workspace("bins", rows * _C.BINS_BYTES // 4)
    for level in range(_C.LEVELS):
        bins.zero_()
        for first, tile in tiles(head, softcap=softmax.cap):
            _C.histogram(
                view(tile),
                first,
                vocab,
                softmax.packed_capped,
                state,
                selections,
                level,
                bins.data_ptr(),
                threads(tile.numel()),
            )
        _C.narrow(bins.data_ptr(), rows, level, selections)
    return selections


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
    """Tokens (...); rows whose z surely stays are not read."""
    lead, key = logits.shape[:-1], key.contiguous()
    head, rows = (logits, weight, bias), lead.numel()
    softmax = Softmax(head, z, shift, temperature, softcap, exclude)
    assert softmax.index is not None
    shared = coefficients.numel() == 6
    coefficients = coefficients.contiguous() if shared else coefficients.expand(*lead, 6).contiguous()
    mixture = (
        vocab_size(logits, weight),
        softmax.index.data_ptr(),
        (coefficients.data_ptr(), 0 if shared else 6),
        prior,
        exclude,
        softmax.packed[2],
        keyed(key),
    )
    skip = scratch("skip", rows)
    _C.plan_mixture(mixture, rows, skip)
    state = scan(head, softmax, key=key, skip=skip)
    tokens = empty(lead, torch.int64)
    _C.finish_mixture(mixture, rows, state, skip, tokens.data_ptr())
    return tokens


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
    lead, head, target = logits.shape[:-1], (logits, weight, bias), target.contiguous()
    softmax = Softmax(head, index, shift, None, softcap, exclude)
    state = scan(head, softmax, target=target)
    numbers = torch.empty(3, *lead, dtype=torch.float64)
    at_target = (target.data_ptr(), 1)
    _C.finish_log_probs(state, at_target, index is not None, lead.numel(), numbers.data_ptr())
    return numbers


def log_probs_backward(
    grad: Tensor,
    numbers: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    index: Tensor | None,
    shift: Tensor | None,
    softcap: float | None,
    exclude: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the head, tile by tile from the logsumexp."""
    target, grad, numbers = target.contiguous(), grad.contiguous(), numbers.contiguous()
    head = (logits, weight, bias)
    softmax = Softmax(head, index, shift, None, softcap, exclude)
    result = HeadGradient(head)
    for first, tile in tiles(head):
        gradient = result.tile(first, tile)
        _C.log_probs_backward(
            view(tile),
            first,
            softmax.packed,
            (target.data_ptr(), 1),
            grad.data_ptr(),
            numbers.data_ptr(),
            view(gradient),
            threads(tile.numel()),
        )
        result.add(first, gradient)
    return result.result()


def _pairs(p: Head, q: Head) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Tiles of two heads side by side."""
    width = None if p[1] is None and q[1] is None else tile_width(p[0].shape[:-1].numel())
    left, right = tiles(p, width=width, buffer="tile p"), tiles(q, width=width, buffer="tile q")
    for (first, p_tile), (_, q_tile) in zip(left, right, strict=True):
        yield first, p_tile, q_tile


def kl(
    p_logits: Tensor,
    p_weight: Tensor | None,
    p_bias: Tensor | None,
    q_logits: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    temperature: Tensor | None,
) -> Tensor:
    """(3, ...): KL(p || q), and the two logsumexps."""
    lead = p_logits.shape[:-1]
    temperature = per_row(temperature, lead)
    state = scratch("kl summaries", lead.numel() * _C.KL_SUMMARY_BYTES)
    _C.clear_kl(state, lead.numel())
    for _, p, q in _pairs((p_logits, p_weight, p_bias), (q_logits, q_weight, q_bias)):
        _C.kl(view(p), view(q), strided(temperature), state, threads(p.numel()))
    numbers = torch.empty(3, *lead, dtype=torch.float64)
    _C.finish_kl(state, lead.numel(), numbers.data_ptr())
    return numbers


def kl_backward(
    grad: Tensor,
    numbers: Tensor,
    p_logits: Tensor,
    p_weight: Tensor | None,
    p_bias: Tensor | None,
    q_logits: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    temperature: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of both heads, tile by tile from the logsumexps."""
    p_head, q_head = (p_logits, p_weight, p_bias), (q_logits, q_weight, q_bias)
    temperature = per_row(temperature, p_logits.shape[:-1])
    grad, numbers = grad.contiguous(), numbers.contiguous()
    p_result, q_result = (
        HeadGradient(p_head, buffer="gradient p"),
        HeadGradient(q_head, buffer="gradient q"),
    )
    for first, p, q in _pairs(p_head, q_head):
        p_grad, q_grad = p_result.tile(first, p), q_result.tile(first, q)
        _C.kl_backward(
            view(p),
            view(q),
            strided(temperature),
            grad.data_ptr(),
            numbers.data_ptr(),
            view(p_grad),
            view(q_grad),
            threads(p.numel()),
        )
        p_result.add(first, p_grad)
        q_result.add(first, q_grad)
    return (*p_result.result(), *q_result.result())


def _weigh(
    head: Head, softmax: Softmax, table: Tensor, key: Tensor | None = None
) -> tuple[int, Tensor, Tensor]:
    """Summaries, Σ_k softmax_k table[k] (rows, E) and the logsumexp (...): each logit is computed once.

    What is summed refers to the largest logit so far, and is scaled down when a larger one appears.
    """
    lead = head[0].shape[:-1]
    rows, width = lead.numel(), tile_width(lead.numel())
    mean = torch.zeros((rows, table.shape[1]), dtype=torch.float32)
    references = empty((2, rows), torch.float64)
    factor = torch.empty((rows, 1), dtype=torch.float32)
    summaries = _summaries(head)
    for first, tile in scanned_tiles(head, softmax, summaries, key=key, width=width):
        moved = _C.follow_largest(summaries, rows, first == 0, references.data_ptr(), factor.data_ptr())
        if moved:
            mean.mul_(factor)
        p = workspace("probabilities", tile.numel()).view(rows, tile.shape[-1])
        used = threads(tile.numel())
        _C.softmax_tile(view(tile), first, softmax.packed_capped, references[1].data_ptr(), view(p), used)
        matmul(p, table[first : first + p.shape[1]], mean, add=True)
    lse = empty(lead, torch.float64)
    _C.finish_logsumexp(summaries, rows, -math.inf, lse.data_ptr())
    # NaN where there is nothing but -inf.
    mean.mul_((references[0] - lse.view(rows)).exp().float().unsqueeze(-1))
    return summaries, mean.view(*lead, table.shape[1]), lse


def expectation(
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
) -> tuple[Tensor, Tensor]:
    """Σ_k softmax_k table[k] (..., E) and the logsumexp (...)."""
    head = (logits, weight, bias)
    return _weigh(head, Softmax(head, None, None, temperature, softcap, exclude), table)[1:]


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
    lead, head = logits.shape[:-1], (logits, weight, bias)
    softmax = Softmax(head, index, None, temperature, softcap, exclude)
    state, mean, lse = _weigh(head, softmax, table, key.contiguous())
    return mean, lse, *_drawn(state, state, lead)


def expectation_backward(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the head and of the table, tile by tile from the logsumexp."""
    lead, head = logits.shape[:-1], (logits, weight, bias)
    rows = lead.numel()
    softmax = Softmax(head, None, None, temperature, softcap, exclude)
    flat = grad.reshape(rows, table.shape[1]).float().contiguous()
    # d/da_k = p_k (g · table_k - g · output) / temperature.
    mean = (flat * output.reshape(flat.shape)).sum(-1, keepdim=True)
    inverse = None if temperature is None else 1 / temperature.expand(lead).reshape(-1, 1)
    result = HeadGradient(head)
    table_grad = empty(table.shape, torch.float32)
    for first, tile in tiles(head, width=tile_width(rows)):
        tokens = slice(first, first + tile.shape[-1])
        p = workspace("probabilities", tile.numel()).view(rows, tile.shape[-1])
        _C.softmax_tile(view(tile), first, softmax.packed, lse.data_ptr(), view(p), threads(tile.numel()))
        matmul(p.mT, flat, table_grad[tokens])
        pull = workspace("pull", p.numel()).view(p.shape)
        matmul(flat, table[tokens].mT, pull)
        pull.sub_(mean).mul_(p)
        if inverse is not None:
            pull.mul_(inverse)
        if softcap is not None:
            pull.mul_((1 - torch.tanh(tile.float() / softcap) ** 2).reshape(pull.shape))
        if exclude is not None and tokens.start <= exclude < tokens.stop:
            pull[:, exclude - first] = 0
        gradient = result.tile(first, tile)
        gradient.copy_(pull)
        result.add(first, gradient)
    return (*result.result(), table_grad.to(table.dtype))
