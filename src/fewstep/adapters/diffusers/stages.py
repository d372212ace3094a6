"""Where the steps of a solver begin among its evaluations, and what several stages do to a grid."""

from __future__ import annotations

from fewstep.adapters.diffusers.runs import Setup
from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.prediction import Prediction
from fewstep.solvers import Solver

LARGEST_JUMP = 200.0
"""The most by which one step of several stages may divide sigma / alpha: that is its amplification."""


def starts(setup: Setup, index: int) -> bool:
    """Returns whether a step, and not only one of its stages, begins at an index of the evaluations."""
    if setup.solver is None:
        return index == 0
    try:
        step_at(setup, index)
    except ValueError:
        return False
    return True


def step_at(setup: Setup, index: int) -> int:
    """Returns the number of the step that begins at an index of the evaluations."""
    assert setup.solver is not None
    assert setup.grid is not None
    grid, method = setup.grid, setup.solver
    evaluations = method.nfe(grid.steps, ends_at_zero=grid.ends_at_zero)
    for step in range(grid.steps):
        rest = method.nfe(grid.steps - step, ends_at_zero=grid.ends_at_zero)
        if evaluations - rest == index:
            return step
    raise ValueError(
        f"index {index} of the timesteps is inside of a step of {method.name}; begin where a step does"
    )


def last_start(setup: Setup) -> int:
    """Returns the index of the evaluation with which the last step begins."""
    return max(index for index in range(setup.plan.nfe) if starts(setup, index))


def most_steps(method: Solver, evaluations: int, to_zero: bool) -> int:
    """Returns the most steps that so many evaluations suffice for."""
    fitting = [
        k for k in range(1, evaluations + 1) if method.nfe(k, ends_at_zero=to_zero) <= evaluations
    ]
    if not fitting:
        raise ValueError(
            f"{method.name} needs more than {evaluations} network evaluations for a step"
        )
    return fitting[-1]


def check_jump(method: Solver, grid: TimeGrid) -> None:
    """Refuses a first step of several stages that would amplify what the network says."""
    if method.nfe(2) <= 2 or grid.steps < 2 or grid.is_last_zero(0):
        return
    if method.prediction_on(grid.schedule) is Prediction.FLOW:
        return  # its stages are weighted in sigma / (alpha + sigma), and nothing is amplified
    jump = float(grid.rho[0] / grid.rho[1])
    if jump > LARGEST_JUMP:
        raise ValueError(
            f"the first step of this grid divides sigma / alpha by {jump:.3g}, which "
            f"{method.name} amplifies, as its stages are weighted in sigma / alpha; "
            "use grid='karras', or a multistep solver such as 'tab3' or 'unipc3'"
        )
