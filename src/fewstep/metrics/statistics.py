"""The mean and the covariance of features, and their sums over batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """The mean (D) and the covariance (D, D) of features, float64, and their number n."""

    mean: Tensor
    covariance: Tensor
    n: int

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """Returns the statistics of features (n, D); the covariance is the unbiased one."""
        mean = features.mean(0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), len(features))

    @classmethod
    def over(cls, batches: Iterable[Tensor]) -> Statistics:
        r"""Returns the statistics of batches of features (b, D), one batch in memory at a time.

        Two parts with n and m features are joined by

        .. math:: S (n + m - 1) = S_n (n - 1) + S_m (m - 1) + \frac{n m}{n + m} \delta \delta^T, \qquad
            \delta = \mu_m - \mu_n

        References:
            | Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (Chan et al., 1979)
            | https://doi.org/10.1007/978-3-642-51461-6_3

        Raises:
            ValueError: If there are fewer than two features.
        """
        mean, scatter, n = torch.zeros(()), torch.zeros(()), 0
        for batch in batches:
            batch = batch.detach().cpu().double()
            m, other = len(batch), batch.mean(0)
            centred, gap = batch - other, other - mean
            scatter = scatter + centred.T @ centred + n * m / (n + m) * gap[:, None] * gap
            mean, n = mean + gap * m / (n + m), n + m
        if n < 2:
            raise ValueError(f"statistics need at least 2 features, got {n}")
        return cls(mean, scatter / (n - 1), n)
