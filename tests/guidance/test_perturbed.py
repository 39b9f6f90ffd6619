"""Guidance by a worse version of the same network: what is perturbed is what the papers perturb, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_pipe import CFG, EPS, VP, Cond, Flow, Level, Model, UsageError, guided, load
from ldm_pipe.attention import attention_rule, grid
from ldm_pipe.guidance.pag import PAG
from ldm_pipe.guidance.sag import SAG
from ldm_pipe.guidance.seg import SEG
from ldm_pipe.guidance.skip_layer import SkipLayer, skip
from ldm_pipe.model import Branches
from ldm_pipe.patch import changed
from ldm_pipe.perturb import blurred, self_attentions

LEVEL = VP.scaled_linear().level(500)
GENERATOR = torch.Generator().manual_seed(4)
X = torch.randn(2, 4, 8, 8, generator=GENERATOR)
TOKENS = {n: torch.randn(2, 8, 16, generator=GENERATOR) for n in ("cond", "uncond")}
MIDDLE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture(scope="module")
def run(tiny: Callable[..., Path]) -> Branches:
    model = load(tiny("eps")).model
    return model.branches(**{n: Cond(tokens=t) for n, t in TOKENS.items()})


def difference(run: Branches, rule: Any) -> Tensor:
    """(good - bad) of a rule with scale 1 that wraps CFG(1), as noise."""
    return guided(run, rule)(X, LEVEL).noise - run(X, LEVEL, ("cond",))["cond"].noise


def test_pag_is_that_of_diffusers(run: Branches, tiny: Callable[..., Path]) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

    unet = UNet2DConditionModel.from_pretrained(tiny("eps") / "unet").eval()
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(PAGIdentitySelfAttnProcessor2_0())
    with torch.no_grad():
        both = unet(torch.cat([X, X]), 500, torch.cat([TOKENS["cond"]] * 2)).sample
    good, bad = both.chunk(2)
    expected = good - bad
    assert float(expected.abs().max()) > 1e-4
    assert torch.allclose(difference(run, PAG(1.0)), expected, atol=1e-5)


def test_pag_joins_a_rule_and_counts_one_more(run: Branches) -> None:
    run.evaluations.clear()
    alone, plain = difference(run, PAG(1.0)), guided(run, CFG(3.0))(X, LEVEL).noise
    run.evaluations.clear()
    found = guided(run, PAG(2.0, rule=CFG(3.0)))(X, LEVEL)
    assert torch.allclose(found.noise, plain + 2 * alone, atol=1e-5)
    assert run.evaluations == {"cond": 2, "uncond": 2, "pag": 2}
    other = guided(run, PAG(2.0, layers="up_blocks.1", rule=CFG(3.0)))(X, LEVEL)
    assert not torch.allclose(other.noise, found.noise, atol=1e-4)


def test_seg_smooths_the_queries(run: Branches) -> None:
    """A kernel narrower than a position changes nothing; the mean is the limit of wide ones and gives all positions one map."""
    assert float(difference(run, SEG(1.0, 0.05)).abs().max()) < 1e-6
    mean = difference(run, SEG(1.0, None))
    assert float(mean.abs().max()) > 1e-5
    assert torch.allclose(difference(run, SEG(1.0, 1e4)), mean, atol=1e-6)
    assert not torch.allclose(difference(run, SEG(1.0, 1.0)), mean, atol=1e-5)
    seen = []

    class Watch:
        def __call__(self, site: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
            seen.append((site.name, site.cross, out))
            return out

    network: Any = run.model.network
    with attention_rule(network, Watch()):
        guided(run, SEG(1.0, None))(X, LEVEL)
    blurred_maps = {name for name, cross, out in seen if not cross and torch.allclose(out, out[:, :, :1].expand(out.shape))}
    assert blurred_maps == {MIDDLE}


def test_blurring_is_a_gaussian_that_keeps_constants() -> None:
    impulse = torch.zeros(1, 15, 15).double()
    impulse[0, 7, 7] = 1
    found = blurred(impulse, 1.5)
    distance = torch.arange(15).double() - 7
    expected = torch.exp(-(distance[:, None] ** 2 + distance**2) / (2 * 1.5**2))
    assert torch.allclose(found[0] / found[0, 7, 7], expected, atol=1e-2)
    assert torch.allclose(blurred(torch.full((2, 3, 5), 4.0), 2.0), torch.full((2, 3, 5), 4.0))
    assert torch.equal(blurred(torch.arange(6.0).reshape(1, 2, 3), None), torch.full((1, 2, 3), 2.5))


def test_sag_blurs_where_attention_looks(run: Branches) -> None:
    """Everywhere, nowhere, and at the positions that are looked at more than the mean of all."""
    base = run(X, LEVEL, ("uncond",))["uncond"]

    def degraded(mask: Tensor | float) -> Tensor:
        x0 = mask * blurred(base.x0, 1.0) + (1 - mask) * base.x0
        return run(LEVEL.mix(x0, base.noise), LEVEL, ("uncond",))["uncond"].noise

    plain = run(X, LEVEL, ("cond",))["cond"].noise
    everywhere = guided(run, SAG(2.0, looked=-1.0))(X, LEVEL)
    assert torch.allclose(everywhere.noise - plain, 2 * (base.noise - degraded(1.0)), atol=1e-5)
    assert torch.allclose(LEVEL.mix(everywhere.x0, everywhere.noise), X, atol=1e-5)
    assert float(difference(run, SAG(2.0, looked=1e9)).abs().max()) < 1e-5
    maps = []

    class Watch:
        def __call__(self, site: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
            if site.name == MIDDLE:
                maps.append(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1).mean(1))  # [B,L,L]
            return out

    with attention_rule(run.model.network, Watch()):  # type: ignore[arg-type]
        run(X, LEVEL, ("uncond",))
    looked = maps[0].sum(1)
    assert torch.allclose(looked.mean(1), torch.ones(2), atol=1e-5)
    mask = (looked > 1).float().reshape(2, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert 0 < float(mask.mean()) < 1
    assert torch.allclose(difference(run, SAG(2.0)), 2 * (base.noise - degraded(mask)), atol=1e-5)


def test_sag_takes_three_evaluations_with_cfg(run: Branches) -> None:
    run.evaluations.clear()
    guided(run, SAG(rule=CFG(3.0)))(X, LEVEL)
    assert run.evaluations == {"cond": 2, "uncond": 2, "sag": 2}
    run.evaluations.clear()
    guided(run, SAG(rule=CFG(1.0), source="cond"))(X, LEVEL)
    assert run.evaluations == {"cond": 2, "sag": 2}


def test_a_skipped_layer_gives_back_what_it_was_given(run: Branches, monkeypatch: pytest.MonkeyPatch) -> None:
    found = difference(run, SkipLayer(1.0, "mid_block"))
    good = run(X, LEVEL, ("cond",))["cond"].noise
    network: Any = run.model.network
    monkeypatch.setattr(network.unet.mid_block.attentions[0].transformer_blocks[0], "forward", lambda x, *rest: x)
    bad = run(X, LEVEL, ("cond",))["cond"].noise
    assert torch.allclose(found, good - bad, atol=1e-6)
    assert float(found.abs().max()) > 1e-4


def test_skip_layer_is_that_of_diffusers_for_stable_diffusion_3() -> None:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8,
    ).eval()  # fmt: skip

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, x: Tensor, time: Tensor, cond: Cond, **more: Any) -> Tensor:
            assert cond.tokens is not None
            found: Tensor = self.inner(x, cond.tokens, cond.pooled, time, return_dict=False, **more)[0]
            return found

    cond = Cond(tokens=TOKENS["cond"], pooled=TOKENS["cond"][:, 0])
    run = Model(Wrapped(), VP.scaled_linear(), EPS).branches(cond=cond)
    time = torch.full((2,), 500.0)
    with torch.no_grad():
        for skip in ([1], [0, 3]):
            layers = ", ".join(f"transformer_blocks.{k}" for k in skip)
            bad = Wrapped()(X, time, cond, skip_layers=skip)
            assert torch.allclose(difference(run, SkipLayer(1.0, layers)), Wrapped()(X, time, cond) - bad, atol=1e-5)


def test_skip_layer_acts_inside_its_interval(run: Branches) -> None:
    rule = SkipLayer(2.0, "", 0.3, 0.6)
    for u, inside in ((0.29, False), (0.3, True), (0.59, True), (0.6, False), (1.0, False)):
        assert rule.needs(Level(1 - u, u)) == (("cond", "skipped") if inside else ("cond",))
    assert SkipLayer(2.0).needs(Level(0.0, 1.0)) == ("cond", "skipped")
    with pytest.raises(UsageError, match="0 <= lo <= hi <= 1"):
        SkipLayer(1.0, "", 0.6, 0.3)


def test_a_layer_is_skipped_in_one_thread_alone(run: Branches) -> None:
    network: Any = run.model.network
    before, seen = run(X, LEVEL, ("cond",))["cond"].x0, []
    layer = network.unet.mid_block.attentions[0].transformer_blocks[0]
    with changed(network, {"unet.mid_block.attentions.0.transformer_blocks.0": [skip]}):
        other = threading.Thread(target=lambda: seen.append(run(X, LEVEL, ("cond",))["cond"].x0))
        other.start()
        other.join()
        inside = run(X, LEVEL, ("cond",))["cond"].x0
    assert torch.equal(seen[0], before)
    assert not torch.equal(inside, before)
    assert "forward" not in layer.__dict__


class Ten(nn.Module):
    """Twelve layers that attend, as a transformer names them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn1": nn.Identity(), "attn2": nn.Identity()}) for _ in range(12))
        for block in self.blocks:
            for layer in block.values():  # type: ignore[operator]
                layer.takes_rules = True


