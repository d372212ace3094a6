r"""The families of samplers that can be searched, by name.

Two kinds. Those over GGDM (``ddim-sigma``, ``vars``, ``ggdm``, ``ggdm+pred``, each also with
``+time``) combine *states*, as the paper that introduced them does. Those over a solver
(``schedule``, ``ld3``, ``gs``, ``free``) combine *answers* of the network, with the solver's own
coefficients as their start. All are plans of the same sort in the end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fewstep.base.registry import Registry
from fewstep.learned.learned_plan import Base, LearnedPlan
from fewstep.learned.solver_families import SolverFamily
from fewstep.learned.state_families import GGDM, DDIMSigma, Vars

FAMILIES: Registry[Callable[..., LearnedPlan]] = Registry(
    "family",
    {
        "gs": partial(SolverFamily, times=True, shifts=True, corrections=True),
        "ld3": partial(SolverFamily, times=True, shifts=True),
        "schedule": partial(SolverFamily, times=True),
        "free": partial(SolverFamily, times=True, shifts=True, corrections=True, theory=False),
        "ddim-sigma": DDIMSigma,
        "ddim-sigma+time": partial(DDIMSigma, time=True),
        "vars": Vars,
        "vars+time": partial(Vars, time=True),
        "ggdm": GGDM,
        "ggdm+time": partial(GGDM, time=True),
        "ggdm+pred": partial(GGDM, pred="vars"),
        "ggdm+pred+time": partial(GGDM, pred="vars", time=True),
        "ggdm+pred-free": partial(GGDM, pred="free"),
        "ggdm+pred-free+time": partial(GGDM, pred="free", time=True),
        "ggdm-matched": partial(GGDM, matched=True),
        "ggdm-theory+time": partial(GGDM, time=True, theory=True),
    },
)
"""The families by name; each takes a :class:`~fewstep.learned.Base` and options."""

STARTS: dict[str, str] = {"ddim-sigma": "ddim", "vars": "ddpm", "ggdm": "ddim"}
"""The solver from which a family starts unless another is asked for, by the name's beginning."""


def family(name: str, base: Base, **options: Any) -> LearnedPlan:
    """Returns the learned plan of a family, at its start.

    Raises:
        ValueError: If the name is unknown or the base does not fit.
        TypeError: If the family has no such option.
    """
    build = FAMILIES[name]
    try:
        return build(base, **options)
    except TypeError as error:
        message = str(error).split("__init__() ")[-1]
        raise TypeError(f"family {name!r} {message}") from None
