"""The training-free solvers: one class each, and the registry of them all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fewstep.base.aliases import aliases_of, names_without
from fewstep.base.registry import Registry, check_options
from fewstep.solvers.accelerated import (
    AcceleratedDDIM,
    AcceleratedDDIMLagged,
    AcceleratedDDIMTheory,
    AcceleratedDDPM,
    DDIMTheory,
    DDPMTheory,
)
from fewstep.solvers.adams import IPNDM, PNDM, TAB, GradientEstimation, LogRhoAB, RhoAB
from fewstep.solvers.adaptive import Dopri5
from fewstep.solvers.ancestral import (
    LCM,
    TCD,
    DPM2Ancestral,
    DPMpp2SAncestral,
    EulerAncestral,
    LangevinCorrected,
    RePaint,
)
from fewstep.solvers.base import Solver
from fewstep.solvers.ddim import DDIM, DDPM, GDDIM, AnalyticDDIM, EIScore, Euler, EulerMaruyama
from fewstep.solvers.dpm import DPMpp2M, DPMpp2MSDE, DPMpp3M
from fewstep.solvers.dpm_v3 import DPMSolverV3
from fewstep.solvers.exponential import (
    RES2S,
    RES3S,
    HochbruckOstermann5S,
    Krogstad4S,
    RESMultistep,
)
from fewstep.solvers.multistep import Multistep
from fewstep.solvers.rk import (
    DPM2,
    DPM3,
    EDMStochastic,
    Heun,
    RhoHeun,
    RhoKutta3,
    RhoMidpoint,
    RhoRK4,
)
from fewstep.solvers.sde import ERSDE, DPMpp3MSDE, DPMppSDE, SASolver
from fewstep.solvers.unipc import UniPC

SOLVERS: Registry[Callable[..., Solver]] = Registry(
    "solver",
    {
        "ddim": DDIM,
        "gddim": GDDIM,
        "ddpm": DDPM,
        "euler": Euler,
        "euler-maruyama": EulerMaruyama,
        "ei-score": EIScore,
        "tab0": partial(TAB, 0),
        "tab1": partial(TAB, 1),
        "tab2": partial(TAB, 2),
        "tab3": partial(TAB, 3),
        "rhoab0": partial(RhoAB, 0),
        "rhoab1": partial(RhoAB, 1),
        "rhoab2": partial(RhoAB, 2),
        "rhoab3": partial(RhoAB, 3),
        "logrhoab0": partial(LogRhoAB, 0),
        "logrhoab1": partial(LogRhoAB, 1),
        "logrhoab2": partial(LogRhoAB, 2),
        "logrhoab3": partial(LogRhoAB, 3),
        "rho-midpoint": RhoMidpoint,
        "rho-heun": RhoHeun,
        "rho-kutta3": RhoKutta3,
        "rho-rk4": RhoRK4,
        "multistep": Multistep,
        "ipndm": IPNDM,
        "gradient-estimation": GradientEstimation,
        "pndm": PNDM,
        "analytic-ddim": AnalyticDDIM,
        "accelerated-ddim": AcceleratedDDIM,
        "accelerated-ddim-theory": AcceleratedDDIMTheory,
        "accelerated-ddim-lagged": AcceleratedDDIMLagged,
        "ddim-theory": DDIMTheory,
        "accelerated-ddpm": AcceleratedDDPM,
        "ddpm-theory": DDPMTheory,
        "heun": Heun,
        "edm-stochastic": EDMStochastic,
        "dpm2": DPM2,
        "dpm3": DPM3,
        "dpmpp-2m": DPMpp2M,
        "dpmpp-3m": DPMpp3M,
        "dpmpp-2m-sde": DPMpp2MSDE,
        "dpm-solver-v3": DPMSolverV3,
        "unipc2": partial(UniPC, 2),
        "unipc3": partial(UniPC, 3),
        "res-2m": partial(RESMultistep, 2),
        "res-3m": partial(RESMultistep, 3),
        "res-4m": partial(RESMultistep, 4),
        "res-2s": RES2S,
        "res-3s": RES3S,
        "krogstad-4s": Krogstad4S,
        "hochbruck-ostermann-5s": HochbruckOstermann5S,
        "euler-ancestral": EulerAncestral,
        "dpm2-ancestral": DPM2Ancestral,
        "dpmpp-2s-ancestral": DPMpp2SAncestral,
        "dpmpp-sde": DPMppSDE,
        "dpmpp-3m-sde": DPMpp3MSDE,
        "sa-solver": SASolver,
        "er-sde": ERSDE,
        "lcm": LCM,
        "tcd": TCD,
        "repaint": RePaint,
        "langevin-corrected": LangevinCorrected,
        "dopri5": Dopri5,
    },
    aliases_of("solver"),
    names_without("solver"),
)


def solver(name: str, **options: Any) -> Solver:
    """Returns the solver of that name.

    Arguments:
        name: One of :data:`SOLVERS`.
        options: Its options, e.g. ``eta=0.5``.

    Raises:
        ValueError: If the name is unknown or an option is out of range.
        TypeError: If the solver has no such option.

    Example:
        >>> from fewstep.solvers import solver
        >>> solver("ddim", eta=0.5).stochastic
        True
    """
    build = SOLVERS[name]
    check_options(f"solver {name!r}", build, options)
    return build(**options)
