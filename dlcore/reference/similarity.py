"""How much rows of a cache differ from fresh ones, in plain torch: the meaning of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore.reference.attention import gathered


def cosine(new: Tensor, cached: Tensor, rows: Tensor | None, page_table: Tensor | None) -> Tensor:
    """(B, n): the cosine between row i of new (B, n, H, D), heads together, and cached row rows[i]."""
    wide = torch.promote_types(new.dtype, torch.float32)
    held, inside = gathered(cached, page_table), None
    if rows is None:
        held = held[:, : new.shape[1]]
    else:
        inside = (rows >= 0) & (rows < held.shape[1])
        held = held.gather(1, torch.where(inside, rows, 0)[..., None, None].expand_as(new))
    a, b = (x.to(wide).flatten(2) for x in (new, held))
    found = _cosine(*(_scaled(x) for x in (a, b)))
    return found if inside is None else torch.where(inside, found, torch.nan)


def _scaled(x: Tensor) -> Tensor:
    """Rows with a largest entry of 1, so that their squares are numbers; zero rows as they are."""
    largest = x.abs().amax(-1, keepdim=True)
    return x / torch.where(largest == 0, 1, largest)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """1 between zero and zero, between which nothing has changed; 0 where one of them is zero."""
    squares = (a * a).sum(-1), (b * b).sum(-1)
    found = ((a * b).sum(-1) / (squares[0].sqrt() * squares[1].sqrt())).clamp(-1, 1)
    still, one = (squares[0] == 0) & (squares[1] == 0), (squares[0] == 0) | (squares[1] == 0)
    return torch.where(still, 1, torch.where(one, 0 * (squares[0] + squares[1]), found))
