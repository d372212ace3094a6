"""The configuration of a scheduler: its class, family, levels, schedule and prediction."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.adapters.diffusers.keys import CLASSES, KEYS, MODEL_KEYS, OWN_KEYS, check_value
from fewstep.base.registry import unknown
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import EDM, Flow, NoiseSchedule, Tabulated, VPSigma

FLOW_START = 1 - 1e-6
"""The largest time of a flow schedule here; at 1 the state does not depend on the data (see PlanScheduler)."""

SMALLEST_ALPHA = 1 - FLOW_START
"""The replacement of an alpha of zero, in models with a zero terminal signal-to-noise ratio."""

PREDICTIONS = {
    "epsilon": Prediction.EPS,
    "sample": Prediction.X0,
    "v_prediction": Prediction.V,
    "flow_prediction": Prediction.FLOW,
}
"""The names of the predictions in diffusers."""

LEVEL_DEFAULTS: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "snr_shift_scale": 1.0,
    "use_flow_sigmas": False,
    "timestep_type": "discrete",
    "sigma_min": None,
    "sigma_max": None,
    "prediction_type": "epsilon",
}
"""The defaults of missing keys of a configuration."""


@functools.cache
def _keys_of(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}


def class_of(config: Mapping[str, Any]) -> str | None:
    """Returns the class whose configuration this is: by its name, else by its set of keys.

    A configuration in memory has no name of its class, but its class has been imported. Where several
    classes have the same keys, one that is not refused is meant.
    """
    name = config.get("_class_name")
    if isinstance(name, str):
        return name
    keys = frozenset(k for k in config if not k.startswith("_"))
    return _classes_by_keys(len(sys.modules)).get(keys)


@functools.lru_cache(1)
def _classes_by_keys(modules: int) -> dict[frozenset[str], str]:
    """Returns the imported classes by their keys, from the cache until something is imported.

    Arguments:
        modules: The number of imported modules.
    """
    del modules
    named: dict[frozenset[str], str] = {}
    loaded = [m for n, m in list(sys.modules.items()) if n.startswith("diffusers.schedulers.")]
    for module in filter(None, loaded):
        for name, meaning in CLASSES.items():
            if isinstance(kind := vars(module).get(name), type):
                keys = _keys_of(kind)
                known = named.setdefault(keys, name)
                if CLASSES[known].family == "refused" != meaning.family:
                    named[keys] = name
    return named


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration with what its class means by it.

    That is: the defaults of the class for keys of the model that were left out (files of older versions), and
    what the class does whatever its configuration says. Of a class that is not known, the configuration as it is.
    """
    meaning = CLASSES.get(name := class_of(config) or "")
    if meaning is None or meaning.family == "refused":
        return dict(config)
    import diffusers.schedulers as home

    kind = getattr(home, name, None)
    parameters = {} if kind is None else inspect.signature(kind.__init__).parameters
    missing = {
        key: parameters[key].default
        for key in MODEL_KEYS
        if key in parameters and key not in config
    }
    # A class that was made from a configuration of latent consistency models keeps this key, but has all times.
    stale = {"original_inference_steps"} - set(parameters)
    result = {key: value for key, value in config.items() if key not in stale}
    return {**missing, **result, **meaning.fixed}


def family_of(config: Mapping[str, Any]) -> str:
    """Returns ``"betas"``, ``"flow"`` or ``"edm"``: how a configuration gives its levels."""
    meaning = CLASSES.get(class_of(config) or "")
    if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        return "flow"
    if meaning is not None and meaning.family != "refused":
        return meaning.family
    if "sigma_data" in config and "beta_schedule" not in config:
        return "edm"
    flow_keys = {"shift", "invert_sigmas", "shift_terminal", "base_image_seq_len"}
    if not {"prediction_type", "beta_schedule"} & set(config) and flow_keys & set(config):
        return "flow"
    return "betas"


def check_class(name: str | None) -> None:
    """Refuses the schedulers whose configuration is not supported.

    Raises:
        ValueError: If it is one of those; the message has the reason.
    """
    meaning = CLASSES.get(name or "")
    if meaning is not None and meaning.family == "refused":
        raise ValueError(f"{name} {meaning.why}")


def check_config(config: Mapping[str, Any], name: str | None = None) -> None:
    """Refuses a configuration of a class, or with a key, that cannot be followed.

    Arguments:
        config: The configuration.
        name: Its class; left out, it is found.

    Raises:
        ValueError: If there is one; the message has it and the reason.
    """
    name = name or class_of(config)
    check_class(name)
    of = name or "this scheduler"
    for key, value in config.items():
        if key.startswith("_") or key in OWN_KEYS:
            continue
        meaning = KEYS.get(key)
        if meaning is None:
            if value is None:
                continue
            raise ValueError(
                f"{unknown('key of a scheduler', key, list(KEYS))} It may change the levels or times of "
                f"the model; if it does not, take {key!r} out of the configuration"
            )
        if meaning.status == "refused" and not any(
            value is n or value == n for n in meaning.neutral
        ):
            raise ValueError(
                f"{of} has {key}={value!r:.60}, which is not supported: {meaning.why}"
            )
        check_value(key, value)


def prediction_of(config: Mapping[str, Any]) -> Prediction:
    """Returns the prediction of a configuration.

    Raises:
        ValueError: If it is none of diffusers' four.
    """
    kind = config.get("prediction_type", "epsilon")
    if not isinstance(kind, str) or kind not in PREDICTIONS:
        raise ValueError(unknown("prediction_type", kind, list(PREDICTIONS)))
    return PREDICTIONS[kind]