def test_layers_are_chosen_by_parts_of_their_names(run: Branches) -> None:
    assert list(self_attentions(run.model.network)) == [MIDDLE]
    assert list(self_attentions(Ten())) == ["blocks.6.attn1"]
    assert list(self_attentions(Ten(), "blocks.1")) == ["blocks.1.attn1"]
    assert list(self_attentions(Ten(), "blocks.10, blocks.2")) == ["blocks.2.attn1", "blocks.10.attn1"]
    assert len(self_attentions(Ten(), "attn1")) == 12


@pytest.mark.parametrize("layers", ["block", "locks.1", "blocks.12", "blocks.1,", "attn2"])
def test_an_unknown_layer_is_an_error_that_lists_the_known(layers: str) -> None:
    with pytest.raises(UsageError, match=r"no self-attention; there are blocks.0.attn1, blocks.1.attn1"):
        self_attentions(Ten(), layers)


def test_what_cannot_be_perturbed_is_refused_by_name(x: Tensor) -> None:
    plain = Model(lambda x, time, cond: x, Flow(), EPS).branches(cond=Cond(), uncond=Cond())
    for rule in (PAG(), SEG(), SAG(), SkipLayer()):
        with pytest.raises(UsageError, match="has no self-attention to perturb"):
            guided(plain, rule)
    with pytest.raises(UsageError, match="positions of attention are no map of 8x8"):
        grid(7, *X.shape[2:])
    with pytest.raises(UsageError, match="blur is 0"):
        SEG(1.0, 0.0)


@pytest.mark.parametrize(
    ("size", "positions", "expected"), [((8, 8), 16, (4, 4)), ((6, 10), 15, (3, 5)), ((5, 9), 15, (3, 5)), ((7, 2), 2, (2, 1))]
)
def test_the_grid_of_a_feature_map(size: Any, positions: int, expected: Any) -> None:
    assert grid(positions, *size) == expected
