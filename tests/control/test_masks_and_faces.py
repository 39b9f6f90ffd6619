"""IP-Adapters for a region and for a face: as diffusers has them, on record, and refused in one sentence."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_pipe import Model, ModelError, UsageError, recipe
from ldm_pipe.cli import main
from ldm_pipe.control.ip_adapter import IPAdapter
from ldm_pipe.control.sd3_ip_adapter import SD3IPAdapter
from ldm_pipe.doors.controls import Controls
from ldm_pipe.doors.picture_prompts import Call
from ldm_pipe.level import Level
from ldm_pipe.networks.image_prompt import ImageAdapter
from ldm_pipe.networks.sd3 import SD3
from ldm_pipe.networks.timed_prompt import Resampler, TimedAdapter
from ldm_pipe.parts import vision
from ldm_pipe.patch import Run

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
controls = importlib.import_module("tiny_controls")
RUN = Run((Level(0.1, 0.9), Level(1.0, 0.0)))


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter for faces and a face."""
    torch.manual_seed(3)
    place = tmp_path_factory.mktemp("face")
    controls.image_prompt("face", 16, (8, 8, 8, 16))(place)
    return place


def test_a_picture_for_each_region(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], reference: Path) -> None:
    """Two pictures of one file, each where its mask is white, are diffusers' two pictures with two masks."""
    left = torch.zeros(1, 1, 32, 32)
    left[..., :13] = 1
    masks, pictures = (left, 1 - left), [controls.PICTURE, controls.PICTURE.transpose(Image.Transpose.ROTATE_90)]

    def ready(pipe: Any) -> None:
        pipe.load_ip_adapter(str(reference), subfolder="", weight_name=["base.safetensors"], local_files_only=True)
        pipe.set_ip_adapter_scale([[0.6, 0.6]])

    given = {"ip_adapter_image": [pictures], "cross_attention_kwargs": {"ip_adapter_masks": [torch.cat(masks, dim=1)]}}
    expected = theirs("StableDiffusionPipeline", {}, ready, **given)
    adapter, tower = ImageAdapter.of(load_file(reference / "base.safetensors"), "base"), vision(reference / "image_encoder")

    def each(*regions: Tensor) -> Tensor:
        return ours(*(IPAdapter.of(adapter, tower, [p], scale=0.6, mask=m) for p, m in zip(pictures, regions, strict=True)))

    found, near = each(*masks), 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=near)
    assert not torch.allclose(each(*masks[::-1]), expected, atol=0.01)
    white = torch.ones_like(left)
    whole = ours(*(IPAdapter.of(adapter, tower, [p], scale=0.6) for p in pictures))
    torch.testing.assert_close(each(white, white), whole, rtol=1e-4, atol=near)
    black = IPAdapter.of(adapter, tower, [pictures[0]], mask=0 * left)
    torch.testing.assert_close(ours(black), ours(), rtol=1e-4, atol=near)


