"""T2I-Adapter equals diffusers' pipeline, alone and with weights, and reads its picture once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_pipe import UsageError
from ldm_pipe.blocks import Down
from ldm_pipe.control.controlnet import ControlNet
from ldm_pipe.control.t2i_adapter import T2IAdapter
from ldm_pipe.level import Level
from ldm_pipe.networks import light_unet
from ldm_pipe.networks.stages import DownStage, Shape
from ldm_pipe.patch import Run

Draw = Callable[..., Tensor]
PIPELINE = "StableDiffusionAdapterPipeline"


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_one(ours: Draw, theirs: Draw, adapters: list[Any], hints: list[Tensor]) -> None:
    expected = theirs(PIPELINE, {"adapter": adapters[0]}, image=hints[0], adapter_conditioning_scale=0.6)
    close(ours(T2IAdapter.of(adapters[0], hints[0], scale=0.6)), expected)
    assert not torch.allclose(ours(), expected, atol=0.1)


def test_two_with_weights(ours: Draw, theirs: Draw, adapters: list[Any], hints: list[Tensor]) -> None:
    from diffusers import MultiAdapter

    both = {"adapter": MultiAdapter(adapters)}
    expected = theirs(PIPELINE, both, image=hints, adapter_conditioning_scale=[0.6, 0.3])
    one, two = T2IAdapter.of(adapters[0], hints[0], scale=0.6), T2IAdapter.of(adapters[1], hints[1], scale=0.3)
    close(ours(one, two), expected)
    close(ours(two, one), expected)


def test_it_is_read_once_an_image(ours: Draw, adapters: list[Any], hints: list[Tensor]) -> None:
    calls = 0

    def hook(*args: Any) -> None:
        nonlocal calls
        calls += 1

    handle = adapters[0].register_forward_hook(hook)
    ours(T2IAdapter.of(adapters[0], hints[0]))
    handle.remove()
    assert calls == 1


def test_an_empty_window_changes_no_bit(ours: Draw, adapters: list[Any], hints: list[Tensor]) -> None:
    assert torch.equal(ours(T2IAdapter.of(adapters[0], hints[0], lo=0.4, hi=0.4)), ours())


def test_with_a_controlnet(ours: Draw, adapters: list[Any], nets: list[Any], hints: list[Tensor]) -> None:
    """Both act, in any order."""
    control, adapter = ControlNet(nets[0], hints[0]), T2IAdapter.of(adapters[0], hints[1])
    both = ours(control, adapter)
    close(ours(adapter, control), both)
    assert not torch.allclose(both, ours(control), atol=0.1)
    assert not torch.allclose(both, ours(adapter), atol=0.1)


def test_too_many_sizes_are_refused(adapters: list[Any], hints: list[Tensor]) -> None:
    patch = T2IAdapter(tuple(torch.zeros(1, 1, 1, 1) for _ in range(4)))
    unet = nn.Module()
    unet.down_blocks, unet.mid_block, unet.up_blocks = (
        nn.ModuleList([nn.Identity(), nn.Identity()]),
        nn.Identity(),
        nn.ModuleList(),
    )
    with pytest.raises(UsageError, match="4 sizes, the network's way down 2"):
        patch.changes(unet, Run((Level(0.1, 0.9), Level(1.0, 0.0))))


@torch.no_grad()
def test_the_light_network_takes_residuals_as_diffusers_does(tmp_path: Any) -> None:
    """In float64, also where a stage without transformers is halved after it (SDXL's first)."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    types = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    config: dict[str, Any] = {**types, "block_out_channels": (8, 16), "cross_attention_dim": 12, "norm_num_groups": 4}
    net = UNet2DConditionModel(**config, attention_head_dim=2, layers_per_block=2).double().eval()
    for weight in net.parameters():
        nn.init.normal_(weight, 0.02, 0.2)
    ours = light_unet.UNet(light_unet.Config(**config, attention_head_dim=2, layers_per_block=2)).double()
    ours.load_state_dict(net.state_dict())
    x, tokens, time = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 5, 12).double(), torch.tensor([9.0, 800.0])
    sizes = [(8, 8)] * 3 + [(8, 4)] + [(16, 4)] * 2
    down = [torch.randn(2, c, s, s).double() for c, s in sizes]
    given: dict[str, Any] = {
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": torch.randn(2, 16, 4, 4).double(),
    }
    for inside in (
        None,
        [torch.randn(2, 8, 4, 4), torch.randn(2, 16, 4, 4)],
        [torch.randn(2, 8, 4, 4), *[torch.randn(2, 16, 4, 4)] * 2],
    ):
        added = {} if inside is None else {"down_intrablock_additional_residuals": [t.double() for t in inside]}
        copies = {n: [t.clone() for t in v] for n, v in added.items()}
        expected = net(x, time, encoder_hidden_states=tokens, return_dict=False, **given, **copies)[0]
        found = ours(x, time, encoder_hidden_states=tokens, **given, **added)[0]
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-10


@pytest.mark.parametrize("layers", [0, 2])
def test_a_stage_that_only_halves_is_fed_before_it_halves(layers: int) -> None:
    """Features of the size of what a stage without attention is given join that, and the skip that leaves it there."""
    torch.manual_seed(0)
    stage = DownStage(Shape(4, 1e-5, 8, False, False, 16), [8] * layers, 8, None)
    stage.downsamplers = nn.ModuleList([Down(8)])
    for weight in stage.parameters():
        nn.init.normal_(weight, 0.02, 0.2)
    x, vector, tokens, added = torch.randn(2, 8, 8, 8), torch.randn(2, 8), torch.randn(2, 5, 16), torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        plain, before = stage(x, vector, tokens)
        fed, after = stage(x, vector, tokens, added)
        inner = before[-2] if layers else x
        close(fed, stage.downsamplers[0](inner + added))
        small = stage(x, vector, tokens, added[..., :4, :4])[0]  # of the size of what it gives, as before
    close(small, plain + added[..., :4, :4])
    assert [t.shape for t in after] == [t.shape for t in before]
    if layers:
        close(after[-2], before[-2] + added)
        assert torch.equal(after[0], before[0])
