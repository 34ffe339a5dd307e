"""Statistical checks with known power: chi-square with pooled bins, and counts of rare events."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import stats
from torch import Tensor


def chi_square(tokens: Tensor, probabilities: Tensor, smallest: float = 5.0) -> float:
    """The p-value of tokens (n,) under probabilities (V,); 0 if one of probability 0 was drawn.

    Bins that expect fewer than `smallest` are pooled.
    """
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < probabilities.numel():
        return 0.0
    expected = (probabilities.double() / probabilities.sum()).numpy() * tokens.numel()
    observed = torch.bincount(tokens.flatten(), minlength=probabilities.numel()).double().numpy()
    rare = (expected < smallest) & (expected > 0)
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
    keep = expected > 0
    if observed[~keep].sum() > 0:
        return 0.0
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    return float(stats.chi2.sf(statistic, max(int(keep.sum()) - 1, 1)))


def count_score(hits: int, expected: float) -> float:
    """How many standard deviations a Poisson count is from its mean."""
    return (hits - expected) / math.sqrt(expected)
