"""Controls of every family that has them: the finished latents are those of diffusers' pipeline."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from ldm_pipe import UsageError
from ldm_pipe.control.controlnet import KINDS, ControlNet
from ldm_pipe.control.flux_controlnet import FluxControlNet
from ldm_pipe.control.sana_controlnet import SanaControlNet
from ldm_pipe.control.sd3_controlnet import SD3ControlNet
from ldm_pipe.doors.controls import Controls
from ldm_pipe.doors.steering import Window
from ldm_pipe.level import Level
from ldm_pipe.networks.flux import Flux
from ldm_pipe.patch import Run

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
controls = importlib.import_module("tiny_controls")


@pytest.mark.parametrize("name", controls.CASES)
def test_the_finished_latents_equal_diffusers(name: str, tmp_path: Path) -> None:
    """Same folders, picture, prompts, start and steps, guidance included: 1e-4 of the largest value in fp32."""
    found, expected = controls.both(name, tmp_path)
    assert expected.abs().max() > 0.5
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_union_network_is_told_the_kind() -> None:
    """And networks that want more than this model has are refused."""
    flux = importlib.import_module("tiny_families").flux
    dev, schnell = (Flux(flux(embeds).transformer, 1.0) for embeds in (True, False))
    run, hint = Run((Level(0.1, 0.9), Level(1.0, 0.0))), torch.zeros(1, 4, 16)
    union, plain = controls.flux_controlnet(num_mode=3), controls.flux_controlnet()
    for mode in (None, -1, 3):
        with pytest.raises(UsageError, match=f"a mode from 0 to 2, got {mode}"):
            FluxControlNet(union, hint, mode=mode).changes(dev, run)
    with pytest.raises(UsageError, match="takes no mode, got 0"):
        FluxControlNet(plain, hint, mode=0).changes(dev, run)
    with pytest.raises(UsageError, match="XLabs"):
        FluxControlNet(controls.flux_controlnet(conditioning_embedding_channels=4), hint).changes(dev, run)
    with pytest.raises(UsageError, match="told the guidance scale"):
        FluxControlNet(plain, hint).changes(schnell, run)
    assert set(FluxControlNet(plain, hint).changes(dev, run)) == {"transformer"}


def test_a_union_network_of_xl_is_told_a_word(tmp_path: Path) -> None:
    """Each kind of picture steers otherwise; one that it was not trained on, or none, is refused with those that it knows; two
    networks add up as diffusers' do, each told its own."""
    union, plain = controls.lively(controls.union(), 1.3), controls.controlnet()
    model, hint = importlib.import_module("tiny_families").sdxl().unet, torch.rand(1, 3, 32, 64)
    few = controls.union(num_control_type=6)
    for network, kind, words in (
        (union, "", "a mode: pose, depth, hed, scribble, canny, lineart, mlsd, normal, segment, tile, repaint"),
        (union, "3", "a mode: pose"),
        (few, "tile", "a mode: .*, normal, segment$"),
        (plain, "pose", "no mode"),
    ):
        with pytest.raises(UsageError, match=f"this network takes {words}"):
            ControlNet(network, hint, kind=kind).changes(model, Run((Level(0.1, 0.9), Level(1.0, 0.0))))
    x, tokens, added = torch.randn(2, 4, 8, 16), torch.randn(2, 5, 40), {"text_embeds": torch.randn(2, 20)}
    given = {"encoder_hidden_states": tokens, "added_cond_kwargs": {**added, "time_ids": torch.ones(2, 6)}}
    found = {kind: ControlNet(union, hint, 0.7, kind=kind)._residuals(x, torch.tensor(9), given)[1] for kind in KINDS}
    assert torch.equal(found["canny"], found["mlsd"])
    numbers = {number: found[kind] for kind, number in KINDS.items()}
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in numbers.items() for j, b in numbers.items() if i < j)
    with torch.no_grad():
        marks = torch.zeros(2, 8).index_fill_(1, torch.tensor(1), 1)
        kinds = {"control_type": marks, "control_type_idx": [1]}
        _, expected = union(x, 9, **given, controlnet_cond=[hint.expand(2, -1, -1, -1)], **kinds, return_dict=False)
    torch.testing.assert_close(found["depth"], 0.7 * expected, rtol=1e-5, atol=1e-5)


def test_each_control_has_its_own_mode() -> None:
    window = Window(mode="depth, canny,")
    assert [window.of(k, 3).mode for k in range(3)] == ["depth", "canny", None]
    assert [Window(mode="2,tile").of(k, 2).mode for k in range(2)] == [2, "tile"]
    assert Window(mode="depth").of(1, 3).mode == "depth"
    with pytest.raises(UsageError, match="one for each --control, or one; got 3 for 2"):
        Controls.of(["a", "b"], 2, (), {"mode": "depth,canny,"})


def test_two_of_one_depth_add_up(tmp_path: Path) -> None:
    """Two at half the scale are one; of two depths they are refused."""
    from ldm_pipe import Pipeline
    from ldm_pipe.plan import patched

    for name, make, cls, shape, other in (
        ("sd3", controls.sd3_controlnet, SD3ControlNet, (1, 4, 8, 8), {"num_layers": 2}),
        ("flux dev", controls.flux_controlnet, FluxControlNet, (1, 16, 16), {"num_single_layers": 2}),
        ("sana", controls.sana_controlnet, SanaControlNet, (1, 4, 16, 16), {"num_layers": 2}),
    ):
        folder = importlib.import_module("tiny_families").save(name, tmp_path / name / "model")
        pipe, hint = Pipeline.from_pretrained(str(folder), "cpu", "fp32"), torch.randn(shape)
        whole = pipe.plan("a fox", steps=2, height=32, width=32, seed=1)

        def drawn(*patches: object, pipe: Pipeline = pipe, whole: object = whole) -> torch.Tensor:
            return next(pipe.run(patched(whole, pipe.bundle.model, patches))).latents  # type: ignore[arg-type]

        one, deep = controls.lively(make(), 0.8), controls.lively(make(**other), 0.8)
        whole_scale, half = cls(one, hint, 1.0), cls(one, hint, 0.5)
        torch.testing.assert_close(drawn(half, half), drawn(whole_scale), rtol=1e-4, atol=1e-3)
        assert not torch.allclose(drawn(half), drawn(whole_scale), atol=0.1)
        with pytest.raises(UsageError, match="blocks do not add up"):
            drawn(half, cls(deep, hint))
