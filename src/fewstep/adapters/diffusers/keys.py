"""The meaning of each class of scheduler and each key of its configuration, as data.

Every configuration that comes from diffusers is checked against it (:mod:`.configurations`): what changes
the levels, the times or the prediction is understood or refused by name, never dropped. ``docs/diffusers.md`` prints
both tables; a test fails when the installed diffusers has a class or a key that is not in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from types import MappingProxyType
from typing import Any, NamedTuple

from fewstep.base.registry import unknown

TOKENS = "steps over discrete tokens, which is no Gaussian diffusion"
INVERSE = "runs from data to noise; take the forward scheduler of the same model"
CLOCK = "conditions the network on another clock than its noise levels say: {}"
NO_STEP = "is no sampler with set_timesteps and step: {}"


class SchedulerClass(NamedTuple):
    """The model that a scheduler of diffusers describes.

    Attributes:
        family: ``"betas"`` (variance preserving, training timesteps), ``"flow"``, ``"edm"``, or
            ``"refused"``.
        why: Why it is refused.
        fixed: What it does whatever its configuration says, in the keys of other classes.
    """

    family: str
    why: str = ""
    fixed: Mapping[str, Any] = MappingProxyType({})


BETAS, FLOW, EDM_FAMILY = (SchedulerClass(family) for family in ("betas", "flow", "edm"))


def _refused(why: str) -> SchedulerClass:
    return SchedulerClass("refused", why)


def _betas(**fixed: Any) -> SchedulerClass:
    return SchedulerClass("betas", fixed=fixed)


CLASSES: Mapping[str, SchedulerClass] = {
    "AmusedScheduler": _refused(TOKENS),
    "BlockRefinementScheduler": _refused(TOKENS),
    "CMStochasticIterativeScheduler": _refused(
        CLOCK.format("250 ln(sigma), with the boundary conditions of consistency models")
    ),
    "CogVideoXDDIMScheduler": _betas(clip_sample=False),
    "CogVideoXDPMScheduler": _betas(clip_sample=False),
    "ConsistencyDecoderScheduler": _refused("decodes in two fixed steps of a consistency model"),
    "CosineDPMSolverMultistepScheduler": EDM_FAMILY,
    "DDIMInverseScheduler": _refused(INVERSE),
    "DDIMParallelScheduler": BETAS,
    "DDIMScheduler": BETAS,
    "DDPMParallelScheduler": BETAS,
    "DDPMScheduler": BETAS,
    "DDPMWuerstchenScheduler": _refused(CLOCK.format("a continuous cosine, time from 1 to 0")),
    "DEISMultistepScheduler": BETAS,
    "DPMSolverMultistepInverseScheduler": _refused(INVERSE),
    "DPMSolverMultistepScheduler": BETAS,
    "DPMSolverSDEScheduler": BETAS,
    "DPMSolverSinglestepScheduler": BETAS,
    "DiscreteDDIMScheduler": _refused(TOKENS),
    "EDMDPMSolverMultistepScheduler": EDM_FAMILY,
    "EDMEulerScheduler": EDM_FAMILY,
    "EntropyBoundScheduler": _refused(TOKENS),
    "EulerAncestralDiscreteScheduler": BETAS,
    "EulerDiscreteScheduler": BETAS,
    "FlowMapEulerDiscreteScheduler": _refused(
        "belongs to a flow map, whose network is conditioned on the two ends of a step"
    ),
    "FlowMatchEulerDiscreteScheduler": FLOW,
    "FlowMatchHeunDiscreteScheduler": FLOW,
    "FlowMatchLCMScheduler": FLOW,
    "HeliosDMDScheduler": _refused("changes the resolution between stages, with noise of its own"),
    "HeliosScheduler": _refused("changes the resolution between stages, with noise of its own"),
    "HeunDiscreteScheduler": BETAS,
    "IPNDMScheduler": _refused(
        CLOCK.format(
            "its own sine of the step, not training timesteps; the solver 'ipndm' is the method"
        )
    ),
    "KDPM2AncestralDiscreteScheduler": BETAS,
    "KDPM2DiscreteScheduler": BETAS,
    "KarrasVeScheduler": _refused(NO_STEP.format("it needs step and step_correct in turns")),
    "LCMScheduler": BETAS,
    "LMSDiscreteScheduler": BETAS,
    "LTXEulerAncestralRFScheduler": FLOW,
    "MiniMaxH3Scheduler": _refused(CLOCK.format("1 - sigma")),
    "PNDMScheduler": BETAS,
    "PiflowScheduler": _refused("takes a network of many outputs, which it integrates by itself"),
    "RFD4ProteinaScheduler": _refused(
        CLOCK.format("a flow of proteins whose time grows with the data")
    ),
    "RePaintScheduler": _refused(
        "jumps back and forth in time and takes a mask; take DDIM's configuration of the same model"
    ),
    "SASolverScheduler": BETAS,
    "SCMScheduler": _refused(CLOCK.format("an angle, with trigflow prediction")),
    "ScoreSdeVeScheduler": _refused(NO_STEP.format("it has step_pred and step_correct")),
    "ScoreSdeVpScheduler": _refused(NO_STEP.format("it has step_pred")),
    "TCDScheduler": _betas(clip_sample=False, thresholding=False),
    "UnCLIPScheduler": _betas(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="linspace", trained_betas=None
    ),
    "UniPCMultistepScheduler": BETAS,
    "VQDiffusionScheduler": _refused(TOKENS),
}
"""Every scheduler of the diffusers that is installed."""


class Key(NamedTuple):
    """The meaning of a key of a configuration.

    Attributes:
        status: ``"understood"``, ``"no effect"`` or ``"refused"``.
        why: Its effect, why it has no effect, or why it is refused, with a hint.
        neutral: The values of a refused key that change nothing.
        model: Whether it belongs to the model: a default of the scheduler that says it holds too.
    """

    status: str
    why: str
    neutral: tuple[Any, ...] = ()
    model: bool = False


def _model(why: str) -> Key:
    return Key("understood", why, model=True)


def _understood(why: str) -> Key:
    return Key("understood", why)


def _sampler(why: str) -> Key:
    return Key("no effect", why)


def _refuse(why: str, *neutral: Any) -> Key:
    return Key("refused", why, neutral)


STEPS = "an option of the steps of the scheduler that is replaced; here {}"
OF_REFUSED = "only of schedulers that are refused: {}"

KEYS: Mapping[str, Key] = {
    # The model: levels, times, prediction.
    "num_train_timesteps": _model("the number of training timesteps"),
    "beta_start": _model("the first beta"),
    "beta_end": _model("the last beta"),
    "beta_schedule": _model("linear, scaled_linear or squaredcos_cap_v2"),
    "trained_betas": _model("all betas"),
    "prediction_type": _model("epsilon, sample, v_prediction or flow_prediction"),
    "rescale_betas_zero_snr": _model("the last level has no signal"),
    "snr_shift_scale": _model("CogVideoX: divides the signal-to-noise ratio of all levels"),
    "timestep_type": _model(
        "continuous, with v_prediction: the network is conditioned on 0.25 ln(sigma), any level"
    ),
    "sigma_min": _model("the lowest level of Karras, exponential and beta spacing, and of EDM"),
    "sigma_max": _model("the highest level of Karras, exponential and beta spacing, and of EDM"),
    "sigma_data": _understood("EDM's preconditioning: fewstep.load and plan_from_scheduler only"),
    "use_flow_sigmas": _model("the model is a flow model"),
    "flow_shift": _model("the shift of flow levels; multiplies shift"),
    "shift": _model("the shift of flow levels"),
    "use_dynamic_shifting": _model("the shift comes from mu"),
    "time_shift_type": _model("what mu means: exponential or linear"),
    "shift_terminal": _model("the level that the last flow level is stretched to"),
    "base_shift": _model("read by pipelines that compute mu"),
    "max_shift": _model("read by pipelines that compute mu"),
    "base_image_seq_len": _model("read by pipelines that compute mu"),
    "max_image_seq_len": _model("read by pipelines that compute mu"),
    "clip_sample": _model("predicted data are clipped; in fewstep.load: wrap in fewstep.Clipped"),
    "clip_sample_range": _model("to which range they are clipped"),
    "thresholding": _model("dynamic thresholding; in fewstep.load: fewstep.Thresholded"),
    "dynamic_thresholding_ratio": _model("the quantile of dynamic thresholding"),
    "sample_max_value": _model("the largest threshold"),
    "variance_type": _understood(
        "fixed_large and fixed_large_log: variance='large' of the solver ddpm; learned: the second half of the "
        "channels is dropped, as only DDPM's own draws use it, and ddpm draws with fixed_small"
    ),
    "original_inference_steps": _model(
        "LCM, TCD: a count of steps chooses among so many times, at which the network was distilled; None: "
        "among all"
    ),
    "lambda_min_clipped": _model("grids in timesteps start at the first level above it"),
    # Where the scheduler steps.
    "timestep_spacing": _understood("linspace, leading or trailing"),
    "steps_offset": _understood("added to the timesteps of leading"),
    "use_karras_sigmas": _understood("spacing of the levels"),
    "use_exponential_sigmas": _understood("spacing of the levels"),
    "use_beta_sigmas": _understood("spacing of the levels; needs scipy"),
    "use_lu_lambdas": _understood("spacing of the levels: that of use_exponential_sigmas"),
    "final_sigmas_type": _understood("the level at which sampling ends; flows end at zero"),
    "set_alpha_to_one": _understood(
        "the end, for the solvers of the schedulers that read it: ddim, pndm"
    ),
    "lower_order_final": _understood("for solvers whose twin lowers its order"),
    "solver_order": _understood("the order of a solver that is given by its family"),
    # How the scheduler that is replaced steps.
    "algorithm_type": _sampler(
        STEPS.format(
            "the solver says it: dpmpp-2m, dpmpp-2m-sde for sde-dpmsolver++, logrhoab for deis"
        )
    ),
    "solver_type": _sampler(
        STEPS.format("the solver says it: midpoint in dpmpp-2m, bh2 in unipc")
    ),
    "predict_x0": _sampler(STEPS.format("unipc predicts the data; False has no solver")),
    "disable_corrector": _sampler(
        STEPS.format("unipc corrects each step; ddim is its first predictor")
    ),
    "solver_p": _sampler(STEPS.format("unipc's predictor is its own")),
    "euler_at_final": _sampler(
        STEPS.format("lower_order_final lowers the last step to first order below 15 steps")
    ),
    "skip_prk_steps": _sampler(
        STEPS.format("pndm starts by Runge-Kutta steps; ipndm is the method without them")
    ),
    "predictor_order": _sampler(STEPS.format("the solver 'sa-solver' has the option predictor")),
    "corrector_order": _sampler(STEPS.format("the solver 'sa-solver' has the option corrector")),
    "tau_func": _sampler(
        STEPS.format("the solver 'sa-solver' has the options tau, rho_min and rho_max")
    ),
    "noise_sampler_seed": _sampler(STEPS.format("noise_seed seeds draws")),
    "timestep_scaling": _sampler(
        STEPS.format("there is no boundary condition of consistency models")
    ),
    "rho": _sampler(STEPS.format("grid='karras' has its own rho")),
    "sigma_schedule": _sampler(STEPS.format("grid says it: karras or log-rho")),
    "eta": _sampler(STEPS.format("an option of solvers: solver_options={'eta': ...}")),
    "s_noise": _sampler(STEPS.format("an option of solvers: solver_options={'s_noise': ...}")),
    "upscale_mode": _sampler("read with scale_factors only"),
    # Refused at other values than those that change nothing.
    "invert_sigmas": _refuse("time must grow with the noise, here it would fall", False),
    "interpolation_type": _refuse(
        "log_linear gives levels that its timesteps do not belong to; use_exponential_sigmas=True "
        "has the same levels with their own times",
        "linear",
    ),
    "stochastic_sampling": _refuse(
        "it renews the noise in each step, which is a sampler of its own; set it to False, and take a "
        "stochastic solver if noise is wanted",
        False,
    ),
    "scale_factors": _refuse("changes the resolution between steps; set it to None", None),
    "predict_epsilon": _refuse(
        "an old word: prediction_type='sample' is predict_epsilon=False", True
    ),
    "clip_denoised": _refuse("clips the predicted data: clip_sample says so here", False),
    # Of configurations that older versions wrote.
    "tensor_format": _sampler("an old key: the framework of the arrays"),
    "timestep_values": _refuse(
        "an old key: give the times to set_timesteps(timesteps=[...])", None
    ),
    # Of classes that are refused; without a class's name these keys say enough.
    **{
        key: _refuse(OF_REFUSED.format(classes))
        for classes, keys in {
            "discrete tokens": (
                "alpha_cum_start alpha_cum_end gamma_cum_start gamma_cum_end num_vec_classes "
                "mask_token_id masking_schedule block_length minimal_topk editing_threshold "
                "corrector_k corrector_selection corrector_selection_tau corrector_steps entropy_bound "
                "threshold num_inference_steps t_max t_min"
            ),
            "Helios": "gamma stages stage_range scheduler_type",
            "Wuerstchen": "s scaler",
            "the SDEs of Song et al.": "beta_min beta_max sampling_eps snr correct_steps",
            "KarrasVe": "s_churn s_min s_max",
            "Piflow": "n_grid eps final_step_size_scale num_policy_substeps",
            "RFD4Proteina": (
                "noise_mode schedule_mode t_lim_ode t_lim_ode_below tail_step_multiplier tail_steps "
                "tsr_k tsr_sigma"
            ),
        }.items()
        for key in keys.split()
    },
}
"""Every key of the configuration of every scheduler of the diffusers that is installed."""

MODEL_KEYS = tuple(key for key, meaning in KEYS.items() if meaning.model)

OWN_KEYS = (
    "solver",
    "solver_options",
    "grid",
    "grid_options",
    "recipe",
    "profile",
    "count",
    "integer_times",
    "noise_seed",
)
"""The keys that PlanScheduler adds."""


class Number(NamedTuple):
    """Which numbers a key takes.

    Attributes:
        low: The least, itself allowed only if ``with_low``.
        high: The largest, allowed.
        whole: Whether it is an integer.
        with_low: See ``low``.
        optional: Whether ``None`` is allowed.
    """

    low: float
    high: float = math.inf
    whole: bool = False
    with_low: bool = False
    optional: bool = False

    def allows(self, value: Any) -> bool:
        """Returns whether a value is one of these numbers."""
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        number = float(value)
        inside = self.low < number <= self.high or (self.with_low and number == self.low)
        whole = not self.whole or number.is_integer()
        return inside and whole and number != math.inf

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        low = f"at least {self.low:g}" if self.with_low else f"above {self.low:g}"
        high = "" if self.high == math.inf else f" and at most {self.high:g}"
        bounds = "" if self.low == -math.inf else f" {low}{high}"
        return f"{kind}{bounds}" + (", or None" if self.optional else "")


POSITIVE, LEVEL = Number(0), Number(0, optional=True)
NUMBERS: Mapping[str, Number] = {
    "num_train_timesteps": Number(2, whole=True, with_low=True),
    "beta_start": Number(0, 1, with_low=True),
    "beta_end": Number(0, 1, with_low=True),
    "snr_shift_scale": POSITIVE,
    "flow_shift": POSITIVE,
    "shift": POSITIVE,
    "shift_terminal": Number(0, 1, with_low=True, optional=True),
    "sigma_min": LEVEL,
    "sigma_max": LEVEL,
    "sigma_data": POSITIVE,
    "clip_sample_range": POSITIVE,
    "dynamic_thresholding_ratio": Number(0, 1, with_low=True),
    "sample_max_value": POSITIVE,
    "lambda_min_clipped": Number(-math.inf, with_low=True, optional=True),
    "original_inference_steps": Number(1, whole=True, with_low=True, optional=True),
    "steps_offset": Number(0, whole=True, with_low=True),
}
"""The numbers that keys take; the bounds are those outside of which a level or a time makes no sense."""

SWITCHES = (
    "rescale_betas_zero_snr",
    "use_flow_sigmas",
    "use_dynamic_shifting",
    "clip_sample",
    "thresholding",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "set_alpha_to_one",
    "lower_order_final",
)
"""The keys that are true or false (``None``: false, or the twin's)."""

VARIANCES = (
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "fixed_large_log",
    "learned",
    "learned_range",
)
"""The variances that diffusers knows."""


def check_value(key: str, value: Any) -> None:
    """Refuses a value that a key cannot have.

    Raises:
        ValueError: If it is one; the message says which it can have.
    """
    allowed = NUMBERS.get(key)
    if allowed is not None and not allowed.allows(value):
        raise ValueError(f"{key} must be {allowed}, got {value!r:.60}")
    if key in SWITCHES and not (
        value is None or (isinstance(value, (bool, int)) and value in (0, 1))
    ):
        raise ValueError(f"{key} must be True or False, got {value!r:.60}")
    if key == "variance_type" and not (
        value is None or (isinstance(value, str) and value in VARIANCES)
    ):
        raise ValueError(unknown("variance_type", value, list(VARIANCES)))


SETTING = {
    "block_length": "belongs to schedulers over discrete tokens",
    "intermediate_timesteps": "belongs to SCMScheduler, whose network is conditioned on an angle",
    "max_timesteps": "belongs to SCMScheduler, whose network is conditioned on an angle",
    "temperature": "belongs to schedulers over discrete tokens",
    "jump_length": "belongs to RePaintScheduler, which jumps back and forth in time",
    "jump_n_sample": "belongs to RePaintScheduler, which jumps back and forth in time",
    "is_amplify_first_chunk": "belongs to HeliosScheduler, which changes the resolution between stages",
    "start_time": "belongs to RFD4ProteinaScheduler, whose time grows with the data",
}
"""Arguments that pipelines give to ``set_timesteps`` of other schedulers, and why they are refused."""

STEPPING = {
    "r_timestep": "is the end of a step of a flow map; steps end at the next of the timesteps here",
    "per_token_timesteps": "gives each token a noise level of its own; one level holds for a batch here. With "
    "FlowMatchEulerDiscreteScheduler the pipeline runs",
    "pred_original_sample": "belongs to EDMEulerScheduler, which scales the network's input and output",
    "s_churn": "is an option of solvers here: solver='edm-stochastic' with solver_options",
    "s_tmin": "is an option of solvers here: solver='edm-stochastic' with solver_options",
    "s_tmax": "is an option of solvers here: solver='edm-stochastic' with solver_options",
    "s_noise": "is an option of solvers here: solver='edm-stochastic' with solver_options",
    "order": "is fixed by the solver here; LMS of k steps is solver='rhoab' with solver_order=k",
    "predict_epsilon": "is an old word: prediction_type='sample' is predict_epsilon=False",
    "old_pred_original_sample": "belongs to CogVideoXDPMScheduler; what a step needs of earlier ones is kept here",
    "timestep_back": "belongs to CogVideoXDPMScheduler; what a step needs of earlier ones is kept here",
    "cur_sampling_step": "belongs to HeliosScheduler, which changes the resolution between stages",
}
"""Arguments that pipelines give to ``step`` of other schedulers, and why they are refused."""

NEUTRAL = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": float("inf"), "s_noise": 1.0}
"""Values of refused arguments that change nothing, besides ``None``."""


def check_arguments(method: str, given: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Refuses arguments of ``set_timesteps`` or ``step`` that only other schedulers take.

    Raises:
        ValueError: If there is one that would change something; the message says why.
    """
    for name, value in given.items():
        if value is None or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        why = reasons.get(name, "belongs to the steps of another scheduler; leave it out")
        raise ValueError(
            f"{method} of PlanScheduler takes no {name} (got {value!r:.60}): it {why}"
        )


def table() -> str:
    """Returns both tables in Markdown, as ``docs/diffusers.md`` has them."""
    lines = [
        "| scheduler | levels | why refused, or what it does whatever its keys say |",
        "|---|---|---|",
    ]
    for name, meaning in CLASSES.items():
        fixed = ", ".join(f"`{key}={value!r}`" for key, value in meaning.fixed.items())
        lines.append(f"| `{name}` | {meaning.family} | {meaning.why or fixed} |")
    lines += ["", "| key | status | what becomes of it |", "|---|---|---|"]
    for key, meaning in KEYS.items():
        neutral = f" (changes nothing: `{meaning.neutral[0]}`)" if meaning.neutral else ""
        lines.append(f"| `{key}` | {meaning.status} | {meaning.why}{neutral} |")
    return "\n".join(lines)
