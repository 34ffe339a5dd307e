"""Bitstream diffusion: tokens as `width` bits, x = bit + σ·noise per bit, and a posterior per bit.

Codings: bits are {0, 1} ("01": CoBit) or {-1, 1} ("pm1": Analog Bits); σ is in the coding's own units, so
x and σ of "pm1" are 2x - 1 and 2σ of "01". Probabilities are always those of a set bit, in [0, 1].

The structure is that of every family here (`process.flow`, `sphere`):

- a corruption: `corrupt`, `churn`;
- a context-free posterior logit, the matched filter: `matched_filter`;
- a drift weighed with the posterior, to its mean: `posterior`, and what trains it, `loss`;
- a cheap update, a lerp from that mean: `step`, which does all of it in one pass, `euler_step`, `heun_step`.

What x alone says of its bit is the matched filter, the logit (x - 1/2)/σ² ("01") or 2x/σ² ("pm1"), clamped to
±clip; a network adds a residual logit. Sums are made in float32 whatever the inputs' dtypes; a float64 input
makes everything float64 (on the reference).

Noise levels sigma and gamma are ``float | Tensor``: they broadcast to the leading dimensions of x (one per
sequence of x (B, S), one per token of x (B, L, w)), or, with as many dimensions as x, to x itself (one per
bit). Row r of x is x.flatten(0, -2)[r]; its noise is `rng.normal` of its key to 2e-6 (float32), so chunks of
rows with `rng.split` keys agree with the whole; it costs least on long rows: noise x (B, S), not (B, L, w).
NaN in x or in a residual gives NaN at that place alone, be the place held or moved.

Sources: CoBit, Batzolis et al., arXiv 2605.07013; Analog Bits, Chen, Zhang and Hinton, ICLR 2023.
"""

from dlcore.bits.codes import decode, encode, patch, unpatch
from dlcore.bits.corruption import churn, churn_gamma, corrupt
from dlcore.bits.entropy_schedule import EntropySchedule
from dlcore.bits.posteriors import edm_weight, loss, matched_filter, posterior, scale_input
from dlcore.bits.updates import euler_step, heun_step, step

__all__ = [
    "EntropySchedule",
    "churn",
    "churn_gamma",
    "corrupt",
    "decode",
    "edm_weight",
    "encode",
    "euler_step",
    "heun_step",
    "loss",
    "matched_filter",
    "patch",
    "posterior",
    "scale_input",
    "step",
    "unpatch",
]
