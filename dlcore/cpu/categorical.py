"""The categorical family on the compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dlcore import _C
from dlcore.cpu.tensors import (
    flat_hidden,
    keyed,
    per_row,
    scratch,
    strided,
    threads,
    tile_width,
    tiles,
    view,
    vocab_size,
    workspace,
)

Head = tuple[Tensor, Tensor | None, Tensor | None]


class Softmax:
    """Softmax's parameters for the compiled module; holds the tensors that they point to."""

    def __init__(
        self,
        lead: torch.Size,
        index: Tensor | None = None,
        shift: Tensor | None = None,
        temperature: Tensor | None = None,
        softcap: float | None = None,
        exclude: int | None = None,
    ) -> None:
        self.index = None if index is None else index.contiguous()
        self.shift = per_row(shift, lead)
        self.temperature = per_row(temperature, lead)
        at_index = None if self.index is None else (self.index.data_ptr(), 1)
        self.packed = (at_index, strided(self.shift), strided(self.temperature), softcap, exclude)


def scan(
    head: Head,
    softmax: Softmax,
    target: Tensor | None = None,
    key: Tensor | None = None,
    skip: int = 0,
    cuts: int = 0,
    state: str = "summaries",
) -> int:
    """One read of the logits: the address of a summary per row, kept until the next scan of that name."""
    summaries = scratch(state, head[0].shape[:-1].numel() * _C.SUMMARY_BYTES)
    at_target = None if target is None else (target.data_ptr(), 1)
    at_key = None if key is None else keyed(key)
    for first, tile in tiles(*head):
        _C.scan(
            view(tile),
            first,
            softmax.packed,
            at_target,
            at_key,
            skip,
            cuts,
            summaries,
            threads(tile.numel()),
        )
    return summaries


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
    state = scan((logits, weight, bias), softmax)
    argmax = torch.empty(lead, dtype=torch.int64)
    numbers = torch.empty((6, *lead), dtype=torch.float32)
    _C.finish_stats(state, argmax.numel(), argmax.data_ptr(), numbers.data_ptr())
    return argmax, numbers


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
    softmax = Softmax(lead, index, shift, temperature, softcap, exclude)
    if top_k is None and top_p is None and min_p is None:
        state = drawn = scan(head, softmax, key=key)
    else:
        state = scan(head, softmax)
        cuts = _cuts(head, softmax, state, top_k, top_p, min_p)
        drawn = scan(head, softmax, key=key, cuts=cuts, state="drawn summaries")
    tokens = torch.empty((2, *lead), dtype=torch.int64)
    numbers = torch.empty((7, *lead), dtype=torch.float32)
    rows = lead.numel()
    _C.finish_sample(state, drawn, rows, tokens.data_ptr(), numbers.data_ptr())
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
        for first, tile in tiles(*head):
            _C.histogram(
                view(tile),
                first,
                vocab,
                softmax.packed,
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
    rows = lead.numel()
    softmax = Softmax(lead, z, shift, temperature, softcap, exclude)
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
    state = scan((logits, weight, bias), softmax, key=key, skip=skip)
    tokens = torch.empty(lead, dtype=torch.int64)
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
    lead, target = logits.shape[:-1], target.contiguous()
    softmax = Softmax(lead, index, shift, None, softcap, exclude)
    state = scan((logits, weight, bias), softmax, target=target)
    numbers = torch.empty((3, *lead), dtype=torch.float64)
    at_target = (target.data_ptr(), 1)
    _C.finish_log_probs(state, at_target, index is not None, lead.numel(), numbers.data_ptr())
    return numbers


class HeadGradient:
    """Collects the gradient of a head from gradients of its tiles of logits."""

    def __init__(
        self, logits: Tensor, weight: Tensor | None, bias: Tensor | None, *, buffer: str = "gradient"
    ) -> None:
        self.logits, self.weight, self.bias, self.buffer = logits, weight, bias, buffer
        if weight is None:
            self.out = torch.empty_like(logits, memory_format=torch.contiguous_format)
            return
        self.flat = flat_hidden(logits)
        self.hidden_grad = torch.zeros_like(self.flat)
        self.weight_grad = torch.empty(weight.shape, dtype=torch.float32)
        self.bias_grad = None if bias is None else torch.empty(bias.shape, dtype=torch.float32)

    def tile(self, first: int, like: Tensor) -> Tensor:
        """Where the gradient of the tile at token `first` is to be written, (rows, n)."""
        if self.weight is None:
            return self.out.view(-1, self.out.shape[-1])[:, first : first + like.shape[-1]]
        return workspace(self.buffer, like.numel()).view(like.shape)

    def add(self, first: int, gradient: Tensor) -> None:
        """Take in the gradient of the tile at token `first`."""
        if self.weight is None:
            return
        tokens = slice(first, first + gradient.shape[-1])
        self.hidden_grad.addmm_(gradient, self.weight[tokens].float())
        torch.mm(gradient.mT, self.flat, out=self.weight_grad[tokens])
        if self.bias_grad is not None:
            torch.sum(gradient, 0, out=self.bias_grad[tokens])

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of logits or hidden, of weight and of bias; empty where there is none."""
        empty = self.logits.new_empty(0)
        if self.weight is None:
            return self.out, empty, empty.clone()
        hidden = self.hidden_grad.view(self.logits.shape).to(self.logits.dtype)
        weight = self.weight_grad.to(self.weight.dtype)
        if self.bias is None or self.bias_grad is None:
            return hidden, weight, empty
        return hidden, weight, self.bias_grad.to(self.bias.dtype)


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
    softmax = Softmax(logits.shape[:-1], index, shift, None, softcap, exclude)
    result = HeadGradient(logits, weight, bias)
    for first, tile in tiles(logits, weight, bias):
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
    left, right = tiles(*p, width=width, buffer="tile p"), tiles(*q, width=width, buffer="tile q")
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
    numbers = torch.empty((3, *lead), dtype=torch.float64)
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
        HeadGradient(*p_head, buffer="gradient p"),
        HeadGradient(*q_head, buffer="gradient q"),
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


def _probabilities(head: Head, softmax: Softmax, lse: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first token, tile of logits, tile of softmax (rows, n) float32)."""
    rows = head[0].shape[:-1].numel()
    for first, tile in tiles(*head, width=tile_width(rows)):
        p = workspace("probabilities", tile.numel()).view(rows, tile.shape[-1])
        _C.softmax_tile(view(tile), first, softmax.packed, lse.data_ptr(), view(p), threads(tile.numel()))
        yield first, tile, p


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
    lead, head = logits.shape[:-1], (logits, weight, bias)
    softmax = Softmax(lead, None, None, temperature, softcap, exclude)
    lse = torch.empty(lead, dtype=torch.float64)
    _C.finish_logsumexp(scan(head, softmax), lead.numel(), lse.data_ptr())
    out = torch.zeros((lead.numel(), table.shape[1]), dtype=torch.float32)
    for first, _, p in _probabilities(head, softmax, lse):
        out.addmm_(p, table[first : first + p.shape[1]].float())
    return out.view(*lead, table.shape[1]), lse


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
    softmax = Softmax(lead, None, None, temperature, softcap, exclude)
    flat = grad.reshape(lead.numel(), table.shape[1]).float()
    # d/da_k = p_k (g · table_k - g · output) / temperature.
    mean = (flat * output.reshape(flat.shape)).sum(-1, keepdim=True)
    inverse = None if temperature is None else 1 / temperature.expand(lead).reshape(-1, 1)
    result = HeadGradient(*head)
    table_grad = torch.empty(table.shape, dtype=torch.float32)
    for first, tile, p in _probabilities(head, softmax, lse):
        tokens = slice(first, first + p.shape[1])
        torch.mm(p.mT, flat, out=table_grad[tokens])
        pull = workspace("pull", p.numel()).view(p.shape)
        torch.mm(flat, table[tokens].float().mT, out=pull)
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
