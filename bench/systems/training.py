"""Train a system for a while, and go on where a killed training stopped."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.systems import checkpoint
from bench.systems.system import System
from dlcore import rng

#: The share of the tokens that training doesn't see.
HELD_OUT = 0.1


@dataclass(frozen=True)
class Data:
    """Tokens below `vocab_size`, cut into training and held-out parts.

    They are (N,) of a text, of which sequences are windows, or (N, L), the sequences themselves.
    """

    tokens: Tensor
    vocab_size: int

    @property
    def training(self) -> Tensor:
        return self.tokens[: self._cut]

    @property
    def held_out(self) -> Tensor:
        return self.tokens[self._cut :]

    @property
    def _cut(self) -> int:
        return round(len(self.tokens) * (1 - HELD_OUT))

    def digest(self) -> str:
        """A name for the tokens that changes with them."""
        return hashlib.sha256(self.tokens.to(torch.int32).numpy().tobytes()).hexdigest()[:16]


class Trained(NamedTuple):
    """A training after a step."""

    step: int
    seconds: float
    """Spent in steps, those before a restart included."""
    loss: float
    saved: bool


def windows(tokens: Tensor, length: int, count: int, key: Tensor) -> Tensor:
    """Random windows (count, length) of tokens (N,), or rows of tokens (N, length)."""
    if tokens.dim() == 2:
        return tokens[(rng.uniform(key, (count,)) * len(tokens)).long()]
    starts = (rng.uniform(key, (count,)) * (len(tokens) - length + 1)).long()
    return tokens[starts.unsqueeze(1) + torch.arange(length)]


def train(
    system: System,
    data: Data,
    *,
    seconds: float,
    key: Tensor,
    path: Path | None = None,
    steps: int | None = None,
    batch: int = 16,
    save_every: float = 10.0,
) -> Iterator[Trained]:
    """Train until `seconds` or `steps` are over; yields after each step.

    The learning rate rises over the first twentieth and falls to 0 in the end. The clock stops while the
    caller holds a result. With a path, training goes on from the checkpoint there and leaves one every
    `save_every` seconds and at the end.

    Raises:
        UserError: the checkpoint at path is another training's.
    """
    optimizer = torch.optim.AdamW(system.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    corpus = data.digest()
    reached = checkpoint.load(path, system, optimizer, corpus) if path else checkpoint.Reached()
    step, spent, saved = reached.step, reached.seconds, reached.seconds
    while (done := _done(spent, seconds, step, steps)) < 1:
        start = time.perf_counter()
        window_key, noise_key = rng.split(rng.fold_in(key, step), 2)
        x = windows(data.training, system.length, batch, window_key)
        loss = _descend(system, optimizer, x, noise_key, done)
        step += 1
        spent += time.perf_counter() - start
        save = path is not None and (spent - saved >= save_every or _done(spent, seconds, step, steps) >= 1)
        if save and path is not None:
            saved = spent
            checkpoint.save(path, system, optimizer, checkpoint.Reached(step, spent), corpus)
        yield Trained(step, spent, loss, save)


def _done(spent: float, seconds: float, step: int, steps: int | None) -> float:
    return max(spent / seconds, 0.0 if steps is None else step / steps)


def _descend(system: System, optimizer: torch.optim.Optimizer, x: Tensor, key: Tensor, done: float) -> float:
    """One step; the loss before it."""
    optimizer.param_groups[0]["lr"] = system.learning_rate * min(20 * done + 0.02, 1.0, (1 - done) / 0.6)
    loss = system.loss(x, key, done)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(system.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def held_out_loss(system: System, data: Data, key: Tensor, draws: int = 16, batch: int = 16) -> float:
    """The loss of a finished training on the part of the text that it didn't see."""
    losses = []
    for draw in rng.split(key, draws):
        window_key, noise_key = rng.split(draw, 2)
        x = windows(data.held_out, system.length, batch, window_key)
        losses.append(float(system.loss(x, noise_key, 1.0)))
    return sum(losses) / draws
