"""Statistics and draws of the categorical family on the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _cuda
from dlcore._tensors import empty
from dlcore.cpu.categorical import Softmax
from dlcore.cpu.linear_logits import Head, vocab_size
from dlcore.cpu.tensors import keyed, per_row, strided, view
from dlcore.cuda.linear_logits import fused, gradient_of, pairs, tiles
from dlcore.cuda.tensors import call, scratch

#: Of such a row the masses, as integers, are summed without an overflow.
_LONGEST_ROW = 1 << 23


def scan(
    head: Head,
    softmax: Softmax,
    target: Tensor | None = None,
    key: Tensor | None = None,
    skip: Tensor | None = None,
    cuts: tuple[Tensor, Tensor] | None = None,
    begin: int = 0,
) -> Tensor:
    """One read of the logits, of tokens from `begin` on: a summary per row.

    Rows that `skip` marks are not read, nor those whose target is negative; of the others what `cuts` leaves.
    """
    rows, like = head[0].shape[:-1].numel(), head[0]
    state = scratch(rows * _cuda.SUMMARY_BYTES, like)
    for first, tile in tiles(head):
        workspace = scratch(_cuda.scan_bytes(rows, tile.shape[-1]), like)
        call(
            _cuda.scan,
            like,
            view(tile),
            begin + first,
            first == 0,
            softmax.packed,
            None if target is None else (target.data_ptr(), 1),
            None if key is None else keyed(key),
            0 if skip is None else skip.data_ptr(),
            *((0, 0) if cuts is None else (x.data_ptr() for x in cuts)),
            state.data_ptr(),
            workspace.data_ptr(),
        )
    return state


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
    if fused(head):
        from dlcore.triton import categorical as triton

        return triton.stats(*head, index, shift, temperature, softcap, exclude)
    state = scan(head, Softmax(head, index, shift, temperature, softcap, exclude))
    argmax = empty(lead, torch.int64, logits.device)
    numbers = empty((6, *lead), torch.float32, logits.device)
    results = (state.data_ptr(), lead.numel(), argmax.data_ptr(), numbers.data_ptr())
    call(_cuda.finish_stats, logits, *results)
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
    state = scan(head, softmax, target, key, skip, begin=first)
    tokens = empty((2, *lead), torch.int64, logits.device)
    numbers = empty((8, *lead), torch.float64, logits.device)
    results = (state.data_ptr(), lead.numel(), tokens.data_ptr(), numbers.data_ptr())
    call(_cuda.finish_summary, logits, *results)
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
    """Tokens and argmax (2, ...), numbers (7, ...): one read; to truncate, a search and another read."""
    lead, head, key = logits.shape[:-1], (logits, weight, bias), key.contiguous()
    softmax = Softmax(head, index, shift, temperature, softcap, exclude)
    if top_k is None and top_p is None and min_p is None:
        if fused(head):
            from dlcore.triton import categorical as triton

            return triton.sample(*head, index, shift, temperature, softcap, exclude, None, None, None, key)
        state = drawn = scan(head, softmax, key=key)
    else:
        state = scan(head, softmax)
        drawn = scan(head, softmax, key=key, cuts=_cuts(head, softmax, state, top_k, top_p, min_p))
    tokens = empty((2, *lead), torch.int64, logits.device)
    numbers = empty((7, *lead), torch.float32, logits.device)
    results = (lead.numel(), tokens.data_ptr(), numbers.data_ptr())
    call(_cuda.finish_sample, logits, state.data_ptr(), drawn.data_ptr(), *results)
    return tokens, numbers


def _cuts(
    head: Head,
    softmax: Softmax,
    state: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Per row the last entry that a truncated draw keeps, and where its equals end. top_p counts within what
    top_k keeps."""
    lead, like = head[0].shape[:-1], head[0]
    top_k, top_p, min_p = per_row(top_k, lead), per_row(top_p, lead), per_row(min_p, lead)
    rows = lead.numel()
    cuts = scratch(rows * _cuda.CUT_BYTES, like)
    ends = torch.empty(rows, dtype=torch.int64, device=like.device)
    if head[1] is None and like.shape[-1] <= _LONGEST_ROW:
        limits = (strided(top_k), strided(top_p), strided(min_p), cuts.data_ptr(), ends.data_ptr())
        ((_, dense),) = tiles(head)
        call(_cuda.cut_rows, like, view(dense), softmax.packed, state.data_ptr(), *limits)
        return cuts, ends
    selections = None
    if top_k is not None:
        selections = _select(head, softmax, state, top_k, None, None)
    if top_p is not None:
        selections = _select(head, softmax, state, top_k, top_p, selections)
    found = 0 if selections is None else selections.data_ptr()
    known = (strided(min_p), softmax.packed[2], found, cuts.data_ptr())
    call(_cuda.finish_selections, like, state.data_ptr(), rows, *known)
    for first, tile in tiles(head):
        places = (cuts.data_ptr(), ends.data_ptr())
        call(_cuda.find_ends, like, view(tile), first, softmax.packed, *places)
    return cuts, ends


