"""The names that other libraries have for solvers and grids: one table, shown by ``fewstep solvers`` and ``grids``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

COMFY, KDIFF, DIFFUSERS = "ComfyUI", "k-diffusion", "diffusers"

EQUAL, NEAR, NONE = "equal", "nearest", "none"
"""How an entry matches a foreign name: equal numbers, the nearest method, or no counterpart."""


@dataclass(frozen=True)
class Alias:
    """A name of another library.

    Attributes:
        kind: ``"solver"`` or ``"grid"``.
        name: Its name in that library.
        ours: The entry of the registry; empty if there is none.
        options: The options with which it is equal to theirs.
        where: The libraries that have the name.
        match: Whether the two are equal (a test compares them), ours is the nearest, or there is none.
        note: The difference, or why there is none; empty if they are equal.
    """

    kind: Literal["solver", "grid"]
    name: str
    ours: str
    options: Mapping[str, Any] = field(default_factory=dict)
    where: tuple[str, ...] = (COMFY,)
    match: str = EQUAL
    note: str = ""


BOTH = (COMFY, KDIFF)

LAST = {"lower_final": False}
FROM_15 = "below 15 steps; from there on with lower_final=False"
RES4LYF = "RES4LYF"
TORCHDIFFEQ = "torchdiffeq"
SAME_TABLE = "from the same published table; the numbers were not compared"

ALIASES: tuple[Alias, ...] = (
    Alias("solver", "euler", "ddim", where=BOTH, note="ours of that name steps in time: the same on edm and flow only"),
    Alias("solver", "euler_ancestral", "euler-ancestral", where=BOTH),
    Alias("solver", "heun", "heun", where=BOTH),
    Alias("solver", "heunpp2", "rho-kutta3", match=NEAR, note="theirs weights two or three stages by heuristics"),
    Alias("solver", "dpm_2", "dpm2", where=BOTH),
    Alias("solver", "dpm_2_ancestral", "dpm2-ancestral", where=BOTH),
    Alias("solver", "lms", "rhoab3", where=BOTH),
    Alias("solver", "dpm_fast", "dpm3", where=BOTH, match=NEAR, note="theirs mixes steps of order 1 to 3"),
    Alias("solver", "dpm_adaptive", "dopri5", where=BOTH, match=NEAR, note="another adaptive method"),
    Alias("solver", "dpmpp_2s_ancestral", "dpmpp-2s-ancestral", where=BOTH),
    Alias("solver", "dpmpp_sde", "dpmpp-sde", where=BOTH),
    Alias("solver", "dpmpp_sde_gpu", "dpmpp-sde"),
    Alias("solver", "dpmpp_2m", "dpmpp-2m", LAST, BOTH),
    Alias("solver", "dpmpp_2m_sde", "dpmpp-2m-sde", LAST, BOTH),
    Alias("solver", "dpmpp_2m_sde_gpu", "dpmpp-2m-sde", LAST),
    Alias("solver", "dpmpp_3m_sde", "dpmpp-3m-sde", LAST, BOTH),
    Alias("solver", "dpmpp_3m_sde_gpu", "dpmpp-3m-sde", LAST),
    Alias("solver", "ddim", "ddim"),
    Alias("solver", "ddpm", "ddpm"),
    Alias("solver", "lcm", "lcm"),
    Alias("solver", "ipndm", "ipndm"),
    Alias("solver", "ipndm_v", "rhoab3", match=NEAR, note="both of variable step; theirs approximates the weights"),
    Alias("solver", "deis", "tab2", match=NEAR, note="theirs takes the time of vp-linear for every model"),
    Alias("solver", "uni_pc", "unipc3", {"variant": "bh1"}, match=NEAR, note="theirs ends above zero, then denoises"),
    Alias("solver", "uni_pc_bh2", "unipc3", match=NEAR, note="theirs ends above zero, then denoises"),
    Alias("solver", "res_multistep", "res-2m", LAST),
    Alias("solver", "er_sde", "er-sde", match=NEAR, note="theirs has sums of 200 points for the integrals"),
    Alias("solver", "sa_solver", "sa-solver", {"predictor": 3, "corrector": 3}, match=NEAR, note="theirs has a corrector of order 4, and noise in the middle only"),
    Alias("solver", "seeds_2", "dpmpp-sde", match=NEAR, note="both have a stage within the step and noise in both halves"),
    Alias("solver", "exp_heun_2_x0", "res-2s", {"c2": 1.0}, match=NEAR, note="exponential Heun; theirs has other weights of the last step"),
    Alias("solver", "gradient_estimation", "gradient-estimation"),
    Alias("solver", "res_2m", "res-2m", LAST, (RES4LYF,), NEAR, SAME_TABLE),
    Alias("solver", "res_3m", "res-3m", LAST, (RES4LYF,), NEAR, "theirs has other weights of third order"),
    Alias("solver", "res_2s", "res-2s", {}, (RES4LYF,), NEAR, SAME_TABLE),
    Alias("solver", "res_3s", "res-3s", {}, (RES4LYF,), NEAR, "theirs has other stages"),
    Alias("solver", "krogstad_4s", "krogstad-4s", {}, (RES4LYF,), NEAR, SAME_TABLE),
    Alias("solver", "DDIMScheduler", "ddim", where=(DIFFUSERS,)),
    Alias("solver", "DDPMScheduler", "ddpm", where=(DIFFUSERS,)),
    Alias("solver", "PNDMScheduler", "pndm", where=(DIFFUSERS,)),
    Alias("solver", "EulerDiscreteScheduler", "ddim", where=(DIFFUSERS,)),
    Alias("solver", "EulerAncestralDiscreteScheduler", "euler-ancestral", where=(DIFFUSERS,)),
    Alias("solver", "FlowMatchEulerDiscreteScheduler", "ddim", where=(DIFFUSERS,)),
    Alias("solver", "HeunDiscreteScheduler", "heun", where=(DIFFUSERS,)),
    Alias("solver", "FlowMatchHeunDiscreteScheduler", "heun", where=(DIFFUSERS,)),
    Alias("solver", "KDPM2DiscreteScheduler", "dpm2", where=(DIFFUSERS,)),
    Alias("solver", "KDPM2AncestralDiscreteScheduler", "dpm2-ancestral", where=(DIFFUSERS,)),
    Alias("solver", "LMSDiscreteScheduler", "rhoab3", where=(DIFFUSERS,)),
    Alias("solver", "IPNDMScheduler", "ipndm", where=(DIFFUSERS,), match=NEAR, note="theirs has a schedule of its own"),
    Alias("solver", "DEISMultistepScheduler", "logrhoab1", where=(DIFFUSERS,), note=FROM_15),
    Alias("solver", "DPMSolverMultistepScheduler", "dpmpp-2m", where=(DIFFUSERS,), note=FROM_15),
    Alias("solver", "DPMSolverSinglestepScheduler", "dpm2", where=(DIFFUSERS,), match=NEAR, note="theirs mixes steps of order 1 and 2"),
    Alias("solver", "DPMSolverSDEScheduler", "dpmpp-sde", where=(DIFFUSERS,)),
    Alias("solver", "UniPCMultistepScheduler", "unipc2", where=(DIFFUSERS,)),
    Alias("solver", "SASolverScheduler", "sa-solver", where=(DIFFUSERS,), note="with tau_func=1; by default theirs has noise at t = 200 to 800 only"),
    Alias("solver", "LCMScheduler", "lcm", where=(DIFFUSERS,)),
    Alias("solver", "TCDScheduler", "tcd", where=(DIFFUSERS,)),
    Alias("solver", "RePaintScheduler", "repaint", {"passes": 10}, (DIFFUSERS,), NEAR, "theirs jumps over ten steps and has the mask; here that is fewstep.guidance.Inpainted"),
    Alias("solver", "midpoint", "rho-midpoint", where=(TORCHDIFFEQ,), note="on a flow, whose time it steps in; elsewhere ours steps in sigma / alpha"),
    Alias("solver", "rk4", "rho-rk4", where=(TORCHDIFFEQ,), match=NEAR, note="theirs is the 3/8 rule, ours the classical method of the same order"),
    Alias("grid", "normal", "normal", note="with the ends of the model"),
    Alias("grid", "linspace", "normal", where=(DIFFUSERS,), note="between timesteps theirs interpolates sigma, ours its logarithm"),
    Alias("grid", "sgm_uniform", "sgm-uniform"),
    Alias("grid", "simple", "simple"),
    Alias("grid", "trailing", "simple", where=(DIFFUSERS,), match=NEAR, note="equal where K divides N; theirs rounds, ours rounds down"),
    Alias("grid", "ddim_uniform", "leading", note="where K divides N; else theirs has a step more"),
    Alias("grid", "karras", "karras", {"to_zero": True}, (COMFY, KDIFF, DIFFUSERS)),
    Alias("grid", "exponential", "exponential", {"to_zero": True}, (COMFY, KDIFF, DIFFUSERS)),
    Alias("grid", "polyexponential", "polyexponential", {"to_zero": True}, BOTH),
    Alias("grid", "beta", "beta"),
    Alias("grid", "beta57", "beta", {"alpha": 0.5, "beta": 0.7}),
    Alias("grid", "linear_quadratic", "linear-quadratic"),
    Alias("grid", "kl_optimal", "kl-optimal", {"to_zero": True}),
    Alias("grid", "bong_tangent", "bong-tangent", where=(RES4LYF,)),
    Alias("grid", "vp", "uniform", where=(KDIFF,), note="on the schedule vp-linear, to_zero=True"),
    Alias("grid", "AlignYourStepsScheduler", "ays", where=(COMFY,)),
    Alias("grid", "ModelSamplingSD3", "flow-shift", where=(COMFY,), note="with the scheduler simple, where K divides 1000"),
    Alias("grid", "ModelSamplingFlux", "dynamic-shift", where=(COMFY,), note="with the scheduler simple, where K divides 10,000"),
    Alias("grid", "laplace", "logistic", match=NEAR, note="quantiles of a Laplace distribution of log sigma, ours of a logistic one"),
    Alias("grid", "GITSScheduler", "", match=NONE, note="a table of times for one model: measure one with fewstep.fit"),
)  # fmt: skip


def aliases_of(kind: str) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Returns the aliases of a registry: foreign name → (entry, options)."""
    return {row.name: (row.ours, row.options) for row in ALIASES if row.kind == kind and row.ours}


def names_without(kind: str) -> dict[str, str]:
    """Returns the foreign names of a registry that have no entry: name → reason."""
    return {row.name: row.note for row in ALIASES if row.kind == kind and not row.ours}
