"""The torch chains of a linear head's loss: what a trainer writes without a fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The sum of all tokens' losses from whole logits, in float32 as trainers have it."""
    return F.cross_entropy((hidden @ weight.mT).float(), target, reduction="sum")


def rows_of_a_chunk(rows: int, depth: int, vocab: int) -> int:
    """Liger's choice: so many rows that their logits take about what all hidden states do, a power of two."""
    share = -(-vocab // depth)
    return 1 << (max(1, -(-rows // share)) - 1).bit_length()


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses and its gradients in hidden and weight, chunk of rows by chunk of rows.

    After Liger's fused linear cross-entropy (arXiv 2410.10989), by torch: a chunk's logits become its
    gradient in place, and products take it to hidden and weight before the next chunk is made.
    """
    rows, depth = hidden.shape
    count = rows_of_a_chunk(rows, depth, len(weight))
    loss = torch.zeros((), device=hidden.device)
    hidden_grad = torch.empty_like(hidden)
    weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=hidden.device)
    for first in range(0, rows, count):
        some, at = hidden[first : first + count], target[first : first + count].unsqueeze(-1)
        log_p = torch.log_softmax(some @ weight.mT, -1, dtype=torch.float32)
        loss -= log_p.gather(-1, at).sum()
        gradient = log_p.exp_().scatter_add_(-1, at, -torch.ones_like(at, dtype=torch.float32))
        gradient = gradient.to(hidden.dtype)
        torch.mm(gradient, weight, out=hidden_grad[first : first + count])
        weight_grad += gradient.mT @ some
    return loss, hidden_grad, weight_grad.to(weight.dtype)
