"""Keys and values of the committed blocks: one allocation, contiguous or paged."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore.reference import attention as reference


def settled(x: Tensor, live: Tensor, held: Tensor) -> Tensor:
    """x (B, n, ...) to be written with no harm: what is not `live` (B, n), a first part of each sequence,
    becomes what slot 0 is, or `held` (B, 1, ...) where not even that is."""

    def like_x(mask: Tensor) -> Tensor:
        return mask.reshape(*mask.shape, *[1] * (x.dim() - 2))

    return torch.where(like_x(live), x, torch.where(like_x(live[:, :1]), x[:, :1], held))


class KVCache:
    """Post-RoPE keys and values of `batch` sequences for every layer, in one allocation.

    `lengths` (batch,) int32 counts the committed positions of each sequence. What lies past them is scratch:
    `write` and `attention.decode` overwrite it and `commit` makes it part of the sequence. With `page_size`
    the rows of a sequence lie in pages listed by `page_table` (batch, pages) int32; else that is None.

    Args:
        num_layers, batch, max_len, num_kv_heads, head_dim: sizes, at least 1.
        v_head_dim: the values' head dimension where it differs.
        dtype: float32, bfloat16, float16 or float64.
        device: where the cache lives.
        page_size: rows per page, or None for contiguous rows.

    Raises ValueError for sizes, positions and a full cache (nothing is changed then), TypeError for dtypes.
    Inside torch.compile a full cache is an IndexError or RuntimeError of torch's, to `attention.decode` still
    a ValueError; no committed row changes. On a GPU, where nothing waits for `lengths`, it is torch's own
    error, and `attention.decode` writes no row past the end; under DLCORE_CHECK=1 it is a ValueError there.

    Example:
        >>> import torch
        >>> from dlcore.attention import KVCache
        >>> cache = KVCache(2, batch=1, max_len=16, num_kv_heads=2, head_dim=8)
        >>> for layer in range(2):
        ...     cache.write(layer, torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2, 8))
        >>> cache.commit(4)
        >>> cache.lengths.tolist(), tuple(cache.view(0)[0].shape)
        ([4], (1, 16, 2, 8))
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        page_size: int | None = None,
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        sizes = {
            "num_layers": num_layers,
            "batch": batch,
            "max_len": max_len,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "v_head_dim": v_head_dim,
            "page_size": 1 if page_size is None else page_size,
        }
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"KVCache: {name} must be an int, got {checks.describe(size)}")
            if size < 1:
                raise ValueError(f"KVCache: {name} must be at least 1, got {size}")
        if dtype not in checks.FLOATING:
            raise TypeError(f"KVCache: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        self.num_layers, self.batch, self.max_len = num_layers, batch, max_len
        self.page_size = page_size
        self.page_table: Tensor | None = None
        shape = [batch, max_len, num_kv_heads]
        if page_size is not None:
            pages = -(-max_len // page_size)
            table = torch.arange(batch * pages, dtype=torch.int32, device=device)
            self.page_table = table.view(batch, pages)
            shape = [batch * pages, page_size, num_kv_heads]
        rows = num_layers * shape[0] * shape[1] * shape[2]
        with torch.inference_mode(False):
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
            storage = torch.empty(rows * (head_dim + v_head_dim), dtype=dtype, device=device)
        self._keys = storage[: rows * head_dim].view(num_layers, *shape, head_dim)
        self._values = storage[rows * head_dim :].view(num_layers, *shape, v_head_dim)

    def view(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer in place: (batch, max_len, H, D), paged (num_pages, page_size, H, D)."""
        layer = self._layer("KVCache.view", layer)
        return self._keys[layer], self._values[layer]

    def write(self, layer: int, k: Tensor, v: Tensor, start: int | Tensor | None = None) -> None:
        """Write rows k (batch, n, H, D) and v from `start` on (int or (batch,); default `lengths`).

        `lengths` stay as they are; writing again overwrites.
        """
        op = "KVCache.write"
        self.layer_for(op, layer, k, v)
        first = self.lengths if start is None else self._rows(op, "start", start)
        last = first + k.shape[1]
        self._check_room(op, last)
        position = first.long().unsqueeze(1) + torch.arange(k.shape[1], device=first.device)
        self._store(layer, position, k, v)

    def layer_for(self, op: str, layer: int, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor]:
        """`view`, once k (batch, n, H, D) and v, if given, are found to be rows of it; errors name `op`."""
        layer = self._layer(op, layer)
        self._check_rows(op, k, v)
        return self._keys[layer], self._values[layer]

    def scatter(
        self, layer: int, rows: Tensor, k: Tensor | None, v: Tensor | None, count: Tensor | None = None
    ) -> None:
        """Overwrite single rows: `rows` (batch, n) int64 positions below `max_len`, k and v (batch, n, H, D).

        For what dLLM-Cache or dKV-Cache style schedules refresh; the positions of a sequence must differ.
        Keys or values that are None stay. With `count` (batch,) int64 only the first so many rows of each
        sequence are written, whatever the others hold.
        """
        op = "KVCache.scatter"
        self.layer_for(op, layer, k, v)
        given = k if k is not None else v
        if given is None:
            raise ValueError(f"{op}: give k or v, got neither")
        checks.tokens(op, "rows", rows, given.shape[:2])
        if count is None:
            checks.token_range(op, "rows", rows, self.max_len)
            return self._store(layer, rows, k, v)
        checks.tokens(op, "count", count, torch.Size((self.batch,)))
        checks.token_range(op, "count", count, rows.shape[1] + 1)
        live = torch.arange(rows.shape[1], device=rows.device) < count.unsqueeze(1)
        checks.token_range(op, "rows", torch.where(live, rows, 0), self.max_len)
        self._store(layer, rows, k, v, live)

    def commit(self, n: int | Tensor) -> None:
        """Count the next `n` rows (int or (batch,)) of each sequence as committed."""
        op = "KVCache.commit"
        lengths = self.lengths + self._rows(op, "n", n)
        self._check_room(op, lengths)
        self.lengths.copy_(lengths)

    def truncate(self, n: int | Tensor) -> None:
        """Shorten every sequence to at most `n` (int or (batch,)) committed rows."""
        self.lengths.copy_(torch.minimum(self.lengths, self._rows("KVCache.truncate", "n", n)))

    def reset(self) -> None:
        """Forget every sequence; the memory is kept."""
        self.lengths.zero_()

    def reorder(self, index: Tensor) -> None:
        """Make sequence i what sequence index[i] was: (batch,) int64; entries may repeat (beams).

        Rows are copied: a page that two sequences list would be written twice.
        """
        op = "KVCache.reorder"
        checks.tokens(op, "index", index, torch.Size((self.batch,)))
        checks.token_range(op, "index", index, self.batch)
        index = index.to(self.lengths.device)
        # Layer by layer, so that the copy stays small.
        for layer in (*self._keys, *self._values):
            if self.page_table is None:
                layer.copy_(layer[index])
            else:
                layer[self.page_table.long()] = layer[self.page_table[index].long()]
        self.lengths.copy_(self.lengths[index])

    def _layer(self, op: str, layer: int) -> int:
        checks.integer(op, "layer", layer)
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"{op}: layer must lie in [0, {self.num_layers}), got {layer}")
        return layer

    def _rows(self, op: str, name: str, value: int | Tensor) -> Tensor:
        lead, device = torch.Size((self.batch,)), self.lengths.device
        rows = checks.per_row(op, name, value, lead, device, torch.int64)
        if rows is None:
            raise TypeError(f"{op}: {name} must be an int or an integer Tensor, got None")
        checks.value_range(op, name, rows, 0)
        # So that no sum of lengths wraps.
        return rows.clamp(max=2**31 - 1).expand(lead)

    def _check_rows(self, op: str, k: Tensor | None, v: Tensor | None) -> None:
        for name, x, like in (("k", k, self._keys), ("v", v, self._values)):
            if x is None:
                continue
            checks.floating(op, name, x)
            heads, size = like.shape[-2:]
            if x.dim() != 4 or x.shape[0] != self.batch or x.shape[2:] != (heads, size):
                wanted = f"({self.batch}, n, {heads}, {size})"
                raise ValueError(f"{op}: {name} must be {wanted}, got {tuple(x.shape)}")
            if x.dtype != like.dtype:
                raise TypeError(f"{op}: {name} must have the cache's dtype {like.dtype}, got {x.dtype}")
            if x.device != like.device:
                raise ValueError(f"{op}: {name} must be on {like.device}, got {x.device}")
        if k is not None and v is not None and k.shape[1] != v.shape[1]:
            raise ValueError(f"{op}: v must have k's {k.shape[1]} rows, got {v.shape[1]}")

    def _check_room(self, op: str, lengths: Tensor) -> None:
        if checks.reads_data(lengths):
            checks.room(op, self.max_len, int(lengths.max()))

    def _store(
        self, layer: int, position: Tensor, k: Tensor | None, v: Tensor | None, live: Tensor | None = None
    ) -> None:
        keys, values = self.view(layer)
        if live is not None:
            position = settled(position, live, torch.zeros_like(position[:, :1]))
        row = reference.cache_rows(position, keys, self.page_table, self.max_len)
        for store, x in ((keys, k), (values, v)):
            if x is None:
                continue
            flat, x = store.flatten(0, 1), x.detach()
            if live is not None:
                x = settled(x, live, flat[row[:, :1]])
            flat.index_copy_(0, row.flatten(), x.flatten(0, 1))
