r"""The registry entry of the adaptive solver: its options. :mod:`fewstep.sampling.adaptive` runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NoReturn

from fewstep.diffusion.grids import TimeGrid
from fewstep.plans.tape import Form, Tape
from fewstep.solvers.base import NO_PLAN, Solver, check_number


@dataclass(frozen=True)
class Dopri5(Solver):
    r"""Dormand–Prince 5(4) on the probability-flow ODE, with a step size for each sample.

    .. math:: y_s = y_t + h \sum_i b_i \, \rho_i \, \varepsilon_i, \qquad
        e = h \sum_i (b_i - \hat b_i) \, \rho_i \, \varepsilon_i, \qquad y = x / \alpha, \ h = \log \rho_s - \log \rho_t

    A step is accepted where the error e is below the tolerances. The steps are chosen
    during the run, so there is no plan beforehand: :func:`fewstep.sample` runs it, and
    :func:`fewstep.sampling.adaptive.freeze` makes a plan of one of its runs.

    References:
        | A family of embedded Runge-Kutta formulae (Dormand & Prince, 1980)
        | https://doi.org/10.1016/0771-050X(80)90013-3
        | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023), rhoRK-DEIS
        | https://arxiv.org/abs/2204.13902

    Cost: 2 network evaluations to begin and 6 for each step, accepted or not.

    Order: 5.

    Arguments:
        rtol: The relative tolerance of each step.
        atol: The absolute tolerance of each step, for data of about unit size.
        max_steps: The most steps of a sample, accepted or not.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 1000

    name = "dopri5"
    adaptive: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol, self.max_steps)

    @property
    def order(self) -> int:
        return 5

    def nfe(self, steps: int, *, ends_at_zero: bool = False) -> NoReturn:
        raise ValueError(NO_PLAN.format(self.name))

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        raise ValueError(NO_PLAN.format(self.name))


def check_tolerances(rtol: object, atol: object, max_steps: object) -> None:
    """Raises unless a tolerance is positive, none negative, and the number of steps positive."""
    check_number("rtol", rtol)
    check_number("atol", atol)
    if rtol == 0 and atol == 0:
        raise ValueError("rtol and atol cannot both be 0; the defaults are 1e-5")
    check_positive("max_steps", max_steps)


def check_positive(name: str, value: object) -> None:
    """Raises unless a value is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
