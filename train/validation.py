"""What a run is judged by while it goes on: the loss on pictures held out, by level, and pictures on fixed seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm_pipe import files
from ldm_pipe.cond import Cond
from ldm_pipe.level import Level
from ldm_pipe.model import Model
from ldm_pipe.noise import Noise

BANDS = 4


@torch.no_grad()
def banded_loss(model: Model, latents: Sequence[Tensor], conds: Sequence[Cond], seed: int = 0) -> dict[str, float]:
    """Mean squared error of the output in BANDS equal bands of u, on noise that is the same every time.

    latents: [1,C,h,w] each, conds: one row each. Every picture is seen at a level of its own in every band.
    """
    found = {}
    for band in range(BANDS):
        errors = []
        for i, (x0, cond) in enumerate(zip(latents, conds, strict=True)):
            u = (band + (i + 0.5) / len(latents)) / BANDS
            alpha = torch.full((1, 1, 1, 1), 1 - u, device=x0.device)
            level = Level(alpha, 1 - alpha)
            noise = Noise((seed + i,), tuple(x0.shape[1:])).at(band)("validation").to(x0)
            _, out, own = model.raw(level.mix(x0, noise), level, cond)
            target = model.prediction.target(x0 / model.path.data_std, noise, own)
            errors.append((out[:, : x0.shape[1]].float() - target).square().mean())
        found[f"held_out_{band / BANDS:.2f}"] = float(torch.stack(errors).mean())
    return found


def draw(bundle: object, prompts: Sequence[str], folder: Path, seed: int = 0) -> None:
    """One picture per prompt with the model's own defaults, each on the same seed every time: `00.png`, `01.png`, ..."""
    import io

    from ldm_pipe.pipeline import Pipeline

    output = Pipeline(bundle)(list(prompts), seed=seed)  # type: ignore[arg-type]
    for i, picture in enumerate(output.images):
        data = io.BytesIO()
        picture.save(data, "PNG")
        files.write(folder / f"{i:02d}.png", data.getvalue(), replace=True)
