"""What autoencoders are trained by: squared error and KL term, on request a perceptual and an adversarial one.

High-Resolution Image Synthesis with Latent Diffusion Models, Rombach et al. 2022, arXiv 2112.10752, section 3.1 and eq. 25.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe import loading
from ldm_pipe.errors import UsageError
from train.job import Batch, Task
from train.objectives import perceptual
from train.objectives.adversarial import Critic, balanced, hinge


@dataclass(frozen=True)
class Autoencoder(Task):
    """What the tasks of autoencoders share.

    perceptual: weight of the distance in the features of `tower`, a folder with a CLIP ("builtin": the model's own).
    adversarial: factor of the adversarial term, heard from step `adversarial_from` on; the critic of `critic_width` channels
    and `critic_layers` strides learns from the first. group: set by the loop.
    """

    perceptual: float = 0.0
    tower: str = "builtin"
    adversarial: float = 0.0
    adversarial_from: int = 0
    critic_width: int = 64
    critic_layers: int = 2
    group: int = 1

    def __post_init__(self) -> None:
        if min(self.perceptual, self.adversarial, self.adversarial_from) < 0:
            raise UsageError("task: perceptual, adversarial and adversarial_from take 0 or more")

    def grouped(self, size: int) -> Autoencoder:
        """The same task, which can tell the step by a sample's number where it has to."""
        return dataclasses.replace(self, group=size) if self.adversarial else self

    def facts(self) -> dict[str, str]:
        """The tower that pictures are compared by, with the digest of its weights."""
        return {"perceptual": perceptual.named(self._tower)} if self.perceptual else {}

    @property
    def _tower(self) -> Path:
        return loading.BUILTIN / "clip" if self.tower == "builtin" else Path(self.tower)

    def loss(self, codec: Any, kl: float) -> CodecLoss:
        """The trainable module around a codec, with the terms that the recipe asks for."""
        found = CodecLoss(codec, kl)
        if self.perceptual:
            perceptual.named(self._tower)
            found.distance, found.perceptual = perceptual.Perceptual(self._tower), self.perceptual
        if self.adversarial:
            found.critic, found.adversarial = Critic(self.critic_width, self.critic_layers), self.adversarial
        return found

    def heard(self, ids: Sequence[int]) -> Batch:
        """heard: [B], 1 from the step on at which the critic is listened to; nothing where there is none."""
        if not self.adversarial:
            return {}
        return {"heard": torch.tensor([float(i // self.group >= self.adversarial_from) for i in ids])}


class CodecLoss(nn.Module):
    """Squared error of the reconstruction plus the KL term; on request a perceptual and an adversarial one."""

    def __init__(self, codec: Any, kl: float) -> None:
        super().__init__()
        self.codec: Any = codec
        self.kl = kl
        self.distance: perceptual.Perceptual | None = None
        self.critic: Critic | None = None
        self.perceptual, self.adversarial = 0.0, 0.0

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """images [B,3,H,W] in -1..1, noise [B,C,h,w] -> loss, psnr in dB, kl in nats per latent value; with the further terms
        perceptual, critic (the critic's own loss) and balance (lambda)."""
        images = batch["images"]
        posterior = self.codec.encode(images).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        out = self.codec.decode(mean + std * batch["noise"]).sample.float()
        error = (out - images).square().mean()
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log())
        told = {"psnr": 10 * torch.log10(4 / error), "kl": kl.mean()}
        reconstruction = error
        if self.distance is not None:
            told["perceptual"] = self.distance(images, out).mean()
            reconstruction = error + self.perceptual * told["perceptual"]
        loss = reconstruction + self.kl * kl.sum() / images.numel()
        if self.critic is not None and torch.is_grad_enabled():
            told["critic"] = hinge(self.critic, images, out).mean()
            fooled = -self.critic.judged(out).float().mean()
            told["balance"] = balanced(reconstruction, fooled, self.codec.decoder.conv_out.weight)
            loss = loss + self.adversarial * batch["heard"].mean() * told["balance"] * fooled + told["critic"]
        return {"loss": loss, **told}
