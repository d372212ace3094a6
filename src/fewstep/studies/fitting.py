r"""Fitting error: a network's distance to the optimal denoiser of the data, apart from discretisation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.base.progress import SILENT, Progress
from fewstep.diffusion.noise import NoiseSource
from fewstep.models.denoiser import Denoiser
from fewstep.models.exact import DataSet
from fewstep.plans.plan import Plan
from fewstep.studies.local_errors import Path, step_errors
from fewstep.studies.reference import Reference, follow

MOST_NUMBERS = 1 << 27
"""The most coordinates of a data set for the comparison, all images together."""


class Optimal(Denoiser):
    r"""The optimal denoiser of a data set with classes: for each sample, that of its own class.

    Arguments:
        data: The data, with shape (N, \*).
        labels: The classes of the data (N), or ``None`` if the model has none.
        denoiser: The model, for its schedule and the range of labels.
    """

    def __init__(self, data: Tensor, labels: Tensor | None, denoiser: Denoiser) -> None:
        super().__init__()
        most = max(1, MOST_NUMBERS // math.prod(data.shape[1:]))
        data = data[:most]
        labels = None if labels is None else labels[:most]
        self.schedule = denoiser.schedule
        self.whole = DataSet(data, denoiser.schedule)
        self.native = self.whole.native
        self.event_shape = tuple(data.shape[1:])
        self.classes: dict[int, DataSet] = {}
        if labels is not None:
            for label in labels.unique().tolist():
                self.classes[label] = DataSet(data[labels == label], denoiser.schedule)

    def raw(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        labels = cond.get("class_labels")
        if labels is None or not self.classes:
            return self.whole.raw(x, t)
        labels = torch.as_tensor(labels).expand(len(x))
        value = torch.empty_like(x)
        for label in labels.unique().tolist():
            rows = (labels == label).nonzero().flatten()
            model = self.classes.get(label, self.whole)
            value[rows.to(x.device)] = model.raw(x[rows.to(x.device)], t[rows.to(t.device)])
        return value


def fitting_error(
    denoiser: Denoiser,
    reference: Reference,
    path: Path,
    data: Tensor,
    labels: Tensor | None = None,
    *,
    plan: Plan | None = None,
    seed: int = 0,
    samples: int = 32,
    every: int = 2,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    r"""Returns the network's distance to the optimal denoiser of the data.

    Over t on noised data, and along the reference trajectories: the root mean square of
    :math:`\varepsilon_\theta - \varepsilon^*` and its size relative to :math:`\varepsilon^*`; the end of the ODE of
    the optimal denoiser from the same noise; and for each step of a plan what this difference moves
    the state by, :math:`\alpha_j \| \int (\varepsilon_\theta - \varepsilon^*) \, d\rho \|`, beside the step's local error.

    The optimal denoiser of finite data returns the data: a network that generalises must differ
    from it where few data are near, so this difference is not an error by itself; it is the scale on
    which the discretisation error is small or not.

    Cost: one evaluation for each noised sample and time, and a pass over the data for each sample,
    place and time.

    Arguments:
        denoiser: The model.
        reference: Its trajectories.
        path: Their path, for local errors.
        data: The data in the model's range, with shape (N, \*).
        labels: The classes of the data, or ``None``.
        plan: A plan of the model, for the split.
        seed: The seed of the noise.
        samples: The number of noised data.
        every: The stride of the nodes that are used: 1 for all, 2 for every other.
        progress: Follows the times.
    """
    data = data.to(reference.noise)
    usable = labels if _takes_labels(denoiser, labels) else None
    best = Optimal(data, usable, denoiser)
    nodes = list(range(0, len(reference.times), every))
    if nodes[-1] != len(reference.times) - 1:
        nodes.append(len(reference.times) - 1)
    n = min(samples, len(data))
    rows = torch.linspace(0, len(data) - 1, n).round().long()
    images = data[rows]
    cond = denoiser.prepare(n, {} if usable is None else {"class_labels": usable[rows]})
    s, source = reference.schedule, NoiseSource(seed, range(n))
    tube, along, differences = [], [], []
    with torch.no_grad():
        for k, i in enumerate(nodes):
            t = reference.times[i]
            z = source.draw(k, images.shape[1:], dtype=images.dtype, device=images.device)
            x = float(s.alpha(t)) * images + float(s.sigma(t)) * z
            tube.append(_compare(denoiser(x, t, prediction="eps", **cond), best, x, t, cond)[0])
            sizes, difference = _compare(reference.eps[i], best, reference.x[i], t, reference.cond)
            along.append(sizes)
            differences.append(difference.cpu())
            progress.tick()
        ideal = follow(best, reference.noise, reference.cond, intervals=24, substeps=1)
    distance = (ideal.end - reference.end).cpu().double().square().mean().sqrt()
    record: dict[str, Any] = {
        "points": len(best.whole.points),
        "classes": len(best.classes),
        "times": reference.times[nodes].tolist(),
        "noised": {"rms": [a for a, _ in tube], "relative": [b for _, b in tube]},
        "trajectories": {"rms": [a for a, _ in along], "relative": [b for _, b in along]},
        "end": float(distance),
        "steps": None,
    }
    if plan is not None:
        record["steps"] = _split(plan, path, reference.times[nodes], torch.stack(differences))
    return record


def _takes_labels(denoiser: Denoiser, labels: Tensor | None) -> bool:
    if labels is None or "class_labels" not in denoiser.null_condition:
        return False
    null = denoiser.null_condition["class_labels"]
    return not isinstance(null, int) or int(labels.max()) < null


def _compare(
    eps: Tensor, best: Optimal, x: Tensor, t: Tensor, cond: Mapping[str, Any]
) -> tuple[tuple[float, float], Tensor]:
    ideal = best(x, t, prediction="eps", **cond)
    difference = (eps - ideal).float()
    rms = float(difference.cpu().double().square().mean().sqrt())
    size = float(ideal.cpu().double().square().mean().sqrt())
    return (rms, rms / max(size, 1e-30)), difference


def _split(plan: Plan, path: Path, times: Tensor, differences: Tensor) -> dict[str, Any]:
    """Returns for each step of a plan how far fitting and discretisation move the state."""
    s, knots = path.schedule, plan.knots.detach()
    flat = differences.flatten(1)
    gram = (flat @ flat.T).double() / flat.shape[1]
    rho = s.rho(times)
    # The trapezoidal rule on the nodes, as weights; partial steps by the hat functions' integral.
    fitting = []
    for start, end in zip(knots[:-1].tolist(), knots[1:].tolist(), strict=True):
        last = max(end, float(times[-1]))
        weights = _hat_integrals(
            rho,
            float(s.rho(torch.tensor(start).double())),
            float(s.rho(torch.tensor(last).double())),
        )
        alpha = float(s.alpha(torch.tensor(last, dtype=torch.float64)))
        fitting.append(alpha * math.sqrt(max(0.0, float(weights @ gram @ weights))))
    errors = step_errors(plan, path)
    return {
        "times": knots[1:].tolist(),
        "fitting": fitting,
        "discretisation": errors.local.tolist(),
    }


def _hat_integrals(rho: Tensor, start: float, end: float) -> Tensor:
    """Returns the integrals of the piecewise linear basis on nodes (decreasing) from start down to end."""
    weights = torch.zeros_like(rho)
    for k in range(len(rho) - 1):
        high, low = min(float(rho[k]), start), max(float(rho[k + 1]), end)
        if high <= low:
            continue
        width = float(rho[k] - rho[k + 1])
        middle = ((high + low) / 2 - float(rho[k + 1])) / width
        weights[k] += (high - low) * middle
        weights[k + 1] += (high - low) * (1 - middle)
    return weights
