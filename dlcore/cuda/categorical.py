"""Statistics and draws of the categorical family on the CUDA kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dlcore import _cuda
from dlcore.cpu.categorical import Softmax
from dlcore.cpu.linear_logits import Head, vocab_size
from dlcore.cpu.tensors import keyed, rows_contiguous, strided, view
from dlcore.cuda.tensors import call, scratch


def _tiles(head: Head) -> Iterator[tuple[int, Tensor]]:
    """(first token, logits of the tokens from there on); a head's products are cuBLAS's."""
    logits, weight, _ = head
    if weight is None:
        yield 0, rows_contiguous(logits)
        return
    from dlcore.triton.linear_logits import tiles

    for first, _, tile in tiles(head):
        yield first, tile.data


def scan(
    head: Head,
    softmax: Softmax,
    target: Tensor | None = None,
    key: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """One read of the logits: a summary per row. Rows that `skip` marks are not read, nor those whose target
    is negative."""
    rows, like = head[0].shape[:-1].numel(), head[0]
    state = scratch(rows * _cuda.SUMMARY_BYTES, like)
    for first, tile in _tiles(head):
        workspace = scratch(_cuda.scan_bytes(rows, tile.shape[-1]), like)
        call(
            _cuda.scan,
            like,
            view(tile),
            first,
            softmax.packed,
            None if target is None else (target.data_ptr(), 1),
            None if key is None else keyed(key),
            0 if skip is None else skip.data_ptr(),
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
    state = scan(head, Softmax(head, index, shift, temperature, softcap, exclude))
    argmax = torch.empty(lead, dtype=torch.int64, device=logits.device)
    numbers = torch.empty((6, *lead), dtype=torch.float32, device=logits.device)
    results = (state.data_ptr(), lead.numel(), argmax.data_ptr(), numbers.data_ptr())
    call(_cuda.finish_stats, logits, *results)
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
    """Tokens and argmax (2, ...), numbers (7, ...): one read."""
    lead, head, key = logits.shape[:-1], (logits, weight, bias), key.contiguous()
    state = scan(head, Softmax(head, index, shift, temperature, softcap, exclude), key=key)
    tokens = torch.empty((2, *lead), dtype=torch.int64, device=logits.device)
    numbers = torch.empty((7, *lead), dtype=torch.float32, device=logits.device)
    results = (state.data_ptr(), lead.numel(), tokens.data_ptr(), numbers.data_ptr())
    call(_cuda.finish_sample, logits, *results)
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
    tokens = torch.empty(lead, dtype=torch.int64, device=logits.device)
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
    numbers = torch.empty((3, *lead), dtype=torch.float64, device=logits.device)
    finish = ((target.data_ptr(), 1), index is not None, lead.numel(), numbers.data_ptr())
    call(_cuda.finish_log_probs, logits, state.data_ptr(), *finish)
    return numbers
