"""What a sample costs here, and a plan for a very large recording, computed from that.

Usage: python benchmarks/scale.py measure [--out FILE]
       python benchmarks/scale.py processes [--count 2] [-n 128] [--batch 32] [--out FILE]
       python benchmarks/scale.py plan [--trajectories 1e9] [--gpus 1000] [--rate EVALUATIONS_PER_SECOND] ...

``measure`` times the parts of the cost of a sample that do not depend on the network, on one core of this
machine: noise, the sampler's own operations, packing and writing a shard, verifying it. ``processes`` measures
how much faster several processes of one launch are than one (``fewstep sample``, from loaded models to the written
files), and how much faster the network alone is in as many: more than that cannot be reached. ``plan`` computes
files, bytes, hours, failures and money from these figures and from assumptions that are options; it prints
each assumption, so that a reader can put in their own. ``docs/scale.md`` is its output with explanations.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fewstep
from _common import print_table, say_what_runs
from fewstep.diffusion.noise import INITIAL, NoiseSource
from fewstep.trajectories import TrajectoryStore

RESULTS = Path(__file__).parent / "results" / "scale.json"
EVENT = (3, 32, 32)
EVENT_FASHION = (1, 28, 28)


def seconds(run: Callable[[], object], rounds: int = 5) -> float:
    """Returns the median of the CPU seconds of a call."""
    times = []
    for _ in range(rounds + 1):
        begun = time.process_time()
        run()
        times.append(time.process_time() - begun)
    return statistics.median(times[1:])


def measure() -> dict[str, Any]:
    """Returns microseconds a sample of each part, for samples of (3, 32, 32) in batches of 256."""
    torch.set_num_threads(1)
    batch, nfe, n = 256, 20, 1024
    model = fewstep.Denoiser.wrap(
        lambda x, t: x,
        schedule=fewstep.schedule("ddpm-linear"),
        prediction="eps",
        event_shape=EVENT,
    )
    noise = seconds(lambda: NoiseSource(0, range(batch)).draw(INITIAL, EVENT)) / batch
    z = NoiseSource(0, range(batch)).draw(INITIAL, EVENT)
    alone = seconds(
        lambda: fewstep.sample(model, noise=z, solver="tab3", nfe=nfe, batch_size=batch)
    )
    with tempfile.TemporaryDirectory() as folder:
        place, number = Path(folder), iter(range(100))

        def record() -> None:
            fewstep.record(
                model,
                place / str(next(number)),
                n=n,
                solver="tab3",
                nfe=nfe,
                keep=4,
                shard_size=n,
                batch_size=batch,
            )

        whole = seconds(record, 3) / n
        store = TrajectoryStore.open(place / "0")
        size = sum(p.stat().st_size for p in (place / "0").glob("shard-*"))
        read = seconds(lambda: store.read(range(n)), 3) / n
    sampling = alone / batch
    return {
        "noise_us": 1e6 * noise,
        "solver_us_per_evaluation": 1e6 * sampling / nfe,
        "writing_us": 1e6 * max(whole - noise - sampling, 0.0),
        "reading_us": 1e6 * read,
        "bytes": size / n,
        "event_shape": list(EVENT),
        "states": 5,
    }


def worker(rank: int, count: int, options: argparse.Namespace, gates: Any, results: Any) -> None:
    """Evaluates the network alone, then draws samples with the others; each begins when all are ready."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    from fewstep.cli import run

    torch.set_num_threads(1)
    model = fewstep.load("fashion", device="cpu")
    cond = model.prepare(options.batch, {"class_labels": 3})
    x, t = torch.randn(options.batch, *EVENT_FASHION), torch.full((options.batch,), 0.5)
    evaluations = options.number * options.steps // options.batch // count
    arguments = ["sample", "fashion", "-n", str(options.number), "--nfe", str(options.steps)]
    arguments += ["--solver", "ddim", "--class-labels", "3", "--batch-size", str(options.batch)]
    arguments += ["--device", "cpu"]
    with torch.no_grad():
        model.raw(x, t, **cond)
        for number in range(2 * options.rounds):
            gates.wait()
            begun = time.perf_counter()
            if number % 2:
                assert (
                    run(["--quiet", *arguments, "--out", f"{options.folder}/{count}-{number}"])
                    == 0
                )
            else:
                for _ in range(evaluations):
                    model.raw(x, t, **cond)
            results.put((number, time.perf_counter() - begun))


