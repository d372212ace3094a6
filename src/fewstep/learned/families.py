r"""The families of samplers that can be searched, by name.

Two kinds. Those over GGDM (``ddim-sigma``, ``vars``, ``ggdm``, ``ggdm+pred``, each also with
``+time``) combine *states*, as the paper that introduced them does. Those over a solver
(``schedule``, ``ld3``, ``gs``, ``gs+noise``, ``free``) combine *model outputs*, starting from the solver's own
coefficients. All result in ordinary plans.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fewstep.base.registry import Registry
from fewstep.learned.learned_plan import Base, LearnedPlan, Start
from fewstep.learned.solver_families import SolverFamily
from fewstep.learned.state_families import GGDM, DDIMSigma, Vars
from fewstep.solvers import Solver


@dataclass(frozen=True)
class Family:
    """An entry of the registry: a class of learned plans, with the options that its name stands for.

    Attributes:
        kind: The class; it declares the :class:`Start`.
        options: The options of the class under this name; the user's replace them.
    """

    kind: type[LearnedPlan]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def start(self) -> Start:
        """The training-free sampler that the class declares as its start."""
        return self.kind.default_start

    def accepts(self, solver: Solver, **options: Any) -> bool:
        """Whether it can start from a solver."""
        return self.kind.accepts(solver, **{**self.options, **options})

    def __call__(self, base: Base, **options: Any) -> LearnedPlan:
        """Returns the learned plan with its initial parameters."""
        return self.kind(base, **{**self.options, **options})


FAMILIES: Registry[Family] = Registry(
    "family",
    {
        "gs": Family(SolverFamily, {"times": True, "shifts": True, "corrections": True}),
        "gs+noise": Family(
            SolverFamily, {"times": True, "shifts": True, "corrections": True, "noise": True}
        ),
        "ld3": Family(SolverFamily, {"times": True, "shifts": True}),
        "schedule": Family(SolverFamily, {"times": True}),
        "free": Family(
            SolverFamily, {"times": True, "shifts": True, "corrections": True, "theory": False}
        ),
        "ddim-sigma": Family(DDIMSigma),
        "ddim-sigma+time": Family(DDIMSigma, {"time": True}),
        "vars": Family(Vars),
        "vars+time": Family(Vars, {"time": True}),
        "ggdm": Family(GGDM),
        "ggdm+time": Family(GGDM, {"time": True}),
        "ggdm+pred": Family(GGDM, {"pred": "vars"}),
        "ggdm+pred+time": Family(GGDM, {"pred": "vars", "time": True}),
        "ggdm+pred-free": Family(GGDM, {"pred": "free"}),
        "ggdm+pred-free+time": Family(GGDM, {"pred": "free", "time": True}),
        "ggdm-matched": Family(GGDM, {"matched": True}),
        "ggdm-theory+time": Family(GGDM, {"time": True, "theory": True}),
    },
)
"""The families by name. A new one is a subclass of :class:`LearnedPlan` and a line here."""


def family(name: str, base: Base, **options: Any) -> LearnedPlan:
    """Returns the learned plan of a family, with its initial parameters.

    Arguments:
        name: A name in :data:`FAMILIES`.
        base: The training-free sampler that it starts from, see :func:`start_of`.
        options: Options of the family's class.

    Raises:
        ValueError: If the name is unknown or the base does not fit.
        TypeError: If the family has no such option, or a switch is not true or false.
    """
    entry = FAMILIES[name]
    known = {
        key: parameter.default
        for key, parameter in inspect.signature(entry.kind).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for key, value in options.items():
        if key not in known:
            raise TypeError(f"family {name!r} has no option {key!r}; it has {', '.join(known)}")
        if isinstance(known[key], bool) and not isinstance(value, bool):
            raise TypeError(f"option {key} of family {name!r} is true or false, got {value!r}")
    return entry(base, **options)
