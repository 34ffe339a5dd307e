"""Uniform-state diffusion of images: 8×8 handwritten digits, a grey level a token."""

from __future__ import annotations

import math

import torch
from matplotlib.image import imsave
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bench.systems.network import Network
from bench.systems.sequences import Outcome, main
from bench.systems.training import Data
from bench.systems.udm_loo import LeaveOneOut
from dlcore import LinearLogits
from dlcore.demo.options import UserError

#: Grey levels, the pixels of a side, images in a row of the picture, and its dots for a pixel's side.
LEVELS, SIDE, ROW, DOTS = 17, 8, 16, 4


class Placed(nn.Module):
    """A network that is told where a pixel is, for text's knows distances alone."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.network = Network(max(LEVELS, pixels), LEVELS, pixels, streams=2)

    def forward(self, z: Tensor, level: float | Tensor) -> LinearLogits:
        logits: LinearLogits = self.network(z, torch.arange(z.shape[1]).expand_as(z), level=level)
        return logits


class Digits(LeaveOneOut):
    """The leave-one-out system, on rows of pixels joined to one; it isn't told which digit."""

    name = "digits"
    title = "uniform diffusion of 8×8 digits"

    def build(self) -> nn.Module:
        return Placed(self.length)


def read() -> Data:
    """The 1,797 images that scikit-learn ships, in an order of their own: writers are in both parts."""
    images = torch.from_numpy(load_digits().data).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Data(images[order], LEVELS)


def tiled(images: Tensor) -> Tensor:
    """Images (N, 64) side by side, ROW in a row, with an empty line after each: (H, W)."""
    missing = -len(images) % ROW
    grid = torch.nn.functional.pad(images, (0, 0, 0, missing)).view(-1, ROW, SIDE, SIDE)
    return torch.nn.functional.pad(grid, (0, 1, 0, 1)).transpose(1, 2).flatten(2).flatten(0, 1)


def distance(images: Tensor, others: Tensor) -> float:
    """The mean distance to the nearest of the others, in grey levels (root of the summed squares)."""
    return float(torch.cdist(images.float(), others.float()).amin(1).mean())


def report(outcome: Outcome) -> str:
    """Bits per pixel, and whether samples are as near to training images as held-out images are."""
    path, data = outcome.out / "digits.png", outcome.data
    picture = tiled(outcome.tokens).repeat_interleave(DOTS, 0).repeat_interleave(DOTS, 1)
    try:
        imsave(path, picture.numpy(), cmap="gray_r", vmin=0, vmax=LEVELS - 1)
    except OSError as error:
        raise UserError(f"--out {outcome.out}: {error.strerror or error}") from None
    return (
        f"{path}: {len(outcome.tokens)} samples\n"
        f"held-out bound {outcome.loss / math.log(2):.2f} bits per pixel; nearest training image at "
        f"{distance(outcome.tokens, data.training):.1f}, of held-out images at "
        f"{distance(data.held_out, data.training):.1f}"
    )


if __name__ == "__main__":
    main(Digits, read, report)
