"""Block diffusion: masked diffusion within a block, blocks from left to right with a KV cache."""

from __future__ import annotations

from torch import Tensor, nn

from bench.systems import network
from bench.systems.command import main
from bench.systems.system import System
from dlcore.demo import block_transformer
from dlcore.demo.block_transformer import BlockTransformer

#: Tokens of a block.
BLOCK = 16


class BlockDiffusion(System):
    """The demo's block transformer: training is one pass over [x_t; x_0], a finished block is cached."""

    name = "block_diffusion"
    title = "block diffusion, cached"
    paper = "arXiv 2503.09573"
    network: BlockTransformer

    def build(self) -> nn.Module:
        return BlockTransformer(
            self.vocab_size,
            length=self.length,
            block_size=BLOCK,
            layers=network.LAYERS,
            width=network.WIDTH,
        )

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        return block_transformer.nelbo(self.network, x, key).mean()

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        blocks = self.length // BLOCK
        each = max(1, steps // blocks)
        *_, tokens = block_transformer.generate(self.network, batch=batch, blocks=blocks, steps=each, key=key)
        return tokens


if __name__ == "__main__":
    main(BlockDiffusion)
