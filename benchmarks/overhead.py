"""What sampling costs besides the network: whole calls of all solvers, and the loop of some beside others.

``calls``: ``fewstep.sample``, with and without an image, and ``PlanScheduler.set_timesteps``, of each solver that
has a plan: the first call of a process (it makes the plan), the second, and the bare loop of the executor.

``steps``: microseconds of each step of the loop alone, beside diffusers, azula and bare arithmetic.
Every contender walks the same number of steps with the network ``x * 0.1``; the cost of that
network is measured apart and subtracted. Rounds are interleaved and medians of thread CPU time
are shown, so that a busy machine hurts all of them alike; the ratios are what to read.

Bare arithmetic is what a step costs at least: for each linear row of the plan one
``torch.mul`` out of place (``torch.add``, if a coefficient is 1) and one ``add_`` for each further
term. The schedulers, ``PlanScheduler`` and those of diffusers, are called as pipelines do, through
``step(..., return_dict=False)``, with a network that predicts the noise; the bare arithmetic beside
``PlanScheduler`` is that of its plan, in which the conversions of predictions are included.

Ends with the limits that the project promises, and with an error if one does not hold (times and ratios need a
quiet machine). Writes ``results/overhead.json``.

Run: ``python benchmarks/overhead.py [--rounds 15] [--steps 20] [--part calls]``
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep
from _common import print_table, say_what_runs, version
from fewstep.base.files import write_json
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

MOST_OVER_LOOP = 1.0
"""The most milliseconds that the second ``sample`` of a process may take beyond the bare loop."""

MOST_OPERATIONS = 12.0
"""The most tensor operations for each evaluation through ``sample``, network excluded."""

RESULTS = Path(__file__).parent / "results" / "overhead.json"

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
    return {name: statistics.median(values) for name, values in times.items()}


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
        contenders["step"], scheduler_plan = ours
        arithmetic = bare(scheduler_plan, x)
        contenders["bare step"] = lambda: arithmetic
    for peer, of in (("diffusers", of_diffusers), ("azula", of_azula)):
        prepare = of(name, steps)
        if prepare is not None:
            contenders[peer] = prepare
    medians = measure(contenders, x, rounds)
    cost = {
        key: (value - (0 if key.startswith("bare") else medians["network"])) / steps * 1e6
        for key, value in medians.items()
    }
    ours_and_theirs = [k for k in ("fewstep", "sampler", "step", "diffusers") if k in contenders]
    return cost, [operations(contenders[key](), x) / steps - 1 for key in ours_and_theirs]


def budget(name: str, most: int) -> tuple[int, int]:
    """Returns the most steps of a solver that at most so many evaluations suffice for, and their cost."""
    method = fewstep.solvers.solver(name)
    zero = bool(method.default_grid[1].get("to_zero"))
    costs = [method.nfe(steps, ends_at_zero=zero) for steps in range(1, most + 1)]
    steps = max(k for k, cost in enumerate(costs, start=1) if cost <= most)
    return steps, costs[steps - 1]


def milliseconds(function: Callable[[], Any]) -> float:
    """Returns the thread CPU time of a call."""
    start = time.thread_time()
    function()
    return 1e3 * (time.thread_time() - start)


def counted(function: Callable[[], Any]) -> int:
    """Returns the tensor operations of a call."""
    with Count() as counter:
        function()
    return counter.count


def through_sample(name: str, nfe: int, rounds: int, *, strength: float | None) -> dict[str, Any]:
    """Returns what ``fewstep.sample`` costs of one small sample, without the network.

    Arguments:
        name: The solver.
        nfe: Its budget.
        rounds: How often it is called after the first, of which the fastest is the second call: a busy machine only adds.
        strength: For a start from an image.

    Returns:
        ``first``, ``second`` and ``loop`` (the bare loop of the executor with the same draws) in milliseconds,
        ``operations`` of the second call for each evaluation, network excluded, and ``draws`` for each. The
        schedule is a new one, so that there is no plan before.
    """
    denoiser = fewstep.Denoiser.wrap(
        network,
        schedule=fewstep.schedule("ddpm-linear"),
        prediction="eps",
        event_shape=SIZES[0][1:],
        data_mean=0.0,
        data_std=0.5,
    )
    start = {} if strength is None else {"strength": strength, "image": torch.zeros(SIZES[0][1:])}

    def call() -> Any:
        return fewstep.sample(denoiser, 1, solver=name, nfe=nfe, **start)

    first = milliseconds(call)
    second = min(milliseconds(call) for _ in range(rounds))
    options = {} if strength is None else {"strength": strength}
    request = fewstep.SamplerRequest(name, nfe=nfe, options=options)
    sampler = fewstep.resolve(denoiser, request, image=strength is not None).sampler
    assert isinstance(sampler, PlanSampler)
    plan, x = sampler.native, torch.randn(SIZES[0])

    def loop() -> None:
        source = NoiseSource(0, [0])
        run = Execution(plan, x, draw=lambda k: source.draw(k, x.shape[1:]))
        while (request := run.request) is not None:
            run.advance(network(request.x))

    with torch.no_grad():
        bare_loop = min(milliseconds(loop) for _ in range(rounds))
    return {
        "first": first,
        "second": second,
        "loop": bare_loop,
        "operations": counted(call) / nfe - 1,
        "draws": plan.n_noise / nfe,
        "nfe": nfe,
    }


def through_scheduler(name: str, steps: int, rounds: int) -> dict[str, Any]:
    """Returns what ``PlanScheduler.set_timesteps`` costs: the first and later calls, and whether these plan.

    Returns:
        ``first`` and ``second`` in milliseconds, ``operations`` of a second call, ``same`` (a second call takes
        the plan of the first), and the same of runs that begin in the middle, as of images.
    """
    from fewstep.adapters.diffusers import PlanScheduler

    scheduler = PlanScheduler(solver=name)
    x = torch.zeros(SIZES[0])

    def call() -> None:
        scheduler.set_timesteps(steps)

    def middle() -> None:
        scheduler.set_timesteps(steps)
        begin = scheduler.order * (steps // 2)
        scheduler.set_begin_index(begin)
        scheduler.step(x, scheduler.timesteps[begin], x, return_dict=False)

    found: dict[str, Any] = {}
    for kind, function in (("", call), ("image ", middle)):
        try:
            found[f"{kind}first"] = milliseconds(function)
        except ValueError:
            break  # no scheduler can run it (accelerated-ddpm), or begin in its middle (pndm)
        plan = scheduler.plan
        found[f"{kind}second"] = min(milliseconds(function) for _ in range(rounds))
        found[f"{kind}operations"] = counted(function)
        found[f"{kind}same"] = scheduler.plan is plan
    return found


def shown(cost: dict[str, float], key: str) -> str:
    """Returns a cost as text, or a dash where there is none."""
    return f"{cost[key]:.1f}" if key in cost else "-"


@dataclass(frozen=True)
class Limit:
    """A promise: the worst figure of all solvers, and the most that it may be."""

    name: str
    worst: float
    solver: str
    most: float

    @property
    def holds(self) -> bool:
        """Whether the worst figure is within the limit."""
        return self.worst <= self.most

    @classmethod
    def of(cls, name: str, figures: dict[str, float], most: float) -> Limit:
        """Returns the limit of the figures of all solvers."""
        solver = max(figures, key=lambda key: figures[key])
        return cls(name, figures[solver], solver, most)


def planned_solvers() -> list[str]:
    """Returns the solvers that have a plan."""
    return [name for name in fewstep.SOLVERS if not fewstep.solvers.solver(name).adaptive]


def measure_calls(most: int, rounds: int) -> tuple[dict[str, Any], list[Limit]]:
    """Prints and returns what whole calls cost, through ``sample`` and ``PlanScheduler``, and their limits."""
    print(
        "Whole calls, of one sample of 1x3x32x32, without the network: milliseconds of the first call, of the"
    )
    print(
        "second, of the bare loop; tensor operations of the second for each evaluation; of set_timesteps and of"
    )
    print(
        "a run that begins in the middle the milliseconds and all operations of the second call.\n"
    )
    rows, results = [], {}
    for name in planned_solvers():
        steps, nfe = budget(name, most)
        whole = through_sample(name, nfe, rounds, strength=None)
        image = through_sample(name, nfe, rounds, strength=0.5)
        scheduler = through_scheduler(name, steps, rounds)
        results[name] = {"sample": whole, "image": image, "set_timesteps": scheduler}
        times = [whole[key] for key in ("first", "second", "loop")]
        times += [image[key] for key in ("first", "second")]
        rows.append(
            [name, whole["nfe"], *(f"{t:.2f}" for t in times)]
            + [f"{found['operations']:.1f}" for found in (whole, image)]
            + [f"{scheduler.get(key, nan):.2f}" for key in ("first", "second", "image second")]
            + [scheduler.get("operations", "-"), scheduler.get("image operations", "-")]
        )
    head = [
        "solver",
        "NFE",
        "first",
        "second",
        "loop",
        "image first",
        "second",
        "ops",
        "image ops",
    ]
    head += ["set_timesteps first", "second", "middle", "ops", "middle ops"]
    print_table(head, rows)

    def figures(of: Callable[[dict[str, Any]], float]) -> dict[str, float]:
        return {name: of(found) for name, found in results.items()}

    limits = [
        Limit.of(
            f"milliseconds of the second {what} over the bare loop",
            figures(lambda found, kind=kind: found[kind]["second"] - found[kind]["loop"]),
            MOST_OVER_LOOP,
        )
        for what, kind in (("sample", "sample"), ("sample of an image", "image"))
    ]
    limits += [
        Limit.of(
            f"operations for each evaluation of {what}",
            figures(lambda found, kind=kind: found[kind]["operations"]),
            MOST_OPERATIONS,
        )
        for what, kind in (("sample", "sample"), ("sample of an image", "image"))
    ]
    limits += [
        Limit.of(
            f"plans made by a second {what}",
            figures(lambda found, key=key: float(not found["set_timesteps"].get(key, True))),
            0.0,
        )
        for what, key in (("set_timesteps", "same"), ("start in the middle", "image same"))
    ]
    limits.append(
        Limit.of(
            "operations of a second set_timesteps",
            figures(lambda found: found["set_timesteps"].get("operations", 0)),
            MOST_OPERATIONS,
        )
    )
    return results, limits


def measure_steps(steps: int, rounds: int) -> tuple[dict[str, Any], list[Limit]]:
    """Prints and returns microseconds a step of the loops alone, and their limits."""
    print(
        "Loops alone; bare, run, all: the plan's arithmetic, the executor, PlanSampler.run;",
        end=" ",
    )
    print("bare', step: the arithmetic of the scheduler's plan, PlanScheduler.step.")
    print("ops: tensor operations a step of run, all, step, and of diffusers (tab3: DEIS)\n")
    schedule = fewstep.schedule("ddpm-linear")
    rows, results = [], {}
    for size in SIZES:
        x = torch.randn(size)
        for name in SOLVERS:
            cost, counts = costs(name, schedule, x, steps, rounds)
            shape = "x".join(map(str, size))
            results[f"{shape} {name}"] = {"microseconds": cost, "operations": counts}
            rows.append(
                [shape, name, f"{cost['bare']:.1f}"]
                + [f"{cost[k]:.1f} ({cost[k] / cost['bare']:.2f})" for k in ("fewstep", "sampler")]
                + [shown(cost, key) for key in ("bare step", "step", "diffusers", "azula")]
                + [" / ".join(f"{c:.1f}" for c in counts)]
            )
    print_table(
        ["size", "solver", "bare", "run", "all", "bare'", "step", "diffusers", "azula", "ops"],
        rows,
    )
    largest, smallest = ("x".join(map(str, SIZES[k])) for k in (-1, 0))

    def figures(shape: str, of: Callable[[dict[str, float]], float]) -> dict[str, float]:
        every = {name: results[f"{shape} {name}"]["microseconds"] for name in SOLVERS}
        return {name: of(cost) for name, cost in every.items() if "step" in cost}

    limits = [
        Limit.of(
            f"ratio of the sampler to bare arithmetic at {largest}",
            figures(largest, lambda cost: cost["sampler"] / cost["bare"]),
            LIMIT,
        ),
        Limit.of(
            f"ratio of PlanScheduler.step to bare arithmetic at {largest}",
            figures(largest, lambda cost: cost["step"] / cost["bare step"]),
            LIMIT,
        ),
        Limit.of(
            f"microseconds of PlanScheduler.step at {smallest}",
            figures(smallest, lambda cost: cost["step"]),
            STEP_LIMIT,
        ),
    ]
    return results, limits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--part", choices=("calls", "steps"), help="one part only; nothing is written"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("fewstep").setLevel(logging.ERROR)  # the network returns nonsense
    steps, rounds = arguments.steps, arguments.rounds
    say_what_runs(f"{steps} evaluations at most, {rounds} rounds.", ("diffusers", "azula"))
    parts = {"calls": measure_calls, "steps": measure_steps}
    measured: dict[str, Any] = {}
    limits: list[Limit] = []
    for part in [arguments.part] if arguments.part else parts:
        measured[part], found = parts[part](steps, rounds)
        limits += found
    for package in ("diffusers", "azula"):
        if version(package) == "not installed":
            print(f"{package} is not installed, so its column is empty (pip install {package})")
    print_table(
        ["limit", "worst", "solver", "at most", "holds"],
        [
            [
                limit.name,
                f"{limit.worst:.2f}",
                limit.solver,
                f"{limit.most:g}",
                "yes" if limit.holds else "NO",
            ]
            for limit in limits
        ],
    )
    if arguments.part is None:
        settings = {"steps": steps, "rounds": rounds, "threads": 1, "torch": torch.__version__}
        content = {"settings": settings, "limits": [asdict(limit) for limit in limits], **measured}
        write_json(RESULTS, content)
        print(f"wrote {RESULTS}")
    return 0 if all(limit.holds for limit in limits) else 1


if __name__ == "__main__":
    sys.exit(main())
