"""The examples in docstrings run, and the most used names have docstrings of one form."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import logging
import re
from pathlib import Path

import pytest
import torch

import fewstep

ROOT = Path(fewstep.__file__).parent

MOST_USED = (
    "models.denoiser:Denoiser",
    "models.denoiser:Denoiser.wrap",
    "loading:load",
    "sampling.sample:sample",
    "sampling.sample:steps",
    "sampling.sample:sampler",
    "sampling.resolve:plan",
    "sampling.resolve:resolve",
    "sampling.request:SamplerRequest",
    "sampling.profile:Profile",
    "sampling.protocol:Trajectory",
    "sampling.likelihood:log_likelihood",
    "plans.plan:Plan",
    "diffusion.time_grid:TimeGrid",
    "diffusion.grids:grid",
    "diffusion.schedules:NoiseSchedule",
    "diffusion.schedules:schedule",
    "solvers.base:Solver",
    "solvers:solver",
    "studies.fit:fit",
    "studies.stages:study",
    "learned.tuning:tune",
    "trajectories.recording:record",
    "operators.distillation:distill",
    "comparison.running:compare",
    "workflows.analyzing:analyze",
    "workflows.comparing:compare",
    "adapters.diffusers.scheduler:PlanScheduler",
    "adapters.diffusers.scheduler_plans:plan_from_scheduler",
)
"""Module and name of each; a class has attributes and a function says what it raises."""

RUNS = {"sample", "steps", "sampler", "log_likelihood", "fit", "tune", "record", "distill"}
RUNS |= {"Denoiser", "Plan", "PlanScheduler", "analyze", "compare", "study"}
"""Names whose docstrings have the cost in network evaluations."""


def examples() -> list[doctest.DocTest]:
    """Every docstring of the package with an example."""
    parser, result = doctest.DocTestParser(), []
    for path in sorted(ROOT.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if ">>>" not in text:
            continue
        place = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                doc, name = ast.get_docstring(node) or "", getattr(node, "name", place)
                test = parser.get_doctest(doc, {}, f"{place}:{name}", str(path), None)
                if test.examples:
                    result.append(test)
    return result


def cases():
    """The examples; those that search or train are slow."""
    for example in examples():
        slow = example.name.split(":")[1] in ("analyze", "study", "tune", "distill")
        marks = [pytest.mark.slow] * slow
        marks += [pytest.mark.diffusers] * ("diffusers" in example.name)
        yield pytest.param(example, id=example.name, marks=marks)


@pytest.mark.usefixtures("few_real_samples", "few_hypotheses", "coarse_references", "undrawn")
@pytest.mark.parametrize("example", list(cases()))
def test_the_example_runs(example, tmp_path, monkeypatch, caplog):
    place, name = example.name.split(":")
    if "diffusers" in place:
        pytest.importorskip("diffusers")
    if name in ("distill", "continued"):
        pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"fewstep.{place}")
    example.globs = {"fewstep": fewstep, "torch": torch, name: getattr(module, name, None)}
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    with torch.random.fork_rng(devices=[]), caplog.at_level(logging.ERROR, "fewstep"):
        torch.manual_seed(0)
        failed, tried = runner.run(example, out=said.append)
    assert tried, "no example"
    assert not failed, "".join(said)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.diffusers if "diffusers" in name else ())
        for name in MOST_USED
    ],
)
def test_docstrings_of_the_most_used_names(name):
    place, _, path = name.partition(":")
    if "diffusers" in place:
        pytest.importorskip("diffusers")
    thing = importlib.import_module(f"fewstep.{place}")
    for part in path.split("."):
        thing = getattr(thing, part)
    doc = inspect.getdoc(thing)
    parts = set(re.findall(r"^(\w+):", doc, re.MULTILINE))
    assert ">>>" in doc
    assert "Attributes" in parts or "Raises" in parts
    if not inspect.isclass(thing) and path != "sampler":
        arguments = set(inspect.signature(thing).parameters) - {"self", "cls"}
        described = set(re.findall(r"^    (\w+): ", doc, re.MULTILINE))
        own = {"kwargs", "cond", "changes", "options"}
        assert path == "steps" or arguments - own <= described, arguments - described
    if path.split(".")[-1] in RUNS:
        assert "Cost" in parts, "no cost in network evaluations"
