"""Less memory, the same pictures: smaller batches, slices, tiles, then one line with a size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import cli, memory, recipe, replay
from ldm_pipe.codec import Identity
from ldm_pipe.errors import EnvironmentFault, UsageError
from ldm_pipe.image import to_tensor
from ldm_pipe.pipeline import Pipeline

Tiny = Callable[[str], Path]
PROMPTS = [f"a fox {k}" for k in range(5)]


@pytest.fixture(scope="module")
def pipe(tiny: Tiny) -> Pipeline:
    return Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")


def short(limit: int, real: Any) -> Any:
    """`real`, on a machine where only `limit` values of its first tensor fit."""

    def call(x: Tensor, *args: Any) -> Any:
        if x.numel() > limit:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: tried 9 bytes.")
        return real(x, *args)

    return call


@dataclass(frozen=True)
class Doubling(Identity):
    """A codec of factor 2 without any global statistics, whose tiles must equal the whole."""

    factor: int = 2

    def decode(self, latents: Tensor) -> Tensor:
        return latents.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.mark.parametrize(("h", "w", "side"), [(16, 16, 8), (24, 40, 16), (9, 33, 8), (8, 8, 8), (31, 17, 9)])
def test_tiles_of_a_local_codec_equal_the_whole(h: int, w: int, side: int) -> None:
    x = torch.randn(2, 3, h, w, dtype=torch.float64)
    torch.testing.assert_close(memory.tiled(Doubling(), x, side), Doubling().decode(x), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_tiles_of_the_built_in_codec_are_near_the_whole() -> None:
    """At least 35 dB, where the statistics of the whole picture are kept (without, 29.5), and nothing is left behind."""
    codec = Pipeline.from_pretrained("builtin", "cpu", "fp32").bundle.codec
    y, x = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128), indexing="ij")
    picture = torch.stack([x * 0.5, y * 0.4, -x * 0.3])
    for row, column, colour in ((-0.3, -0.4, (0.8, -0.6, -0.6)), (0.3, 0.4, (-0.6, 0.7, -0.2)), (-0.5, 0.3, (0.9, 0.8, -0.7))):
        disc = ((x - column) ** 2 + (y - row) ** 2 < 0.08)[None]
        picture = torch.where(disc, torch.tensor(colour)[:, None, None], picture)
    latents = codec.encode(picture[None])
    whole = codec.decode(latents)
    error = (memory.tiled(codec, latents, 16).clamp(-1, 1) - whole.clamp(-1, 1)).square().mean()
    assert 10 * torch.log10(4 / error) >= 35
    assert torch.equal(codec.decode(latents), whole)
    assert torch.equal(memory.tiled(codec, latents, 32), whole)


def test_a_smaller_batch_gives_the_same_images(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pipe(PROMPTS, seed=3)
    two = 2 * 2 * 4 * 8 * 8  # two branches of two images
    monkeypatch.setattr(pipe.bundle.model, "forward", short(two, pipe.bundle.model.forward))
    split = pipe(PROMPTS, seed=3)
    assert split.places == ((2, 0), (2, 1), (2, 0), (2, 1), (1, 0))
    assert "memory ran out; 2 image(s) are computed at a time" in split.notices
    assert split.seeds == whole.seeds
    torch.testing.assert_close(split.latents, whole.latents, rtol=1e-4, atol=1e-4)


def test_one_image_too_large_is_one_line_with_a_size(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe.bundle.model, "forward", short(0, pipe.bundle.model.forward))
    with pytest.raises(EnvironmentFault, match=r"32x32 pixels do not fit into memory; try 20x20"):
        pipe("a fox")


@pytest.mark.parametrize(("images", "how"), [(1, "image by image"), (0.5, "in tiles of 32 pixels")])
def test_the_decoder_takes_slices_then_tiles(tiny: Tiny, images: float, how: str) -> None:
    codec = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32").bundle.codec
    latents, said = torch.randn(2, 4, 16, 16), list[str]()
    whole = codec.decode(latents)
    object.__setattr__(codec, "decode", short(int(images * latents[0].numel()), codec.decode))
    out, tile = memory.decode(codec, latents, said.append)
    assert said == [f"the images are decoded {how}: memory ran out in the decoder"]
    assert out.shape == whole.shape
    assert tile == (0 if images == 1 else 8)
    if images == 1:
        torch.testing.assert_close(out, whole)
    object.__setattr__(codec, "decode", short(0, codec.decode))
    with pytest.raises(EnvironmentFault, match="smallest tiles"):
        memory.decode(codec, latents, said.append)


@pytest.mark.parametrize(
    ("room", "how", "tile"),
    [
        (3, "", 0),
        (2, "", 0),
        (1.9, "image by image", 0),
        (1, "image by image", 0),
        (0.9, "in tiles of 48 pixels", 12),
        (0.01, "in tiles of 32 pixels", 8),
    ],
)
def test_a_forecast_says_how_to_decode(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, room: float, how: str, tile: int) -> None:
    """room: as a share of what one image needs. What is not expected to fit is not tried; below a size nothing is asked."""
    codec = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32").bundle.codec
    latents, said, sizes = torch.randn(2, 4, 24, 16), list[str](), list[tuple[int, ...]]()
    need = memory.of_decoding(codec, latents)
    assert need == memory.LIVE * 8 * codec.factor**2 * 4  # eight channels of fp32 are the widest at full size
    real = codec.decode
    object.__setattr__(codec, "decode", lambda x: sizes.append(tuple(x.shape)) or real(x))
    monkeypatch.setattr(memory, "free", lambda device: int(room * need * 24 * 16))
    memory.decode(codec, latents, said.append)
    assert sizes == [(2, 4, 24, 16)]
    monkeypatch.setattr(memory, "ASKED", 24 * 16 * codec.factor**2)
    sizes.clear()
    _, used = memory.decode(codec, latents, said.append)
    assert used == tile
    asked = [s for s in sizes if s != (1, 4, 8, 8) or tile == 8]
    assert max(s[0] * s[2] * s[3] for s in asked) <= max(room * 24 * 16, 64)
    assert len(said) == bool(how)
    if how:
        assert said[0].startswith(f"the images are decoded {how}: at once they need about 0.0 GiB of memory and 0.0 are free")


def test_a_tiled_image_is_replayed_in_tiles(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bit, on a machine where it would fit whole; --show, --check and a note tell of the tiles."""
    file, there = tmp_path / "a.png", ["--model", str(tiny("eps")), "--device", "cpu"]
    codec = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32").bundle.codec
    with monkeypatch.context() as small:
        need = memory.of_decoding(codec, torch.zeros(1, 4, 8, 8)) * 16 * 16
        small.setattr(memory, "ASKED", 0)
        small.setattr(memory, "free", lambda device: need / 2)
        size = ["--width", "64", "--height", "64"]
        assert cli.main([*there, "-p", "a fox", "--seed", "1", *size, "--steps", "2", "-o", str(file)]) == 0
        assert "note: the images are decoded in tiles of 32 pixels: at once they need" in capsys.readouterr().err
        assert cli.main([*there, "--check", *size]) == 0
        assert "MiB, so it is decoded in tiles of 32 pixels\n" in capsys.readouterr().out
    made = recipe.read(file)
    assert made.tile == 8
    assert "decoded:         in tiles of 8 latent pixels" in made.summary()
    assert cli.main(["--replay", str(file), "--verify", *there]) == 0
    assert capsys.readouterr().out == f"{file}: bit-equal\n"
    whole = replace(made, tile=0)
    pipe = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")
    verdict = replay.verify(file, made, replay.again(whole, pipe), pipe)
    assert verdict.largest > 0
    assert verdict.facts == ("tile: 8 -> 0",)
    with pytest.raises(UsageError, match="tiles of 0 to"):
        replace(made, tile=-1)


