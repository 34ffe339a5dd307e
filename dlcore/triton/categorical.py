"""Statistics and draws of the categorical family on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore._tensors import empty
from dlcore.triton import noise
from dlcore.triton.categorical_cut import cuts
from dlcore.triton.categorical_scan import (
    INDEX_LOGIT,
    SCORE,
    SECOND,
    SUM,
    TARGET_LOGIT,
    TOKEN_LOGIT,
    TOP,
    WEIGHTED,
    State,
    load_state,
    log_prob,
    scan,
)
from dlcore.triton.launch import ceil_div, launch
from dlcore.triton.linear_logits import GROUP, vocab_size
from dlcore.triton.linear_logits_scan import scan_head
from dlcore.triton.softmax import NONE, Softmax

_BLOCK = 128


@triton.jit(do_not_specialize=["rows"])
def finish_kernel(
    numbers,
    tokens,
    drawn_numbers,
    drawn_tokens,
    temperature,
    temperature_step,
    rows,
    argmax,
    drawn,
    out,
    WITH_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out: logsumexp, argmax_logprob, margin, entropy, index_logprob, runner_up_logprob, and the draw's.

    Where there is a state that drew, `drawn` is its token, at temperature 0 its argmax.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    rows = rows.to(tl.int64)
    total = load_state(numbers, row, rows, inside, SUM)
    lawful = (total > 0.0) & (total < float("inf"))
    log_total = tl.log(tl.where(lawful, total, 1.0))
    top = load_state(numbers, row, rows, inside, TOP)
    second = load_state(numbers, row, rows, inside, SECOND) - top - log_total
    none = float("nan")
    tl.store(argmax + row, tl.where(lawful, tl.load(tokens + row, inside, -1), -1), inside)
    tl.store(out + row, tl.where(lawful, top + log_total, none).to(tl.float32), inside)
    tl.store(out + rows + row, tl.where(lawful, -log_total, none).to(tl.float32), inside)
    margin = tl.exp(-log_total) - tl.exp(second)
    tl.store(out + 2 * rows + row, tl.where(lawful, margin, none).to(tl.float32), inside)
    weighted = load_state(numbers, row, rows, inside, WEIGHTED)
    entropy = log_total - tl.minimum(weighted, 0.0) / tl.where(lawful, total, 1.0)
    tl.store(out + 3 * rows + row, tl.where(lawful, entropy, none).to(tl.float32), inside)
    at_index = tl.full(row.shape, none, tl.float64)
    if WITH_INDEX:
        at_index = log_prob(numbers, load_state(numbers, row, rows, inside, INDEX_LOGIT), row, rows, inside)
    tl.store(out + 4 * rows + row, at_index.to(tl.float32), inside)
    tl.store(out + 5 * rows + row, tl.where(lawful, second, none).to(tl.float32), inside)
    if drawn_numbers is not None:
        token = tl.load(drawn_tokens + rows + row, inside, -1)
        logit = load_state(drawn_numbers, row, rows, inside, TOKEN_LOGIT)
        if temperature is not None:
            greedy = tl.load(temperature + row * temperature_step, inside, 1.0) == 0.0
            token = tl.where(greedy, tl.load(drawn_tokens + row, inside, -1), token)
            logit = tl.where(greedy, load_state(drawn_numbers, row, rows, inside, TOP), logit)
        tl.store(drawn + row, tl.where(lawful, token, -1), inside)
        logprob = log_prob(numbers, logit, row, rows, inside)
        tl.store(out + 6 * rows + row, logprob.to(tl.float32), inside)


@triton.jit
def _settle(numbers, row, rows, inside, known, nothing, NUMBER: tl.constexpr):
    """Where a number is not known it becomes `nothing`; returns all."""
    at = numbers + NUMBER * rows + row
    value = tl.load(at, known, nothing)
    tl.store(at, value, inside)
    return value


@triton.jit(do_not_specialize=["first", "columns", "rows"])
def finish_summary_kernel(
    numbers,
    tokens,
    first,
    columns,
    index,
    skip,
    target,
    temperature,
    temperature_step,
    rows,
    DRAWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sets what a scan left open of a state: rows that were not read, and numbers that were not asked for."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    rows = rows.to(tl.int64)
    read = inside
    if skip is not None:
        read = read & (tl.load(skip + row, inside, 1) == 0)
    if target is not None:
        read = read & (tl.load(target + row, inside, -1) >= 0)
    none = float("nan")
    top = _settle(numbers, row, rows, inside, read, NONE, TOP)
    _settle(numbers, row, rows, inside, read, NONE, SECOND)
    total = tl.load(numbers + SUM * rows + row, read, 0.0)
    tl.store(numbers + SUM * rows + row, tl.where(total < float("inf"), total, none), inside)
    _settle(numbers, row, rows, inside, read, 0.0, WEIGHTED)
    here = read & False
    if index is not None:
        at = tl.load(index + row, inside, -1)
        here = read & (at >= first) & (at - first < columns)
    _settle(numbers, row, rows, inside, here, none, INDEX_LOGIT)
    _settle(numbers, row, rows, inside, read & (target is not None), none, TARGET_LOGIT)
    score = tl.load(numbers + SCORE * rows + row, read & DRAWN, NONE)
    logit = tl.load(numbers + TOKEN_LOGIT * rows + row, read & DRAWN, NONE)
    lawful = (total > 0.0) & (total < float("inf"))
    argmax = tl.load(tokens + row, read & lawful, -1)
    token = tl.load(tokens + rows + row, read & lawful & DRAWN, -1)
    if DRAWN and temperature is not None:
        greedy = tl.load(temperature + row * temperature_step, inside, 1.0) == 0.0
        score = tl.where(greedy, top, score)
        logit = tl.where(greedy, top, logit)
        token = tl.where(greedy, argmax, token)
    tl.store(numbers + SCORE * rows + row, score, inside)
    tl.store(numbers + TOKEN_LOGIT * rows + row, logit, inside)
    tl.store(tokens + row, argmax, inside)
    tl.store(tokens + rows + row, token, inside)


@triton.jit
def _coefficient(coefficients, row, step, inside, I: tl.constexpr):  # noqa: E741
    return tl.load(coefficients + row * step + I, inside, 0.0)


@triton.jit
def _route(coefficients, step, keys, row, rows, inside, p_z, KEY_PER_ROW: tl.constexpr):
    """(needs p(z), keeps z, takes a draw), and the words of the prior's number."""
    d0 = _coefficient(coefficients, row, step, inside, 0)
    d1 = _coefficient(coefficients, row, step, inside, 1)
    k0 = _coefficient(coefficients, row, step, inside, 2)
    k1 = _coefficient(coefficients, row, step, inside, 3)
    p0 = _coefficient(coefficients, row, step, inside, 4)
    p1 = _coefficient(coefficients, row, step, inside, 5)
    needs = (d1 != 0.0) | (k1 != 0.0) | (p1 != 0.0)
    p = tl.where(needs, p_z, 0.0)
    seed, offset = noise.row_key(keys, tl.where(inside, row, 0), KEY_PER_ROW)
    low, high, prior_low, prior_high = noise.block(seed, offset, noise.ROUTE, row * 0)
    total = d0 + d1 * p
    mark = noise.uniform(low, high) * total
    keep = k0 + k1 * p
    # A state without any mass (a clean position with p(z) = 0) stays what it is.
    keeps = (mark < keep) | ~(total > 0.0)
    return needs, keeps, ~keeps & (mark < keep + (p0 + p1 * p)), prior_low, prior_high