def _select(
    head: Head,
    softmax: Softmax,
    state: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    within: Tensor | None,
) -> Tensor:
    """The last kept entry of every row, by a radix search over the logits' ordered bits."""
    rows, like, vocab = head[0].shape[:-1].numel(), head[0], vocab_size(head[0], head[1])
    selections = scratch(rows * _cuda.SELECTION_BYTES, like)
    outer = 0 if within is None else within.data_ptr()
    limits = (strided(top_k), strided(top_p), outer, selections.data_ptr())
    call(_cuda.start_selections, like, state.data_ptr(), rows, *limits)
    bins = scratch(rows * _cuda.BINS_BYTES, like)
    for level in range(_cuda.LEVELS):
        places = (state.data_ptr(), selections.data_ptr(), level, bins.data_ptr())
        for first, tile in tiles(head):
            call(_cuda.histogram, like, view(tile), first, vocab, softmax.packed, *places)
        call(_cuda.narrow, like, bins.data_ptr(), state.data_ptr(), rows, level, selections.data_ptr())
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
    lead, head, key = logits.shape[:-1], (logits, weight, bias), key.contiguous()
    if fused(head):
        from dlcore.triton import categorical as triton

        return triton.sample_mixture(*head, z, coefficients, prior, shift, temperature, softcap, exclude, key)
    rows, softmax = lead.numel(), Softmax(head, z, shift, temperature, softcap, exclude)
    assert softmax.index is not None
    shared = coefficients.numel() == 6
    coefficients = coefficients.contiguous() if shared else coefficients.expand(*lead, 6).contiguous()
    mixture = (
        vocab_size(logits, weight),
        softmax.index.data_ptr(),
        strided(coefficients, 6),
        prior,
        exclude,
        softmax.packed[2],
        keyed(key),
    )
    skip = scratch(rows, logits)
    call(_cuda.plan_mixture, logits, mixture, rows, skip.data_ptr())
    state = scan(head, softmax, key=key, skip=skip)
    tokens = empty(lead, torch.int64, logits.device)
    finish = (mixture, rows, state.data_ptr(), skip.data_ptr(), tokens.data_ptr())
    call(_cuda.finish_mixture, logits, *finish)
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
    numbers = empty((3, *lead), torch.float64, logits.device)
    finish = ((target.data_ptr(), 1), index is not None, lead.numel(), numbers.data_ptr())
    call(_cuda.finish_log_probs, logits, state.data_ptr(), *finish)
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
    softmax, result = Softmax(head, index, shift, None, softcap, exclude), gradient_of(head)
    known = (target.data_ptr(), grad.data_ptr(), numbers.data_ptr())
    for first, tile in tiles(head):
        out = result.tile(first, tile.shape[-1])
        call(_cuda.log_probs_backward, logits, view(tile), first, softmax.packed, *known, view(out))
        result.add(first, out)
    return result.result()


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
    rows, temperature = lead.numel(), per_row(temperature, lead)
    state = scratch(rows * _cuda.KL_SUMMARY_BYTES, p_logits)
    for first, p, q in pairs((p_logits, p_weight, p_bias), (q_logits, q_weight, q_bias)):
        workspace = scratch(_cuda.kl_bytes(rows, p.shape[-1]), p_logits)
        places = (state.data_ptr(), workspace.data_ptr())
        call(_cuda.kl, p_logits, view(p), view(q), strided(temperature), first == 0, *places)
    numbers = empty((3, *lead), torch.float64, p_logits.device)
    call(_cuda.finish_kl, p_logits, state.data_ptr(), rows, numbers.data_ptr())
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
    known = (strided(temperature), grad.data_ptr(), numbers.data_ptr())
    p_result, q_result = gradient_of(p_head), gradient_of(q_head)
    for first, p, q in pairs(p_head, q_head):
        p_out, q_out = p_result.tile(first, p.shape[-1]), q_result.tile(first, q.shape[-1])
        p_to, q_to = p_out, q_out
        if p_out.dtype != q_out.dtype:  # of a head and of dense logits
            p_to, q_to = (torch.empty_like(x, dtype=torch.float32) for x in (p_out, q_out))
        call(_cuda.kl_backward, p_logits, view(p), view(q), *known, view(p_to), view(q_to))
        if p_to is not p_out:
            p_out.copy_(p_to)
            q_out.copy_(q_to)
        p_result.add(first, p_out)
        q_result.add(first, q_out)
    return (*p_result.result(), *q_result.result())
