r"""Recommends a solver, grid and number of evaluations for a model: predicted, then run, then polished."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.base.progress import SILENT, Progress
from fewstep.models.conditions import select
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.auto import choose
from fewstep.sampling.profile import Profile, ProfileEntry
from fewstep.sampling.resolve import plan as make_plan
from fewstep.solvers import solver as make_solver
from fewstep.studies.dynamic import BestGrid, StepCosts, best_grids
from fewstep.studies.local_errors import Path, step_errors
from fewstep.studies.polishing import Candidate, polish, robust_mean
from fewstep.studies.reference import mean_squares, run_plan

SOLVERS = ("tab2", "tab3", "unipc2", "unipc3", "ipndm", "dpmpp-2m", "dpmpp-3m", "ddim")
"""The solvers that are tried: one evaluation a step, deterministic."""

GRIDS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("power 1.5", "power", {"power": 1.5}),
    ("quadratic", "quadratic", {}),
    ("uniform", "uniform", {}),
    ("log-rho", "log-rho", {}),
)

FRONT = 4
"""The number of candidates that are run on held-out samples too."""

FINE = 0.05
"""The number of evaluations that is recommended brings the error below this share of the data's deviation."""


@dataclass(frozen=True)
class Batch:
    r"""Noise draws with their reference samples.

    Attributes:
        noise: The initial draws, of unit variance, with shape (B, \*).
        end: The reference samples, with shape (B, \*).
        cond: The conditions, ready.
    """

    noise: Tensor
    end: Tensor
    cond: Mapping[str, Any]

    def first(self, n: int) -> Batch:
        """Returns the first n samples."""
        return Batch(self.noise[:n], self.end[:n], select(self.cond, range(n)))


@dataclass(frozen=True)
class Tried:
    """A solver on a grid, with predicted and measured errors; distances are root mean squares.

    Attributes:
        solver: The solver.
        grid: The name of the grid.
        times: Its times.
        head: Whether it has an analytic head start.
        predicted: The error that local errors predict.
        measured: The distance on the samples that grids are fitted to, or ``None``.
        held_out: The distance on held-out samples, or ``None``.
        score: The robust mean by which it is chosen, on held-out samples, or ``None``.
        weights: The measured weights of the solver ``multistep``; they hold for these times only.
    """

    solver: str
    grid: str
    times: tuple[float, ...]
    head: bool = False
    predicted: float | None = None
    measured: float | None = None
    held_out: float | None = None
    score: float | None = None
    weights: Sequence[Sequence[float]] = ()

    @property
    def candidate(self) -> Candidate:
        """Returns it as a candidate for :func:`polish`."""
        times = torch.tensor(self.times, dtype=torch.float64)
        options = {"weights": self.weights} if self.weights else {}
        return Candidate(make_solver(self.solver, **options), times, self.head, self.grid)

    def to_record(self) -> dict[str, Any]:
        """Returns it as a JSON object."""
        return {**self.__dict__, "times": list(self.times)}

    @classmethod
    def from_record(cls, content: Mapping[str, Any]) -> Tried:
        """Returns it from its JSON object."""
        weights = tuple(tuple(row) for row in content.get("weights", ()))
        return cls(**{**content, "times": tuple(content["times"]), "weights": weights})


@dataclass(frozen=True)
class Advice:
    """The recommendation at one number of evaluations.

    Attributes:
        nfe: The number of evaluations.
        best: The recommended sampler.
        default: The sampler of ``auto`` without a fitted grid.
        tried: All samplers tried, the predicted best first.
        polished: Whether there was time to polish times.
    """

    nfe: int
    best: Tried
    default: Tried
    tried: tuple[Tried, ...]
    polished: bool

    def to_record(self) -> dict[str, Any]:
        """Returns it as a JSON object."""
        return {
            "nfe": self.nfe,
            "best": self.best.to_record(),
            "default": self.default.to_record(),
            "tried": [item.to_record() for item in self.tried],
            "polished": self.polished,
        }

    @classmethod
    def from_record(cls, content: Mapping[str, Any]) -> Advice:
        """Returns it from its JSON object."""
        return cls(
            content["nfe"],
            Tried.from_record(content["best"]),
            Tried.from_record(content["default"]),
            tuple(Tried.from_record(item) for item in content["tried"]),
            content["polished"],
        )