def scaling(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the seconds of one process and of several, of the network alone and of ``sample``."""
    context = multiprocessing.get_context("spawn")
    seconds_of: dict[int, list[list[float]]] = {}
    kept = {"samples": options.number, "rounds": options.rounds}
    partial = options.out.with_suffix(".partial.json")
    if partial.exists() and (before := json.loads(partial.read_text()))["settings"] == kept:
        seconds_of = {int(count): rows for count, rows in before["seconds"].items()}
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        for count in (c for c in (1, options.count) if c not in seconds_of):
            gates, results = context.Barrier(count), context.SimpleQueue()
            arguments = (count, options, gates, results)
            group = [context.Process(target=worker, args=(r, *arguments)) for r in range(count)]
            for one in group:
                one.start()
            last = [0.0] * (2 * options.rounds)
            for _ in range(count * len(last)):
                number, spent = results.get()
                last[number] = max(last[number], spent)  # the slowest of a round
            for one in group:
                one.join()
            seconds_of[count] = [last[0::2], last[1::2]]
            partial.write_text(json.dumps({"settings": kept, "seconds": seconds_of}))
    partial.unlink(missing_ok=True)
    one, several = seconds_of[1], seconds_of[options.count]
    rows = {}
    for place, name in enumerate(("network alone", "fewstep sample")):
        before, after = statistics.median(one[place]), statistics.median(several[place])
        rows[name] = {"seconds of one": before, "seconds of several": after}
        rows[name]["times as fast"] = before / after
    return {"processes": options.count, "samples": options.number, "results": rows}


def plan(cost: dict[str, Any], options: argparse.Namespace) -> list[tuple[str, str]]:
    """Returns the rows of a plan for a recording."""
    n, gpus = int(options.trajectories), options.gpus
    evaluations = n * options.nfe
    # The processor prepares and writes while the GPU computes; what it cannot keep up with is added.
    device = options.nfe / options.rate
    host = 1e-6 * (cost["noise_us"] + cost["writing_us"]) / options.cores
    each = max(device, host)
    hours = n * each / gpus / 3600
    shards = math.ceil(n / options.shard_size)
    total = n * cost["bytes"]
    shard_seconds = options.shard_size * each
    failures = gpus * hours / options.hours_between_failures
    # A failure loses half a shard on average, and the claim is taken over after two minutes.
    lost = failures * (shard_seconds / 2 + options.restart_seconds) / 3600
    rows = [
        ("trajectories, evaluations each", f"{n:.0e}, {options.nfe}"),
        ("evaluations", f"{evaluations:.1e}"),
        ("assumed evaluations a second and GPU", f"{options.rate:,.0f}"),
        ("GPU seconds a trajectory", f"{device:.2e}"),
        (f"host seconds a trajectory ({options.cores} cores a GPU)", f"{host:.2e}"),
        ("limited by", "the GPU" if device >= host else "the processor"),
        ("hours on the clock", f"{hours:,.2f}"),
        ("GPU hours", f"{hours * gpus:,.0f}"),
        ("bytes a trajectory", f"{cost['bytes']:,.0f}"),
        ("bytes", f"{total / 1e12:,.1f} TB"),
        (
            "shards (files)",
            f"{shards:,} of {options.shard_size:,}: {options.shard_size * cost['bytes'] / 1e6:,.0f} MB each",
        ),
        ("seconds a shard", f"{shard_seconds:,.0f}"),
        ("bytes a second, all GPUs", f"{total / hours / 3600 / 1e9:,.2f} GB/s"),
        ("shards a second", f"{shards / hours / 3600:,.1f}"),
        ("assumed hours between failures of a GPU", f"{options.hours_between_failures:,.0f}"),
        ("failures", f"{failures:,.1f}"),
        ("GPU hours lost by them", f"{lost:,.2f} ({lost / hours / gpus:.2%})"),
        ("GPU hours lost without shards, by starting anew", f"{failures * hours / 2:,.1f}"),
        (
            f"cost at {options.dollars:g} $ a GPU hour",
            f"{(hours * gpus + lost) * options.dollars:,.0f} $",
        ),
        (
            "cost of a million trajectories",
            f"{(hours * gpus + lost) * options.dollars / n * 1e6:,.2f} $",
        ),
        (
            f"storage at {options.storage:g} $ a TB and month",
            f"{total / 1e12 * options.storage:,.0f} $ a month",
        ),
        (
            "time to read all once, verified, on 100 cores",
            f"{n * cost['reading_us'] * 1e-6 / 100 / 3600:,.1f} h",
        ),
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "processes", "plan"))
    parser.add_argument("--trajectories", type=float, default=1e9)
    parser.add_argument("--nfe", type=int, default=20)
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--cores", type=int, default=8, help="processor cores for each GPU")
    parser.add_argument("--rate", type=float, default=10_000, help="evaluations a second and GPU")
    parser.add_argument("--shard-size", type=int, default=8192)
    parser.add_argument("--hours-between-failures", type=float, default=50_000)
    parser.add_argument("--restart-seconds", type=float, default=180)
    parser.add_argument("--dollars", type=float, default=2.5, help="the price of a GPU hour")
    parser.add_argument(
        "--storage", type=float, default=23, help="the price of a terabyte and month"
    )
    parser.add_argument("--count", type=int, default=2, help="processes at once")
    parser.add_argument("-n", dest="number", type=int, default=128, help="samples they share")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="evaluations of these samples")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.what == "processes":
        made = scaling(options)
        say_what_runs(f"{options.count} processes against one, fashion, CPU, one thread each.")
        rows = [
            [what, *(f"{v:.2f}" for v in row.values())] for what, row in made["results"].items()
        ]
        print_table(("what", *made["results"]["network alone"]), rows)
        options.out.write_text(json.dumps({**known, "several": made}, indent=1) + "\n")
        return
    if options.what == "measure":
        cost = measure()
        say_what_runs("CPU microseconds a sample of (3, 32, 32) apart from the network, one core.")
        print_table(
            ("what", "figure"),
            [(k, f"{v:.2f}" if isinstance(v, float) else v) for k, v in cost.items()],
        )
        options.out.write_text(json.dumps({**known, **cost}, indent=1) + "\n")
        return
    cost = json.loads(options.out.read_text())
    say_what_runs("A plan from the figures of `measure`.")
    print_table(("what", "figure"), plan(cost, options))


if __name__ == "__main__":
    main()
