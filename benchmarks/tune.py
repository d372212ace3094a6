"""Tuned samplers: what they gain, on which statistics, at what cost; and where they fail.

Usage: python benchmarks/tune.py mixtures --out DIR [--only families,losses,budgets,seeds,ingredients]
       python benchmarks/tune.py fashion --out DIR --data FOLDER [--cells gs-5,ggdm-5,...]
                                 [--samples DIR of benchmarks/quality.py] [--pairs DIR]
       python benchmarks/tune.py free --out DIR --samples DIR    the training-free rows
       python benchmarks/tune.py other --out DIR --data FOLDER --samples DIR
       python benchmarks/tune.py memory --out DIR
       python benchmarks/tune.py table --out DIR [--model fashion] [--data fashion] [--features A,B]
                                 [--name NAME] [--names auto,...] [--samples DIR of benchmarks/quality.py]
                                 [--budgets 3,4,5] [--variants default,...] [--seconds S] [-n 1000]
       python benchmarks/tune.py ratios --out DIR [--mixtures DIR] [--write benchmarks/results/tune.json]
       python benchmarks/tune.py show --out DIR [--write FILE]

Each cell is a file in DIR; what is there is not done again, and a cell that was stopped goes on.
``show`` prints the tables.

``table`` is what the issue asks for: the tuned sampler over the best training-free one of any library, in features that
were trained on, selected with and unseen, each ingredient left out in turn; it stops after S seconds and goes on when
given again. ``ratios`` prints it, with paired intervals.

Mixtures: the squared discrepancy from the mixture itself, in closed form, with Gaussian kernels of
five widths, on 3000 noises that no search saw; its noise is about 0.1e-3. ``fashion``: 1000
samples of seed 5000 with the classes in turn. FID is against all training images in the features
of the embedded classifier (those that the objective mmd is trained on), in those of
``fashion-robust``, with which searches on embedded data are judged, and in those of a network with
random weights that no search has seen. All are biased upwards by the 1000 samples, alike for
all rows.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import _tune_table
import fewstep
from _common import print_table, say_what_runs
from fewstep.base.files import read_json, read_tensors, write_json
from fewstep.comparison.store import Store
from fewstep.learned import Base
from fewstep.learned.condition_pool import ConditionPool
from fewstep.learned.families import family
from fewstep.learned.judges import random_features
from fewstep.learned.objectives import Outcome
from fewstep.learned.starts import start_of
from fewstep.learned.teachers import Source
from fewstep.learned.unrolled import Unrolled, backpropagate
from fewstep.metrics import Reference, fid, kid, precision_recall
from fewstep.plans.execute import execute
from fewstep.plans.plan import Plan
from fewstep.sampling.request import SamplerRequest
from fewstep.training.data import read_images

BUDGETS = (3, 4, 5, 6, 8, 10)
MIXTURES = ("mixture-smooth", "mixture-sharp")
WIDTHS = (0.05, 0.1, 0.2, 0.5, 1.0)
JUDGED = 3000
SEARCH = {
    "steps": 300, "pairs": 1024, "heldout": 2000, "test": 100, "teacher_nfe": 60, "real_batch": 500,
    "patience": 15,
}  # fmt: skip
"""On mixtures: judged on so many noises that the judge can tell."""
FAMILIES = (
    "ddim-sigma", "vars", "ggdm", "ggdm+time", "ggdm+pred", "ggdm+pred-free", "ggdm+pred+time",
    "ggdm+pred-free+time", "schedule", "ld3", "free", "gs",
)  # fmt: skip
LOSSES = ("linear", "cubic", "random", "gaussian", "mixture", "endpoint")
SEARCHED = (("gs", "endpoint", None), ("ggdm+pred+time", "mmd", "gaussian"))
"""What is searched on mixtures at each budget: in the plane KID is of no use (see the losses)."""
INGREDIENTS = (
    ("gs", "endpoint"), ("gs", "endpoint,mmd"), ("gs", "mmd"), ("gs", "endpoint+0.1*adversarial"),
    ("gs+noise", "mmd"),
)  # fmt: skip
"""On mixtures, at 3 and 5 evaluations: what an adversarial term and noise on the way bring."""
SEED, N = 5000, 1000
SCORES = ("FID", "FID robust", "FID random", "KID", "precision", "recall")
"""What is shown of the samples of `fashion`."""


# Mixtures


def quadratic(steps: int, schedule: Any) -> list[float]:
    return [schedule.t_max * (1 - i / steps) ** 2 for i in range(steps)] + [schedule.t_zero]


def discrepancy(model: Any, x: Tensor) -> float:
    """Returns the squared discrepancy of samples from a mixture, its own terms in closed form."""
    total = 0.0
    variance, weights = model.stds.square(), model.weights
    between = torch.cdist(model.means, model.means).square()
    squares = torch.cdist(x, model.means).square()
    inside = torch.pdist(x).square()
    for width in WIDTHS:
        xx = (-inside / (2 * width**2)).exp().mean()
        one = width**2 + variance
        xy = ((width**2 / one * (-squares / (2 * one)).exp()) @ weights).mean()
        two = width**2 + variance[:, None] + variance
        yy = weights @ (width**2 / two * (-between / (2 * two)).exp()) @ weights
        total += float(xx + yy - 2 * xy)
    return total / len(WIDTHS)


def judged(model: Any, plan: Plan) -> float:
    """Returns the discrepancy of a plan's samples on the common noises."""
    generator = torch.Generator().manual_seed(4242)
    z = torch.randn((plan.n_noise + 1, JUDGED, 2), generator=generator, dtype=torch.float64)
    source = Source.of(model, plan, ConditionPool())

    def network(y: Tensor, t: Tensor) -> Tensor:
        return model(y, t, prediction=plan.prediction)

    x = execute(plan, network, source.start(z[0]), draw=lambda k: z[k + 1])
    return discrepancy(model, x)