def dynamic_grids(path: Path, most: int) -> dict[str, dict[int, BestGrid]]:
    """Returns the grids of dynamic programming, by name: without and, if it pays, with a head start.

    They end at the schedule's smallest time. An earlier end can have a lower mean square distance, but
    it leaves visible noise in the samples, which that mean hardly counts and feature extractors do.
    """
    costs = StepCosts(path, 2 if most > 1 else 0)
    grids = {"dynamic": best_grids(costs, most, free_end=False)}
    if path.head is not None:
        grids["dynamic, head start"] = best_grids(costs, most, head=True, free_end=False)
    return grids


def candidates(
    denoiser: Denoiser,
    path: Path,
    nfe: int,
    dynamic: Mapping[str, Mapping[int, BestGrid]],
    solvers: Iterable[str] = SOLVERS,
) -> list[Tried]:
    """Returns every solver on every grid with its predicted error, the best first."""
    grids: list[tuple[str, Tensor, bool]] = []
    integer = denoiser.integer_times
    for label, name, options in GRIDS:
        try:
            plan = make_plan(
                "ddim", denoiser.schedule, nfe=nfe, grid=name, integer_times=integer, **options
            )
        except ValueError:  # more steps than training timesteps near one end
            continue
        grids.append((label, plan.knots, False))
    for label, by_steps in dynamic.items():
        best = by_steps.get(nfe)
        if best is not None and (best.head or label == "dynamic"):
            grids.append((label, best.times, best.head))
    tested = []
    for solver in solvers:
        for label, times, head in grids:
            tried = Tried(solver, label, tuple(times.tolist()), head)
            try:
                plan = tried.candidate.plan(denoiser)
            except ValueError:  # this solver is not defined on this grid
                continue
            tested.append(replace(tried, predicted=step_errors(plan, path).predicted))
    return sorted(tested, key=lambda item: item.predicted or 0.0)


@dataclass(frozen=True)
class Front:
    """The samplers of a number of evaluations that were run, before times are polished.

    Attributes:
        tried: Every solver on every grid with its predicted error, the best first.
        measured: The default and of each solver the best grid, run on the samples to fit to.
        held_out: The best of these, the default first, run on held-out samples.
        order: Places in ``held_out`` whose times are to be polished.
        middle: The median of the mean square distances of the predicted best.
    """

    tried: tuple[Tried, ...]
    measured: tuple[Tried, ...]
    held_out: tuple[Tried, ...]
    order: tuple[int, ...]
    middle: float

    def to_record(self) -> dict[str, Any]:
        """Returns it as a JSON object."""
        lists = {k: [item.to_record() for item in getattr(self, k)] for k in _LISTS}
        return {**lists, "order": list(self.order), "middle": self.middle}

    @classmethod
    def from_record(cls, content: Mapping[str, Any]) -> Front:
        """Returns it from its JSON object."""
        lists = {k: tuple(Tried.from_record(item) for item in content[k]) for k in _LISTS}
        return cls(**lists, order=tuple(content["order"]), middle=content["middle"])


_LISTS = ("tried", "measured", "held_out")


def polished_count(nfe: int) -> int:
    """Returns of how many candidates the times are polished: two up to 10 evaluations, then one."""
    return 2 if nfe <= 10 else 1