def test_each_batch_says_its_tiles(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out in the second batch alone tells of tiles there alone."""
    answers = iter([0, 0, 8])
    monkeypatch.setattr(memory, "decode", lambda codec, x, say, tile: (codec.decode(x), next(answers)))
    out = pipe(PROMPTS, seed=3, batch_size=2)
    assert out.tiles == (0, 0, 0, 0, 8)
    assert [replay.recipe_of(out, pipe, k).tile for k in (0, 4)] == [0, 8]


def test_other_errors_are_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory.forgiven():
        raise RuntimeError("shapes do not agree")


def test_a_forecast_refuses_before_it_starts(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    one = pipe.forecast(512, 512)
    assert pipe.forecast(1024, 512, 3) == pytest.approx(6 * one, rel=0.01)
    monkeypatch.setattr(memory, "free", lambda device: one)
    with pytest.raises(EnvironmentFault, match=r"1024x512 pixels need about .* GiB .* --width 512 --height 512 fits"):
        pipe("a fox", height=512, width=1024)
    assert pipe._room(_plan(pipe, 512, 512, 4), 4) == 1
    assert pipe._room(_plan(pipe, 32, 32, 16), 16) == 16


def _plan(pipe: Pipeline, height: int, width: int, images: int) -> Any:
    from ldm_pipe.plan import plan
    from ldm_pipe.settings import Settings

    return plan(pipe.bundle, ["x"], pipe.resolve(Settings(height=height, width=width, num_images=images)))


def test_a_real_limit_is_seen() -> None:
    assert 0 < memory.free(torch.device("cpu")) < 2**62


def test_a_decoder_that_overflows_in_fp16_runs_again_in_fp32(tiny: Tiny) -> None:
    loaded = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")
    codec = loaded.bundle.codec
    good = loaded("a fox", seed=1)
    real, dtypes = codec.decode, list[torch.dtype]()

    def overflow(latents: Tensor) -> Tensor:
        dtypes.append(codec.vae.dtype)  # type: ignore[attr-defined]
        images = real(latents)
        return images * torch.inf if dtypes[-1] == torch.float16 else images

    object.__setattr__(codec, "decode", overflow)
    codec.to(torch.device("cpu"), torch.float16)
    out = replace(loaded, dtype=torch.float16)("a fox", seed=1)
    assert dtypes == [torch.float16, torch.float32]
    assert "the decoder overflowed in fp16 and was run again in fp32" in out.notices
    before, after = (to_tensor([o.images[0]]) for o in (good, out))
    torch.testing.assert_close(after, before, rtol=0, atol=2 / 127.5)  # its weights have been through fp16