@triton.jit(do_not_specialize=["rows"])
def plan_mixture_kernel(coefficients, step, keys, rows, skip, KEY_PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """Marks rows whose outcome does not depend on their logits."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    needs, _, takes, _, _ = _route(coefficients, step, keys, row, rows, inside, 0.0, KEY_PER_ROW)
    tl.store(skip + row, (~needs & ~takes).to(tl.uint8), inside)


@triton.jit(do_not_specialize=["rows", "prior", "exclude", "vocab"])
def finish_mixture_kernel(
    numbers,
    drawn,
    temperature,
    temperature_step,
    coefficients,
    step,
    keys,
    rows,
    skip,
    z,
    vocab,
    prior,
    exclude,
    tokens,
    KEY_PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """tokens (rows): z, the draw or the prior; -1 where a row without a law had to be read."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    rows = rows.to(tl.int64)
    kept = tl.load(z + row, inside, 0)
    read = inside & (tl.load(skip + row, inside, 1) == 0)
    token = tl.load(drawn + rows + row, read, -1)
    argmax = tl.load(drawn + row, read, -1)
    logprob = log_prob(numbers, load_state(numbers, row, rows, read, INDEX_LOGIT), row, rows, read)
    p_z = tl.exp(logprob)
    if temperature is not None:
        greedy = tl.load(temperature + row * temperature_step, inside, 1.0) == 0.0
        p_z = tl.where(greedy & (p_z == p_z), tl.where(argmax == kept, 1.0, 0.0), p_z)
        token = tl.where(greedy, argmax, token)
    broken = read & (p_z != p_z)
    _, keeps, takes, low, high = _route(
        coefficients, step, keys, row, rows, inside, tl.where(p_z == p_z, p_z, 0.0), KEY_PER_ROW
    )
    drawn_prior = tl.full(row.shape, 0, tl.int64) + prior
    if exclude is not None:
        uniform = noise.below(low, high, vocab - 1)
        uniform = uniform + (uniform >= exclude).to(tl.int64)
    else:
        uniform = noise.below(low, high, vocab)
    drawn_prior = tl.where(drawn_prior < 0, uniform, drawn_prior)
    result = tl.where(keeps, kept, tl.where(takes, token, drawn_prior))
    tl.store(tokens + row, tl.where(broken, -1, result), inside)


def _finish(
    state: State,
    drawn: State | None,
    softmax: Softmax,
    argmax: Tensor,
    tokens: Tensor | None,
    numbers: Tensor,
) -> None:
    launch(
        finish_kernel,
        ceil_div(argmax.numel(), _BLOCK),
        argmax,
        *(*state, *(drawn or (None, None)), *softmax.temperature, argmax.numel(), argmax, tokens, numbers),
        WITH_INDEX=softmax.index is not None,
        BLOCK=_BLOCK,
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
    lead = logits.shape[:-1]
    softmax = Softmax(lead, index, shift, temperature, softcap, exclude)
    state = scan_head((logits, weight, bias), softmax)
    argmax = empty(lead, torch.int64, logits.device)
    numbers = empty((6, *lead), torch.float32, logits.device)
    _finish(state, None, softmax, argmax, None, numbers)
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
    softmax = Softmax(lead, index, shift, temperature, softcap, exclude)
    target, key = (None if x is None else x.contiguous() for x in (target, key))
    skip = None if skip is None else skip.contiguous().view(torch.uint8)
    state = scan_head(head, softmax, key, skip, target, first)
    launch(
        finish_summary_kernel,
        ceil_div(lead.numel(), _BLOCK),
        logits,
        *(*state, first, vocab_size(head), softmax.index, skip, target, *softmax.temperature, lead.numel()),
        DRAWN=key is not None,
        BLOCK=_BLOCK,
    )
    return state.tokens.view(2, *lead), state.numbers.view(8, *lead)


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
    """Tokens and argmax (2, ...), numbers (7, ...): one read; to truncate, a search and another read."""
    head, key = (logits, weight, bias), key.contiguous()
    softmax = Softmax(logits.shape[:-1], index, shift, temperature, softcap, exclude)
    if top_k is None and top_p is None and min_p is None:
        state = drawn = scan_head(head, softmax, key=key)
    else:
        shape = (logits.shape[:-1].numel(), ceil_div(vocab_size(head), GROUP))
        tops = empty(shape, torch.float32, logits.device)
        state = scan(head, softmax, tops=tops)
        cut = cuts(head, softmax, state, tops, top_k, top_p, min_p)
        drawn = scan(head, softmax, key=key, cuts=cut)
    return finish_sample(state, drawn, softmax, logits.shape[:-1])


def finish_sample(state: State, drawn: State, softmax: Softmax, lead: torch.Size) -> tuple[Tensor, Tensor]:
    """Tokens and argmax (2, ...), numbers (7, ...); `drawn` is the state that drew."""
    tokens = empty((2, *lead), torch.int64, state.numbers.device)
    numbers = empty((7, *lead), torch.float32, state.numbers.device)
    _finish(state, drawn, softmax, tokens[1], tokens[0], numbers)
    return tokens, numbers


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
    lead, head, key = logits.shape[:-1], (logits, weight, bias), key.contiguous()
    softmax, rows = Softmax(lead, z, shift, temperature, softcap, exclude), z.numel()
    shared = coefficients.numel() == 6
    coefficients = coefficients.contiguous() if shared else coefficients.expand(*lead, 6).contiguous()
    skip = empty(lead, torch.uint8, z.device)
    tokens = empty(lead, torch.int64, z.device)
    plan = (coefficients, 0 if shared else 6, key, rows, skip)
    options = {"KEY_PER_ROW": key.dim() > 1, "BLOCK": _BLOCK}
    launch(plan_mixture_kernel, ceil_div(rows, _BLOCK), tokens, *plan, **options)
    state = scan_head(head, softmax, key=key, skip=skip)
    mixture = (*softmax.temperature, *plan, softmax.index, vocab_size(head), prior, exclude, tokens)
    launch(finish_mixture_kernel, ceil_div(rows, _BLOCK), tokens, *state, *mixture, **options)
    return tokens


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that launch every variant of every kernel."""
    # A head of many rows, and a tile as narrow as with thousands of them.
    lead, vocab, many, narrow = (4, 8), 126_464, 65, 768
    key = torch.empty(2, dtype=torch.int64, device=device)
    z = torch.empty(lead, dtype=torch.int64, device=device)
    number, row = torch.empty((), device=device), torch.empty(lead, device=device)
    coefficients = torch.empty(6, dtype=torch.float64, device=device)
    full: tuple[Any, ...] = (row, row, 30.0, 5)
    drawn: tuple[Any, ...] = (z, *full, z, number, number, key.expand(*lead, 2))
    part: tuple[Any, ...] = (512, z, row, z, *full[1:], z == 0, key.expand(*lead, 2))
    later: tuple[Any, ...] = (512, z, row, None, *full[1:], z == 0, key)
    mixed: tuple[Any, ...] = (z, coefficients.expand(*lead, 6), 7, *full, key)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.empty(*lead, vocab, dtype=dtype, device=device)
        head = (logits, None, None)
        yield partial(stats, *head, None, None, None, None, None)
        yield partial(stats, *head, z, *full)
        yield partial(summary, *head, 0, None, None, None, None, None, None, None, None)
        yield partial(summary, *head, *part)
        yield partial(summary, *head, *later)
        yield partial(sample, *head, *(None,) * 8, key)
        yield partial(sample, *head, *drawn)
        # Of so many rows each is reduced by one warp.
        yield partial(
            sample, torch.empty(1024, vocab, dtype=dtype, device=device), None, None, *(None,) * 8, key
        )
        yield partial(sample_mixture, *head, z, coefficients, -1, *(None,) * 4, key)
        weight = torch.empty(narrow, 64, dtype=dtype, device=device)
        linear = (torch.empty(many, 64, dtype=dtype, device=device), weight, None)
        yield partial(sample, *linear, *(None,) * 8, key)
        yield partial(sample_mixture, *head, *mixed)