def baselines(model: Any, steps: int) -> dict[str, float]:
    """Returns the discrepancies of training-free samplers on three grids, all with an end at zero."""
    schedule, found = model.schedule, {}
    grids = {
        "linear": [schedule.t_max * (1 - i / steps) for i in range(steps)],
        "quadratic": quadratic(steps, schedule)[:-1],
        "log-rho": fewstep.grid("log-rho", schedule, steps).times.tolist()[:-1],
    }
    for solver in ("ddim", "ddpm", "tab2", "tab3", "dpmpp-2m", "unipc3"):
        for name, times in grids.items():
            options = {"times": [*times, schedule.t_zero]}
            base = Base.of(schedule, SamplerRequest(solver, nfe=steps, options=options))
            found[f"{solver} {name}"] = judged(model, base.plan())
    return found


def mixture_cell(
    name: str,
    steps: int,
    kind: str,
    objective: str,
    kernel: Any = None,
    features: Any = None,
    seed: int = 0,
    solver: str | None = None,
) -> dict[str, Any]:
    """Runs one search on a mixture."""
    model: Any = fewstep.load(name)
    if solver is None:
        solver = "ddpm" if kind.startswith("vars") else "ddim"
        if kind in ("schedule", "ld3", "free", "gs", "gs+noise"):
            solver = "tab3"
    search: dict[str, Any] = {
        **SEARCH,
        "batch_size": 64 if objective.startswith("endpoint") else 256,
    }
    if kernel is not None:
        search["kernel"] = kernel
    begun, cpu = time.perf_counter(), time.process_time()
    made = fewstep.tune(
        model, nfe=steps, family=kind, objective=objective, solver=solver, grid="explicit",
        options={"times": quadratic(steps, model.schedule)}, search=search, features=features,
        seed=seed,
    )  # fmt: skip
    options = {"times": quadratic(steps, model.schedule)}
    start = Base.of(model.schedule, SamplerRequest(solver, nfe=steps, options=options))
    losses = [h["loss"] for h in made.history if h["loss"] is not None]
    return {
        "start": judged(model, start.plan()),
        "score": judged(model, made.plan),
        "count": made.recipe.about["learned"],
        "improved": made.improved,
        "verdict": made.verdict.state,
        "loss": [losses[0], losses[-1]],
        "taken": [h["step"] for h in made.history if h["taken"]][-1],
        "held out": [made.history[0]["score"], made.history[-1]["score"]],
        "seconds": time.perf_counter() - begun,
        "cpu": time.process_time() - cpu,
    }


