"""Flows over continuous states: ELF, FLM, LangFlow, EDM, DDIM, CoBit and their kin are one structure.

A state is x = α·clean + σ·noise; a network turns it into x̂, its expectation of `clean`. The structure is that
of every family here (`dlcore.bits`, `dlcore.sphere`): a corruption (`interpolate`, `renoise`), a context-free
posterior logit (`matched_filter`), a drift weighed with the posterior (to x̂, of embeddings p·E by
`categorical.expectation`; `velocity_from_clean`), and a cheap update (`step` and its kin). Everything else is

- a path, (α, σ) as functions of the family's own time:

  ========  =====================  ============  ============  ========================================
  path      its time t             α             σ             families
  ========  =====================  ============  ============  ========================================
  linear    0 noise, 1 clean       t             1 - t         rectified flow, ELF (scale 2), FLM (t = γ)
  edm       the noise level σ      1             t             EDM, CoBit and other variance exploding
  vp        ᾱ, the share of power  √t            √(1 - t)      DDPM, DDIM, Analog Bits
  lognsr    γ = ln(σ²/α²)          √sigmoid(-γ)  √sigmoid(γ)   LangFlow, Plaid, VDM
  ========  =====================  ============  ============  ========================================

- a context-free posterior logit, where tokens have embeddings: `matched_filter`;
- one deterministic update, `step`: x' = α'x̂ + (σ'/σ)(x - αx̂), which is Euler's step of each family and on
  the first two paths a lerp from x̂ to x. `heun_step`, `sde_step` and `renoise` are made of it.

So an update never divides by 1 - t or by a vanishing σ. Times, weights and levels are ``float | Tensor`` and
broadcast to x.shape[:-1]; a state of scalars, such as bits (B, S), has times (B,), or one per bit as
x.unsqueeze(-1). Coefficients are computed in float64, states in float32 or wider whatever comes in.

Sources: EDM, arXiv 2206.00364; DDIM, arXiv 2010.02502; ELF, arXiv 2605.10938; FLM, arXiv 2602.16813;
LangFlow, arXiv 2604.11748; CoBit, arXiv 2605.07013; flow matching, arXiv 2210.02747.
"""

from dlcore._gaussian import Precondition
from dlcore.process.flow.edm import edm_grid, edm_precondition
from dlcore.process.flow.embeddings import flm_factor, flm_noise, matched_filter
from dlcore.process.flow.flm_time import flm_alpha, flm_gamma
from dlcore.process.flow.steps import (
    guide,
    heun_step,
    interpolate,
    renoise,
    sde_step,
    step,
    velocity_from_clean,
)
from dlcore.process.flow.times import elf_grid, langflow_gamma, langflow_grid

__all__ = [
    "Precondition",
    "edm_grid",
    "edm_precondition",
    "elf_grid",
    "flm_alpha",
    "flm_factor",
    "flm_gamma",
    "flm_noise",
    "guide",
    "heun_step",
    "interpolate",
    "langflow_gamma",
    "langflow_grid",
    "matched_filter",
    "renoise",
    "sde_step",
    "step",
    "velocity_from_clean",
]
