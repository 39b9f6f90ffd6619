"""Larger images: each change is what its paper says, in closed form where there is one."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.cond import ROWS, Rows
from ldm_pipe.level import Level
from ldm_pipe.networks.light_unet import Config, UNet
from ldm_pipe.patch import Patch, Run, changed
from ldm_pipe.resolution.attention_scale import AttentionScale
from ldm_pipe.resolution.hidiffusion import HiDiffusion, joined, windows
from ldm_pipe.resolution.scalecrafter import ScaleCrafter, dispersed, dispersion, redilated
from ldm_pipe.resolution.tiles import Tiles, starts

WALK = tuple(Level(k / 10, 1 - k / 10) for k in range(11))  # ten steps


@pytest.fixture(scope="module")
def unet() -> UNet:
    """Three stages, attention in all of them, trained on 8x8."""
    torch.manual_seed(0)
    config = Config(
        block_out_channels=(8, 8, 8), down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3, cross_attention_dim=12, norm_num_groups=4, attention_head_dim=2,
        layers_per_block=1, sample_size=8,
    )  # fmt: skip
    found = UNet(config).double().requires_grad_(False)
    for weight in found.parameters():
        nn.init.normal_(weight, 0.02, 0.2)
    return found


@pytest.fixture(scope="module")
def below() -> UNet:
    """Three stages as in SDXL: the first does not attend, the others do in two blocks."""
    torch.manual_seed(1)
    config = Config(
        block_out_channels=(8, 8, 8), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=12, norm_num_groups=4,
        attention_head_dim=2, layers_per_block=2, sample_size=8,
    )  # fmt: skip
    found = UNet(config).double().requires_grad_(False)
    for weight in found.parameters():
        nn.init.normal_(weight, 0.02, 0.2)
    return found


def shapes(unet: UNet, patch: Patch, step: int, side: int, *names: str) -> dict[str, tuple[int, ...]]:
    """What modules give, at a step."""
    found: dict[str, tuple[int, ...]] = {}

    def watching(name: str) -> Callable[..., Any]:
        def change(call: Callable[..., Any], *args: Any, **given: Any) -> Any:
            out = call(*args, **given)
            found[name] = tuple((out[0] if isinstance(out, tuple) else out).shape[-2:])
            return out

        return change

    with changed(unet, {n: [watching(n)] for n in names}):
        ask(unet, patch, step, torch.randn(1, 4, side, side).double())
    return found


def ask(unet: Any, patch: Patch, step: int, x: Tensor) -> Tensor:
    """The network's output at a step under a patch."""
    token = ROWS.set(Rows(("cond",), len(x), WALK[step]))
    try:
        with changed(unet, {n: [c] for n, c in patch.changes(unet, Run(WALK)).items()}):
            tokens = torch.randn(1, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            return unet(x, torch.tensor([500.0]), encoder_hidden_states=tokens.expand(len(x), -1, -1))[0]
    finally:
        ROWS.reset(token)


def picture(side: int, seed: int = 3) -> Tensor:
    return torch.randn(1, 4, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_at_the_size_of_training_attention_is_not_scaled(unet: UNet) -> None:
    x = picture(8)
    assert torch.equal(ask(unet, AttentionScale(), 0, x), ask(unet, AttentionScale(strength=0.0), 0, x))
    assert not torch.allclose(ask(unet, AttentionScale(), 0, picture(16)), ask(unet, Tiles(99), 0, picture(16)))


def test_scaling_brings_the_entropy_back(unet: UNet) -> None:
    """Random queries and keys, D = 64: the entropy of 4096 and of 256 positions moves towards that of the 1024 of training."""
    generator = torch.Generator().manual_seed(0)

    def entropy(count: int, scale: float) -> float:
        q, k = (torch.randn(count, 64, generator=generator, dtype=torch.float64) for _ in range(2))
        p = torch.softmax(q[:64] @ k.T * scale / 8, -1)
        return float(-(p * p.log()).sum(-1).mean())

    reference = entropy(1024, 1.0)
    for count in (256, 4096):
        factor = math.sqrt(math.log(count) / math.log(1024))
        assert abs(entropy(count, factor) - reference) < abs(entropy(count, 1.0) - reference) - 0.05


def test_the_factor_is_that_of_each_layers_own_size(unet: UNet) -> None:
    """In the outermost layer 256 positions for 64, in the next 64 for 16."""
    seen: dict[str, float] = {}

    def watching(name: str, module: nn.Module) -> Callable[..., Any]:
        def change(call: Callable[..., Any], x: Tensor) -> Tensor:
            out = call(x)
            seen[name] = float((out / F.linear(x, module.weight)).median())  # type: ignore[arg-type]
            return out

        return change

    names = [f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn1.to_q" for i in (0, 1)]
    with changed(unet, {n: [watching(n, unet.get_submodule(n))] for n in names}):
        ask(unet, AttentionScale(), 0, picture(16))
    assert seen[names[0]] == pytest.approx(math.sqrt(math.log(256) / math.log(64)))
    assert seen[names[1]] == pytest.approx(math.sqrt(math.log(64) / math.log(16)))


def test_a_dilated_convolution_of_an_enlarged_image_is_the_enlarged_result() -> None:
    """d = 2 and nearest 2x: exact inside. d = 1 is the convolution."""
    conv = nn.Conv2d(3, 5, 3, padding=1).double().requires_grad_(False)
    x = torch.randn(2, 3, 6, 6).double()
    torch.testing.assert_close(redilated(x, conv, 1.0), conv(x))
    large = F.interpolate(x, scale_factor=2, mode="nearest")
    torch.testing.assert_close(redilated(large, conv, 2.0), F.interpolate(conv(x), scale_factor=2, mode="nearest"))


def test_a_fractional_dilation_and_a_stride_keep_the_size() -> None:
    """And on a constant image they give what the convolution gives in the middle."""
    for stride in (1, 2):
        conv = nn.Conv2d(3, 5, 3, stride, padding=1).double().requires_grad_(False)
        for side in (12, 13):
            x = torch.ones(1, 3, side, side).double()
            for dilation in (1.5, 2.0, 2.5):
                out = redilated(x, conv, dilation)
                assert out.shape == conv(x).shape
                torch.testing.assert_close(out[..., 3:4, 3:4], conv(x)[..., 3:4, 3:4])


def test_dilation_ends_after_its_share(unet: UNet) -> None:
    x = picture(16)
    patch, none = ScaleCrafter(2.0, 0.3), ScaleCrafter(1.0)
    for step in range(10):
        assert torch.equal(ask(unet, patch, step, x), ask(unet, none, step, x)) == (step >= 3)


def test_the_outermost_stages_are_left_alone(unet: UNet) -> None:
    names = ScaleCrafter().changes(unet, Run(WALK))
    assert {n.split(".resnets")[0].split(".up")[0].split(".down")[0] for n in names} <= {
        "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1", "down_blocks", "up_blocks"
    }  # fmt: skip
    assert not any(n.startswith(("down_blocks.0.", "up_blocks.2.")) for n in names)
    assert len([n for n in names if n.startswith("mid_block")]) == 4
    only = ScaleCrafter(layers="mid_block").changes(unet, Run(WALK))
    assert {n.split(".")[0] for n in only} == {"mid_block"}
    with pytest.raises(Exception, match=r"'down_blocks\.3' is not a layer"):
        ScaleCrafter(layers="down_blocks.3").changes(unet, Run(WALK))


def test_deep_features_are_those_of_half_the_side_early_on(unet: UNet) -> None:
    patch = HiDiffusion(0.4, windows=False)
    names = ("down_blocks.0.downsamplers.0", "mid_block", "up_blocks.0", "up_blocks.1", "conv_out")
    early = shapes(unet, patch, 3, 16, *names)
    assert [early[n][0] for n in names] == [4, 2, 4, 16, 16]
    late = shapes(unet, patch, 4, 16, *names)
    assert [late[n][0] for n in names] == [8, 4, 8, 16, 16]


def test_the_halving_by_four_is_the_halving_of_every_second_pixel(unet: UNet) -> None:
    name = "down_blocks.0.downsamplers.0.conv"
    conv, x = unet.get_submodule(name), torch.randn(1, 8, 16, 16).double()
    token = ROWS.set(Rows(("cond",), 1, WALK[0]))
    with changed(unet, {name: [HiDiffusion().changes(unet, Run(WALK))[name]]}):
        found = conv(x)
    ROWS.reset(token)
    torch.testing.assert_close(found, conv(x[..., ::2, ::2]))


SIDES = ("down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1", "conv_out")


@pytest.mark.parametrize("side", [16, 18, 20, 22])
def test_where_attention_begins_below_the_features_are_pooled_there(below: UNet, side: int) -> None:
    """Also where a half or a quarter of the side is odd; after its share nothing is."""
    patch, up = HiDiffusion(0.4, windows=False), "up_blocks.1.attentions.{}".format
    names = ("down_blocks.1.resnets.0", "down_blocks.1.resnets.1", up(0), up(1), "up_blocks.1.resnets.2", *SIDES)
    half, quarter, eighth = side // 2, -(-side // 4), -(-side // 8)
    found, late = shapes(below, patch, 3, side, *names), shapes(below, patch, 4, side, *names)
    assert [found[n][0] for n in names] == [half, quarter, quarter, half, half, eighth, eighth, quarter, side, side]
    assert [late[n][0] for n in names] == [half, half, half, half, half, quarter, quarter, half, side, side]


def test_a_second_stage_lies_within_the_first_or_takes_its_place(unet: UNet, below: UNet) -> None:
    """Ten steps: the second lasts for two, the first for five. Sides of the middle and of what is nowhere smaller, by step."""
    plain = shapes(unet, HiDiffusion(0.0, False), 0, 32, "mid_block", "up_blocks.1")
    assert plain == {"mid_block": (8, 8), "up_blocks.1": (32, 32)}
    for net, within in ((unet, (2, 4, 8)), (below, (2, 4, 8))):
        for patch, early in ((HiDiffusion(0.5, False, 0.2), within[0]), (HiDiffusion(0.5, False, 0.2, True), within[1])):
            found = [shapes(net, patch, step, 32, "mid_block", "conv_out") for step in (0, 1, 2, 4, 5)]
            assert [f["mid_block"][0] for f in found] == [early, early, within[1], within[1], within[2]]
            assert all(f["conv_out"] == (32, 32) for f in found)
    instead = HiDiffusion(0.5, False, 0.2, True)
    by_step = [shapes(below, instead, step, 32, "down_blocks.1.resnets.1")["down_blocks.1.resnets.1"] for step in (1, 2)]
    assert by_step == [(16, 16), (8, 8)], "first halved by four behind the stage, then pooled within it"
    x = picture(32)
    assert torch.equal(ask(below, instead, 5, x), ask(below, HiDiffusion(0.0, False), 5, x))


@pytest.mark.parametrize("patch", [HiDiffusion(0.5, True, 0.2), HiDiffusion(0.5, False, 0.2, True)])
def test_the_network_of_diffusers_agrees_where_a_size_is_odd(below: UNet, patch: HiDiffusion) -> None:
    """It is not told the sizes on its way up where those of the latent are whole."""
    from diffusers import UNet2DConditionModel

    c = below.config
    kinds = {"down_block_types": c.down_block_types, "up_block_types": c.up_block_types, "cross_attention_dim": 12}
    theirs = UNet2DConditionModel(
        block_out_channels=(8, 8, 8), norm_num_groups=4, attention_head_dim=2, layers_per_block=2, **kinds
    ).double()  # fmt: skip
    theirs.load_state_dict(below.state_dict())
    theirs.requires_grad_(False)
    x = picture(20)
    for step in (0, 3, 9):
        torch.testing.assert_close(ask(theirs, patch, step, x), ask(below, patch, step, x))


def test_what_is_pooled_is_a_mean_and_comes_back_by_bicubic(below: UNet) -> None:
    down, up, x = "down_blocks.1.attentions.0", "up_blocks.1.attentions.1", picture(16)
    seen: dict[str, list[Tensor]] = {down: [], up: []}

    def keep(name: str) -> Callable[..., Any]:
        def change(call: Callable[..., Any], *args: Any) -> Any:
            seen[name].append(call(*args))
            return seen[name][-1]

        return change

    token = ROWS.set(Rows(("cond",), 1, WALK[0]))
    changes: dict[str, Any] = {n: [c] for n, c in HiDiffusion(windows=False).changes(below, Run(WALK)).items()}
    with changed(below, {n: [keep(n), *cs, keep(n)] if n in seen else cs for n, cs in changes.items()}):
        below(x, torch.tensor([500.0]), torch.randn(1, 5, 12).double())
    ROWS.reset(token)
    assert torch.equal(F.avg_pool2d(seen[down][0], 2), seen[down][1])
    assert torch.equal(F.interpolate(seen[up][0], size=(8, 8), mode="bicubic"), seen[up][1])


def test_windows_lie_where_attention_begins(below: UNet) -> None:
    names = HiDiffusion(0.0).changes(below, Run(WALK))
    assert {n.rsplit(".attentions", 1)[0] for n in names if n} == {"down_blocks.1", "up_blocks.1"}
    x = picture(16)
    assert not torch.allclose(ask(below, HiDiffusion(0.0), 0, x), ask(below, HiDiffusion(0.0, False), 0, x))


def test_a_network_without_the_second_stage_says_so(unet: UNet) -> None:
    config = Config(
        block_out_channels=(8, 8), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=12, attention_head_dim=2,
    )  # fmt: skip
    with pytest.raises(Exception, match=r"no down_blocks\.1\.attentions\.0"):
        HiDiffusion(second=0.3).changes(UNet(config), Run(WALK))
    with pytest.raises(Exception, match="second takes 0 to 1"):
        HiDiffusion(second=1.5)


def test_dispersed_kernels_are_the_nearest_ones() -> None:
    """A single pixel stays one; sums are kept but for 5%; the residual is that of the least squares, .18; on a smooth image of
    twice the size they give the enlarged result, nearer than the dilated kernels do."""
    r = dispersion()
    assert r.shape == (25, 9)
    torch.testing.assert_close(r[:, 4], F.one_hot(torch.tensor(12), 25).double())
    assert 0.95 < float(r.sum(0).min()) <= float(r.sum(0).max()) < 1 + 1e-9
    draw = torch.Generator().manual_seed(0)
    x, k = (torch.randn(64, 1, n, n, dtype=torch.float64, generator=draw) for n in (7, 3))
    large = F.interpolate(x, scale_factor=2, mode="bilinear")
    wanted = F.interpolate(F.conv2d(x.movedim(0, 1), k, padding=1, groups=64), scale_factor=2, mode="bilinear")

    def off(weight: Tensor, dilation: int) -> float:
        found = F.conv2d(large.movedim(0, 1), weight, padding=2, dilation=dilation, groups=64)
        return float((found - wanted).norm() / wanted.norm())

    best = off(dispersed(k), 1)
    assert best == pytest.approx(0.18, abs=0.02)
    assert best < off(k, 2) - 0.01


def test_dispersion_halves_the_dilation_and_ends_first(unet: UNet) -> None:
    x, conv = picture(16), nn.Conv2d(4, 6, 3, padding=1).double().requires_grad_(False)
    for dilation in (1.0, 2.0):
        whole = int(dilation)
        plain = F.conv2d(x, dispersed(conv.weight), conv.bias, padding=2 * whole, dilation=whole)
        torch.testing.assert_close(redilated(x, conv, dilation, True), plain)
    halved = nn.Conv2d(4, 6, 3, 2, padding=1).double().requires_grad_(False)
    assert redilated(x, halved, 1.5, True).shape == halved(x).shape
    patch, dilated, none = ScaleCrafter(2.0, 0.6, "", 0.3), ScaleCrafter(2.0, 0.6), ScaleCrafter(1.0)
    for step in range(10):
        found = ask(unet, patch, step, x)
        assert torch.equal(found, ask(unet, dilated, step, x)) == (step >= 3)
        assert torch.equal(found, ask(unet, none, step, x)) == (step >= 6)
    conv_in, mid = "mid_block.resnets.0.conv1", picture(8)[:, :4].repeat(1, 2, 1, 1)
    token, change = ROWS.set(Rows(("cond",), 1, WALK[0])), patch.changes(unet, Run(WALK))[conv_in]
    inner: Any = unet.get_submodule(conv_in)
    torch.testing.assert_close(change(inner, mid), redilated(mid, inner, 1.0, True))
    ROWS.reset(token)
    for wrong in ({"dispersed": 0.7}, {"dispersed": 0.1, "dilation": 1.5}):
        with pytest.raises(Exception, match="dispersed takes 0 to share"):
            ScaleCrafter(**wrong)


def test_windows_take_an_image_apart_and_join_it() -> None:
    x = torch.arange(2 * 8 * 12 * 3.0).reshape(2, 96, 3)
    for quarter in range(4):
        parts = windows(x, 8, 12, quarter)
        assert [p.shape for p in parts] == [(2, 24, 3)] * 4
        assert torch.equal(joined(parts, 8, 12, quarter), x)
    first = {q: float(windows(x, 8, 12, q)[0][0, 0, 0]) for q in range(4)}
    assert first == {q: 3.0 * (12 * q + 6 * q // 4) for q in range(4)}


def test_windowed_attention_is_attention_of_each_quarter(unet: UNet) -> None:
    """What one window sees does not depend on the others."""
    name, counts = "down_blocks.0.attentions.0.transformer_blocks.0.attn1", list[int]()

    def watch(call: Callable[..., Any], x: Tensor) -> Tensor:
        counts.append(x.shape[1])
        return call(x)

    with changed(unet, {name: [watch]}):
        ask(unet, HiDiffusion(0.0), 0, picture(16))
    assert counts == [256], "the change that was there before stands outside"
    inner: list[int] = []

    def see(call: Callable[..., Any], x: Tensor) -> Tensor:
        inner.append(x.shape[1])
        return call(x)

    changes: dict[str, Any] = {n: [c] for n, c in HiDiffusion(0.0).changes(unet, Run(WALK)).items()}
    changes[name] = [see, *changes[name]]
    with changed(unet, changes):
        unet(picture(16), torch.tensor([500.0]), torch.randn(1, 5, 12).double())
    assert inner == [64] * 4


def test_an_odd_size_attends_as_a_whole(unet: UNet) -> None:
    x = picture(9)
    assert torch.equal(ask(unet, HiDiffusion(0.0), 0, x), ask(unet, HiDiffusion(0.0, windows=False), 0, x))


def test_tiles_cover_and_overlap() -> None:
    for length, size, overlap in ((16, 8, 0.5), (17, 8, 0.5), (64, 16, 0.25), (8, 8, 0.5), (5, 8, 0.5), (9, 8, 0.0)):
        found = starts(length, size, overlap)
        assert found[0] == 0
        assert found[-1] == max(0, length - size)
        assert all(b - a <= max(1, size * (1 - overlap)) + 0.5 for a, b in pairwise(found))


def test_a_tile_is_answered_alone_and_overlaps_are_means(unet: UNet) -> None:
    x = torch.randn(1, 4, 8, 12).double()
    out = ask(unet, Tiles(8, 0.5), 0, x)
    left, right = (ask(unet, Tiles(99), 0, x[..., k : k + 8]) for k in (0, 4))
    torch.testing.assert_close(out[..., :4], left[..., :4])
    torch.testing.assert_close(out[..., 8:], right[..., 4:])
    torch.testing.assert_close(out[..., 4:8], (left[..., 4:] + right[..., :4]) / 2)
