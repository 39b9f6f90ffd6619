"""The flow shift by the size of the image: more tokens need more noise to lose the same signal.

Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, Esser et al. 2024, arXiv 2403.03206, eq. 23: an image
of m tokens is at the noise of one of n where sigma / alpha is sqrt(m / n) times as large. Flux makes the logarithm of that
factor a line through two points instead (Black Forest Labs 2024; `calculate_shift` in its pipelines).
"""

from __future__ import annotations

import math
from typing import Literal

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level, Path
from ldm_pipe.levels import checked, flow


def token_shift(
    path: Path,
    steps: int,
    tokens: int = 4096,
    rule: Literal["line", "root"] = "line",
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base: str = "trailing",
) -> list[Level]:
    """The flow shift that an image of this size needs: Flux's, or the square root of Esser et al. 2024.

    tokens: of the image, 2x2 latent pixels each; `generate` gives those of the run. rule: "line" is the exponential of a line
    through base_shift at 256 tokens and max_shift at 4096, "root" sqrt(tokens / 256). base: as that of `flow`.
    """
    checked(steps)
    if tokens < 1 or not all(math.isfinite(v) and abs(v) <= 20 for v in (base_shift, max_shift)):
        raise UsageError(f"token_shift takes 1 or more tokens and shifts of -20 to 20, got {tokens}, {base_shift}, {max_shift}")
    log = base_shift + (max_shift - base_shift) * (tokens - 256) / (4096 - 256)
    return flow(path, steps, math.exp(min(log, 20.0)) if rule == "line" else (tokens / 256) ** 0.5, base)
