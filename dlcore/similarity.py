"""How much rows of a cache differ from fresh ones, without a temporary: what adaptive caches refresh by."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import _registry  # noqa: F401  (stands the backends behind the ops)

__all__ = ["cosine"]


def cosine(
    new: Tensor, cached: Tensor, rows: Tensor | None = None, *, page_table: Tensor | None = None
) -> Tensor:
    """The cosine between each row of `new` and the cached row at its position, heads together.

    A cache's rows are read in place: keys or values as `KVCache.view` gives them, paged or not. Two zero rows
    have cosine 1, as nothing has changed; a zero row and another one 0. A row that holds NaN or an infinity
    gives NaN, and so does, where values are not checked, a position outside of the cache. No gradients.

    Args:
        new: (B, n, H, D), or (B, n, N), floating; of any strides but the last.
        cached: (B, S, H, D), or (B, S, N), of new's dtype; paged (num_pages, page_size, H, D).
        rows: (B, n) int64 positions in [0, S) to compare with; default 0 to n - 1.
        page_table: (B, pages) int32, as `KVCache.page_table`: S is then pages · page_size.

    Returns:
        (B, n) in [-1, 1], float32, of float64 float64.

    Raises:
        TypeError: dtypes.
        ValueError: shapes, devices, a position outside of the cache.

    Example:
        >>> import torch
        >>> from dlcore import similarity
        >>> cached = torch.eye(4).view(1, 4, 1, 4)
        >>> new = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, -2]]).view(1, 2, 1, 4)
        >>> similarity.cosine(new, cached, torch.tensor([[0, 3]]))
        tensor([[ 0.7071, -1.0000]])
    """
    op = "similarity.cosine"
    for name, x in (("new", new), ("cached", cached)):
        checks.floating(op, name, x)
        if x.dim() not in (3, 4) or x.dim() != new.dim():
            wanted = "(B, S, H, D) or (B, S, N), both alike"
            raise ValueError(f"{op}: {name} must be {wanted}, got {tuple(x.shape)}")
    new, cached = (x.unsqueeze(2) if x.dim() == 3 else x for x in (new, cached))
    checks.on_device(op, "cached", cached, new.device)
    if rows is not None:
        checks.tokens(op, "rows", rows, new.shape[:2], new.device)
    if page_table is not None:
        if not isinstance(page_table, Tensor) or page_table.dtype != torch.int32:
            got = checks.describe(page_table)
            raise TypeError(f"{op}: page_table must be an int32 Tensor, got {got}")
        checks.on_device(op, "page_table", page_table, new.device)
    found: Tensor = torch.ops.dlcore.similarity_cosine(new, cached, rows, page_table)
    return found