def test_several_faces_stand_side_by_side(face: Path, model: Model) -> None:
    adapter = ImageAdapter.of(load_file(face / "face.safetensors"), "face")
    assert adapter.face
    one, two = torch.randn(2, 12).split(1)
    both = IPAdapter.of_faces(adapter, torch.cat([one, two]))
    apart = [IPAdapter.of_faces(adapter, t).tokens for t in (one, two, 0 * one)]
    torch.testing.assert_close(both.tokens, torch.cat(apart[:2], dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.absent[:, :4], apart[2], rtol=1e-5, atol=1e-5)
    other = tuple({n: (down[:, :5], up) for n, (down, up) in row.items()} for row in adapter.low)
    with pytest.raises(UsageError, match=r"adds there is \[8, 5\].*made for another base model"):
        IPAdapter(both.tokens, both.absent, both.weights, low=other).changes(model.network.unet, RUN)
    with pytest.raises(ModelError, match="reads faces by vectors of 12, the file gives 5"):
        IPAdapter.of_faces(adapter, torch.zeros(1, 5))


def test_off_it_adds_no_low_rank(face: Path, ours: Callable[..., Tensor]) -> None:
    adapter = ImageAdapter.of(load_file(face / "face.safetensors"), "face")
    assert torch.equal(ours(IPAdapter.of_faces(adapter, controls.FACE, lo=0.4, hi=0.4)), ours())
    assert torch.equal(ours(IPAdapter.of_faces(adapter, controls.FACE, scale=0.0)), ours())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: {n: v for n, v in t.items() if n != "ip_adapter.3.to_q_lora.up.weight"},
            "tensor 'ip_adapter.3.to_q_lora.up",
        ),
        (lambda t: {**t, "ip_adapter.8.to_q_lora.up.weight": torch.zeros(8, 3)}, "tensor 'ip_adapter.8.to_q_lora.up"),
        (
            lambda t: {**t, "ip_adapter.3.to_q_lora.up.weight": torch.zeros(8, 2)},
            "mismatched tensor 'ip_adapter.3.to_q_lora.up",
        ),
        (lambda t: {**t, "ip_adapter.3.to_x_lora.up.weight": torch.zeros(8, 3)}, "unexpected.*ip_adapter.3.to_x_lora"),
        (lambda t: {**t, "image_proj.perceiver_resampler.proj_in.weight": torch.zeros(1)}, r"FaceID Plus\), which is not supp"),
        (lambda t: {n: v for n, v in t.items() if n != "image_proj.proj.0.weight"}, "none of the base, plus and full-face"),
        (lambda t: {**t, "image_proj.proj.0.weight": torch.zeros(2, 2, 2)}, "none of the base, plus and full-face"),
    ],
)
def test_a_wrong_file_of_faces_names_the_tensor(change: Callable[..., Any], words: str, face: Path) -> None:
    with pytest.raises(ModelError, match=words):
        ImageAdapter.of(change(load_file(face / "face.safetensors")), "file")


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("lines", None),
        ("ip_adapter_folder", None),
        (" ip_adapter ( 'a.st' ) ", Call(Path("a.st"))),
        ("ip_adapter(a, eyes)", Call(Path("a"), Path("eyes"))),
        ("ip_adapter(a, image_encoder = eyes, mask=m.png)", Call(Path("a"), Path("eyes"), Path("m.png"))),
        ("ip_adapter(a, face='f.st')", Call(Path("a"), face=Path("f.st"))),
    ],
)
def test_how_a_call_is_read(text: str, call: Call | None) -> None:
    assert Call.of(text) == call


@pytest.mark.parametrize(
    "text",
    [f"ip_adapter({inside})" for inside in ("a, b, c", "a, mask=b, mask=c", "a, ear=b", "a, mask=", "(a)", ", mask=b", "a,")],
)
def test_what_is_no_call(text: str) -> None:
    """Nor is such a one with words behind it."""
    with pytest.raises(UsageError, match="is not of the form"):
        Call.of("ip_adapter(a) b")
    with pytest.raises(UsageError, match=r"is not of the form ip_adapter\(FILE, image_encoder=FOLDER, mask=FILE, face=FILE\)"):
        Call.of(text)


