"""Inverse distillation: a student in few steps whose samples no model of their own tells from the text's."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bench.systems.command import main
from bench.systems.mdlm import MDLM
from bench.systems.network import detached
from bench.systems.system import System, levels
from dlcore import categorical, rng
from dlcore.process import distill, masked


class IDLM(MDLM):
    """Student, fake and teacher start from MDLM's network; student and fake descend by turns."""

    name = "idlm"
    title = "inverse distillation"
    paper = "arXiv 2602.19066"
    teacher = MDLM
    steps = 8
    learning_rate = 3e-4
    bound = False

    def __init__(self, vocab_size: int, length: int, network: nn.Module | None = None) -> None:
        super().__init__(vocab_size, length, network)
        self.frozen = copy.deepcopy(self.network).requires_grad_(False)
        self.fake = copy.deepcopy(self.network)

    def learn_from(self, teacher: System) -> None:
        super().learn_from(teacher)
        for copied in (self.frozen, self.fake):
            copied.load_state_dict(teacher.network.state_dict())

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        """The fake's loss plus the student's, each blind to the other's weights: no bound."""
        keys = rng.split(key, 5)
        z = masked.corrupt(x, levels(len(x), keys[0]), self.mask_id, key=keys[1])
        student, hidden = self.network(z), z == self.mask_id
        drawn = categorical.sample(student, exclude=self.mask_id, key=keys[2]).tokens
        written = torch.where(hidden, drawn, z)
        alpha = levels(len(x), keys[3])
        noisy = masked.corrupt(written, alpha, self.mask_id, key=keys[4])
        noise = noisy, alpha, -1.0, self.mask_id
        fake, teacher = self.fake(noisy), self.frozen(noisy)
        # What z shows is a token; what the student filled in is its whole softmax.
        soft = distill.masked_fake_loss(fake, student, *noise)
        hard = masked.nelbo(fake, noisy, written, alpha, -1.0, self.mask_id)
        inverse = distill.masked_inverse_loss(student, teacher, detached(fake), *noise)
        return torch.where(hidden, soft + inverse, hard).mean()


if __name__ == "__main__":
    main(IDLM)
