"""The uniform-state NELBO on the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _C
from dlcore._tensors import empty
from dlcore.cpu.categorical import Softmax, scan
from dlcore.cpu.linear_logits import HeadGradient, tiles, vocab_size
from dlcore.cpu.tensors import per_row, strided, threads, view


def nelbo(
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor,
    x: Tensor,
    alpha: Tensor,
    dalpha: Tensor,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """NELBO per token (...), and (5, ...) float64 that its gradient needs."""
    lead, head, vocab = logits.shape[:-1], (logits, weight, bias), vocab_size(logits, weight)
    z, x, rows = z.contiguous(), x.contiguous(), lead.numel()
    alpha, dalpha = _rows(alpha, lead), _rows(dalpha, lead)
    softmax = Softmax(head, z, shift)
    saved = torch.zeros((5, *lead), dtype=torch.float64)
    # A dense row is scanned and summed at once; a head's tiles are scanned first, then made again.
    target = (x.data_ptr(), 1) if weight is None else None
    if weight is not None:
        _C.start_nelbo(scan(head, softmax, target=x), rows, saved.data_ptr())
    for first, tile in tiles(head):
        used = threads(tile.numel())
        _C.nelbo(view(tile), first, vocab, softmax.packed, strided(alpha), target, saved.data_ptr(), used)
    loss = empty(lead, torch.float32)
    _C.finish_nelbo(
        saved.data_ptr(),
        rows,
        vocab,
        z.data_ptr(),
        x.data_ptr(),
        strided(alpha),
        strided(dalpha),
        loss.data_ptr(),
    )
    return loss, saved


def nelbo_backward(
    grad: Tensor,
    saved: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor,
    x: Tensor,
    alpha: Tensor,
    dalpha: Tensor,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the head, tile by tile from the logsumexp."""
    lead, head, vocab = logits.shape[:-1], (logits, weight, bias), vocab_size(logits, weight)
    z, x, grad, saved = z.contiguous(), x.contiguous(), grad.contiguous(), saved.contiguous()
    alpha, dalpha = _rows(alpha, lead), _rows(dalpha, lead)
    softmax = Softmax(head, z, shift)
    result = HeadGradient(head)
    for first, tile in tiles(head):
        gradient = result.tile(first, tile)
        _C.nelbo_backward(
            view(tile),
            first,
            vocab,
            softmax.packed,
            z.data_ptr(),
            x.data_ptr(),
            strided(alpha),
            strided(dalpha),
            grad.data_ptr(),
            saved.data_ptr(),
            view(gradient),
            threads(tile.numel()),
        )
        result.add(first, gradient)
    return result.result()


def _rows(x: Tensor, lead: torch.Size) -> Tensor:
    rows = per_row(x, lead)
    assert rows is not None
    return rows
