"""The uniform-state NELBO on the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _cuda
from dlcore._tensors import empty
from dlcore.cpu.categorical import Softmax
from dlcore.cpu.linear_logits import vocab_size
from dlcore.cpu.tensors import per_row, strided, view
from dlcore.cuda.categorical import scan
from dlcore.cuda.linear_logits import gradient_of, tiles
from dlcore.cuda.tensors import call, scratch


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
    """NELBO per token (...) and (5, ...) float64 for its gradient: a scan, and a second read for the sums."""
    lead, head, vocab = logits.shape[:-1], (logits, weight, bias), vocab_size(logits, weight)
    z, x, rows = z.contiguous(), x.contiguous(), lead.numel()
    level, slope = per_row(alpha, lead), per_row(dalpha, lead)
    softmax = Softmax(head, z, shift)
    saved = empty((5, *lead), torch.float64, logits.device)
    state = scan(head, softmax, target=x)
    call(_cuda.start_nelbo, logits, state.data_ptr(), rows, saved.data_ptr())
    for first, tile in tiles(head):
        workspace = scratch(_cuda.nelbo_bytes(rows, tile.shape[-1]), logits)
        places = (saved.data_ptr(), workspace.data_ptr())
        call(_cuda.nelbo, logits, view(tile), first, vocab, softmax.packed, strided(level), *places)
    loss = empty(lead, torch.float32, logits.device)
    tokens = (vocab, z.data_ptr(), x.data_ptr())
    finish = (saved.data_ptr(), rows, *tokens, strided(level), strided(slope), loss.data_ptr())
    call(_cuda.finish_nelbo, logits, *finish)
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
    level, slope = per_row(alpha, lead), per_row(dalpha, lead)
    softmax, result = Softmax(head, z, shift), gradient_of(head)
    known = (z.data_ptr(), x.data_ptr(), strided(level), strided(slope), grad.data_ptr(), saved.data_ptr())
    for first, tile in tiles(head):
        out = result.tile(first, tile.shape[-1])
        call(_cuda.nelbo_backward, logits, view(tile), first, vocab, softmax.packed, *known, view(out))
        result.add(first, out)
    return result.result()
