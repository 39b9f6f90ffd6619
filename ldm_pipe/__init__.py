"""ldm_pipe: latent text-to-image diffusion; make, edit, restore and fine-tune images, every method one short file.

from ldm_pipe import Pipeline
Pipeline.from_pretrained("builtin")("a fox on a blue background", seed=7).images[0].save("fox.png")
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public names and where they live. They are imported when first used, so that `import ldm_pipe` stays cheap.
_HOMES = {
    "level": ("CLEAN", "Level"),
    "path": ("EDM", "VP", "Flow"),
    "prediction": ("CLEAN_IMAGE", "EPS", "FLOW", "PREDICTIONS", "VELOCITY"),
    "cond": ("Cond",),
    "model": ("Branches", "Estimate", "Model", "guided"),
    "noise": ("Noise",),
    "walk": ("Sampler", "Step", "sample", "trajectory"),
    "guidance.cfg": ("CFG",),
    "guidance.rescale": ("Rescale",),
    "guidance.between": ("Between",),
    "analysis.gaussian": ("Gaussian",),
    "analysis.mixture": ("Mixture",),
    "registry": ("build",),
    "doors.adapters": ("adapted",),
    "loading": ("Bundle", "load"),
    "pipeline": ("Output", "Pipeline"),
    "settings": ("Settings",),
    "errors": ("EnvironmentFault", "LdmError", "ModelError", "NumericalError", "UsageError"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = ("levels", "registry")

__all__ = ["__version__", "levels", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    """PEP 562. `sample` and `load` are functions here; the modules of those names are reached by `import ldm_pipe.walk`."""
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value  # also over a submodule of the same name, which its import has just bound
        return value
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
