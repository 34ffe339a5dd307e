"""Guidance of discrete diffusion: by a condition, by a classifier, by an autoregressive model.

==================  =========================================  ==========================================
guidance            what is sampled                            calls
==================  =========================================  ==========================================
classifier-free     q_c^γ · q_u^(1-γ), normalised              `cfg`, `cfg_uniform_step` and its law,
                                                               `cfg_uniform_log_probs`
classifier-based    q(y) · p(class | x with y at l)^γ          `exact_guide` or `taylor_guide`, then `cbg`,
                                                               `cbg_masked_step`, `cbg_uniform_step`
guided diffusion    the network's own tokens, as many as an    `verify`
                    autoregressive model agrees with
ARPC                a clean draft, noised again where the two  `arpc_score`, `renoise`
                    models disagree most
==================  =========================================  ==========================================

Logits are Tensors or `LinearLogits`; where both of a pair are linear the guided logits are linear too, so
that nothing of size (B, L, V) exists. Weights γ are ``float | Tensor``, broadcast to z's shape: 0 is no
guidance, 1 is the condition (or Bayes' rule with the classifier), more exaggerates it. A gradient reaches
`cfg`, `cfg_uniform_log_probs` and `cbg`; the rest draws or ranks.

Sources: Simple Guidance (D-CFG, D-CBG) and UDLM, arXiv 2412.10193; Taylor-approximated guidance (TAG), arXiv
2406.01572; FlashDLM, arXiv 2505.21467; BlockGen, arXiv 2606.02241.
"""

from dlcore.process.guidance.autoregressive import SCORES, arpc_score, renoise, verify
from dlcore.process.guidance.classifier import (
    cbg,
    cbg_masked_step,
    cbg_uniform_step,
    exact_guide,
    taylor_guide,
)
from dlcore.process.guidance.classifier_free import cfg, cfg_uniform_log_probs, cfg_uniform_step

__all__ = [
    "SCORES",
    "arpc_score",
    "cbg",
    "cbg_masked_step",
    "cbg_uniform_step",
    "cfg",
    "cfg_uniform_log_probs",
    "cfg_uniform_step",
    "exact_guide",
    "renoise",
    "taylor_guide",
    "verify",
]
