"""Further channels: the model begins as it was, reads the picture once it has learned, and is fed by `--init-image`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm_pipe import Cond, Pipeline, UsageError, load
from train.__main__ import main
from train.data.precomputed import pixels
from train.loop import run
from train.tasks.concat import Concat, box
from train.tasks.finetune import Finetune

KINDS = ["picture", "masked"]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def photos(pictures: Callable[..., Path]) -> Path:
    return pictures(("a fox on red",), beside=True)


@pytest.fixture
def make(photos: Path, tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Concat]:
    def task(kind: str, **fields: Any) -> Concat:
        table = {"path": str(photos), "cache": str(tmp_path / "cache"), **fields.pop("data", {})}
        return Concat(table, str(fields.pop("model", tiny("eps"))), kind=kind, **fields)

    return task


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_the_model_it_was_made_of(make: Any, tiny: Any, kind: str) -> None:
    task, plain = make(kind, blind=0.0).grouped(2), load(tiny("eps"))
    net, batch = task.net(), task.batch(0, range(2))
    assert task.bundle.inserts == kind
    x, time, tokens = torch.randn(2, 4, 8, 8), torch.tensor([500, 20]), torch.randn(2, 8, 16)
    with torch.no_grad():
        mine = task.bundle.model.network(x, time, Cond(tokens=tokens, channels=batch["channels"]))
        assert torch.allclose(mine, plain.model.network(x, time, Cond(tokens=tokens)), atol=1e-6)
    net(batch)["loss"].backward()
    first = task.bundle.model.network.unet.conv_in.weight
    assert float(first.detach()[:, 4:].abs().max()) == 0
    assert bool((first.grad[:, 4:].abs().amax((0, 2, 3)) > 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_it_resumes_to_the_bit_and_is_fed_by_a_picture(make: Any, tmp_path: Path, photos: Path, kind: str, job: Any) -> None:
    straight = run(make(kind), job(tmp_path / "a"))
    for stop in (3, 0):
        again = run(make(kind), job(tmp_path / "b", stop=stop))
    assert (straight / UNET).read_bytes() == (again / UNET).read_bytes()
    assert float(load_file(straight / UNET)["conv_in.weight"][:, 4:].abs().max()) > 0
    pipe = Pipeline.from_pretrained(str(straight), "cpu", "fp32", "sdpa")
    mask = Image.fromarray(np.pad(np.full((32, 16), 255, np.uint8), ((0, 0), (0, 16)))) if kind == "masked" else None
    drawn = [pipe("a fox", seed=1, init_image=Image.open(photos / f"{k}.png"), mask=mask).latents for k in (0, 1)]
    assert not torch.equal(*drawn)
    more = make(kind, model=straight)  # a model that has the channels goes on as it is
    assert more.source == straight


def test_what_stands_behind_x(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture's own latents, as `--init-image` gives them; zeros where it is blind; a mask of ones and zeros first."""

    def ready(kind: str, **fields: Any) -> Concat:
        task = make(kind, **fields).grouped(1)
        task.net()
        return task

    task = ready("picture", blind=0.0, data={"buckets": False})
    codec = task.bundle.codec
    batch = task.batch(0, [0])
    row = int(batch["names"][0].split(".")[0])
    given = torch.from_numpy(255 - np.random.default_rng(row).integers(0, 256, (32, 32, 3), dtype=np.uint8)).permute(2, 0, 1)
    with torch.no_grad():
        wanted = codec.raw(codec.encode(given[None].float() / 127.5 - 1))
    assert torch.allclose(batch["channels"], wanted, atol=1e-4)
    assert float(ready("picture", blind=1.0).batch(0, [0])["channels"].abs().max()) == 0
    masked = ready("masked", blind=0.0)
    masks = torch.cat([masked.batch(0, [i])["channels"] for i in range(4)])[:, :1]
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert float(ready("masked", blind=1.0).batch(0, [0])["channels"][:, 0].min()) == 1.0
    left = torch.zeros(1, 1, 32, 32)
    left[..., :16] = 1.0
    monkeypatch.setattr("train.tasks.concat.box", lambda like, rng: left)
    part = ready("masked", blind=0.0, data={"buckets": False})
    batch = part.batch(0, [0])
    picture = pixels(part.dataset, part.dataset.seen(0, 0))[None]
    with torch.no_grad():
        rest = codec.encode(picture * (1 - left))
    assert torch.allclose(batch["channels"], torch.cat([left[..., ::4, ::4], rest], dim=1), atol=1e-5)
    rng = np.random.default_rng(0)
    boxes = [box(torch.zeros(1, 3, 20, 40), rng)[0, 0] for _ in range(300)]
    shares = [float(b.mean()) for b in boxes]
    assert 0.05 < min(shares) < 0.15
    assert 0.8 < max(shares) <= 1.0
    strips = sum(bool(b.all(dim).any()) for b in boxes for dim in (0, 1))
    assert 30 < strips < 120, "some go from edge to edge"


def test_what_does_not_go_is_said_in_a_line(make: Any, tmp_path: Path, photos: Path) -> None:
    for fields, words in (
        ({"blind": 2.0}, "0 to 1"),
        ({"held_out": 1}, "validates nothing"),
        ({"data": {"cache": ""}}, "kept there"),
    ):
        with pytest.raises(UsageError, match=words):
            make("picture", **fields)
    widened = make("masked").source
    with pytest.raises(UsageError, match="has 5 further channels; picture takes 4"):
        _ = make("picture", model=widened).source
    with pytest.raises(UsageError, match="by the task concat"):
        Finetune({"path": str(photos), "cache": str(tmp_path / "cache")}, str(widened)).net()


def test_the_recipe_runs_from_the_command_line(photos: Path, tiny: Any, tmp_path: Path) -> None:
    words = ["--config", "configs/concat.toml", "--set", f"data.path={photos}", "--set", f"task.model={tiny('v')}"]
    words += ["--set", f"data.cache={tmp_path / 'cache'}", "--set", f"job.output={tmp_path / 'run'}"]
    words += ["--set", "job.steps=2", "--set", "job.batch=2"]
    assert main(["check", *words]) == 0
    assert main(words) == 0
    assert load(tmp_path / "run" / "export").inserts == "picture"


@pytest.mark.parametrize("kind", KINDS)
def test_a_codec_of_another_width_is_read_back(make: Any, photos: Path, tmp_path: Path, kind: str, job: Any) -> None:
    """The built-in codec has ten channels, so ten or eleven stand behind x."""
    export = run(make(kind, model="builtin", data={"side": 64}), job(tmp_path / "a"))
    pipe = Pipeline.from_pretrained(str(export), "cpu", "fp32", "sdpa")
    assert pipe.bundle.inserts == kind
    mask = Image.fromarray(np.pad(np.full((32, 16), 255, np.uint8), ((0, 0), (0, 16)))) if kind == "masked" else None
    drawn = [pipe("a fox", seed=1, steps=2, init_image=Image.open(photos / f"{k}.png"), mask=mask).latents for k in (0, 1)]
    assert not torch.equal(*drawn)
