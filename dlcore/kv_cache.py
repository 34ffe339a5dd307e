"""Keys and values of the committed blocks: one allocation, contiguous or paged."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks


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
    Inside torch.compile a full cache is an IndexError or RuntimeError of torch's; no committed row changes.
    So it is on a GPU, where nothing waits for `lengths`; under DLCORE_CHECK=1 it is a ValueError there, too.

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
        self.write_as("KVCache.write", layer, k, v, start)

    def write_as(self, op: str, layer: int, k: Tensor, v: Tensor, start: int | Tensor | None = None) -> None:
        """`write` whose errors name `op`."""
        layer = self._layer(op, layer)
        self._check_rows(op, k, v)
        first = self.lengths if start is None else self._rows(op, "start", start)
        last = first + k.shape[1]
        self._check_room(op, last)
        position = first.long().unsqueeze(1) + torch.arange(k.shape[1], device=first.device)
        self._store(layer, position, k, v)

    def scatter(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Overwrite single rows: `rows` (batch, n) int64 positions below `max_len`, k and v (batch, n, H, D).

        For what dLLM-Cache or dKV-Cache style schedules refresh; the positions of a sequence must differ.
        """
        op = "KVCache.scatter"
        layer = self._layer(op, layer)
        self._check_rows(op, k, v)
        checks.tokens(op, "rows", rows, k.shape[:2])
        checks.token_range(op, "rows", rows, self.max_len)
        self._store(layer, rows, k, v)

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

    def _check_rows(self, op: str, k: Tensor, v: Tensor) -> None:
        for name, x, like in (("k", k, self._keys), ("v", v, self._values)):
            checks.floating(op, name, x)
            heads, size = like.shape[-2:]
            if x.dim() != 4 or x.shape[0] != self.batch or x.shape[2:] != (heads, size):
                wanted = f"({self.batch}, n, {heads}, {size})"
                raise ValueError(f"{op}: {name} must be {wanted}, got {tuple(x.shape)}")
            if x.dtype != like.dtype:
                raise TypeError(f"{op}: {name} must have the cache's dtype {like.dtype}, got {x.dtype}")
            if x.device != like.device:
                raise ValueError(f"{op}: {name} must be on {like.device}, got {x.device}")
        if k.shape[1] != v.shape[1]:
            raise ValueError(f"{op}: v must have k's {k.shape[1]} rows, got {v.shape[1]}")

    def _check_room(self, op: str, lengths: Tensor) -> None:
        if checks.reads_data(lengths) and int(lengths.max()) > self.max_len:
            raise ValueError(
                f"{op}: the cache is full: max_len is {self.max_len}, {int(lengths.max())} are needed"
            )

    def _store(self, layer: int, position: Tensor, k: Tensor, v: Tensor) -> None:
        keys, values = (x.flatten(0, 1) for x in self.view(layer))
        checked = checks.reads_data(position)
        inside = None if checked else (position >= 0) & (position < self.max_len)
        if self.page_table is None or self.page_size is None:
            row = position + self.max_len * torch.arange(self.batch, device=position.device).unsqueeze(1)
        else:
            known = position if inside is None else torch.where(inside, position, 0)
            page = self.page_table.long().gather(1, known // self.page_size)
            row = page * self.page_size + position % self.page_size
        if inside is not None:
            # Outside of its rows a sequence would run into another one; index_copy_ refuses a row past all.
            row = torch.where(inside, row, keys.shape[0])
        row = row.flatten()
        for store, x in ((keys, k), (values, v)):
            store.index_copy_(0, row, x.detach().flatten(0, 1))
