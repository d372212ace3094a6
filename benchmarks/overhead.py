"""Microseconds per step of the loop alone, beside diffusers, azula and bare arithmetic.

Every contender walks the same number of steps with the network ``x * 0.1``; the cost of that
network is measured apart and subtracted. Rounds are interleaved and medians of thread CPU time
are shown, so that a busy machine hurts all of them alike; the ratios are what to read.

Bare arithmetic is what a step costs at least: for each linear row of the plan one
``torch.mul`` out of place (``torch.add``, if a coefficient is 1) and one ``add_`` for each further
term. The schedulers, ``PlanScheduler`` and those of diffusers, are called as pipelines do, through
``step(..., return_dict=False)``, with a network that predicts the noise; the bare arithmetic beside
``PlanScheduler`` is that of its plan, in which the conversions of predictions are included.

Run: ``python benchmarks/overhead.py [--rounds 15] [--steps 20]``
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep
from fewstep.diffusion.noise import NoiseSource
from fewstep.plans.execute import Execution
from fewstep.plans.plan import Plan
from fewstep.plans.structure import Lin
from fewstep.sampling.plan_sampler import PlanSampler
from fewstep.sampling.protocol import Run

SIZES = ((1, 3, 32, 32), (4, 4, 64, 64), (64, 3, 32, 32))
SOLVERS = ("ddim", "dpmpp-2m", "dpmpp-3m", "logrhoab2", "tab3", "unipc2", "unipc3")
LIMIT = 1.5
"""The most that a step may cost, in units of the bare arithmetic, at the largest size."""

STEP_LIMIT = 15.0
"""The most microseconds that ``PlanScheduler.step`` may take at the smallest size."""

Loop = Callable[[Tensor], Any]


class Count(TorchDispatchMode):
    """Counts tensor operations, views apart."""

    views = ("view", "expand", "select", "slice", "unbind", "detach", "alias", "t.default")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(word in str(func) for word in self.views):
            self.count += 1
        return func(*args, **(kwargs or {}))


def network(x: Tensor, t: Any = None, **_: Any) -> Tensor:
    """Stands for a network; as cheap as one can be."""
    return x * 0.1


def executions(plan: Plan) -> Loop:
    """Returns the loop of the executor alone."""

    def loop(x: Tensor) -> None:
        run = Execution(plan, x)
        while (call := run.request) is not None:
            run.advance(network(call.x))

    return loop


def samplers(plan: Plan, x: Tensor) -> Loop:
    """Returns ``PlanSampler.run`` with a network in the plan's own prediction."""
    denoiser = fewstep.Denoiser.wrap(
        network,
        schedule=plan.schedule,
        prediction=plan.prediction,
        event_shape=x.shape[1:],
    )
    sampler, run = PlanSampler(plan, denoiser), Run(NoiseSource(0, range(len(x))))
    return lambda x: sampler.run(x, run)


def bare(plan: Plan, x: Tensor) -> Loop:
    """Returns the arithmetic of the plan's rows and nothing else."""
    rows = [row for row in plan.structure.rows if isinstance(row, Lin)]
    shapes = [
        (len(row.terms), 1.0 in plan.numbers[row.offset : row.offset + len(row.terms)])
        for row in rows
    ]
    terms = [torch.randn_like(x) for _ in range(max(width for width, _ in shapes))]
    factor = torch.tensor(0.9)

    def loop(_: Tensor) -> None:
        for width, unit in shapes:
            if unit and width > 1:
                total = torch.add(terms[0], terms[1], alpha=0.1)
            else:
                total = torch.mul(terms[0], factor)
            for other in terms[2 if unit else 1 : width]:
                total.add_(other, alpha=0.1)

    return loop


def stepping(scheduler: Any, steps: int) -> Callable[[], Loop]:
    """Returns what makes a loop over a scheduler's own ``step``, as a pipeline has it.

    Walking over the tensor of timesteps costs a pipeline 0.8 microseconds a step with any
    scheduler; that is no part of ``step``.
    """

    def prepare() -> Loop:
        scheduler.set_timesteps(steps)
        timesteps = list(scheduler.timesteps)

        def loop(x: Tensor) -> None:
            for t in timesteps:
                x = scheduler.step(network(x), t, x, return_dict=False)[0]

        return loop

    return prepare


