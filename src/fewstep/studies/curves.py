r"""Where the error of a solver comes from, along reference trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.grids import grid
from fewstep.diffusion.quadrature import lagrange
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.plans.plan import Plan
from fewstep.studies.local_errors import Path, step_errors

POINTS = 60
"""The number of times of the curves."""

GRIDS: tuple[tuple[str, str, Mapping[str, float]], ...] = (
    ("uniform", "uniform", {}),
    ("power 1.5", "power", {"power": 1.5}),
    ("quadratic", "quadratic", {}),
    ("log-rho", "log-rho", {}),
)


def relative_change(path: Path, *, share: float = 0.01) -> tuple[Tensor, Tensor]:
    r"""Returns times, and :math:`\| \varepsilon_t - \varepsilon_{t + \delta} \| / \| \varepsilon_t \|` there.

    Arguments:
        path: The reference path.
        share: The distance :math:`\delta` as a share of the schedule's times.
    """
    times, away = _curve(path, share)
    one, two = path.at(times - away)[1], path.at(times)[1]
    return times - away, (one - two).norm(dim=1) / one.norm(dim=1).clamp_min(1e-30)


def freezing(path: Path, *, share: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns times t, and the error of freezing the score or the noise from t at :math:`\tau = t - \delta`.

    In units of the score: :math:`\| s_\tau - s_t \|` and :math:`\| \varepsilon_\tau - \varepsilon_t \| / \sigma_\tau`,
    root mean squares over coordinates.
    """
    times, away = _curve(path, share)
    sigma_t, sigma = path.schedule.sigma(times), path.schedule.sigma(times - away)
    before, after = path.at(times)[1], path.at(times - away)[1]
    score = (after / sigma[:, None] - before / sigma_t[:, None]).norm(dim=1)
    return times, score, (after - before).norm(dim=1) / sigma


def _curve(path: Path, share: float) -> tuple[Tensor, float]:
    high, low = float(path.times[0]), float(path.times[-1])
    away = share * (high - low)
    return torch.linspace(high, low + away, POINTS, dtype=torch.float64), away


def extrapolation(path: Path, times: Tensor, degree: int) -> Tensor:
    r"""Returns :math:`\| \varepsilon_{t_n} - P_r(t_n) \|` at the points of a grid.

    The polynomial in t of degree r goes through the predictions at the r + 1 points before (fewer at the
    start: there the degree is lower); root mean squares over coordinates, shape (K), for n = 1, ..., K.

    Arguments:
        path: The reference path.
        times: The grid, decreasing, shape (K + 1).
        degree: The degree r.
    """
    eps = path.at(times)[1]
    errors = []
    for n in range(1, len(times)):
        first = max(0, n - 1 - degree)
        weights = lagrange(list(times[first:n].unbind()), times[n : n + 1])[:, 0]
        errors.append((eps[n] - weights @ eps[first:n]).norm())
    return torch.stack(errors)


def anatomy(
    path: Path,
    schedule: NoiseSchedule,
    plans: Mapping[str, Plan],
    *,
    steps: Sequence[int] = (10, 20),
) -> dict[str, Any]:
    """Returns all curves as a JSON object.

    Arguments:
        path: The reference path, with gains.
        schedule: The schedule.
        plans: Plans whose steps are measured, by name.
        steps: The numbers of steps of the grids on which extrapolation is measured.
    """
    at, change = relative_change(path)
    times, score, eps = freezing(path)
    extrapolated = []
    for count in steps:
        for label, name, options in GRIDS:
            knots = grid(name, schedule, count, **options).times
            curves = [extrapolation(path, knots, r) for r in range(4)]
            extrapolated.append(
                {
                    "grid": label,
                    "steps": count,
                    "times": knots[1:].tolist(),
                    "errors": [curve.tolist() for curve in curves],
                    # From the fourth step on all four degrees have their full history.
                    "means": [float(curve[3:].mean()) for curve in curves],
                }
            )
    local = []
    for label, plan in plans.items():
        errors = step_errors(plan, path)
        local.append(
            {
                "plan": label,
                "times": errors.times.tolist(),
                "local": errors.local.tolist(),
                "left": errors.left.tolist(),
                "start": errors.start,
                "predicted": errors.predicted,
            }
        )
    return {
        "relative_change": {"times": at.tolist(), "values": change.tolist()},
        "freezing": {"times": times.tolist(), "score": score.tolist(), "eps": eps.tolist()},
        "extrapolation": extrapolated,
        "gain": {"times": path.times.tolist(), "values": path.gain.tolist()},
        "head": None if path.head is None else path.head.tolist(),
        "steps": local,
    }