def random_plane(x: Tensor) -> Tensor:
    """Returns 32 features of points in the plane, of a random network."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn((2, 32), generator=generator, dtype=torch.float64)
    shift = torch.randn(32, generator=generator, dtype=torch.float64)
    return (x @ weight + shift).relu()


def mixtures(out: Path, only: set[str]) -> None:
    def cell(name: str, make: Any) -> None:
        file = out / f"{name}.json"
        if not file.exists():
            write_json(file, make())
            print(name, file.read_text().replace("\n", ""), flush=True)

    if "budgets" in only:
        for steps in (5, 3, 4, 6, 8, 10):
            for name in MIXTURES:
                cell(f"{name}.{steps}.free", lambda n=name, k=steps: baselines(fewstep.load(n), k))
                for kind, objective, kernel in SEARCHED:
                    cell(
                        f"{name}.{steps}.{kind}.{objective}",
                        lambda a=(name, steps, kind, objective, kernel): mixture_cell(*a),
                    )
                cell(
                    f"{name}.{steps}.ggdm+pred+time.mmd.tab3",
                    lambda a=(name, steps, "ggdm+pred+time", "mmd", "gaussian"): mixture_cell(
                        *a, solver="tab3"
                    ),
                )
    if "seeds" in only:
        for seed in (1, 2):  # seed 0 is in the budgets
            for name in MIXTURES:
                for kind, objective, kernel in SEARCHED:
                    cell(
                        f"seeds.{name}.{kind}.{objective}.{seed}",
                        lambda a=(name, 5, kind, objective, kernel, None, seed): mixture_cell(*a),
                    )
    if "losses" in only:
        for loss in LOSSES:
            for kind in ("ggdm+pred-free+time", "gs"):
                objective = "endpoint" if loss == "endpoint" else "mmd"
                kernel = None if loss == "endpoint" else "cubic" if loss == "random" else loss
                look = random_plane if loss == "random" else None
                cell(
                    f"losses.{kind}.{loss}",
                    lambda a=("mixture-sharp", 5, kind, objective, kernel, look): mixture_cell(*a),
                )
    if "ingredients" in only:
        for steps in (3, 5):
            for kind, objective in INGREDIENTS:
                kernel = "gaussian" if "mmd" in objective else None
                cell(
                    f"ingredients.{steps}.{kind}.{objective}",
                    lambda a=("mixture-sharp", steps, kind, objective, kernel): mixture_cell(*a),
                )
    if "families" in only:
        for kind in FAMILIES:
            for objective in ("endpoint", "mmd"):
                kernel = None if objective == "endpoint" else "gaussian"
                cell(
                    f"families.{kind}.{objective}",
                    lambda a=("mixture-sharp", 5, kind, objective, kernel): mixture_cell(*a),
                )


# The embedded model

CELLS: dict[str, dict[str, Any]] = {
    "gs-5": {"nfe": 5, "family": "gs", "objective": "endpoint"},
    "ggdm-5": {"nfe": 5, "family": "ggdm+pred+time", "objective": "mmd"},
    "gs-5-mmd": {"nfe": 5, "family": "gs", "objective": "mmd"},
    **{
        f"default-{k}": {"nfe": k, "family": "gs", "objective": "endpoint,mmd"}
        for k in (5, 3, 4, 6, 8, 10, 1)
    },
    "ld3-5": {"nfe": 5, "family": "ld3", "objective": "endpoint"},
    "ggdm-5-endpoint": {"nfe": 5, "family": "ggdm+pred+time", "objective": "endpoint"},
    **{f"gs-{k}": {"nfe": k, "family": "gs", "objective": "endpoint"} for k in (3, 4, 6, 8, 10)},
    **{
        f"ggdm-{k}": {"nfe": k, "family": "ggdm+pred+time", "objective": "mmd"}
        for k in (10, 3, 4, 6, 8)
    },
    **{
        f"ggdm-auto-{k}": {
            "nfe": k,
            "family": "ggdm+pred+time",
            "objective": "mmd",
            "solver": "auto",
        }
        for k in (5, 3, 10, 6, 4, 8)
    },
}


def scored(x: Tensor, data: str | None) -> dict[str, Any]:
    """Returns the scores of samples."""
    reference = Reference.load("fashion")
    found: dict[str, Any] = {"n": len(x)}
    found["FID"] = fid(x, reference)
    found["FID robust"] = fid(x, Reference.load("fashion", "fashion-robust"))
    found["KID"] = kid(x, reference, heldout=True)
    some = precision_recall(x, reference, heldout=True, blocks=4)
    found["precision"], found["recall"] = some.precision, some.recall
    if data is not None:
        found["FID random"] = fid(x, Reference.load(data, random_features((1, 28, 28), seed=2)))
    return {
        key: value if isinstance(value, int) else [value.value, value.low, value.high]
        for key, value in found.items()
    }


def complete(file: Path, data: str | None) -> bool:
    """Whether a cell has all its scores; those in random features need the images."""
    wanted = set(SCORES) - (set() if data is not None else {"FID random"})
    return file.exists() and wanted <= set(read_json(file))


def drawn(plan: Plan, n: int) -> Tensor:
    """Returns the samples that are scored."""
    model = fewstep.load("fashion")
    labels = torch.arange(n) % 10
    return fewstep.sample(
        model, n, plan=plan, seed=SEED, class_labels=labels, batch_size=50
    ).float()


def fashion_cell(
    out: Path, name: str, data: str | None, search: dict[str, Any], pairs: str | None
) -> None:
    file = out / f"fashion.{name}.json"
    if complete(file, data):
        return
    recipe = out / f"{name}.recipe.json"
    arguments, found = CELLS[name], read_json(file) if file.exists() else {}
    begun, cpu = time.perf_counter(), time.process_time()
    if not recipe.exists():
        folder = recipe.with_suffix(".search")
        for pair in sorted(Path(pairs).glob("*.safetensors")) if pairs else ():
            which, count = pair.stem.rsplit("-", 1)
            wanted = search.get("pairs", 512) if which.endswith("train") else search.get("heldout")
            if int(count) == wanted and not (folder / f"{which}.safetensors").exists():
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{which}.safetensors").write_bytes(pair.read_bytes())
        fewstep.tune(
            fewstep.load("fashion"), **arguments, data="fashion", out=recipe, search=search
        )
        found = {
            "seconds": time.perf_counter() - begun,
            "cpu": time.process_time() - cpu,
            "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    made = fewstep.SamplerRecipe.load(recipe)
    assert made.plan is not None
    about = {
        "improved": made.about["improved"],
        "search": made.about["search"],
        "own scores": made.about["scores"],
    }
    write_json(file, {**arguments, **scored(drawn(made.plan, N), data), **found, **about})
    print(name, file.read_text().replace("\n", "")[:600], flush=True)


def free_cells(out: Path, data: str | None, samples: str | None, budgets: list[int]) -> None:
    """Scores training-free samplers: those drawn by benchmarks/quality.py, and DDIM on our strides."""
    for nfe in budgets:
        if samples is not None:
            store = Store(samples)
            for cell in store.all():
                file = out / f"free.{cell.name.replace(':', '_')}.{cell.nfe}.json"
                wanted = cell.nfe == nfe or cell.name == "reference"
                x = store.tensors(cell)["shown"] if wanted else torch.empty(0)
                if not complete(file, data) and len(x) == N:
                    write_json(file, {"nfe": cell.nfe, **scored(x, data)})
        schedule = fewstep.schedule("ddpm-linear")
        for power in (1.0, 1.5, 2.0):
            file = out / f"free.ddim power {power:g}.{nfe}.json"
            if not complete(file, data):
                plan = fewstep.plan("ddim", schedule, nfe=nfe, grid="power", power=power)
                write_json(file, {"nfe": nfe, **scored(drawn(plan, N), data)})
                print(file.name, flush=True)


def other_features(out: Path, data: str, samples: str | None) -> None:
    """Scores in features that no search has seen: 500 samples against 5000 real test images."""
    images = read_images(Path(data) / "t10k-images-idx3-ubyte.gz").floats()
    look = random_features((1, 28, 28), seed=2)
    reference = Reference.of(images[:5000], images[5000:], features=look)
    found: dict[str, Tensor] = {}
    for name, calls in (("auto", 5), ("reference", 100), ("diffusers_unipc-3", 5)):
        files = [
            Path(samples or ".") / f"{name}-{calls}-{k}.safetensors" for k in range(0, 500, 100)
        ]
        if all(f.exists() for f in files):
            found[f"{name} {calls}"] = torch.cat([read_tensors(f)["samples"] for f in files])
    for recipe in sorted(out.glob("*.recipe.json")):
        plan = fewstep.SamplerRecipe.load(recipe).plan
        if plan is not None and not (out / f"other.{recipe.stem}.json").exists():
            found[recipe.stem] = drawn(plan, 500)
    for name, x in found.items():
        value, distance = fid(x, reference), kid(x, reference, heldout=True)
        cell = {
            "FID": [value.value, value.low, value.high],
            "KID": [distance.value, distance.low, distance.high],
        }
        write_json(out / f"other.{name}.json", cell)
        print(name, cell, flush=True)


# Memory


def memory_one(steps: int, remat: bool) -> None:
    """Prints the peak of memory of one gradient of 16 samples, and the seconds of the second."""
    model = fewstep.load("fashion")
    learned = family("gs", start_of("gs", model.schedule, steps))
    source = Source.of(model, learned.base.plan(), ConditionPool.of(model, {}))
    run = Unrolled(model, learned.structure, remat=remat)
    x, cond = source.start(source.noise(5, range(16))), source.conditions.at(range(16))

    def loss(outcome: Outcome) -> Tensor:
        return outcome.x.square().mean()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    backpropagate(learned, run, x, [], cond, loss)
    begun = time.process_time()
    backpropagate(learned, run, x, [], cond, loss)
    seconds = time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"before": before, "peak": peak, "cpu": seconds}))


def memory(out: Path) -> None:
    for steps in (5, 10, 20):
        for remat in (False, True):
            file = out / f"memory.{steps}.{'remat' if remat else 'plain'}.json"
            if not file.exists():
                command = [sys.executable, __file__, "memory-one", str(steps), str(int(remat))]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                write_json(file, json.loads(output.splitlines()[-1]))
                print(file.name, file.read_text().replace("\n", ""), flush=True)


# Tables


def show(out: Path) -> None:
    cells = {f.name.removesuffix(".json"): read_json(f) for f in sorted(out.glob("*.json"))}
    say_what_runs("Mixtures: discrepancy x 1e-3, noise about 0.1.")
    for name in MIXTURES:
        rows = []
        for steps in BUDGETS:
            free = cells.get(f"{name}.{steps}.free")
            if free is None:
                continue
            ddim = min(v for k, v in free.items() if k.startswith("ddim "))
            best = min(free, key=free.__getitem__)
            found = [
                cells.get(f"{name}.{steps}.{kind}", {}).get("score", math.nan)
                for kind in ("ggdm+pred+time.mmd", "ggdm+pred+time.mmd.tab3", "gs.endpoint")
            ]
            rows.append([steps, *_thousandths(ddim, free[best]), best, *_thousandths(*found)])
        print(f"{name}\n")
        print_table(
            ["K", "best DDIM", "best training-free", "which", "ggdm+pred+time, mmd",
             "the same from tab3", "gs, endpoint"],
            rows,
        )  # fmt: skip
    for part, head in (
        ("families", "family"),
        ("losses", "family, loss"),
        ("seeds", "mixture, family, objective, seed"),
        ("ingredients", "K, family, objective"),
    ):
        rows = [
            [
                key.removeprefix(f"{part}.").replace(".", ", "), c["count"],
                *_thousandths(c["start"], c["score"], *c["loss"]), c["taken"],
                f"{c['cpu']:.0f}",
            ]
            for key, c in cells.items()
            if key.startswith(f"{part}.")
        ]  # fmt: skip
        if rows:
            print(f"{'both mixtures' if part == 'seeds' else 'mixture-sharp'}, K = 5, {part}\n")
            print_table(
                [head, "numbers", "start", "after", "loss first", "last", "step kept", "CPU s"],
                rows,
            )
    print("fashion\n")
    rows = []
    for key, c in sorted(cells.items(), key=lambda item: (item[1].get("nfe", 0), item[0])):
        if key.startswith(("free.", "fashion.")):
            minutes = f"{c['cpu'] / 60:.1f}" if "cpu" in c else ""
            peak = f"{c['peak MiB']:.0f}" if "peak MiB" in c else ""
            values = [_with_interval(c.get(k)) for k in SCORES]
            rows.append([key.split(".", 1)[1].rsplit(".", 1)[0] if key.startswith("free") else
                         f"**{key.split('.', 1)[1]}**", c["nfe"], *values, minutes, peak])  # fmt: skip
    print_table(["sampler", "K", *SCORES, "CPU min", "peak MiB"], rows)
    by_budget(cells)
    rows = [
        [key.removeprefix("other."), _with_interval(c["FID"]), _with_interval(c["KID"])]
        for key, c in cells.items()
        if key.startswith("other.")
    ]
    if rows:
        print_table(["sampler", "FID, random features", "KID, random features"], rows)
    rows = [
        [*key.split(".")[1:], f"{c['before']:.0f}", f"{c['peak']:.0f}", f"{c['cpu']:.2f}"]
        for key, c in cells.items()
        if key.startswith("memory.")
    ]
    if rows:
        print_table(["K", "gradient", "MiB before", "MiB at the peak", "CPU s"], rows)


def shown_cells(out: Path) -> dict[str, Any]:
    """Returns the cells of `fashion` and of training-free samplers, without the searches' settings."""
    return {
        f.name.removesuffix(".json"): {
            key: value
            for key, value in read_json(f).items()
            if key not in ("search", "own scores")
        }
        for f in sorted(out.glob("f*.json"))
        if f.name.startswith(("fashion.", "free."))
    }


