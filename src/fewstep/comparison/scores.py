"""Scores of the samples of a cell: estimates with intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.base.registry import unknown
from fewstep.metrics import Estimate, Reference, fid, kid, precision_recall, sliced_wasserstein
from fewstep.metrics.intervals import jackknife, student
from fewstep.models.denoiser import Denoiser

RMS = "rms"
METRICS = ("fid", "kid", "precision-recall", "sliced-wasserstein")
"""The available metrics; the distance to the reference is always measured."""

TITLES = {
    "fid": "FID",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "sliced-wasserstein": "sliced Wasserstein",
    RMS: "RMS to the reference",
}
"""The names of measures in reports."""

BETTER_HIGH = frozenset({"precision", "recall", "density", "coverage"})
LEVEL = 0.95


def check_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of metrics; raises if one is not known."""
    for name in names:
        if name not in METRICS:
            raise ValueError(unknown("metric", name, list(METRICS)))
    return tuple(names)


def score(
    features: Tensor, reference: Reference, names: Sequence[str]
) -> tuple[dict[str, Estimate], dict[str, str]]:
    r"""Returns estimates by name, and the reason for those that are not defined.

    Arguments:
        features: Features of the samples, with shape (n, D).
        reference: The real data.
        names: Which of :data:`METRICS`.
    """
    estimates: dict[str, Estimate] = {}
    failed: dict[str, str] = {}
    single: dict[str, Callable[..., Estimate]] = {
        "fid": fid,
        "kid": kid,
        "sliced-wasserstein": sliced_wasserstein,
    }
    for name in names:
        try:
            if name in single:
                estimates[name] = single[name](features, reference)
            else:
                estimates.update(precision_recall(features, reference)._asdict())
        except ValueError as error:
            failed[name] = str(error)
    return estimates, failed


def root(squares: Tensor) -> Estimate:
    """Returns the root of the mean of per-sample mean squares (n), with Student's interval."""
    n, mean = len(squares), squares.double().mean()
    width = spread(squares) if n > 1 else mean
    low, high = (mean - width).clamp(min=0).sqrt(), (mean + width).sqrt()
    return Estimate(float(mean.sqrt()), float(low), float(high), LEVEL, "Student", (n, n))


def spread(values: Tensor) -> Tensor:
    """Returns half the width of Student's interval for the mean of values (n), n > 1."""
    n = len(values)
    return student(LEVEL, n - 1) * values.double().std() / n**0.5


def less_fid(others: Sequence[Tensor], first: Tensor, reference: Reference) -> list[Estimate]:
    """Returns how much larger the FID of each set of features (n, D) is than that of the first.

    Sample i of all sets started from the same noise, so most of the random error is common to them, and
    these intervals are much narrower than those of the FIDs: the blocks of the jackknife leave
    the same samples out of all sets.
    """
    real = reference.statistics
    values, vectors = torch.linalg.eigh(real.covariance)
    half = vectors * values.clamp(min=0).sqrt() @ vectors.T
    sides = [(x, x @ half) for x in (side.double() for side in [first, *others])]

    def distance(x: Tensor, y: Tensor) -> Tensor:
        # The singular values of the centred y are the roots of the eigenvalues in FID.
        cross = torch.linalg.svdvals(y - y.mean(0)).sum() / (len(y) - 1) ** 0.5
        return (x.mean(0) - real.mean).square().sum() + x.var(0).sum() - 2 * cross

    def statistic(i: Tensor, _: Tensor) -> Tensor:
        fids = torch.stack([distance(x[i], y[i]) for x, y in sides])
        return fids[1:] - fids[0]

    return jackknife(statistic, (len(first), real.n), fixed=(False, True), level=LEVEL)


def less_rms(a: Tensor, b: Tensor) -> Estimate:
    """Returns how much larger the root mean square is with squares a (n) than with b, paired."""
    a, b = a.double(), b.double()
    roots = a.mean().sqrt(), b.mean().sqrt()
    value = float(roots[0] - roots[1])
    # The root's derivative at each mean turns the difference into a mean over samples.
    terms = a / (2 * roots[0]).clamp(min=1e-30) - b / (2 * roots[1]).clamp(min=1e-30)
    width = float(spread(terms)) if len(a) > 1 else abs(value)
    return Estimate(
        value, value - width, value + width, LEVEL, "Student, paired", (len(a), len(b))
    )


def estimate_record(estimate: Estimate) -> dict[str, Any]:
    """Returns an estimate as a JSON object."""
    return {
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "level": estimate.level,
        "method": estimate.method,
        "sizes": list(estimate.sizes),
    }


def estimate_from_record(record: Mapping[str, Any]) -> Estimate:
    """Returns the estimate of a record of :func:`estimate_record`."""
    return Estimate(**{**record, "sizes": tuple(record["sizes"])})


def same_place(a: Tensor, b: Tensor) -> Tensor:
    r"""Returns per-sample mean squares (n) of the difference of samples, float64."""
    return (a.cpu().double() - b.cpu().double()).square().flatten(1).mean(1)


def denoised(denoiser: Denoiser, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """Returns the data that a model predicts from states at the lowest level of its schedule."""
    with torch.no_grad():
        return denoiser(x, denoiser.schedule.t_min, prediction="x0", **cond)
