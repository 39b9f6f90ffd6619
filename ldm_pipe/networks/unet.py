"""The cross-attention U-Net as a Network (Rombach et al. 2022, arXiv 2112.10752, section 3.3): the light one or diffusers'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.cond import Cond


class UNet(nn.Module):
    """A cross-attention U-Net. `unet`: a light UNet or a UNet2DConditionModel; its time is the path's (0..T-1, or u * 1000)."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """x [B,C,H,W] (with cond.channels joined behind it), time [B], tokens [B,L,D] -> [B,C,H,W]."""
        if cond.channels is not None:
            x = torch.cat([x, cond.channels.to(x)], dim=1)
        assert cond.tokens is not None
        tokens = cond.tokens.to(x.dtype)
        return self.unet(x, time, encoder_hidden_states=tokens, return_dict=False)[0]
