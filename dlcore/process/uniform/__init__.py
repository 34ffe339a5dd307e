"""Uniform-state diffusion: q(z | x) = α·1[z = x] + (1 - α)/V.

Two predictors describe the clean token x_l of a noisy sequence z: the denoiser D(v) = q(x_l = v | z), which
has seen z_l, and the leave-one-out (LOO) posterior p(v) = q(x_l = v | z without z_l), which has not. With
c = Vα/(1 - α) they are related by D(v) ∝ p(v)·(1 + c·1[v = z_l]): one shifted logit. Networks of either
`parameterization` ("loo" or "denoiser") serve every function here.

Noise levels alpha are ``float | Tensor``, broadcast to z's shape, and are best given in float64: 1 - α is
what matters, and a float32 α near 1 has already lost it. A position with α = 1 is clean (a prompt).

Sources: leave-one-out uniform diffusion, arXiv 2605.22765; The Diffusion Duality, arXiv 2506.10892 and
2602.21185; UDLM, arXiv 2412.10193.

Example:
    A loss at α = 1 - t, whose mean over t bounds -log p(x), and a sample in eight steps.

    >>> import torch
    >>> from dlcore.process import uniform
    >>> network = torch.nn.Sequential(torch.nn.Embedding(9, 16), torch.nn.Linear(16, 9))
    >>> x, alpha = torch.randint(9, (2, 6)), torch.rand(2, 1, dtype=torch.float64)
    >>> z = uniform.corrupt(x, alpha, vocab_size=9)
    >>> uniform.nelbo(network(z), z, x, alpha, -1.0).mean().backward()
    >>> z = torch.randint(9, (2, 6))
    >>> for step in range(8):
    ...     z = uniform.step(network(z), z, step / 8, (step + 1) / 8)
    >>> z.shape
    torch.Size([2, 6])
"""

from dlcore.process.uniform.conversions import (
    denoiser_to_loo,
    log_score_to_loo,
    loo_to_denoiser,
    loo_to_log_score,
)
from dlcore.process.uniform.correctors import SCORES, confidence_step, correct, loo_probe
from dlcore.process.uniform.losses import cross_entropy, nelbo
from dlcore.process.uniform.steps import bridge_log_probs, corrupt, step

__all__ = [
    "SCORES",
    "bridge_log_probs",
    "confidence_step",
    "correct",
    "corrupt",
    "cross_entropy",
    "denoiser_to_loo",
    "log_score_to_loo",
    "loo_probe",
    "loo_to_denoiser",
    "loo_to_log_score",
    "nelbo",
    "step",
]
