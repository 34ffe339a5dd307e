"""Self-distillation through time: a student learns to make two of its teacher's steps in one."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bench.systems.command import main
from bench.systems.mdlm import MDLM
from bench.systems.system import System, levels
from dlcore import rng
from dlcore.process import distill, masked

#: Rounds of distillation: after each the student is the next one's teacher, and steps are twice as long.
ROUNDS = 3
#: Of the first round's steps.
FIRST = 1 / 64


class SDTT(MDLM):
    """Starts from MDLM's network and writes in few calls."""

    name = "sdtt"
    title = "self-distillation through time"
    paper = "arXiv 2410.21035"
    teacher = MDLM
    steps = 8
    learning_rate = 1e-3
    bound = False

    def __init__(self, vocab_size: int, length: int, network: nn.Module | None = None) -> None:
        super().__init__(vocab_size, length, network)
        self.frozen = copy.deepcopy(self.network).requires_grad_(False)
        self.register_buffer("round", torch.zeros((), dtype=torch.int64))
        self.round: Tensor

    def learn_from(self, teacher: System) -> None:
        super().learn_from(teacher)
        self.frozen.load_state_dict(teacher.network.state_dict())

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        """KL of the student from its teacher's two steps, per masked token: no bound."""
        current = min(int(done * ROUNDS), ROUNDS - 1)
        if self.training and current > int(self.round):
            self.frozen.load_state_dict(self.network.state_dict())
            self.round.fill_(current)
        step = FIRST * 2**current
        level_key, mask_key, draw_key = rng.split(key, 3)
        alpha = levels(len(x), level_key) * (1 - 2 * step)
        z = masked.corrupt(x, alpha, self.mask_id, key=mask_key)
        path = [alpha, alpha + step, alpha + 2 * step]
        targets = distill.rollout(lambda z, alpha: self.frozen(z), z, path, self.mask_id, key=draw_key)
        loss = distill.self_distillation_loss(self.network(z), targets, exclude=self.mask_id)
        return loss.sum() / (z == self.mask_id).sum().clamp(min=1)


if __name__ == "__main__":
    main(SDTT)
