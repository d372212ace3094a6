"""What it costs to run: speed, scale, faults, pipelines."""

from __future__ import annotations

from result_pages.parts import RESULTS, load, origin, table

from fewstep.base.files import read_json


def speed() -> str:
    """Overhead, throughput, scale, long runs."""
    parts = ["# Speed, scale, long runs\n"]
    overhead = load("overhead")
    if overhead:
        rows = [
            [
                limit["name"],
                f"{limit['worst']:.2f}",
                limit["solver"],
                f"{limit['most']:g}",
                "yes" if limit["worst"] <= limit["most"] else "NO",
            ]
            for limit in overhead["limits"]
        ]
        settings = ", ".join(f"{k} {v}" for k, v in overhead["settings"].items())
        parts.append(f"**Overhead**, all solvers, `python benchmarks/overhead.py` ({settings}):\n")
        parts.append(table(["limit", "worst", "solver", "at most", "holds"], rows))
    for entry in read_json(RESULTS / "throughput.json", what="result"):
        settings = ", ".join(f"{k} {v}" for k, v in entry["settings"].items() if v is not None)
        rows = [
            [
                what,
                f"{row['evaluations_per_second']:.1f}",
                f"{row['ratio']:.3f}",
                f"{row['ratio_of_cpu']:.3f}",
            ]
            for what, row in entry["results"].items()
        ]
        parts.append(
            f"**Throughput**, `python benchmarks/throughput.py` ({entry['device']}; {settings}):\n"
        )
        head = ["what", "evaluations a second", "of the network's own rate", "in CPU seconds"]
        parts.append(table(head, rows))
    runs = load("long_runs") or {}
    rows = [[what, *row.values()] for what, row in runs.items() if isinstance(row, dict)]
    if rows:
        names = next(list(row) for row in runs.values() if isinstance(row, dict))
        parts.append("**Long runs**, `python benchmarks/long_runs.py`:\n")
        parts.append(table(["what", *names], rows))
    parts.append("A worked plan for 10⁹ trajectories: [scale](../scale.md).\n")
    return "\n".join(parts)


def faults() -> str:
    """What survives faults."""
    result = load("faults")
    if result is None:
        return "# Faults\n\nNot measured yet: `python benchmarks/faults.py`.\n"
    commit = result.get("commit", "several")
    commit = "several commits" if commit == "several" else f"commit `{commit}`"
    parts = [
        "# Faults\n",
        f"`python benchmarks/faults.py`, counts over several runs of it, on {commit}.\n",
    ]
    titles = {
        "kills": "SIGKILL at random moments, then the same command until it ends",
        "disk": "A disk that is full at some file operation, then again with space",
        "writers": "Two and six processes with one output",
        "damage": "Bits flipped, files cut, keys and tensors dropped, files swapped",
    }
    for key, title in titles.items():
        rows = result.get(key, {})
        heads = list(dict.fromkeys(name for row in rows.values() for name in row))
        cells = [[what, *(row.get(name, "") for name in heads)] for what, row in rows.items()]
        parts.append(f"**{title}**:\n")
        parts.append(table(["", *heads], cells))
    return "\n".join(parts)


def pipelines() -> str:
    """Pipelines of diffusers."""
    result = load("pipelines")
    assert result is not None
    families = result["families"]
    names = list(dict.fromkeys(key for row in families.values() for key in row))
    rows = [[name, *(_small(row.get(key, "")) for key in names)] for name, row in families.items()]
    refused = [[name, _small(reason)] for name, reason in result["refused"].items()]
    return f"""# Pipelines of diffusers

{origin(result)}; {result["steps"]} steps, tiny random networks. The largest difference of the pictures: `PlanScheduler` with the pipeline's own solver beside the
native scheduler; with `tab3` (another solver, so it differs); a saved pipeline loaded again; the folder loaded by `fewstep.load`.

{table(["family", *names], rows)}
Refused, with a reason:

{table(["family", "reason"], refused)}"""


def _small(value: float | str) -> str:
    if isinstance(value, str):
        return value if len(value) <= 110 else f"{value[:110]}…"
    return f"{value:.1e}"
