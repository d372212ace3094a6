"""Microseconds per step of the loop alone, beside diffusers, azula and bare arithmetic.

Every contender walks the same number of steps with the network ``x * 0.1``; the cost of that
network is measured apart and subtracted. Rounds are interleaved and medians of thread CPU time
are shown, so that a busy machine hurts all of them alike; the ratios are what to read.

Bare arithmetic is what a step costs at least: for each linear row of the plan one
``torch.mul`` out of place and one ``add_`` for each further term.

Run: ``python benchmarks/overhead.py [--rounds 15] [--steps 20]``
"""

from __future__ import annotations

import argparse
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
from fewstep.execute import Execution
from fewstep.noise import NoiseSource
from fewstep.plans import Lin, Plan
from fewstep.sampling import PlanSampler, Run

SIZES = ((1, 3, 32, 32), (4, 4, 64, 64), (64, 3, 32, 32))
SOLVERS = ("ddim", "dpmpp-2m", "tab3", "unipc3")
LIMIT = 1.5
"""The most that a step may cost, in units of the bare arithmetic, at the largest size."""

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
        while (call := run.call) is not None:
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
    widths = [len(row.terms) for row in plan.structure.rows if isinstance(row, Lin)]
    terms = [torch.randn_like(x) for _ in range(max(widths))]

    def loop(_: Tensor) -> None:
        for width in widths:
            total = torch.mul(terms[0], 0.9)
            for other in terms[1:width]:
                total.add_(other, alpha=0.1)

    return loop


def of_diffusers(name: str, steps: int) -> Callable[[], Loop] | None:
    """Returns what makes a loop over a scheduler, or ``None`` without diffusers."""
    try:
        import diffusers
    except ImportError:
        return None
    build, options = {
        "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
        "dpmpp-2m": (diffusers.DPMSolverMultistepScheduler, {}),
        "tab3": (diffusers.DEISMultistepScheduler, {"solver_order": 3}),
        "unipc3": (diffusers.UniPCMultistepScheduler, {"solver_order": 3}),
    }[name]
    scheduler = build(**options)

    def prepare() -> Loop:
        scheduler.set_timesteps(steps)

        def loop(x: Tensor) -> None:
            for t in scheduler.timesteps:
                x = scheduler.step(network(x), t, x).prev_sample

        return loop

    return prepare


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
    print("ops: tensor operations a step of the executor, of PlanSampler.run, and of diffusers\n")
    schedule = fewstep.schedule("ddpm-linear")
    print(
        f"{'size':>12} {'solver':>9} {'bare':>8} {'fewstep':>8} {'ratio':>6} {'sampler':>8} "
        f"{'ratio':>6} {'diffusers':>9} {'azula':>8} {'ops':>16}"
    )
    worst = 0.0
    for size in SIZES:
        x = torch.randn(size)
        for name in SOLVERS:
            plan = fewstep.plan(name, schedule, nfe=steps)
            loops = {
                "bare": bare(plan, x),
                "fewstep": executions(plan),
                "sampler": samplers(plan, x),
            }
            contenders: dict[str, Callable[[], Loop]] = {
                key: lambda loop=loop: loop for key, loop in loops.items()
            }

            def calls(x: Tensor) -> None:
                for _ in range(steps):
                    network(x)

            contenders["network"] = lambda calls=calls: calls
            for peer, of in (("diffusers", of_diffusers), ("azula", of_azula)):
                prepare = of(name, steps)
                if prepare is not None:
                    contenders[peer] = prepare
            found = measure(contenders, x, arguments.rounds)
            cost = {
                key: (value - (0 if key == "bare" else found["network"])) / steps * 1e6
                for key, value in found.items()
            }
            ratios = [cost[key] / cost["bare"] for key in ("fewstep", "sampler")]
            if size == SIZES[-1]:
                worst = max(worst, *ratios)
            counts = [operations(loops[key], x) / steps - 1 for key in ("fewstep", "sampler")]
            if "diffusers" in contenders:
                counts.append(operations(contenders["diffusers"](), x) / steps - 1)
            peers = [f"{cost[p]:.1f}" if p in cost else "-" for p in ("diffusers", "azula")]
            print(
                f"{'x'.join(map(str, size)):>12} {name:>9} {cost['bare']:8.1f} "
                f"{cost['fewstep']:8.1f} {ratios[0]:6.2f} {cost['sampler']:8.1f} {ratios[1]:6.2f} "
                f"{peers[0]:>9} {peers[1]:>8} {' / '.join(f'{c:.1f}' for c in counts):>16}",
                flush=True,
            )
    for package in ("diffusers", "azula"):
        if version(package) == "not installed":
            print(f"{package} is not installed, so its column is empty (pip install {package})")
    print(
        f"\nworst ratio to bare arithmetic at {'x'.join(map(str, SIZES[-1]))}: {worst:.2f}",
        end=" ",
    )
    print(f"(at most {LIMIT})")


if __name__ == "__main__":
    main()
