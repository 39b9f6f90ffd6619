"""Edits start from a picture: what is run is what is said, what is kept is kept to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_pipe import VP, Gaussian, Noise, Pipeline, UsageError, build, image, levels, registry, sample
from ldm_pipe.cli import main
from ldm_pipe.editing.keep import Keep
from ldm_pipe.editing.source import Source

Tiny = Callable[[str], Path]
SIDE = 32


@pytest.fixture(scope="module")
def pipe(tiny: Tiny) -> Pipeline:
    return Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")


def picture(size: tuple[int, int] = (SIDE, SIDE), seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def half() -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    return mask


@pytest.mark.parametrize("sampler", sorted(registry.KINDS["sampler"]))
def test_black_is_kept_to_the_bit_under_every_sampler(pipe: Pipeline, sampler: str) -> None:
    before = picture()
    out = pipe("a fox", seed=1, steps=4, sampler=sampler, init_image=before, mask=half(), num_images=2, spacing="trailing")
    for made in out.images:
        old, new = np.asarray(before), np.asarray(made)
        assert np.array_equal(new[:, SIDE // 2 :], old[:, SIDE // 2 :])
        assert not np.array_equal(new[:, : SIDE // 2], old[:, : SIDE // 2])


@pytest.mark.parametrize(("strength", "steps"), [(0.01, 1), (0.1, 1), (0.33, 3), (0.5, 5), (0.95, 10), (1.0, 10)])
def test_the_steps_that_are_said_are_run(pipe: Pipeline, strength: float, steps: int) -> None:
    out = pipe("a fox", seed=1, steps=10, strength=strength, guidance_scale=1, init_image=picture(), spacing="trailing")
    assert out.evaluations["cond"] == steps
    assert out.walked == steps


def test_steps_are_counted_as_they_run(pipe: Pipeline) -> None:
    """Quadratic times that fall together are walked once: what is said is the walk's number, not a share of what was asked."""
    seen = list[int]()
    asked = {"steps": 100, "spacing": "quadratic", "strength": 0.5, "guidance_scale": 1}
    out = pipe("a fox", seed=1, on_step=lambda step: seen.append(step.number), init_image=picture(), **asked)
    assert out.walked == len(seen) == out.evaluations["cond"] < 50


def test_little_strength_leaves_the_picture(pipe: Pipeline) -> None:
    """The less noise, the nearer the latents stay to the picture's own."""
    before = picture()
    own = Source(before).latents(pipe.bundle.codec, pipe.device)
    gaps = [
        float((pipe("a fox", seed=1, steps=20, strength=s, init_image=before, guidance_scale=1).latents - own).square().mean())
        for s in (0.05, 0.4, 1.0)
    ]
    assert gaps[0] < 0.2 * gaps[2]
    assert gaps == sorted(gaps)


def test_sdedit_of_a_gaussian_has_its_mean() -> None:
    """A picture noised to any level and denoised by DDIM stays in the family: for N(m, s^2) the affine map is known."""
    exact = Gaussian.isotropic(torch.full((4,), 0.3, dtype=torch.float64), 0.5)
    walk = levels.tail(levels.trailing(VP.scaled_linear(), 1000), 0.5)
    x0, noise = torch.full((6, 1, 2, 2), 1.5, dtype=torch.float64), Noise(tuple(range(6)), (1, 2, 2), dtype=torch.float64)
    x = walk[0].mix(x0, noise.start())
    out = sample(exact, x, walk, build("sampler", "ddim"), noise)
    a, s = float(walk[0].alpha), float(walk[0].sigma)
    flow = 0.3 + 0.5 * (x - a * 0.3) / (a * a * 0.25 + s * s) ** 0.5  # the probability flow of a Gaussian, in closed form
    torch.testing.assert_close(out, flow, rtol=0, atol=1.2e-2)  # first order in 500 steps


