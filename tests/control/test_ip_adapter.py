"""IP-Adapter equals diffusers' pipeline: every form of the file, several at once, in a window; off, it changes no bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ldm_pipe import Cond, Model, ModelError, UsageError, levels
from ldm_pipe.cond import ROWS, Rows
from ldm_pipe.control.controlnet import ControlNet
from ldm_pipe.control.ip_adapter import IPAdapter
from ldm_pipe.level import Level
from ldm_pipe.networks.image_prompt import ImageAdapter
from ldm_pipe.parts import vision
from ldm_pipe.patch import Run, changed
from ldm_pipe.vision import ImageTower

Draw = Callable[..., Tensor]
PIPELINE = "StableDiffusionPipeline"


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def picture(seed: int, size: tuple[int, int] = (41, 67)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


@pytest.fixture(scope="module")
def tower(reference: Path) -> ImageTower:
    return vision(reference / "image_encoder")


@pytest.fixture(scope="module")
def of(reference: Path, tower: ImageTower) -> Callable[..., IPAdapter]:
    """of("base", picture, ..., scale=0.6)"""

    def made(form: str, *pictures: Image.Image, **fields: Any) -> IPAdapter:
        return IPAdapter.of(ImageAdapter.of(load_file(reference / f"{form}.safetensors"), form), tower, pictures, **fields)

    return made


def loading(reference: Path, forms: list[str], scales: list[float]) -> Callable[[Any], None]:
    """Give a pipeline of diffusers the same files."""

    def ready(pipe: Any) -> None:
        names = [f"{form}.safetensors" for form in forms]
        pipe.load_ip_adapter(str(reference), subfolder="", weight_name=names, local_files_only=True)
        pipe.set_ip_adapter_scale(scales)

    return ready


@pytest.mark.parametrize("form", ["base", "plus", "full"])
def test_one(form: str, ours: Draw, theirs: Draw, reference: Path, of: Callable[..., IPAdapter]) -> None:
    expected = theirs(PIPELINE, {}, loading(reference, [form], [0.6]), ip_adapter_image=picture(1))
    close(ours(of(form, picture(1), scale=0.6)), expected)
    assert not torch.allclose(ours(), expected, atol=0.05)
    assert not torch.allclose(ours(of(form, picture(2), scale=0.6)), expected, atol=0.01)


def test_two_add_up_in_any_order(ours: Draw, theirs: Draw, reference: Path, of: Callable[..., IPAdapter]) -> None:
    ready = loading(reference, ["base", "plus"], [0.6, 0.3])
    expected = theirs(PIPELINE, {}, ready, ip_adapter_image=[picture(1), picture(2)])
    one, two = of("base", picture(1), scale=0.6), of("plus", picture(2), scale=0.3)
    close(ours(one, two), expected)
    close(ours(two, one), expected)


def test_several_pictures_of_one(ours: Draw, theirs: Draw, reference: Path, of: Callable[..., IPAdapter]) -> None:
    """Their tokens stand side by side."""
    both = [picture(1), picture(2)]
    expected = theirs(PIPELINE, {}, loading(reference, ["base"], [0.6]), ip_adapter_image=[both])
    close(ours(of("base", *both, scale=0.6)), expected)


def test_with_a_controlnet(
    ours: Draw, theirs: Draw, reference: Path, of: Callable[..., IPAdapter], nets: list[Any], hints: list[Tensor]
) -> None:
    ready = loading(reference, ["base"], [0.6])
    given = {"ip_adapter_image": picture(1), "image": hints[0], "controlnet_conditioning_scale": 0.7}
    expected = theirs("StableDiffusionControlNetPipeline", {"controlnet": nets[0]}, ready, **given)
    close(ours(ControlNet(nets[0], hints[0], 0.7), of("base", picture(1), scale=0.6)), expected)


def test_the_picture_is_seen_as_by_clip(tower: ImageTower) -> None:
    """Tall, wide, small, large and of an odd margin: what transformers makes of it."""
    from transformers import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(size=28, crop_size=28)
    for size in ((41, 67), (67, 41), (28, 28), (9, 31), (301, 200)):
        expected = theirs(picture(3, size), return_tensors="pt").pixel_values
        torch.testing.assert_close(tower.pixels([picture(3, size)]), expected, rtol=0, atol=1e-6)


def test_an_empty_window_changes_no_bit(ours: Draw, of: Callable[..., IPAdapter], model: Model) -> None:
    assert torch.equal(ours(of("base", picture(1), lo=0.4, hi=0.4)), ours())
    broken = of("base", picture(1)).tokens * torch.nan
    off = IPAdapter(broken, broken, of("base", picture(1)).weights, scale=0.0)
    assert torch.equal(ours(off), ours()), "nothing of it is looked at"
    u = float(levels.leading(model.path, 4)[1].u)
    above, below = ours(of("base", picture(1), lo=u)), ours(of("base", picture(1), hi=u))
    whole = ours(of("base", picture(1)))
    assert not any(torch.equal(a, b) for a, b in ((above, below), (above, whole), (below, whole), (above, ours())))


def test_keys_and_values_are_computed_once_and_by_row(model: Model, of: Callable[..., IPAdapter], embeds: Tensor) -> None:
    """A row under the negative prompt is shown none, whatever stands before it; one alone is as in the batch."""
    patch, network = of("base", picture(1)), model.network.unet
    changes = {n: [c] for n, c in patch.changes(network, Run((Level(0.1, 0.9), Level(1.0, 0.0)))).items()}
    x, level = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)), Level(0.5, 0.5)

    def drawn(rows: slice, branches: tuple[str, ...]) -> Tensor:
        token = ROWS.set(Rows(branches, 1, level))
        try:
            with changed(network, changes), torch.no_grad():
                return model(x[rows], level, Cond(embeds[0].expand(3, -1, -1)[rows])).x0
        finally:
            ROWS.reset(token)

    whole = drawn(slice(0, 3), ("cond", "uncond", "weak"))
    torch.testing.assert_close(drawn(slice(1, 2), ("uncond",)), whole[1:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn(slice(2, 3), ("weak",)), whole[2:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn(slice(1, 2), ("image",)), whole[1:2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drawn(slice(1, 2), ("cond",)), whole[1:2], atol=1e-3)


def test_files_for_another_model_are_refused(reference: Path, model: Model, of: Callable[..., IPAdapter]) -> None:
    run, network = Run((Level(0.1, 0.9), Level(1.0, 0.0))), model.network.unet
    whole = of("base", picture(1))
    for weights in (whole.weights[:2], (*whole.weights[:2], whole.weights[3], whole.weights[2])):
        with pytest.raises(UsageError, match="made for another base model"):
            IPAdapter(whole.tokens, whole.absent, weights).changes(network, run)
    with pytest.raises(ModelError, match="vectors of 12, this image encoder gives 16"):
        ImageAdapter.of(load_file(reference / "base.safetensors"), "base")(torch.zeros(1, 16))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {**t, "other": torch.zeros(1)}, "is no IP-Adapter.*'other'"),
        (lambda t: {n: v for n, v in t.items() if n.startswith("image_proj")}, "lacks one of the two"),
        (lambda t: {n: v for n, v in t.items() if n != "image_proj.norm.bias"}, "missing tensor 'norm.bias'"),
        (lambda t: {**t, "image_proj.more": torch.zeros(1)}, "unexpected tensor 'image_proj.more'"),
        (lambda t: {n: v for n, v in t.items() if n != "ip_adapter.3.to_v_ip.weight"}, "missing.*ip_adapter.3.to_v_ip"),
        (lambda t: {**t, "ip_adapter.0.to_k_lora.down.weight": torch.zeros(1)}, "FaceID"),
        (lambda t: {**t, "ip_adapter.3.to_v_ip.weight": torch.zeros(8, 15)}, "mismatched tensor.*ip_adapter.3.to_v_ip"),
        (lambda t: {**t, "image_proj.norm.weight": torch.zeros(15)}, "mismatched tensor 'norm.weight'"),
        (lambda t: {**t, "image_proj.proj.weight": torch.zeros(64, 12, dtype=torch.int32)}, "not floating point"),
        (lambda t: {n: v for n, v in t.items() if n != "image_proj.proj.weight"}, "none of the base, plus and full-face"),
    ],
)
def test_a_wrong_file_names_the_tensor(change: Callable[..., Any], words: str, reference: Path) -> None:
    with pytest.raises(ModelError, match=words):
        ImageAdapter.of(change(load_file(reference / "base.safetensors")), "file")