def of_ours(name: str, steps: int) -> tuple[Callable[[], Loop], Plan] | None:
    """Returns the loop over ``PlanScheduler`` and its plan, or ``None`` without diffusers."""
    try:
        from fewstep.adapters.diffusers import PlanScheduler
    except ImportError:
        return None
    scheduler = PlanScheduler(solver=name)
    scheduler.set_timesteps(steps)
    return stepping(scheduler, steps), scheduler.plan


def of_diffusers(name: str, steps: int) -> Callable[[], Loop] | None:
    """Returns what makes a loop over a scheduler, or ``None`` without diffusers."""
    try:
        import diffusers
    except ImportError:
        return None
    pp, unipc = diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler
    deis = diffusers.DEISMultistepScheduler
    build, options = {
        "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
        "dpmpp-2m": (pp, {}),
        "dpmpp-3m": (pp, {"solver_order": 3}),
        "logrhoab2": (deis, {"solver_order": 3}),
        "tab3": (deis, {"solver_order": 3}),
        "unipc2": (unipc, {}),
        "unipc3": (unipc, {"solver_order": 3}),
    }[name]
    return stepping(build(**options), steps)


def of_azula(name: str, steps: int) -> Callable[[], Loop] | None:
    """Returns what makes a loop of azula's, or ``None`` without it."""
    try:
        from azula.denoise import DiracPosterior
        from azula.noise import VPSchedule
        from azula.sample import DDIMSampler, xEABSampler
    except ImportError:
        return None

    class Toy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = VPSchedule()

        def forward(self, x: Tensor, t: Tensor, **_: Any) -> Any:
            return DiracPosterior(mean=network(x))

    build = {"ddim": DDIMSampler, "tab3": xEABSampler}.get(name)
    if build is None:
        return None
    options = {"order": 3} if name == "tab3" else {}
    sampler = build(Toy(), steps=steps, silent=True, **options)
    return lambda: sampler


def operations(loop: Loop, x: Tensor) -> int:
    """Returns the tensor operations of a loop."""
    with torch.no_grad(), Count() as counter:
        loop(x)
    return counter.count