def is_continuous(config: Mapping[str, Any]) -> bool:
    """Returns whether the network is conditioned on 0.25 ln(sigma), as Stable Video Diffusion is.

    As in diffusers, that holds for v-prediction only; with another one the key changes nothing.
    """
    kind = config.get("timestep_type") or "discrete"
    if kind not in ("discrete", "continuous"):
        raise ValueError(f"timestep_type must be 'discrete' or 'continuous', got {kind!r}")
    return kind == "continuous" and config.get("prediction_type") == "v_prediction"


def betas(config: Mapping[str, Any]) -> Tensor:
    """Returns the trained betas, float32 as diffusers forms them, so that the levels are the model's."""
    trained, kind = config.get("trained_betas"), config["beta_schedule"]
    start, end, count = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if trained is not None:
        table = _trained(trained)
    elif kind == "linear":
        table = torch.linspace(start, end, count, dtype=torch.float32)
    elif kind == "scaled_linear":
        table = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    elif kind == "squaredcos_cap_v2":
        edge = torch.arange(count + 1, dtype=torch.float64) / count
        curve = torch.cos((edge + 0.008) / 1.008 * math.pi / 2).square()
        table = (1 - curve[1:] / curve[:-1]).clamp(max=0.999).float()
    else:
        raise ValueError(
            f"beta_schedule must be 'linear', 'scaled_linear' or 'squaredcos_cap_v2', got {kind!r}"
        )
    if not config["rescale_betas_zero_snr"] or _snr_scale(config) != 1:
        return table
    root = _zero_terminal(torch.cumprod(1 - table, 0).sqrt())
    rescaled = root.square()
    return 1 - torch.cat([rescaled[:1], rescaled[1:] / rescaled[:-1]])


def _trained(values: Any) -> Tensor:
    try:
        table = torch.tensor([float(b) for b in values], dtype=torch.float32)
    except (TypeError, ValueError):
        table = torch.zeros(0)
    if len(table) < 2 or not bool(((table >= 0) & (table <= 1)).all()):
        raise ValueError(
            f"trained_betas must be a list of at least two numbers from 0 to 1, got {values!r:.60}"
        )
    return table


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    r"""Returns the levels :math:`\bar\alpha`, float32, shape (N,).

    With CogVideoX's ``snr_shift_scale`` s they are :math:`\bar\alpha / (s + (1 - s) \bar\alpha)`: the
    signal-to-noise ratio divided by s.
    """
    products, scale = torch.cumprod(1 - betas(config), 0), _snr_scale(config)
    if scale == 1:
        return products
    products = products / (scale + (1 - scale) * products)
    if config["rescale_betas_zero_snr"]:
        products = _zero_terminal(products.sqrt()).square()
    return products


def _snr_scale(config: Mapping[str, Any]) -> float:
    return float(config["snr_shift_scale"])


def _zero_terminal(root: Tensor) -> Tensor:
    """Shifts and stretches the square roots of the levels so that the last is zero, the first kept."""
    return (root - root[-1]) * (root[0] / (root[0] - root[-1]))


def positive_levels(products: Tensor, prediction: str) -> Tensor:
    """Returns the levels with a last one above zero (float64 if there was a zero, else unchanged).

    That of diffusers' DPM-Solver, 2^-24, would lie above the level before it.
    """
    if float(products[-1]) > 0 and bool((products.diff() < 0).all()):
        return products
    positive = products.double().clone()
    least = float(positive[-2]) / 4
    # An epsilon-prediction is divided by alpha here; the others do not need it.
    positive[-1] = least if prediction == "epsilon" else min(SMALLEST_ALPHA**2, least)
    return positive


def schedule_of(config: Mapping[str, Any], levels: Tensor) -> NoiseSchedule:
    """Returns the noise schedule of a configuration, and of its table of levels."""
    if config["prediction_type"] == "flow_prediction" or config["use_flow_sigmas"]:
        return Flow(t_max=FLOW_START)
    if not is_continuous(config):
        return Tabulated(levels.double())
    ends = ((1 - levels.double()) / levels.double()).sqrt()
    low, high = config.get("sigma_min"), config.get("sigma_max")
    return VPSigma(
        float(ends[0]) if low is None else float(low),
        float(ends[-1]) if high is None else float(high),
    )


def conventions_of(config: Mapping[str, Any]) -> tuple[NoiseSchedule, Prediction, int]:
    """Returns schedule, prediction and number of training timesteps of any configuration.

    Raises:
        ValueError: If its class or one of its keys cannot be followed.
    """
    check_config(config)
    family, given = family_of(config), completed(config)
    count = int(given.get("num_train_timesteps", 1000))
    if family == "edm":
        ends = float(given.get("sigma_min", 0.002)), float(given.get("sigma_max", 80.0))
        return EDM(*ends), Prediction.X0, count
    if family == "flow":
        given.setdefault("prediction_type", "flow_prediction")
    full = {**LEVEL_DEFAULTS, **given}
    prediction = prediction_of(full)
    if family == "flow":
        return Flow(), prediction, count
    # Plans in eps divide by alpha at the start: so they start further from pure noise than a scheduler.
    table = positive_levels(alphas_cumprod(full), "epsilon")
    return schedule_of(full, table), prediction, count
