"""Generalized interpolating discrete diffusion (GIDD): noise that masks and noise that replaces, together.

q(z | x) = α·1[z = x] + μ·1[z = mask] + υ/N·1[z ≠ mask], with α + μ + υ = 1 and N = V-1 tokens that are not
the mask. A `Level` holds these three masses and the two rates of one moment, from GIDD's `schedule` or from
`level`; each is a number or a tensor that broadcasts to z's shape. With υ = 0 everything here is `masked`,
with μ = 0 it is `uniform` over the N tokens.

The predictor p plays the part of the leave-one-out posterior: where a token stands, the bridge adds what
that token tells. The mask has probability 0 under it.

Source: GIDD, arXiv 2503.04482.

Example:
    A loss at a random t, and a sample in eight steps.

    >>> import torch
    >>> from dlcore.process import hybrid
    >>> network = torch.nn.Sequential(torch.nn.Embedding(9, 16), torch.nn.Linear(16, 9))
    >>> x, at = torch.randint(8, (2, 6)), hybrid.schedule(torch.rand(2, 1, dtype=torch.float64))
    >>> z = hybrid.corrupt(x, at, vocab_size=9, mask_id=8)
    >>> hybrid.loss(network(z), z, x, at, mask_id=8).mean().backward()
    >>> z, levels = torch.full((2, 6), 8), [hybrid.schedule(1 - step / 8) for step in range(9)]
    >>> for now, before in zip(levels, levels[1:]):
    ...     z = hybrid.step(network(z), z, now, before, mask_id=8)
    >>> bool((z < 8).all())
    True
"""

from dlcore.process.hybrid.levels import Level, level, schedule
from dlcore.process.hybrid.losses import loss, nelbo
from dlcore.process.hybrid.steps import bridge_log_probs, correct, corrupt, step

__all__ = [
    "Level",
    "bridge_log_probs",
    "correct",
    "corrupt",
    "level",
    "loss",
    "nelbo",
    "schedule",
    "step",
]