def run_front(
    denoiser: Denoiser,
    path: Path,
    nfe: int,
    fit: Batch,
    held_out: Batch,
    dynamic: Mapping[str, Mapping[int, BestGrid]],
    *,
    solvers: Sequence[str] = SOLVERS,
    progress: Progress = SILENT,
) -> Front:
    """Returns the first part of :func:`advise`, whose arguments it has: what was predicted, and run."""
    tried = candidates(denoiser, path, nfe, dynamic, solvers)
    some = fit.first(min(16, len(fit.noise)))
    middle = _middle(denoiser, tried[0], some, progress)
    default = _default(denoiser, path, nfe)
    leaders, names = [default], set[str]()
    for item in tried:
        if item.solver not in names:
            names.add(item.solver)
            if (item.solver, item.grid) != (default.solver, default.grid):
                leaders.append(item)
    measured = [_measure(denoiser, item, some, middle, progress) for item in leaders]
    by_score = sorted(measured, key=lambda item: item.score or 0.0)
    front = [measured[0], *(item for item in by_score[:FRONT] if item is not measured[0])]
    finals = [_hold_out(denoiser, path, item, held_out, middle, progress) for item in front]
    # Both sets of samples decide which to polish: one alone has too few samples.
    both = [
        (one.score or 0.0) + (two.score or 0.0) for one, two in zip(front, finals, strict=True)
    ]
    order = sorted(range(len(front)), key=both.__getitem__)[: polished_count(nfe)]
    return Front(tuple(tried), tuple(measured), tuple(finals), tuple(order), middle)


def polish_one(
    denoiser: Denoiser,
    path: Path,
    nfe: int,
    front: Front,
    place: int,
    fit: Batch,
    held_out: Batch,
    *,
    deadline: float | None = None,
    iterations: int = 3,
    progress: Progress = SILENT,
) -> list[Tried] | None:
    """Returns a candidate of the front with polished times, run on held-out samples.

    None in the list: polishing moved nothing. ``None``: the deadline had passed.
    """
    if deadline is not None and time.monotonic() > deadline:
        return None
    item = front.held_out[place]
    polished = polish(
        denoiser,
        item.candidate,
        fit.noise,
        fit.end,
        fit.cond,
        iterations=iterations if nfe <= 10 else max(1, iterations - 1),
        progress=progress,
    )
    if not polished.history:
        return []
    name, times = f"{item.grid}, polished", tuple(polished.candidate.times.tolist())
    moved = replace(item, grid=name, times=times, measured=polished.history[-1])
    return [_hold_out(denoiser, path, moved, held_out, front.middle, progress)]


def advice_of(
    denoiser: Denoiser,
    path: Path,
    nfe: int,
    front: Front,
    polished: Sequence[Sequence[Tried] | None],
    held_out: Batch,
    *,
    fitted: Sequence[Tried] = (),
    progress: Progress = SILENT,
) -> Advice:
    """Returns the last part of :func:`advise`: the best on held-out samples of all that was run."""
    finals = [*front.held_out, *(item for items in polished for item in items or ())]
    finals += [
        _hold_out(denoiser, path, item, held_out, front.middle, progress) for item in fitted
    ]
    best = min(finals, key=lambda item: item.score or 0.0)
    rest = [replace(item, score=None) for item in front.measured]
    known = {(item.solver, item.grid) for item in [*finals, *rest]}
    unrun = [item for item in front.tried if (item.solver, item.grid) not in known]
    final_names = {(item.solver, item.grid) for item in finals}
    rest = [item for item in rest if (item.solver, item.grid) not in final_names]
    everything = sorted([*finals, *rest, *unrun], key=lambda item: item.predicted or 0.0)
    in_time = all(items is not None for items in polished)
    return Advice(nfe, best, finals[0], tuple(everything), in_time)


