"""docs/coming-from.md: its tables are those of the code, and its blocks of Python run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

from fewstep.base.aliases import ALIASES

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "coming-from.md"


def test_the_tables_are_those_of_the_code() -> None:
    path = ROOT / "scripts" / "coming_from.py"
    spec = importlib.util.spec_from_file_location("coming_from", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = PAGE.read_text(encoding="utf-8")
    assert script.written(text) == text, "run scripts/coming_from.py"


def test_the_blocks_of_the_page_run() -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    for name in ("samples", "same", "ours", "noisy"):
        assert names[name].shape == (16, 2)
        assert bool(torch.isfinite(names[name]).all())
    # Eight steps are near the law of the mixture, whose deviation is about 1.
    assert 0.5 < float(names["ours"].std()) < 2


RULES = "adapters/test_kdiffusion.py::test_equal_to_the_published_rule"
TWINS = "solvers/test_twins.py::test_table_equals_diffusers"
GRIDS = "diffusion/test_published_grids.py::"

OTHER_TESTS = {
    "ddim": TWINS,  # in sigma it is euler, which has its rule too
    "FlowMatchEulerDiscreteScheduler": "solvers/test_twins.py::test_flow_euler_is_ddim",
    "FlowMatchHeunDiscreteScheduler": "solvers/test_twins.py::test_flow_heun_is_heun",
    "KDPM2DiscreteScheduler": "solvers/test_twins.py::test_dpm2_is_kdpm2",
    "KDPM2AncestralDiscreteScheduler": "solvers/test_twins.py::test_stochastic_steps_with_a_stage",
    "DPMSolverSDEScheduler": "solvers/test_twins.py::test_stochastic_steps_with_a_stage",
    "midpoint": "solvers/test_every_solver.py::test_on_a_flow_the_methods_of_stages_step_in_its_time",
    "normal": f"{GRIDS}test_grids_of_timesteps",
    "sgm_uniform": f"{GRIDS}test_grids_of_timesteps",
    "simple": f"{GRIDS}test_grids_of_timesteps",
    "ddim_uniform": f"{GRIDS}test_leading_where_the_number_of_steps_divides_that_of_timesteps",
    "linspace": f"{GRIDS}test_levels_of_diffusers",
    "karras": f"{GRIDS}test_levels_of_diffusers",
    "exponential": f"{GRIDS}test_levels_of_diffusers",
    "polyexponential": f"{GRIDS}test_polyexponential",
    "beta": f"{GRIDS}test_beta_has_the_quantiles_of_scipy",
    "beta57": f"{GRIDS}test_beta_has_the_quantiles_of_scipy",
    "linear_quadratic": f"{GRIDS}test_linear_quadratic",
    "kl_optimal": f"{GRIDS}test_kl_optimal_is_even_in_the_arctangent",
    "bong_tangent": f"{GRIDS}test_bong_tangent",
    "vp": f"{GRIDS}test_vp_levels_of_k_diffusion",
    "AlignYourStepsScheduler": f"{GRIDS}test_ays_has_the_published_levels",
    "ModelSamplingSD3": f"{GRIDS}test_flow_shift",
    "ModelSamplingFlux": f"{GRIDS}test_dynamic_shift_is_exponential_in_the_number_of_tokens",
}
"""The tests of the equal names that have none of their own in the two tables of cases."""


def test_every_equality_of_the_tables_is_a_test() -> None:
    """By the names in the cases of two tests, and else by the list above, which has nothing else in it."""
    rules, twins = (
        (ROOT / "tests" / test.partition("::")[0]).read_text(encoding="utf-8")
        for test in (RULES, TWINS)
    )
    listed = set[str]()
    for row in ALIASES:
        if row.match != "equal":
            continue
        name = row.name.removesuffix("_gpu")
        test = OTHER_TESTS.get(name)
        if test is None:
            function = re.search(rf"^def {name}\(", rules, re.MULTILINE)
            case = re.search(rf'Case\(\s*"{row.ours}",\s*"{name}"', twins)
            assert function or case, f"no test compares {name} with {row.ours}"
            continue
        listed.add(name)
        file, _, function_name = test.partition("::")
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {function_name}\(", source, re.MULTILINE), test
    assert listed == set(OTHER_TESTS)
