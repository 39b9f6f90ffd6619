"""Blended Latent Diffusion, Avrahami et al. 2022, arXiv 2206.02779, algorithm 1.

With the background noised to the level that is reached (the official script takes the one before, and keeps its noise at the
end); where the first levels are left out, start from the background noised to the first one (`truncated`), not from noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_pipe.codec import Codec
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step, Wrapping


@dataclass(frozen=True, eq=False)
class BlendedLatent(Wrapping):
    """After every step of another sampler, the latents to keep become the background's, noised to the same level.

    background: latents [1 or B,c,h,w]; keep: [1 or B,1,h,w], True where the background stays. The pixels to keep come back
    only nearly through the codec: `paste` puts them in at the end.
    """

    background: Tensor
    keep: Tensor
    sampler: Sampler

    @classmethod
    def of(cls, image: Tensor, keep: Tensor, codec: Codec, sampler: Sampler) -> BlendedLatent:
        """From an image [B,3,H,W] in -1..1 and the pixels to keep, [B,1,H,W]: the nearest one stands for each latent."""
        background = codec.encode(image)
        small = F.interpolate((keep != 0).to(image.dtype), size=background.shape[2:], mode="nearest")
        return cls(background, small != 0, sampler)

    def down(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """One step, blended at `there`."""
        done = self.sampler.step(denoise, x, here, there, memory, noise)
        known = there.mix(self.background, noise("data")) if there.sigma else there.alpha * self.background
        return done._replace(x=torch.where(self.keep, known, done.x))


def paste(images: Tensor, image: Tensor, keep: Tensor) -> Tensor:
    """The images [B,3,H,W] with the kept pixels of `image`, bit for bit. keep: [1 or B,1,H,W]."""
    return torch.where(keep != 0, image, images)
