"""Linear heads on the compiled kernels: logits tile by tile, and the gradients that come back from them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from dlcore import _C
from dlcore.cpu.tensors import rows_contiguous, threads, view, workspace

logger = logging.getLogger("dlcore")

Head = tuple[Tensor, Tensor | None, Tensor | None]

#: A tile of logits stays in the cache: 2^20 floats.
_TILE = 1 << 20
#: Tokens that share a Gumbel number; tiles start at its multiples.
_GROUP = 256


def tile_width(rows: int) -> int:
    """How many tokens a tile of so many rows has: whole groups, at least one."""
    return max(_GROUP, _TILE // max(rows, 1) // _GROUP * _GROUP)


def vocab_size(logits: Tensor, weight: Tensor | None) -> int:
    """V."""
    return logits.shape[-1] if weight is None else weight.shape[0]


def tiles(
    head: Head, *, softcap: float | None = None, width: int | None = None, buffer: str = "tile"
) -> Iterator[tuple[int, Tensor]]:
    """(first token, logits of the tokens from there on): a head's tile by tile, dense ones whole.

    A tile of a head is (rows, n) float32, softcapped, in a workspace that the next one overwrites. Dense
    logits come as they are, with a `width` in (..., width) pieces.
    """
    logits, weight, bias = head
    if weight is None:
        dense = rows_contiguous(logits)
        for first in range(0, dense.shape[-1], width or dense.shape[-1]):
            yield first, dense[..., first : first + (width or dense.shape[-1])]
        return
    # Gradients are the registered backward's business.
    hidden, weight = flat_hidden(logits.detach()), weight.detach()
    shift = None if bias is None else bias.detach().float().contiguous()
    width = width or tile_width(hidden.shape[0])
    for first in range(0, weight.shape[0], width):
        piece = weight[first : first + width]
        tile = workspace(buffer, hidden.shape[0] * piece.shape[0]).view(hidden.shape[0], piece.shape[0])
        matmul(hidden, piece.mT, tile, bias=None if shift is None else shift[first:], softcap=softcap)
        yield first, tile


def multiply_out(head: Head, out: Tensor) -> Tensor:
    """`out` (rows, V) float32, filled with a linear head's logits."""
    hidden, weight, bias = head
    assert weight is not None
    shift = None if bias is None else bias.detach().float().contiguous()
    matmul(flat_hidden(hidden.detach()), weight.detach().mT, out, bias=shift)
    return out


def flat_hidden(hidden: Tensor) -> Tensor:
    """(rows, D) float32."""
    return hidden.reshape(-1, hidden.shape[-1]).float()


def matmul(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    add: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> None:
    """out (rows, n) = softcap([out +] a (rows, k) @ b (k, n) [+ bias]), accumulated in float32.

    a and out are float32; b's rows or columns are contiguous, else it is copied. The same bits for any number
    of rows, columns and threads.
    """
    a, b = _matrix(a), _matrix(b)
    work = a.shape[0] * a.shape[1] * b.shape[1]
    _C.matmul(
        view(a), view(b), 0 if bias is None else bias.data_ptr(), view(out), add, softcap, threads(work // 16)
    )


def _matrix(x: Tensor) -> Tensor:
    if 1 in x.stride():
        return x
    logger.info("copied a %s matrix: its strides are %s", tuple(x.shape), x.stride())
    return x.contiguous()


class HeadGradient:
    """Collects the gradient of a head from gradients of its tiles of logits."""

    def __init__(self, head: Head, *, buffer: str = "gradient") -> None:
        self.logits, self.weight, self.bias = head
        self.buffer = buffer
        if self.weight is None:
            self.out = torch.empty_like(self.logits, memory_format=torch.contiguous_format)
            return
        self.flat = flat_hidden(self.logits)
        self.hidden_grad = torch.zeros_like(self.flat)
        self.weight_grad = torch.empty(self.weight.shape, dtype=torch.float32)
        self.bias_grad = None if self.bias is None else torch.empty(self.bias.shape, dtype=torch.float32)

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
        matmul(gradient, self.weight[tokens], self.hidden_grad, add=True)
        matmul(gradient.mT, self.flat, self.weight_grad[tokens])
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
