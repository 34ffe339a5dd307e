"""One network for two block sizes: blocks drafted at once, redone where its autoregressive side doubts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.systems import network
from bench.systems.command import main
from bench.systems.system import System, levels
from dlcore import LinearLogits, attention, categorical, rng
from dlcore.demo.transformer import Trunk
from dlcore.process import guidance, masked

#: Tokens of a block that is drafted at once.
BLOCK = 16
#: The share of sequences that train it as an autoregressive model, whose blocks have one token.
AUTOREGRESSIVE = 0.5


class BlockNetwork(nn.Module):
    """Logits of noisy blocks given the clean tokens before them, for any block size."""

    def __init__(self, vocab_size: int, length: int) -> None:
        super().__init__()
        width, layers = network.WIDTH, network.LAYERS
        self.embedding = nn.Embedding(vocab_size + 1, width)
        self.trunk = Trunk(length, layers=layers, width=width)
        self.head = nn.Linear(width, vocab_size + 1, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, noisy: Tensor, clean: Tensor, block_size: int) -> LinearLogits:
        """(B, S, V + 1) at noisy (B, S); clean tokens see themselves and those before."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mixed = attention.block_diffusion(q, k, v, block_size=block_size, clean="token")
            assert isinstance(mixed, Tensor)
            return mixed

        length = noisy.shape[1]
        x = self.embedding(torch.cat((noisy, clean), 1))
        hidden = self.trunk(x, torch.arange(length).repeat(2), attend)[:, :length]
        return LinearLogits(hidden, self.head.weight)


class BlockGen(System):
    """BlockGen with masks; the corrector redoes the tokens that its autoregressive side finds unlikely."""

    name = "blockgen_arpc"
    title = "block diffusion, AR-informed corrector"
    paper = "arXiv 2606.02241"

    @property
    def mask_id(self) -> int:
        return self.vocab_size

    def build(self) -> nn.Module:
        return BlockNetwork(self.vocab_size, self.length)

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        level_key, mask_key = rng.split(key, 2)
        singles = round(AUTOREGRESSIVE * len(x))
        alone, x = x[:singles], x[singles:]
        ar = categorical.cross_entropy(self.autoregressive(alone), alone, exclude=self.mask_id)
        blocks = -(-self.length // BLOCK)
        alpha = levels(len(x) * blocks, level_key).view(len(x), blocks)
        alpha = alpha.repeat_interleave(BLOCK, 1)[:, : self.length]
        z = masked.corrupt(x, alpha, self.mask_id, key=mask_key)
        bound = masked.nelbo(self.network(z, x, BLOCK), z, x, alpha, -1.0, self.mask_id)
        return AUTOREGRESSIVE * ar.mean() + (1 - AUTOREGRESSIVE) * bound.mean()

    def autoregressive(self, x: Tensor) -> LinearLogits:
        """Logits of every token of x (B, S) given those before it: blocks of one mask each."""
        logits: LinearLogits = self.network(torch.full_like(x, self.mask_id), x, 1)
        return logits

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        blocks = -(-self.length // BLOCK)
        rounds = max(1, steps // (2 * blocks))
        clean = torch.empty(batch, 0, dtype=torch.int64)
        for block_key in rng.split(key, blocks):
            z = torch.full((batch, min(BLOCK, self.length - clean.shape[1])), self.mask_id)
            for i, k in enumerate(rng.split(block_key, rounds)):
                z = self._draft_and_redo(clean, z, (i + 1) / rounds, k)
            clean = torch.cat((clean, z), 1)
        return clean

    def _draft_and_redo(self, clean: Tensor, z: Tensor, alpha_s: float, key: Tensor) -> Tensor:
        """Draw the whole block, then mask again what the autoregressive side doubts most."""
        start, whole = clean.shape[1], torch.cat((clean, z), 1)
        logits = _rows(self.network(whole, whole, BLOCK), start)
        draft = masked.step(logits, z, 0.0, 1.0, self.mask_id, key=key)
        if alpha_s == 1:
            return draft
        return guidance.renoise(draft, self.doubts(clean, draft), alpha_s, prior=self.mask_id)

    def doubts(self, clean: Tensor, draft: Tensor) -> Tensor:
        """(B, n): how unlikely the tokens of a draft (B, n) are, each given those before it."""
        ar = _rows(self.autoregressive(torch.cat((clean, draft), 1)), clean.shape[1])
        return guidance.arpc_score(ar_logits=ar, tokens=draft, score="ar_nll", exclude=self.mask_id)


def _rows(logits: LinearLogits, start: int) -> LinearLogits:
    return LinearLogits(logits.hidden[:, start:], logits.weight)


if __name__ == "__main__":
    main(BlockGen)