def test_a_soft_mask_holds_longer_what_is_darker() -> None:
    known, mask = torch.zeros(1, 1, 1, 3), torch.tensor([0.0, 0.5, 1.0]).reshape(1, 1, 1, 3)
    from ldm_pipe.level import Level
    from ldm_pipe.model import Estimate

    def ones(x: torch.Tensor, level: Level) -> Estimate:
        return Estimate(torch.ones_like(x), level.noise(x, torch.ones_like(x)))

    held = Keep(known, mask, start=0.8)(ones)
    x, walk = torch.full((1, 1, 1, 3), 2.0), [Level(1 - u, u) for u in (0.8, 0.41, 0.39, 0.01)]
    rows = [held(x, level).x0.flatten().tolist() for level in walk]
    assert rows == [[0, 0, 1], [0, 0, 1], [0, 1, 1], [0, 1, 1]]
    for level in walk:  # what is held and what is left both make up x
        assert torch.allclose(level.mix(held(x, level).x0, held(x, level).noise), x)


def test_a_latent_is_redrawn_as_much_as_the_most_redrawn_of_its_pixels() -> None:
    mask = Image.new("L", (8, 8))
    mask.putpixel((1, 2), 255)
    mask.putpixel((6, 5), 51)
    found = Source(picture((8, 8)), mask).latent_mask(4, torch.device("cpu"))
    assert found is not None
    assert torch.allclose(found[0, 0], torch.tensor([[1.0, 0.0], [0.0, 0.2]]), atol=1e-6)


def test_neutral_masks_change_no_bit(pipe: Pipeline) -> None:
    plain = pipe("a fox", seed=2, steps=3, init_image=picture(), strength=1.0)
    white = pipe("a fox", seed=2, steps=3, init_image=picture(), mask=Image.new("L", (SIDE, SIDE), 255))
    assert torch.equal(plain.latents, white.latents)
    assert plain.images[0].tobytes() == white.images[0].tobytes()
    black = pipe("a fox", seed=2, steps=3, init_image=picture(), mask=Image.new("L", (SIDE, SIDE), 0))
    assert black.images[0].tobytes() == picture().tobytes()


def test_other_sizes_are_fitted(pipe: Pipeline) -> None:
    out = pipe("a fox", steps=1, init_image=picture((100, 50)), mask=Image.new("L", (100, 50)))
    assert out.images[0].size == (SIDE, SIDE)
    with pytest.raises(UsageError, match="the mask is 8x8 pixels, the picture 32x32"):
        pipe("a fox", init_image=picture(), mask=Image.new("L", (8, 8)))
    with pytest.raises(UsageError, match="strength goes with an init image"):
        pipe("a fox", strength=0.5)
    with pytest.raises(UsageError, match="a mask goes with an init image"):
        pipe("a fox", mask=half())


def test_an_edit_from_the_command_line_and_its_replay(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    picture().save("in.png")
    picture(seed=1).save("other.png")
    half().save("mask.png")
    model = ["--model", str(tiny("eps")), "--device", "cpu"]
    edit = ["--init-image", "in.png", "--mask", "mask.png"]
    assert main([*model, "-p", "a fox", *edit, "--strength", "0.5", "--steps", "8", "-o", "out.png"]) == 0
    assert ", 4 of 8 steps, " in capsys.readouterr().err
    assert main([*model, "--replay", "out.png", "--verify", *edit]) == 0
    assert capsys.readouterr().out == "out.png: bit-equal\n"
    for flags, words in (
        ([], "--init-image is needed"),
        (["--init-image", "in.png"], "--mask is needed"),
        (["--init-image", "other.png", "--mask", "mask.png"], "--init-image is not the picture"),
    ):
        assert main([*model, "--replay", "out.png", "--verify", *flags]) == 2
        assert words in capsys.readouterr().err


def test_pictures_are_read_as_they_look(tmp_path: Path) -> None:
    """Upright, on white, 16 bits to 8, the first frame."""
    path = tmp_path / "x.png"
    Image.fromarray(np.arange(0, 65536, 4096, dtype=np.uint16)[None]).save(path)
    assert np.abs(np.asarray(image.read(path))[0, :, 0].astype(int) - np.arange(0, 256, 16)).max() <= 1
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(path)
    assert image.read(path).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "x.jpg", exif=turned)
    assert image.read(tmp_path / "x.jpg").size == (2, 4)
    Image.new("CMYK", (2, 2)).save(tmp_path / "x.tiff")
    assert image.read(tmp_path / "x.tiff").getpixel((0, 0)) == (255, 255, 255)
    whole = (tmp_path / "x.jpg").read_bytes()
    for cut in range(0, len(whole) - 2, 40):
        path.write_bytes(whole[:cut])
        with pytest.raises(UsageError, match="cannot be read as a picture"):
            image.read(path)
