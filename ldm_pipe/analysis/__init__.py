"""Closed-form denoisers and exact measures: what a perfect network would say, and how far from it a method ends."""

from __future__ import annotations

import importlib
from typing import Any

# Public names and where they live, imported when first used.
_HOMES = {
    "gaussian": ("Gaussian",),
    "mixture": ("Mixture", "Posterior"),
    "network": ("ExactNetwork",),
    "metrics": ("Coverage", "clip_score", "coverage", "frechet", "kernel_distance", "r_precision"),
    "extractor": ("Extractor", "clip_extractor"),
    "affine": ("Affine", "outcome", "read_walk"),
    "wasserstein": ("Closeness", "closeness", "gaussian_w2", "sample_w2", "sliced_w2"),
    "modes": ("mode_fractions",),
    "interval": ("wilson",),
    "likelihood": ("log_likelihood",),
    "search": ("Found", "Search"),
    "efficiency": ("cost", "distance"),
    "reference": ("Problem", "reference_problem"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """PEP 562."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