def advise(
    denoiser: Denoiser,
    path: Path,
    nfe: int,
    fit: Batch,
    held_out: Batch,
    dynamic: Mapping[str, Mapping[int, BestGrid]],
    *,
    solvers: Sequence[str] = SOLVERS,
    fitted: Sequence[Tried] = (),
    deadline: float | None = None,
    iterations: int = 3,
    progress: Progress = SILENT,
) -> Advice:
    r"""Returns the best sampler for a model at a number of evaluations.

    The errors of all solvers on all grids are predicted from local errors along the reference (no
    evaluations); of each solver the grid with the least predicted error is run, and so is the default; of the best two of
    these (one above 10 evaluations) the times are polished (:func:`polish`); the best on held-out samples
    is recommended.

    Cost: some ``(solvers + 2) * nfe`` evaluations for each sample, and of polishing about ``2 * nfe ** 2``.

    Arguments:
        denoiser: The model.
        path: The reference path, with gains.
        nfe: The number of evaluations.
        fit: Samples to fit to.
        held_out: Other samples, for the selection.
        dynamic: See :func:`dynamic_grids`.
        solvers: The names of the solvers to try; each makes one evaluation a step.
        fitted: Methods with weights fitted to these samples (:func:`fewstep.fit`'s), which take
            part in the selection as they are.
        deadline: The value of :func:`time.monotonic` after which nothing is polished any more.
        iterations: The most iterations of polishing.
        progress: Follows the evaluations.
    """
    front = run_front(
        denoiser, path, nfe, fit, held_out, dynamic, solvers=solvers, progress=progress
    )
    polished = [
        polish_one(
            denoiser,
            path,
            nfe,
            front,
            place,
            fit,
            held_out,
            deadline=deadline,
            iterations=iterations,
            progress=progress,
        )
        for place in front.order
    ]
    return advice_of(
        denoiser, path, nfe, front, polished, held_out, fitted=fitted, progress=progress
    )


def _default(denoiser: Denoiser, path: Path, nfe: int) -> Tried:
    choice = choose(denoiser.schedule, nfe)
    integer = denoiser.integer_times
    plan = make_plan("auto", denoiser.schedule, nfe=nfe, integer_times=integer)
    label = " ".join([choice.grid or "own", *(f"{v:g}" for v in choice.options.values())])
    return Tried(
        choice.solver,
        label,
        tuple(plan.knots.tolist()),
        plan.head,
        step_errors(plan, path).predicted,
    )


def _errors(denoiser: Denoiser, item: Tried, batch: Batch, progress: Progress) -> Tensor:
    plan = item.candidate.plan(denoiser)
    x = run_plan(denoiser, plan, batch.noise, batch.cond)
    progress.tick(plan.nfe)
    return mean_squares(x - batch.end)


def _middle(denoiser: Denoiser, item: Tried, batch: Batch, progress: Progress) -> float:
    return float(_errors(denoiser, item, batch, progress).median().clamp_min(1e-24))


def _measure(
    denoiser: Denoiser,
    item: Tried,
    batch: Batch,
    middle: float,
    progress: Progress,
) -> Tried:
    squares = _errors(denoiser, item, batch, progress)
    return replace(item, measured=float(squares.mean().sqrt()), score=robust_mean(squares, middle))


def _hold_out(
    denoiser: Denoiser,
    path: Path,
    item: Tried,
    batch: Batch,
    middle: float,
    progress: Progress,
) -> Tried:
    squares = _errors(denoiser, item, batch, progress)
    return replace(
        item,
        predicted=step_errors(item.candidate.plan(denoiser), path).predicted,
        held_out=float(squares.mean().sqrt()),
        score=robust_mean(squares, middle),
    )


def fitted_grids(
    denoiser: Denoiser, advice: Sequence[Advice], *, fingerprint: str | None = None
) -> Profile:
    """Returns the times for a file: of each number of evaluations the recommended ones, and each solver's best."""
    grids: dict[tuple[str, int], ProfileEntry] = {}
    for item in advice:
        order = sorted(
            (t for t in item.tried if t.measured is not None or t.held_out is not None),
            key=lambda t: (
                t is not item.best,
                t.held_out is None,
                t.held_out or t.measured or 0.0,
            ),
        )
        for tried in [item.best, *order]:
            key = (tried.solver, len(tried.times) - 1)
            if key not in grids:
                grids[key] = ProfileEntry(
                    tried.solver, tried.times, tried.head, tried.held_out, weights=tried.weights
                )
    return Profile(
        denoiser.schedule,
        denoiser.fingerprint() if fingerprint is None else fingerprint,
        tuple(grids.values()),
        {item.nfe: item.best.solver for item in advice},
    )


def enough_nfe(advice: Sequence[Advice], deviation: float) -> int | None:
    """Returns the least number of evaluations whose error is below 5 % of the data's deviation, or ``None``."""
    for item in sorted(advice, key=lambda a: a.nfe):
        if item.best.held_out is not None and item.best.held_out <= FINE * deviation:
            return item.nfe
    return None
