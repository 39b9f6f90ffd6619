"""What a diffusers scheduler's configuration says of a network: its path, what it predicts, and the steps it is run with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ldm_pipe.configs import LARGEST
from ldm_pipe.errors import ModelError
from ldm_pipe.families import Defaults
from ldm_pipe.level import Path
from ldm_pipe.path import VP, Flow
from ldm_pipe.prediction import PREDICTIONS, Prediction

NAMES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
FEW_STEPS = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}
SPACINGS = ("leading", "trailing", "linspace")


def path_of(config: Mapping[str, Any], where: str = "scheduler") -> tuple[Path, Prediction]:
    """Path and prediction. Raises ModelError on one that is not known."""
    kind = NAMES.get(str(config.get("prediction_type", "flow_prediction" if is_flow(config) else "epsilon")))
    if is_flow(config):
        return Flow(), PREDICTIONS["flow"]
    if kind is None:
        raise ModelError(f"{where}: prediction_type {config.get('prediction_type')!r:.60} is not one of {', '.join(NAMES)}")
    return _table(config, where), PREDICTIONS[kind]


def is_flow(config: Mapping[str, Any]) -> bool:
    """Is this a scheduler of rectified flow?"""
    return bool(config.get("use_flow_sigmas") or str(config.get("_class_name", "")).startswith("FlowMatch"))


def _table(config: Mapping[str, Any], where: str) -> VP:
    steps = int(_number(config, "num_train_timesteps", 1000, where))
    if not 2 <= steps <= 100_000:
        raise ModelError(f"{where}: num_train_timesteps is {steps}; it takes 2 to 100000")
    start, end = _number(config, "beta_start", 1e-4, where), _number(config, "beta_end", 0.02, where)
    schedule, betas = config.get("beta_schedule", "linear"), config.get("trained_betas")
    if isinstance(betas, list) and all(type(b) in (int, float) for b in betas):
        path = VP.from_betas(betas, "trained")
    elif schedule == "squaredcos_cap_v2":
        path = VP.cosine(steps)
    elif schedule in ("linear", "scaled_linear"):
        path = (VP.linear if schedule == "linear" else VP.scaled_linear)(start, end, steps)
    else:
        raise ModelError(f"{where}: beta_schedule {schedule!r:.60} is not one of linear, scaled_linear, squaredcos_cap_v2")
    return path.zero_terminal() if config.get("rescale_betas_zero_snr") else path


def _number(config: Mapping[str, Any], name: str, default: float, where: str) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        raise ModelError(f"{where}: {name} is {value!r:.60}; it takes a number")
    return value


def defaults_of(config: Mapping[str, Any], family: Defaults, where: str = "scheduler") -> Defaults:
    """The defaults of a family with the spacing that the scheduler has."""
    few = FEW_STEPS.get(str(config.get("_class_name")))
    if few:
        train = int(_number(config, "original_inference_steps", 50, where))
        return replace(family, sampler=few, steps=4, spacing="lcm", spacing_set={"train": train})
    if not is_flow(config):
        spacing = config.get("timestep_spacing", "leading")
        offset = {"offset": int(_number(config, "steps_offset", 0, where))} if spacing == "leading" else {}
        return replace(family, spacing=spacing, spacing_set=offset) if spacing in SPACINGS else family
    if config.get("use_dynamic_shifting"):
        pairs = (("base_shift", 0.5), ("max_shift", 1.15), ("base_image_seq_len", 256), ("max_image_seq_len", 4096))
        low, high, least, most = (_number(config, name, default, where) for name, default in pairs)
        return replace(family, area_shift=(low, high, least, most))
    shift = float(_number(config, "flow_shift" if config.get("use_flow_sigmas") else "shift", 1.0, where))
    own = family.spacing_set if family.spacing == "flow" else {}  # a U-Net trained on flow has a family that is not
    return replace(family, spacing="flow", spacing_set={"base": "shifted", **own, "shift": shift})
