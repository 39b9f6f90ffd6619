"""A ControlNet with a number of layers for every resolution: diffusers' own where they are alike, zero at first, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from ldm_pipe import ModelError
from ldm_pipe.doors.steering import read
from ldm_pipe.networks.level_controlnet import LevelControlNet
from ldm_pipe.parts import foreign

SHAPE: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16, 16), "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 16,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 2,
}  # fmt: skip
WIDTHS = (4, 8)


def unet(layers: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(layers_per_block=layers, **SHAPE).eval()


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x, tokens = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 16, generator=g)
    return x, torch.tensor([20.0, 500.0]), tokens, torch.rand(2, 3, 16, 16, generator=g)


@torch.no_grad()
def out(net: Any) -> tuple[list[Tensor], Tensor]:
    x, time, tokens, hint = inputs()
    down, middle = net(x, time, tokens, controlnet_cond=hint, return_dict=False)
    return list(down), middle


def stirred(net: Any) -> Any:
    torch.manual_seed(2)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval()


@pytest.mark.parametrize("layers", [1, 2])
def test_alike_levels_are_diffusers_own(layers: int) -> None:
    frame = unet(layers)
    theirs = stirred(ControlNetModel.from_unet(frame, conditioning_embedding_out_channels=WIDTHS))
    frame.register_to_config(layers_per_block=[layers] * 3)
    ours = LevelControlNet.from_unet(frame, conditioning_embedding_out_channels=WIDTHS).eval()
    ours.load_state_dict(theirs.state_dict())
    (down, middle), (wanted, last) = out(ours), out(theirs)
    assert all(map(torch.equal, down, wanted))
    assert torch.equal(middle, last)


@pytest.mark.parametrize("layers", [(0, 1, 1), (0, 2, 1), (1, 2, 3)])
def test_it_fits_the_skips_is_zero_at_first_and_reads_what_it_copied(layers: tuple[int, ...]) -> None:
    frame = unet(layers)
    net = LevelControlNet.from_unet(frame, conditioning_embedding_out_channels=WIDTHS).eval()
    down, middle = out(net)
    assert all(float(t.abs().max()) == 0 for t in (*down, middle))
    copied = {n for n, t in net.state_dict().items() if n in frame.state_dict() and torch.equal(t, frame.state_dict()[n])}
    assert {n for n in frame.state_dict() if n.startswith(("conv_in", "time_embedding", "down_blocks", "mid_block"))} == copied
    x, time, tokens, _ = inputs()
    stirred(net)
    down, middle = out(net)
    with torch.no_grad():
        plain = frame(x, time, tokens).sample
        more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        assert frame(x, time, tokens, **more).sample.sub(plain).abs().max() > 1e-3


def test_it_is_written_and_read_back(tmp_path: Path) -> None:
    net = stirred(LevelControlNet.from_unet(unet((0, 1, 1)), conditioning_embedding_out_channels=WIDTHS))
    net.save_pretrained(tmp_path / "net")
    again = foreign(tmp_path / "net", "diffusers", "LevelControlNet")
    assert all(map(torch.equal, out(again)[0], out(net)[0]))
    assert read(tmp_path / "net").sums["sha256"]
    config = tmp_path / "net" / "config.json"
    config.write_text(config.read_text().replace("LevelControlNet", "LevelNet"))
    with pytest.raises(ModelError, match="_class_name is 'LevelNet'"):
        read(tmp_path / "net")
