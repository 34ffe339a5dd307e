"""Uniform-state diffusion, steps followed by redraws of the tokens that fit worst."""

from __future__ import annotations

from torch import Tensor

from bench.systems.command import main
from bench.systems.system import grid
from bench.systems.udm_loo import LeaveOneOut
from dlcore import rng
from dlcore.process import uniform

#: One position in so many is redrawn by a correction.
SPARSITY = 32


class PredictorCorrector(LeaveOneOut):
    """The leave-one-out network; each of the first steps is followed by one informed correction."""

    name = "udm_predictor_corrector"
    title = "uniform diffusion, informed corrector"
    paper = "arXiv 2605.22765"
    teacher = LeaveOneOut

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        corrections = (steps - 1) // 2
        start, run = rng.split(key, 2)
        z = self.noise(batch, start)
        redrawn = max(1, self.length // SPARSITY)
        predictions = steps - corrections
        for i, ((t, s), keys) in enumerate(
            zip(grid(predictions), rng.split(run, (predictions, 2)), strict=True)
        ):
            z = uniform.step(self.network(z, level=t), z, t, s, key=keys[0])
            if i < corrections:
                z = uniform.correct(self.network(z, level=s), z, s, redrawn, key=keys[1])
        return z


if __name__ == "__main__":
    main(PredictorCorrector)
