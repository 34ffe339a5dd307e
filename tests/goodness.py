"""Statistical checks with known power: chi-square with pooled bins, and counts of rare events."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import stats
from torch import Tensor


def chi_square(tokens: Tensor, probabilities: Tensor, smallest: float = 5.0) -> float:
    """The p-value of tokens (n,) under probabilities (V,); bins that expect fewer than `smallest` are pooled."""
    expected = probabilities.double().numpy() * tokens.numel()
    observed = torch.bincount(tokens.flatten(), minlength=probabilities.numel()).double().numpy()
    rare = expected < smallest
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
    keep = expected > 0
    assert observed[~keep].sum() == 0, "a token of probability 0 was drawn"
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    return float(stats.chi2.sf(statistic, max(int(keep.sum()) - 1, 1)))


def count_score(hits: int, expected: float) -> float:
    """How many standard deviations a Poisson count is from its mean."""
    return (hits - expected) / math.sqrt(expected)
