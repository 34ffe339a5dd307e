"""Masked diffusion with an approximate cache: what was written a step ago keeps its keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.systems.command import main
from bench.systems.mdlm import MDLM
from bench.systems.system import grid
from dlcore import LinearLogits, rng
from dlcore.attention import KVCache
from dlcore.demo.transformer import HEAD_DIM
from dlcore.process import cache, masked
from dlcore.process.cache import Rows

#: Every so many steps all rows are computed.
INTERVAL = 8


class DelayedCache(MDLM):
    """dKV-Cache-Decode on MDLM's network: a step computes the rows that were not settled before the last."""

    name = "dkv_cache"
    title = "delayed KV cache"
    paper = "arXiv 2505.15781"
    teacher = MDLM

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        z = self.masks(batch)
        lengths = torch.full((batch,), self.length)
        kv = self._cache(batch)
        kv.commit(lengths)
        decoded = z != self.mask_id
        for i, ((t, s), k) in enumerate(zip(grid(steps), rng.split(key, steps), strict=True)):
            rows = cache.rows(cache.dkv_decode(decoded, lengths, i, interval=INTERVAL))
            decoded = z != self.mask_id
            drawn = masked.step(self._logits(z, rows, kv), cache.take(z, rows), t, s, self.mask_id, key=k)
            cache.put(z, rows, drawn)
        return z

    def _logits(self, z: Tensor, rows: Rows, kv: KVCache) -> LinearLogits:
        """Of the rows alone."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return cache.attend(q, k, v, kv, layer, rows)

        x = cache.take(self.network.embed(z), rows)
        return LinearLogits(self.network.trunk(x, rows.positions, attend), self.network.head.weight)

    def _cache(self, batch: int) -> KVCache:
        weight = self.network.head.weight
        heads, layers = weight.shape[1] // HEAD_DIM, len(self.network.trunk.layers)
        return KVCache(layers, batch, self.length, heads, HEAD_DIM, dtype=weight.dtype, device=weight.device)


if __name__ == "__main__":
    main(DelayedCache)