def by_budget(cells: dict[str, Any]) -> None:
    """Prints the tuned samplers of `fashion` beside the best of each kind, by FID in two features."""
    for score in ("FID", "FID robust"):
        rows = []
        for steps in BUDGETS:
            free = {
                key.removeprefix("free.").rsplit(".", 1)[0]: cell[score]
                for key, cell in cells.items()
                if key.startswith("free.") and cell["nfe"] == steps and score in cell
            }
            ddim = [name for name in free if name.startswith("ddim power")]
            ours = [name for name in free if name in ("auto", "recommended")]
            peers = [name for name in free if name.startswith(("azula_", "diffusers_"))]
            row: list[Any] = [steps]
            for name in ("default", "ggdm-auto", "ggdm"):
                row.append(_with_interval(cells.get(f"fashion.{name}-{steps}", {}).get(score)))
            for names in (ddim, ours, peers):
                best = min(names, key=lambda n: free[n][0], default=None)
                row.append("" if best is None else f"{_with_interval(free[best])} {best}")
            rows.append(row)
        print(f"{score}\n")
        print_table(
            ["K", "default search", "ggdm+pred+time from auto", "ggdm+pred+time", "best DDIM",
             "best of ours, training-free", "best peer"],
            rows,
        )  # fmt: skip