def measure(contenders: dict[str, Callable[[], Loop]], x: Tensor, rounds: int) -> dict[str, float]:
    """Returns the median of the thread CPU time of each loop, in seconds."""
    repeats = max(1, 8_000 // x.numel())
    times: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.no_grad():
        for index in range(rounds + 2):
            for name, prepare in contenders.items():
                total = 0.0
                for _ in range(repeats):
                    loop = prepare()
                    start = time.thread_time()
                    loop(x)
                    total += time.thread_time() - start
                if index >= 2:
                    times[name].append(total / repeats)
    return {name: statistics.median(found) for name, found in times.items()}


def version(package: str) -> str:
    """Returns the version of a package, or that it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def costs(
    name: str, schedule: Any, x: Tensor, steps: int, rounds: int
) -> tuple[dict[str, float], list[float]]:
    """Returns microseconds per step of each contender, and tensor operations per step."""
    plan = fewstep.plan(name, schedule, nfe=steps)
    loops = {"bare": bare(plan, x), "fewstep": executions(plan), "sampler": samplers(plan, x)}
    contenders: dict[str, Callable[[], Loop]] = {
        key: lambda loop=loop: loop for key, loop in loops.items()
    }

    def calls(x: Tensor) -> None:
        for _ in range(steps):
            network(x)

    contenders["network"] = lambda: calls
    ours = of_ours(name, steps)
    if ours is not None:
        contenders["step"], made = ours
        arithmetic = bare(made, x)
        contenders["bare step"] = lambda: arithmetic
    for peer, of in (("diffusers", of_diffusers), ("azula", of_azula)):
        prepare = of(name, steps)
        if prepare is not None:
            contenders[peer] = prepare
    found = measure(contenders, x, rounds)
    cost = {
        key: (value - (0 if key.startswith("bare") else found["network"])) / steps * 1e6
        for key, value in found.items()
    }
    counted = [key for key in ("fewstep", "sampler", "step", "diffusers") if key in contenders]
    return cost, [operations(contenders[key](), x) / steps - 1 for key in counted]


def through_sample(name: str, steps: int, rounds: int) -> tuple[float, float, float, float]:
    """Returns what ``fewstep.sample`` costs of one small sample, without the network.

    Returns:
        The first and the second call and the executor alone, in milliseconds, and tensor operations
        per step, network excluded. The schedule is a new one, so that no plan is there before.
    """
    denoiser = fewstep.Denoiser.wrap(
        network,
        schedule=fewstep.schedule("ddpm-linear"),
        prediction="eps",
        event_shape=SIZES[0][1:],
    )

    def call() -> Any:
        return fewstep.sample(denoiser, 1, solver=name, nfe=steps)

    def cost(function: Callable[[], Any]) -> float:
        start = time.thread_time()
        function()
        return 1e3 * (time.thread_time() - start)

    first = cost(call)
    later = statistics.median(cost(call) for _ in range(rounds))
    resolved = fewstep.resolve(denoiser, fewstep.SamplerRequest(name, nfe=steps))
    native, x = resolved.sampler.native, torch.randn(SIZES[0])  # type: ignore[attr-defined]
    loop = executions(native)
    with torch.no_grad():
        alone = statistics.median(cost(lambda: loop(x)) for _ in range(rounds))
    with Count() as counter:
        call()
    return first, later, alone, counter.count / steps - 1


def shown(cost: dict[str, float], key: str) -> str:
    """Returns a cost as text, or a dash where there is none."""
    return f"{cost[key]:.1f}" if key in cost else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = arguments.steps
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "diffusers", "azula"))
    print(f"{date.today()}, fewstep {fewstep.__version__}, {versions}, Python", end=" ")
    print(f"{platform.python_version()}, {platform.machine()}, 1 thread, {steps} steps,", end=" ")
    print(f"median of {arguments.rounds} rounds; microseconds per step without the network")
    print("bare, run, all: the plan's arithmetic, the executor, PlanSampler.run;", end=" ")
    print("bare', step: the arithmetic of the scheduler's plan, PlanScheduler.step")
    print("ops: tensor operations a step of run, all, step, and of diffusers (tab3: DEIS)\n")
    schedule = fewstep.schedule("ddpm-linear")
    print(
        f"{'size':>12} {'solver':>9} {'bare':>7} {'run':>7} {'ratio':>5} {'all':>7} {'ratio':>5} "
        f"{chr(39).join(('bare', '')):>7} {'step':>7} {'ratio':>5} {'diffusers':>9} {'azula':>7} ops"
    )
    worst = {"sampler": 0.0, "step": 0.0, "microseconds": 0.0}
    for size in SIZES:
        x = torch.randn(size)
        for name in SOLVERS:
            cost, counts = costs(name, schedule, x, steps, arguments.rounds)
            ratios = [cost[key] / cost["bare"] for key in ("fewstep", "sampler")]
            stepped = cost.get("step", math.nan) / cost.get("bare step", math.nan)
            if size == SIZES[-1]:
                worst["sampler"] = max(worst["sampler"], *ratios)
                worst["step"] = max(worst["step"], stepped)
            if size == SIZES[0]:
                worst["microseconds"] = max(worst["microseconds"], cost.get("step", math.nan))
            print(
                f"{'x'.join(map(str, size)):>12} {name:>9} {cost['bare']:7.1f} "
                f"{cost['fewstep']:7.1f} {ratios[0]:5.2f} {cost['sampler']:7.1f} {ratios[1]:5.2f} "
                f"{shown(cost, 'bare step'):>7} {shown(cost, 'step'):>7} {stepped:5.2f} "
                f"{shown(cost, 'diffusers'):>9} {shown(cost, 'azula'):>7} "
                f"{' / '.join(f'{c:.1f}' for c in counts)}",
                flush=True,
            )
    print(
        f"\n{'sample':>9} {'first ms':>9} {'second ms':>9} {'loop ms':>9} {'us/step':>8} ops/step"
    )
    for name in ("ddim", "tab3", "unipc3", "dpmpp-2m"):
        first, later, alone, count = through_sample(name, steps, arguments.rounds)
        print(
            f"{name:>9} {first:9.2f} {later:9.2f} {alone:9.2f} {1e3 * later / steps:8.1f} {count:.1f}"
        )
    for package in ("diffusers", "azula"):
        if version(package) == "not installed":
            print(f"{package} is not installed, so its column is empty (pip install {package})")
    largest, smallest = ("x".join(map(str, SIZES[k])) for k in (-1, 0))
    print(f"\nworst ratio to bare arithmetic at {largest}: {worst['sampler']:.2f} of", end=" ")
    print(f"the sampler, {worst['step']:.2f} of PlanScheduler.step (at most {LIMIT})")
    print(f"most of PlanScheduler.step at {smallest}: {worst['microseconds']:.1f}", end=" ")
    print(f"microseconds (at most {STEP_LIMIT:g})")


if __name__ == "__main__":
    main()
