"""Methods by name: "module:Class" strings, built strictly from fields, listed without importing anything.

Names, fields, defaults and the first line of a docstring are read from the source by AST, so nothing is written twice and
`generate --list` imports no torch.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm_pipe import strict
from ldm_pipe.errors import UsageError, unknown

KINDS: dict[str, dict[str, str]] = {
    "sampler": {
        "consistency": "ldm_pipe.samplers.consistency:Consistency",
        "ddim": "ldm_pipe.samplers.ddim:DDIM",
        "ddpm": "ldm_pipe.samplers.ddpm:DDPM",
        "deis": "ldm_pipe.samplers.deis:DEIS",
        "dpm1s": "ldm_pipe.samplers.euler:Euler",
        "dpm2": "ldm_pipe.samplers.dpm2:DPM2",
        "dpm2_ancestral": "ldm_pipe.samplers.dpm2:DPM2Ancestral",
        "dpm2m": "ldm_pipe.samplers.dpm2m:DPM2M",
        "dpm2m_sde": "ldm_pipe.samplers.dpm2m_sde:DPM2MSDE",
        "dpm2s": "ldm_pipe.samplers.dpm2s:DPM2S",
        "dpm3m": "ldm_pipe.samplers.dpm3m:DPM3M",
        "dpm_sde": "ldm_pipe.samplers.dpm_sde:DPMSDE",
        "edm_churn": "ldm_pipe.samplers.edm_churn:Churn",
        "er_sde": "ldm_pipe.samplers.er_sde:ERSDE",
        "euler": "ldm_pipe.samplers.euler:Euler",
        "euler_ancestral": "ldm_pipe.samplers.euler_ancestral:EulerAncestral",
        "flow_euler": "ldm_pipe.samplers.euler:Euler",
        "flow_heun": "ldm_pipe.samplers.heun:FlowHeun",
        "heun": "ldm_pipe.samplers.heun:Heun",
        "ipndm": "ldm_pipe.samplers.plms:PLMS",
        "lcm": "ldm_pipe.samplers.lcm:LCM",
        "lms": "ldm_pipe.samplers.lms:LMS",
        "ode": "ldm_pipe.samplers.ode:ODE",
        "plms": "ldm_pipe.samplers.plms:PLMS",
        "renoise": "ldm_pipe.samplers.renoise:Renoise",
        "restart": "ldm_pipe.samplers.restart:Restart",
        "sa_solver": "ldm_pipe.samplers.sa_solver:SASolver",
        "score_sde": "ldm_pipe.samplers.score_sde:ScoreSDE",
        "tcd": "ldm_pipe.samplers.tcd:TCD",
        "unipc": "ldm_pipe.samplers.unipc:UniPC",
    },
    "rule": {
        "adaptive": "ldm_pipe.guidance.adaptive:Adaptive",
        "apg": "ldm_pipe.guidance.apg:APG",
        "autoguidance": "ldm_pipe.guidance.autoguidance:Autoguidance",
        "between": "ldm_pipe.guidance.between:Between",
        "cfg": "ldm_pipe.guidance.cfg:CFG",
        "cfg_zero": "ldm_pipe.guidance.cfg_zero:CFGZero",
        "cfgpp": "ldm_pipe.guidance.cfgpp:CFGPP",
        "compose": "ldm_pipe.guidance.compose:Compose",
        "curve": "ldm_pipe.guidance.curve:Curve",
        "linear_ag": "ldm_pipe.guidance.linear_ag:LinearAG",
        "noise_damped": "ldm_pipe.guidance.noise_damped:NoiseDamped",
        "pag": "ldm_pipe.guidance.pag:PAG",
        "perp_neg": "ldm_pipe.guidance.perp_neg:PerpNeg",
        "rescale": "ldm_pipe.guidance.rescale:Rescale",
        "sag": "ldm_pipe.guidance.sag:SAG",
        "seg": "ldm_pipe.guidance.seg:SEG",
        "skip_layer": "ldm_pipe.guidance.skip_layer:SkipLayer",
        "tcfg": "ldm_pipe.guidance.tcfg:TCFG",
        "threshold": "ldm_pipe.guidance.threshold:Threshold",
    },
    "guide": {
        "classifier": "ldm_pipe.guidance.classifier:Classifier",
        "clip": "ldm_pipe.guidance.clip:Clip",
        "experts": "ldm_pipe.guidance.classifier:Experts",
        "refine": "ldm_pipe.guidance.stages:Refine",
    },
    "spacing": {
        "align_your_steps": "ldm_pipe.spacings.align_your_steps:align_your_steps",
        "beta": "ldm_pipe.spacings.beta:beta",
        "exponential": "ldm_pipe.spacings.exponential:exponential",
        "file": "ldm_pipe.spacings.given:given",
        "flow": "ldm_pipe.levels:flow",
        "karras": "ldm_pipe.levels:karras",
        "lambda": "ldm_pipe.spacings.exponential:exponential",
        "lcm": "ldm_pipe.spacings.lcm:lcm",
        "leading": "ldm_pipe.levels:leading",
        "linspace": "ldm_pipe.levels:linspace",
        "quadratic": "ldm_pipe.levels:quadratic",
        "token_shift": "ldm_pipe.spacings.token_shift:token_shift",
        "trailing": "ldm_pipe.levels:trailing",
        "zero_terminal": "ldm_pipe.spacings.zero_terminal:zero_terminal",
    },
    "editing": {
        "plug_and_play": "ldm_pipe.editing.plug_and_play:PlugAndPlay",
        "prompt_to_prompt": "ldm_pipe.editing.prompt_to_prompt:Replacing",
        "shape_guided": "ldm_pipe.editing.shape_guided:ShapeGuided",
        "structured": "ldm_pipe.editing.structured:Structured",
    },
    "inversion": {
        "dpm_encoder": "ldm_pipe.editing.dpm_encoder:DPMEncoder",
        "fixed_point": "ldm_pipe.editing.invert:FixedPoint",
        "negative_prompt": "ldm_pipe.editing.negative_prompt:NegativePrompt",
        "null_text": "ldm_pipe.editing.null_text:NullText",
        "plain": "ldm_pipe.editing.invert:Plain",
    },
    "patch": {
        "attention_scale": "ldm_pipe.resolution.attention_scale:AttentionScale",
        "controlnet": "ldm_pipe.control.controlnet:ControlNet",
        "deepcache": "ldm_pipe.speed.deepcache:DeepCache",
        "faster": "ldm_pipe.speed.faster:Faster",
        "first_block": "ldm_pipe.speed.first_block:FirstBlock",
        "flux_controlnet": "ldm_pipe.control.flux_controlnet:FluxControlNet",
        "flux_ip_adapter": "ldm_pipe.control.flux_ip_adapter:FluxIPAdapter",
        "h_space": "ldm_pipe.analysis.h_space:HSpace",
        "hidiffusion": "ldm_pipe.resolution.hidiffusion:HiDiffusion",
        "ip_adapter": "ldm_pipe.control.ip_adapter:IPAdapter",
        "sana_controlnet": "ldm_pipe.control.sana_controlnet:SanaControlNet",
        "scalecrafter": "ldm_pipe.resolution.scalecrafter:ScaleCrafter",
        "sd3_controlnet": "ldm_pipe.control.sd3_controlnet:SD3ControlNet",
        "sd3_ip_adapter": "ldm_pipe.control.sd3_ip_adapter:SD3IPAdapter",
        "t2i_adapter": "ldm_pipe.control.t2i_adapter:T2IAdapter",
        "text_cache": "ldm_pipe.speed.text_cache:TextCache",
        "tiles": "ldm_pipe.resolution.tiles:Tiles",
        "tome": "ldm_pipe.speed.tome:ToMe",
    },
    "operator": {
        "bicubic": "ldm_pipe.restore.bicubic:Bicubic",
        "blur": "ldm_pipe.restore.blur:Blur",
        "blur_zero": "ldm_pipe.restore.blur:BlurZero",
        "clip": "ldm_pipe.restore.clip:Clip",
        "cs": "ldm_pipe.restore.cs:CS",
        "grey": "ldm_pipe.restore.grey:Grey",
        "jpeg": "ldm_pipe.restore.jpeg:JPEG",
        "mask": "ldm_pipe.restore.mask:Mask",
        "pool": "ldm_pipe.restore.pool:Pool",
    },
    "restoration": {
        "adir": "ldm_pipe.restore.adir:ADIR",
        "blended": "ldm_pipe.restore.blended:BlendedLatent",
        "ccdf": "ldm_pipe.restore.truncated:CCDF",
        "ddnm": "ldm_pipe.restore.ddnm:DDNM",
        "ddnm_plus": "ldm_pipe.restore.ddnm_plus:DDNMPlus",
        "ddnm_scaled": "ldm_pipe.restore.ddnm_plus:DDNMScaled",
        "ddrm": "ldm_pipe.restore.ddrm:DDRM",
        "diffpir": "ldm_pipe.restore.diffpir:DiffPIR",
        "dmps": "ldm_pipe.restore.dmps:DMPS",
        "dps": "ldm_pipe.restore.dps:DPS",
        "dps_score": "ldm_pipe.restore.dps:DPSScore",
        "ilvr": "ldm_pipe.restore.ilvr:ILVR",
        "psld": "ldm_pipe.restore.psld:PSLD",
        "reddiff": "ldm_pipe.restore.reddiff:REDDiff",
        "repaint": "ldm_pipe.restore.repaint:RePaint",
        "resample": "ldm_pipe.restore.resample:ReSample",
        "truncated": "ldm_pipe.restore.truncated:Truncated",
    },
}


class Entry(NamedTuple):
    """What `--list` shows of one method: its fields as (name, default as source) and its first docstring line."""

    name: str
    fields: tuple[tuple[str, str], ...]
    summary: str


def target(kind: str, name: str) -> str:
    """The "module:Class" of a name, or UsageError naming the nearest known one."""
    if kind not in KINDS:
        raise UsageError(unknown("kind of method", kind, KINDS))
    if name not in KINDS[kind]:
        raise UsageError(unknown(kind, name, KINDS[kind]))
    return KINDS[kind][name]


def build(kind: str, name: str, **fields: Any) -> Any:
    """Build a method by name: `build("sampler", "ddim", eta=0.5)`. A spacing comes back as a function (path, steps) -> levels.

    Raises UsageError on an unknown kind, name or field, or a value of the wrong type.
    """
    module, _, attribute = target(kind, name).partition(":")
    found = getattr(importlib.import_module(module), attribute)
    where = f"{kind} {name}"
    return strict.build(found, fields, where) if inspect.isclass(found) else _bound(found, fields, where)


def _bound(function: Any, fields: Mapping[str, Any], where: str) -> Any:
    """The function with its options given; its first two parameters are (path, steps)."""
    hints = typing.get_type_hints(function)
    options = list(inspect.signature(function).parameters)[2:]
    for field in fields:
        if field not in options:
            raise UsageError(unknown(f"field of {where}", field, options))
    return functools.partial(function, **{n: strict.coerce(v, hints[n], f"{where}: {n}") for n, v in fields.items()})


def entry(kind: str, name: str) -> Entry:
    """Read one method's entry from its source, without importing it."""
    module, _, attribute = target(kind, name).partition(":")
    node = next(n for n in _tree(module).body if getattr(n, "name", None) == attribute)
    assert isinstance(node, ast.ClassDef | ast.FunctionDef)
    if isinstance(node, ast.ClassDef):
        rows = [n for n in node.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation)]
        found = ((ast.unparse(n.target), ast.unparse(n.value) if n.value else "required") for n in rows)
        fields = tuple((name, default) for name, default in found if not name.startswith("_"))
    else:
        args, defaults = node.args.args, node.args.defaults
        given = dict(zip([a.arg for a in args[-len(defaults) :]], defaults, strict=True)) if defaults else {}
        fields = tuple((n, ast.unparse(d)) for n, d in given.items())
    return Entry(name, fields, _summary(ast.get_docstring(node) or ""))


def entries(kind: str) -> list[Entry]:
    """All entries of a kind, by name."""
    if kind not in KINDS:
        raise UsageError(unknown("kind of method", kind, KINDS))
    return [entry(kind, name) for name in sorted(KINDS[kind])]


def _summary(doc: str) -> str:
    paragraph = " ".join(doc.split("\n\n")[0].split())
    return re.split(r"(?<! al)\.(?: (?=[A-Z])|$)", paragraph)[0]


@functools.cache
def _tree(module: str) -> ast.Module:
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(next(iter(spec.submodule_search_locations)), *rest.split("."))
    return ast.parse(path.with_suffix(".py").read_text(encoding="utf-8"))
