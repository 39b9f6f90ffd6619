"""A critic of patches beside an autoencoder's reconstruction, with a weight that follows from the gradients.

Taming Transformers for High-Resolution Image Synthesis, Esser et al. 2021, arXiv 2012.09841, eq. 7 and section 3.1. The critic
is PatchGAN (Image-to-Image Translation with Conditional Adversarial Networks, Isola et al. 2017, arXiv 1611.07004, appendix
6.1.2), its loss the hinge (Geometric GAN, Lim and Ye 2017, arXiv 1705.02894, eq. 12-13). Group normalisation stands in place of
batch normalisation, so that no sample's loss depends on its neighbours, nor on the number of processes.

Both sides learn in the same step from the same pictures: the critic from the reconstruction as a constant, the autoencoder from
the critic as a constant. So one optimiser and one checkpoint hold both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

DELTA = 1e-6  # of eq. 7
LARGEST = 1e4  # weight; the authors' code has the same bound


class Critic(nn.Module):
    """C64-C128-C256-... of 4x4 convolutions: [B,3,H,W] -> [B,1,h,w], large where a patch looks real. layers: with stride 2."""

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            parts += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=False),
                nn.GroupNorm(8, widths[i]),
                nn.LeakyReLU(0.2),
            ]
        self.net = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in -1..1 -> [B,1,h,w]."""
        return self.net(images)

    def judged(self, images: Tensor) -> Tensor:
        """The same, with gradients to the images alone."""
        return functional_call(self, {n: t.detach() for n, t in self.state_dict(keep_vars=True).items()}, (images,))


def hinge(critic: Critic, images: Tensor, made: Tensor) -> Tensor:
    """What the critic minimises: E max(0, 1 - D(x)) / 2 + E max(0, 1 + D(G)) / 2, [B]."""
    real, false = critic(images).flatten(1).float(), critic(made.detach()).flatten(1).float()
    return (F.relu(1 - real) + F.relu(1 + false)).mean(1) / 2


def balanced(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """lambda of eq. 7: |gradient of the reconstruction loss| / (|that of the adversarial one| + delta), at `last`."""
    one, two = (torch.autograd.grad(loss, last, retain_graph=True)[0].float().norm() for loss in (reconstruction, adversarial))
    return (one / (two + DELTA)).clamp(max=LARGEST).detach()
