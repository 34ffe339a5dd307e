"""The duality of Gaussian and uniform diffusion: a curriculum of soft tokens, written by a ψ-sampler."""

from __future__ import annotations

from torch import Tensor

from bench.systems.command import main
from bench.systems.system import levels
from bench.systems.udm_loo import LeaveOneOut
from dlcore import rng
from dlcore.process import duo, uniform

#: The share of the training in which the network sees soft tokens.
CURRICULUM = 0.5
#: Temperatures of the softmax over the curriculum, and how many of its terms are kept.
TAU_START, TAU_STOP, TERMS = 1e-1, 1e-3, 5
#: Redraws of a position over a whole run of the sampler.
REDRAWS = 1.0


class Duo(LeaveOneOut):
    """z is the argmax of a noisy one-hot vector; at first the network sees its softmax instead."""

    name = "duo"
    title = "diffusion duality, curriculum and ψ"
    paper = "arXiv 2506.10892, 2602.21185"

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.transformation = duo.Transformation.covering(self.vocab_size)

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        if not self.training:
            # The bound is over all noise levels, the curriculum's are fewer.
            return super().loss(x, key, done)
        level_key, noise_key = rng.split(key, 2)
        gamma, alpha, dalpha = self.transformation.levels(levels(len(x), level_key))
        if done >= CURRICULUM:
            z = duo.corrupt(x, gamma, self.vocab_size, key=noise_key)
            logits = self.network(z, level=alpha)
        else:
            tau = duo.curriculum_temperature(
                done, start=0.0, stop=CURRICULUM, tau_start=TAU_START, tau_stop=TAU_STOP
            )
            z, ids, weights = duo.curriculum(x, gamma, tau, self.vocab_size, top_k=TERMS, key=noise_key)
            soft = duo.embed(ids, weights, self.network.table)
            logits = self.network.from_mixed(self.network.mix(soft, alpha))
        return uniform.nelbo(logits, z, x, alpha, dalpha).mean()

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        start, run = rng.split(key, 2)
        z = self.noise(batch, start)
        alphas = duo.alpha_profile(steps)
        for t, s, k in zip(alphas[:-1], alphas[1:], rng.split(run, steps), strict=True):
            kappa = duo.kappa("cap", t, s, min(1.0, REDRAWS / steps))
            z = uniform.step(self.network(z, level=t), z, t, s, kappa=kappa, key=k)
        return z


if __name__ == "__main__":
    main(Duo)
