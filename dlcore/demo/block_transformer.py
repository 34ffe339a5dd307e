"""A small block-diffusion transformer on dlcore's public calls: train it, sample it with and without a cache.

Blocks are written from left to right, each by masked diffusion given the blocks before it (Arriola et al.,
"Block Diffusion", ICLR 2025). Training runs one pass over [x_t; x_0]; sampling keeps the keys and values of
finished blocks. The mask token is the last of the vocabulary.

Example:
    >>> import torch, dlcore
    >>> _ = torch.manual_seed(0)
    >>> tokens = torch.tensor(list(b"block diffusion with a cache. " * 20)) - 32
    >>> model = BlockTransformer(vocab_size=96, length=32, block_size=8, layers=2, width=64)
    >>> losses = list(train(model, tokens, seconds=60, steps=12, batch=4, key=dlcore.rng.key(1)))
    >>> losses[-1].loss < losses[0].loss
    True
    >>> key = dlcore.rng.key(7)
    >>> *_, cached = generate(model, batch=2, blocks=4, steps=4, key=key)
    >>> *_, recomputed = generate(model, batch=2, blocks=4, steps=4, key=key, cached=False)
    >>> torch.equal(cached, recomputed)
    True
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dlcore import attention, rng
from dlcore.attention import KVCache
from dlcore.demo.transformer import HEAD_DIM, Attend, Trunk
from dlcore.process import masked


class BlockTransformer(nn.Module):
    """Pre-norm transformer with rotary positions and heads of 32.

    Args:
        vocab_size: V without the mask token, whose id is V.
        length: L, the positions it is trained and used on; a multiple of block_size.
        block_size: positions per block.
        layers, width: depth, and d, a multiple of 32.

    Raises:
        ValueError: length or width that is no such multiple.
    """

    def __init__(
        self, vocab_size: int, *, length: int = 256, block_size: int = 16, layers: int = 4, width: int = 128
    ) -> None:
        super().__init__()
        if length % block_size or width % HEAD_DIM:
            raise ValueError(
                f"BlockTransformer: length must be a multiple of block_size and width of {HEAD_DIM}, "
                f"got length {length}, block_size {block_size}, width {width}"
            )
        self.mask_id, self.length, self.block_size = vocab_size, length, block_size
        self.embedding = nn.Embedding(vocab_size + 1, width)
        self.nearby = nn.Conv1d(width, width, kernel_size=5, padding="same")
        self.trunk = Trunk(length, layers=layers, width=width)
        self.head = nn.Linear(width, vocab_size + 1, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, noisy: Tensor, clean: Tensor) -> Tensor:
        """Training: logits (B, n·L, V + 1) at n noisy copies (B, n·L) of the clean tokens (B, L), n >= 1."""
        rows, length = noisy.shape[1], clean.shape[1]
        last = len(self.trunk.layers) - 1

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _tensor(
                attention.block_diffusion(
                    q,
                    k,
                    v,
                    block_size=self.block_size,
                    num_noisy=rows // length,
                    rows="noisy" if layer == last else "all",
                )
            )

        positions = torch.arange(length, device=noisy.device).repeat(rows // length + 1)
        return self._run(torch.cat((noisy, clean), 1), positions, attend, slice(rows))

    def recompute(self, tokens: Tensor) -> Tensor:
        """Logits (B, block, V + 1) of the last block of tokens (B, S), after clean blocks; no cache."""
        first = tokens.shape[1] - self.block_size
        last = len(self.trunk.layers) - 1

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            offset = first if layer == last else 0
            return _tensor(attention.block_causal(q, k, v, block_size=self.block_size, q_offset=offset))

        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self._run(tokens, positions, attend, slice(first, None))

    def decode(self, tokens: Tensor, cache: KVCache, num_commit: int = 0) -> Tensor:
        """Logits (B, S - num_commit, V + 1) of a block at the cache's lengths, tokens (B, S).

        The first `num_commit` tokens are the clean block before it; the caller then commits them.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _tensor(attention.decode(q, k, v, cache, layer, num_commit=num_commit))

        rows = torch.arange(tokens.shape[1], device=tokens.device)
        positions = cache.lengths.long().unsqueeze(1) + rows
        return self._run(tokens, positions, attend, slice(None))[:, num_commit:]

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` sequences of L positions."""
        weight = self.head.weight
        heads = weight.shape[1] // HEAD_DIM
        return KVCache(
            len(self.trunk.layers),
            batch,
            self.length,
            heads,
            HEAD_DIM,
            dtype=weight.dtype,
            device=weight.device,
        )

    def _run(self, tokens: Tensor, positions: Tensor, attend: Attend, wanted: slice) -> Tensor:
        """Logits of the `wanted` rows; the last layer computes no others."""
        hidden = self.trunk(self._mix_nearby(self.embedding(tokens)), positions, attend, wanted)
        logits: Tensor = self.head(hidden)
        return logits

    def _mix_nearby(self, x: Tensor) -> Tensor:
        """Add to each row of x (B, S, d) a mix of its neighbours in its block: spelling is learnt sooner."""
        blocks = x.reshape(-1, self.block_size, x.shape[-1])
        mixed: Tensor = blocks + self.nearby(blocks.mT).mT
        return mixed.view_as(x)


def _tensor(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(result, Tensor)
    return result


def nelbo(model: BlockTransformer, x: Tensor, key: Tensor) -> Tensor:
    """Block diffusion's NELBO at one noise level per block: nats per token (B, L) for x (B, L).

    α = 1 - t, with t stratified over the blocks of the batch, so that its mean varies little between draws.
    """
    batch, length = x.shape
    level_key, mask_key = rng.split(key, 2)
    alpha = 1 - _levels(level_key, (batch, length // model.block_size)).repeat_interleave(model.block_size, 1)
    z = masked.corrupt(x, alpha, model.mask_id, key=mask_key)
    return masked.nelbo(model(z, x), z, x, alpha, -1.0, model.mask_id)


def _levels(key: Tensor, shape: tuple[int, int]) -> Tensor:
    """Uniform times in (0, 1), one in each of as many equal parts, in random order."""
    count = math.prod(shape)
    order_key, jitter_key = rng.split(key, 2)
    order = rng.uniform(order_key, (count,)).argsort()
    return ((order + rng.uniform(jitter_key, (count,))) / count).view(shape)


class Trained(NamedTuple):
    """How far a training is: steps made, seconds spent in them, and the last one's loss in nats per token."""

    step: int
    seconds: float
    loss: float


def train(
    model: BlockTransformer,
    tokens: Tensor,
    *,
    seconds: float,
    key: Tensor,
    steps: int | None = None,
    batch: int = 4,
    learning_rate: float = 4e-3,
) -> Iterator[Trained]:
    """Train on windows of tokens (N,) until `seconds` or `steps` are over; yields after each step.

    The loss is the NELBO. The learning rate rises over the first twentieth and falls to 0 in the end.
    The clock stops while the caller holds a result.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    spent, step = 0.0, 0
    while (done := max(spent / seconds, 0 if steps is None else step / steps)) < 1:
        start = time.perf_counter()
        optimizer.param_groups[0]["lr"] = learning_rate * min(20 * done + 0.02, 1.0, (1 - done) / 0.6)
        window_key, noise_key = rng.split(rng.fold_in(key, step), 2)
        loss = nelbo(model, _windows(tokens, model.length, batch, window_key), noise_key).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        spent += time.perf_counter() - start
        yield Trained(step, spent, float(loss.detach()))


def _windows(tokens: Tensor, length: int, batch: int, key: Tensor) -> Tensor:
    """Random windows (batch, length) of tokens (N,)."""
    starts = (rng.uniform(key, (batch,)) * (len(tokens) - length + 1)).long()
    return tokens[starts.unsqueeze(1) + torch.arange(length)]


@torch.no_grad()
def generate(
    model: BlockTransformer, *, batch: int, blocks: int, steps: int, key: Tensor, cached: bool = True
) -> Iterator[Tensor]:
    """Sample block by block; yields the tokens so far, (batch, blocks so far · block size), after each step.

    A block takes `steps` ancestral steps. With the cache a finished block is committed by the first step of
    the next one, in the same pass; without it every step computes all blocks anew. The tokens are the same.
    """
    size, mask_id = model.block_size, model.mask_id
    cache = model.new_cache(batch)
    clean = torch.empty(batch, 0, dtype=torch.int64)
    for block_key in rng.split(key, blocks):
        z = torch.full((batch, size), mask_id)
        for i, step_key in enumerate(rng.split(block_key, steps)):
            if not cached:
                logits = model.recompute(torch.cat((clean, z), 1))
            elif i > 0 or clean.shape[1] == 0:
                logits = model.decode(z, cache)
            else:
                logits = model.decode(torch.cat((clean[:, -size:], z), 1), cache, num_commit=size)
                cache.commit(size)
            z = masked.step(logits, z, i / steps, (i + 1) / steps, mask_id, key=step_key)
            yield torch.cat((clean, z), 1)
        clean = torch.cat((clean, z), 1)