def _thousandths(*values: float) -> list[str]:
    return [f"{1e3 * v:.2f}" for v in values]


def _with_interval(value: list[float] | None) -> str:
    return "" if value is None else f"{value[0]:.3g} ± {value[2] - value[0]:.2g}"


def main() -> None:
    """Runs what is asked for."""
    if sys.argv[1:2] == ["memory-one"]:
        torch.set_num_threads(1)
        memory_one(int(sys.argv[2]), sys.argv[3] == "1")
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "what",
        choices=["mixtures", "fashion", "free", "other", "memory", "show", "table", "ratios"],
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="budgets,losses,families,seeds,ingredients")
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--data")
    parser.add_argument("--model", default="fashion", help="table: a name or a folder")
    parser.add_argument(
        "--features", help="table: of the loss and of the selection, for other data"
    )
    parser.add_argument(
        "--name", help="table: the model's name in the result, by default the folder's"
    )
    parser.add_argument(
        "--names",
        default=",".join((*_tune_table.OURS, *_tune_table.PEERS)),
        help="table: the training-free samplers, as of benchmarks/quality.py",
    )
    parser.add_argument("--variants", default=",".join(_tune_table.VARIANTS))
    parser.add_argument("--seconds", type=float, help="table: when to stop")
    parser.add_argument("-n", type=int, default=N, help="table: the samples of a cell")
    parser.add_argument("--samples")
    parser.add_argument("--pairs")
    parser.add_argument("--budgets", default="5")
    parser.add_argument("--search", default="{}", help="settings of the search, JSON")
    parser.add_argument(
        "--mixtures", type=Path, help="ratios: the folder of `mixtures --only ingredients`"
    )
    parser.add_argument("--write", type=Path, help="show: the cells of fashion as one file")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.what == "mixtures":
        mixtures(options.out, set(options.only.split(",")))
    elif options.what == "fashion":
        for name in options.cells.split(","):
            fashion_cell(
                options.out, name, options.data, json.loads(options.search), options.pairs
            )
    elif options.what == "free":
        budgets = [int(k) for k in options.budgets.split(",")]
        free_cells(options.out, options.data, options.samples, budgets)
    elif options.what == "other":
        other_features(options.out, options.data, options.samples)
    elif options.what == "table":
        torch.set_num_threads(1)
        _tune_table.table(
            options.model,
            options.data or "fashion",
            (options.features or "").split(","),
            options.out,
            [int(k) for k in options.budgets.split(",")],
            options.variants.split(","),
            name=options.name or Path(options.model).name,
            free=options.names.split(","),
            samples=None if options.samples is None else Path(options.samples),
            n=options.n,
            search=json.loads(options.search),
            seconds=options.seconds,
        )
    elif options.what == "ratios":
        _tune_table.show(options.out, options.write, options.mixtures)
    elif options.what == "memory":
        memory(options.out)
    else:
        show(options.out)
        if options.write is not None:
            write_json(options.write, _tune_table.rounded(shown_cells(options.out)))


if __name__ == "__main__":
    main()
