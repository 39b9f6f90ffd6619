"""What the doors take where nothing is said: the kernel that a method goes with, its steps, and its fields on latents.

Papers give the size of a method's step for images. Latents of unit variance and a decoder in between want another one; these
were tried on the built-in model (`scripts/restoration.py`). Methods that are not named take the model's sampler and their own
defaults. From Python, where a method is built by hand, nothing here applies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

USUAL = 100
STEPS: Mapping[str, int] = {"repaint": 25}  # with its jumps these are about 100 evaluations too
SPACINGS: Mapping[str, str] = {"dmps": "leading"}  # it cannot start at alpha = 0, where a zero-terminal table does
ROUNDS = 2  # of conjugate gradients in the proximal maps of latents, each a pass through the decoder and one back
# The paper's kernel: (sampler, its fields).
KERNELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "blended": ("ddim", {}),
    "ccdf": ("ddpm", {}),
    "ddnm": ("renoise", {"eta": 0.85}),
    "diffpir": ("renoise", {"eta": 0.5}),
    "dmps": ("ddpm", {}),
    "dps": ("ddpm", {}),
    "dps_score": ("ddpm", {}),
    "ilvr": ("ddpm", {}),
    "psld": ("ddim", {}),
    "repaint": ("ddpm", {}),
    "resample": ("ddim", {}),
    "truncated": ("ddim", {"eta": 0.5}),
}
# Where the network lives in latents.
LATENT: Mapping[str, Mapping[str, Any]] = {
    "dps": {"scale": 3.0},
    "dps_score": {"scale": 0.005},
    "psld": {"omega": 3.0, "gamma": 0.5},
    "reddiff": {"rate": 0.2},
    "resample": {"scale": 3.0},
}
# Under a mask of latents, where no decoder stands between.
UNDER_MASK: Mapping[str, Mapping[str, Any]] = {
    "repaint": {"length": 5, "times": 5},
}