def test_the_door(face: Path, tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A face takes no --control-image; both files are on record, and a replay wants the same ones, and all of them."""
    Image.linear_gradient("L").resize((20, 20)).save(tmp_path / "mask.png")
    Image.linear_gradient("L").rotate(90).save(tmp_path / "other.png")
    save_file({"a": torch.ones(3, 12)}, tmp_path / "three.safetensors")
    save_file({"a": torch.ones(12), "b": torch.ones(12)}, tmp_path / "pair.safetensors")
    there, file = ["--model", str(tiny("eps")), "--dtype", "fp32", "--quiet"], str(tmp_path / "a.png")

    def call(**given: object) -> str:
        return f"ip_adapter({face / 'face.safetensors'}{''.join(f', {n}={v}' for n, v in given.items())})"

    def told(*words: str) -> str:
        main([*words, *there])
        return capsys.readouterr().err

    made, one = ["-p", "a fox", "--seed", "3"], face / "one.safetensors"
    assert main([*made, *there, "--control", call(face=one, mask=tmp_path / "mask.png"), "-o", file]) == 0
    row = recipe.read(file).controls[0]
    assert [len(row[n]) for n in ("sha256", "face", "mask")] == [64] * 3
    assert recipe.read(file).sources == {}
    capsys.readouterr()
    again = ["--replay", file, "--verify"]
    assert main([*again, *there, "--control", call(face=one, mask=tmp_path / "mask.png")]) == 0
    assert capsys.readouterr().out.endswith("bit-equal\n")
    for swapped in (call(face=one), call(face=one, mask=tmp_path / "other.png"), call(face=tmp_path / "three.safetensors")):
        assert "is not the network that the image was made with" in told(*again, "--control", swapped)
    assert "face=FILE names the vector that it reads" in told(*made, "--control", call(), "--control-image", file)
    assert "holds one tensor [E] or [N,E], N up to 16; it holds [12], [12]" in told(
        *made, "--control", call(face=tmp_path / "pair.safetensors")
    )
    assert "the mask 'none' is not a file" in told(*made, "--control", call(face=one, mask="none"))
    assert "go together, got 1 (1 of them with a face) and 1" in told(
        *made, "--control", call(face=one), "--control-image", file
    )
    assert main([*made, *there, "--control", call(face=tmp_path / "three.safetensors"), "-o", str(tmp_path / "b.png")]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {**t, "other": torch.zeros(1)}, "unexpected tensor 'other'"),
        (lambda t: {**t, "ip_adapter.9.norm_q.weight": torch.zeros(8)}, "unexpected tensor 'ip_adapter.9.norm_q.weight'"),
        (lambda t: {n: v for n, v in t.items() if n != "ip_adapter.1.to_v_ip.weight"}, "missing tensor 'to_v_ip.weight'"),
        (lambda t: {n: v for n, v in t.items() if n != "ip_adapter.1.to_k_ip.weight"}, "missing tensor 'to_k_ip.weight'"),
        (lambda t: {n: v for n, v in t.items() if n != "image_proj.latents"}, "missing tensor 'latents'"),
        (lambda t: {**t, "ip_adapter.1.to_k_ip.weight": torch.zeros(3)}, "or one of another shape"),
        (lambda t: {**t, "image_proj.layers.2.2.1.bias": torch.zeros(5)}, "mismatched tensor 'layers.2.2.1.bias'"),
    ],
)
def test_a_wrong_file_for_sd3_names_the_tensor(change: Callable[..., Any], words: str) -> None:
    torch.manual_seed(0)
    whole = controls.sd3_tensors()
    assert TimedAdapter.knows(whole)
    assert len(TimedAdapter.of(whole, "file").beside) == 3
    with pytest.raises(ModelError, match=words):
        TimedAdapter.of(change(whole), "file")


def test_what_an_adapter_of_sd3_does_not_go_with(tmp_path: Path, model: Model) -> None:
    """Nor is it taken for another model's; the picture is seen whole, as SigLIP's own processor has it."""
    from transformers import SiglipImageProcessorPil

    torch.manual_seed(0)
    controls.sd3_prompt(tmp_path)
    adapter, tower = TimedAdapter.of(controls.sd3_tensors(), "file"), vision(tmp_path / "image_encoder")
    expected = SiglipImageProcessorPil(size={"height": 28, "width": 28})(controls.PICTURE, return_tensors="pt").pixel_values
    torch.testing.assert_close(tower.pixels([controls.PICTURE]), expected, rtol=0, atol=1e-6)
    patch = SD3IPAdapter.of(adapter, tower, [controls.PICTURE])
    with pytest.raises(UsageError, match="needs the transformer of Stable Diffusion 3"):
        patch.changes(model.network, RUN)
    transformer = importlib.import_module("tiny_families").sd3().transformer
    with pytest.raises(UsageError, match="the file is for 2 attentions of width 32; it was made for another base model"):
        SD3IPAdapter(TimedAdapter(adapter.projection, adapter.beside[:2]), patch.states).changes(SD3(transformer), RUN)
    with pytest.raises(UsageError, match="by vectors of 24, this image encoder gives 16"):
        SD3IPAdapter.of(TimedAdapter(Resampler(24, 32, (1, 5, 24), 1, 64, 96, 8), ()), tower, [controls.PICTURE])
    with pytest.raises(UsageError, match="mask= and face= go with an adapter of Stable Diffusion 1 or XL"):
        Call(tmp_path / "sd3.safetensors", mask=tmp_path / "x.png").read()
    config = tmp_path / "image_encoder" / "config.json"
    config.write_text('{"model_type": "siglip", "vision_config": {}, "text_config": {}}')
    with pytest.raises(ModelError, match="is that of pictures and text together; the folder of its vision model alone"):
        Call(tmp_path / "sd3.safetensors").read()


def test_what_a_mask_and_a_face_do_not_go_with(reference: Path, face: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="reads a picture, and face= goes with FaceID"):
        Call(reference / "base.safetensors", face=face / "one.safetensors").read()
    text = controls.flux_prompt(tmp_path)
    with pytest.raises(UsageError, match="mask= goes with an adapter of Stable Diffusion 1 or XL"):
        Call(tmp_path / "flux.safetensors", mask=face / "mask.png").read()
    with pytest.raises(UsageError, match="go together, got 2 and 0"):
        Controls.of([text, text], 0, (), {})
