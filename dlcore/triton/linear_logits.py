"""Linear heads on the GPU: logits tile by tile, and the gradients that come back from them.

A tile is made by cuBLAS and read by the categorical kernels. Its tokens, in whole groups of 256, are bound by

- one in 20.5 of the head's logits, which with what a scan says of every group is less than 5 % of what they
  would take in float32. Below 1024 tokens it is not kept: a product of fewer columns is not worth a launch,
  and so little memory no care;
- 2^26 floats, from 10,923 rows of 126,464 tokens on.

A tile that outgrows the second-level cache costs a write and a read of memory. Smaller ones cost more: the
products themselves take as long (8192 rows on an H200 12.4 to 12.8 ms by tiles of 1024 to 6144 tokens), but
each tile brings launches, and of few rows its product leaves units idle (256 rows: 559 µs by 4096, 467 by
6144, 381 whole).

A draw or a loss keeps one tile, a truncated draw the largest logits of groups and 4 KiB a row, too. A loss's
gradient keeps two, as do a mean of a table, a drift and a KL of two heads; the gradients of these keep four,
a drift of a bfloat16 table three and a half.

Dense logits, which are there anyway, come in pieces of 2^24, and only where another buffer goes along with
them.

With thousands of rows such a product runs at the rate of the matrix units, which one fused with the reduction
would not; of fewer rows it waits for the weights, each read once; where one read will do and rows are few,
linear_logits_scan makes no tile at all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dlcore.triton.rows import Rows, rows_of

Head = tuple[Tensor, Tensor | None, Tensor | None]

#: Floats in a tile at most, and in what goes along with a piece of dense logits.
_TILE, _PIECE = 1 << 26, 1 << 24
#: Tokens of a head for two of a tile at most, and the tokens that a tile may have in any case.
_SHARE, _LEAST = 41, 1024
#: Tokens that share a Gumbel number; tiles start at its multiples.
GROUP = 256


def vocab_size(head: Head) -> int:
    """V."""
    logits, weight, _ = head
    return logits.shape[-1] if weight is None else weight.shape[0]


def tile_width(head: Head) -> int:
    """How many tokens a tile, or a piece of dense logits, has: whole groups, at least one."""
    rows = max(head[0].shape[:-1].numel(), 1)
    if head[1] is None:
        width = min(_TILE, _PIECE) // rows
    else:
        width = min(_TILE // rows, max(_LEAST, 2 * vocab_size(head) // _SHARE))
    return max(GROUP, width // GROUP * GROUP)


def tiles(head: Head, width: int | None = None) -> Iterator[tuple[int, int, Rows]]:
    """(first token, how many, logits of the tokens from there on): a head's tile by tile, dense ones whole.

    A tile of a head is float32 and lives until the next one is made. Dense logits come as they are, with a
    `width` in pieces.
    """
    logits, weight, bias = head
    if weight is None:
        view, vocab = rows_of(logits), logits.shape[-1]
        for first in range(0, vocab, width or vocab):
            count = min(width or vocab, vocab - first)
            yield first, count, view._replace(data=view.data[..., first:])
        return
    hidden, weight = logits.detach().reshape(-1, logits.shape[-1]), weight.detach()
    rows, width = hidden.shape[0], width or tile_width(head)
    shape = (rows, min(width, weight.shape[0]))
    buffer = torch.empty(shape, dtype=torch.float32, device=hidden.device).view(-1)
    for first in range(0, weight.shape[0], width):
        piece = weight[first : first + width]
        count = piece.shape[0]
        tile = buffer[: rows * count].view(rows, count)
        matmul(hidden, piece.mT, tile)
        if bias is not None:
            tile += bias.detach()[first : first + count]
        yield first, count, rows_of(tile)


def matmul(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out (rows, n) float32 = [out +] a (rows, k) @ b (k, n), accumulated in float32.

    Of two dtypes the wider is used; float32 operands are rounded to TF32 only where torch is told to.
    """
    wider = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(wider), b.to(wider)
    if wider == torch.float32 or not a.is_cuda:
        torch.addmm(out, a.float(), b.float(), beta=1 if add else 0, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def splits(dtype: torch.dtype) -> int:
    """How many numbers of that dtype a float32 is split in where it meets such a table: three bfloat16 hold
    it exactly, and their products run on the matrix units. float16, which has not its range, is widened."""
    return 3 if dtype == torch.bfloat16 else 1


def parts(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """What x is split in to meet a table of that dtype: the parts' sum is x."""
    if x.dtype != torch.float32 or splits(dtype) == 1:
        return [x]
    found: list[Tensor] = []
    for _ in range(splits(dtype)):
        found.append(x.to(dtype))
        x = x - found[-1].float()
    return found


class HeadGradient:
    """Collects the gradient of a head from gradients of its tiles of logits."""

    def __init__(self, head: Head) -> None:
        self.logits, self.weight, self.bias = head
        device = self.logits.device
        if self.weight is None:
            self.out = torch.empty_like(self.logits, memory_format=torch.contiguous_format)
            return
        self.flat = self.logits.reshape(-1, self.logits.shape[-1])
        rows, width = self.flat.shape[0], tile_width(head)
        self.hidden_grad = torch.zeros(self.flat.shape, dtype=torch.float32, device=device)
        self.weight_grad = torch.empty(self.weight.shape, dtype=torch.float32, device=device)
        self.bias_grad = None if self.bias is None else torch.empty_like(self.bias, dtype=torch.float32)
        self.buffer = torch.empty(
            rows * min(width, self.weight.shape[0]),
            dtype=torch.promote_types(self.logits.dtype, self.weight.dtype),
            device=device,
        )

    def tile(self, first: int, count: int) -> Tensor:
        """Where the gradient of `count` tokens from `first` on is to be written, (rows, count)."""
        if self.weight is None:
            return self.out.view(-1, self.out.shape[-1])[:, first : first + count]
        rows = self.flat.shape[0]
        return self.buffer[: rows * count].view(rows, count)

    def add(self, first: int, gradient: Tensor) -> None:
        """Take in the gradient of the tile at token `first`."""
        if self.weight is None:
            return
        tokens = slice(first, first + gradient.shape[-1])
        matmul(gradient, self.weight[tokens], self.hidden_grad, add=True)
        matmul(gradient.mT, self.flat, self.weight_grad[tokens])
        if self.bias_grad is not None:
            self.bias_grad[tokens] = gradient.sum(0, dtype=torch.float32)

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
