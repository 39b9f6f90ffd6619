"""Full fine-tuning: any tiny model on a folder of pictures; what comes out loads, resumes to the bit, and has learned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm_pipe import Pipeline
from ldm_pipe.errors import UsageError
from ldm_pipe.loading import BUILTIN, load
from train import gradient_checkpointing
from train.__main__ import main
from train.data.dataset import Data
from train.folder import shape_of
from train.loop import run
from train.tasks.finetune import Finetune

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures of two shapes, with captions; one has a mask."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(7):
        size = (48, 24) if i % 2 else (32, 32)
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a fox on red" if i % 2 else "an owl on blue")
    Image.fromarray(np.full((32, 32), 255, dtype=np.uint8)).save(folder / "0.mask.png")
    return folder


@pytest.fixture
def make(photos: Path, tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Finetune]:
    def task(prediction: str = "eps", data: dict[str, Any] | None = None, **fields: Any) -> Finetune:
        table = {"path": str(photos), "cache": str(tmp_path / "cache"), **(data or {})}
        return Finetune(table, str(tiny(prediction)), **fields)

    return task


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_the_export_is_the_model_with_other_weights(make: Any, tiny: Any, tmp_path: Path, prediction: str, job: Any) -> None:
    folder = run(make(prediction), job(tmp_path / "run"))
    old, new = load(tiny(prediction)), load(folder)
    assert (new.model.path, new.model.prediction) == (old.model.path, old.model.prediction)
    changed = {n for n, t in new.model.state_dict().items() if not torch.equal(t, old.model.state_dict()[n])}
    assert len(changed) > 20
    assert (folder / "SHA256SUMS").exists()
    assert all(torch.equal(a, b) for a, b in zip(new.codec.vae.parameters(), old.codec.vae.parameters(), strict=True))
    text = [load_file(f / TEXT) for f in (folder, tiny(prediction))]
    assert all(torch.equal(text[0][n], text[1][n]) for n in text[1])
    assert Pipeline(new)("a fox", seed=1, steps=2).images[0].size == (32, 32)


@pytest.mark.parametrize("data", [{}, {"cache": ""}, {"crop": "random", "flip": True, "variants": 2}])
def test_resuming_is_bit_identical(make: Any, tmp_path: Path, data: dict[str, Any], job: Any) -> None:
    straight = run(make(data=data), job(tmp_path / "a"))
    for stop in (1, 3, 0):
        again = run(make(data=data), job(tmp_path / "b", stop=stop, workers=2 if stop == 3 else 0))
    assert (straight / UNET).read_bytes() == (again / UNET).read_bytes()


def test_the_cache_gives_the_same_losses_as_encoding(make: Any, tmp_path: Path, job: Any) -> None:
    for name, data in [("cached", {"half": False}), ("live", {"cache": ""})]:
        run(make(data=data), job(tmp_path / name))
    rows = [[json.loads(x)["loss"] for x in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("cached", "live")]
    assert np.allclose(rows[0], rows[1], rtol=1e-4)


def test_the_text_encoder_learns_only_where_it_is_asked_to(make: Any, tiny: Any, tmp_path: Path, job: Any) -> None:
    folder = run(make(train_text=True, train_network=False), job(tmp_path / "run"))
    old, new = load_file(tiny("eps") / TEXT), load_file(folder / TEXT)
    assert old.keys() == new.keys()
    assert any(not torch.equal(old[n], new[n]) for n in old)
    assert (folder / UNET).read_bytes() == (tiny("eps") / UNET).read_bytes()
    assert load(folder)
    with pytest.raises(UsageError, match="nothing is trained"):
        make(train_network=False)


def test_it_learns_what_it_is_shown(make: Any, tmp_path: Path, job: Any) -> None:
    task = make("flow", held_out=2, log_variance=True)
    run(task, job(tmp_path / "run", steps=60, validate_every=60, lr=3e-3))
    lines = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    errors = [x["error"] for x in lines if "error" in x]
    assert np.mean(errors[-10:]) < 0.9 * np.mean(errors[:10])
    assert set(lines[-1]["validation"]) == {f"held_out_{u}" for u in ("0.00", "0.25", "0.50", "0.75")}
    assert not any("uncertainty" in n for n in load_file(tmp_path / "run" / "export" / UNET))


def test_validation_is_the_same_every_time_and_leaves_no_trace(make: Any, tmp_path: Path) -> None:
    task = make(held_out=2, prompts=("a fox", "an owl"))
    net = task.net()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    first, second = (task.validate(net.eval(), tmp_path / n) for n in ("one", "two"))
    assert first == second
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert (tmp_path / "one" / "01.png").read_bytes() == (tmp_path / "two" / "01.png").read_bytes()
    assert len(task.dataset) == 5


def test_a_step_is_of_one_shape_and_a_batch_a_pure_function(make: Any) -> None:
    task = make().grouped(2)
    task.net()
    shapes = {tuple(task.batch(0, range(i, i + 2))["x0"].shape) for i in range(0, 20, 2)}
    assert len(shapes) == 2
    one, two = task.batch(0, range(4, 6)), make().grouped(2).batch(0, range(4, 6))
    assert all(torch.equal(one[k], two[k]) for k in one if k != "names")
    assert one["names"] == two["names"]
    parts = [task.batch(0, [i]) for i in (4, 5)]
    assert all(torch.equal(torch.cat([p[k] for p in parts]), one[k]) for k in ("x0", "noise", "normal", "text_tokens"))


def test_a_changed_codec_or_picture_is_encoded_anew(make: Any, photos: Path, tiny: Any, tmp_path: Path) -> None:
    def count() -> int:
        return len(list((tmp_path / "cache" / "latents").rglob("*.safetensors")))

    make().net()
    assert count() == 7
    make().net()
    make("v").net()  # the same codec
    assert count() == 7
    other = shutil.copytree(tiny("eps"), tmp_path / "other")
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    replace(make(), model=str(other)).net()
    assert count() == 14
    make(data={"half": False}).net()
    assert count() == 21
    make(data={"side": 16, "buckets": False}).net()
    assert count() == 28


def test_changed_data_is_named_on_resume(make: Any, photos: Path, tmp_path: Path, job: Any) -> None:
    mine = shutil.copytree(photos, tmp_path / "mine")
    run(make(data={"path": str(mine)}), job(tmp_path / "run", stop=2))
    (mine / "3.txt").write_text("a bear on red")
    with pytest.raises(UsageError, match="data was"):
        run(make(data={"path": str(mine)}), job(tmp_path / "run"))


def test_checkpointed_blocks_give_the_same_gradients(make: Any) -> None:
    grads = []
    for on in (False, True):
        task = make("flow", gradient_checkpointing=on).grouped(2)
        net = task.net()
        net(task.batch(0, range(2)))["loss"].backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with pytest.raises(UsageError, match="no block"):
        gradient_checkpointing.use(torch.nn.Linear(1, 1))


def test_repa_aligns_a_site_with_a_frozen_encoder_and_leaves_no_trace(make: Any, tmp_path: Path, job: Any) -> None:
    clip = str(BUILTIN / "clip")
    site = "unet.mid_block.resnets.0"
    for name, repa in [("with", {"encoder": clip, "site": site, "weight": 1.0}), ("without", {})]:
        run(make("flow", repa=repa, data={"buckets": False}), job(tmp_path / name, steps=12))
    rows = [json.loads(x) for x in (tmp_path / "with" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["aligned"] < 0.7 * rows[0]["aligned"]
    assert all(r["loss"] == pytest.approx(r["error"] + r["aligned"], rel=1e-4) for r in rows)
    both = [load_file(tmp_path / n / "export" / UNET) for n in ("with", "without")]
    assert both[0].keys() == both[1].keys()
    assert not torch.equal(both[0]["mid_block.resnets.0.conv1.weight"], both[1]["mid_block.resnets.0.conv1.weight"])
    with pytest.raises(UsageError, match=r"no module 'unet\.middle'"):
        make(repa={"encoder": clip, "site": "unet.middle"}).net()
    with pytest.raises(UsageError, match="is not a folder"):
        make(repa={"encoder": "nowhere", "site": site}).net()


def test_cuts_that_are_cached_do_not_hang_on_the_seed(make: Any) -> None:
    for seed in (0, 1):
        task = make(data={"flip": True, "variants": 3, "buckets": False}).grouped(2)
        task.net()
        assert task.batch(seed, range(12))["x0"].shape[0] == 12


def test_a_mask_hides_its_part(make: Any, photos: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(photos, tmp_path / "mine")
    half = np.zeros((32, 32), dtype=np.uint8)
    half[:, 16:] = 255
    Image.fromarray(half).save(mine / "0.mask.png")
    task = make(data={"buckets": False, "path": str(mine)}).grouped(1)
    net = task.net()
    batches = {b["names"][0]: b for b in (task.batch(0, [i]) for i in range(7))}
    assert "mask" not in batches["1.png"]
    batch = batches["0.png"]
    assert torch.equal(batch["mask"][0, 0], torch.tensor([0.0] * 4 + [1.0] * 4).expand(8, 8))
    whole = {k: v for k, v in batch.items() if k != "mask"}
    parts = [net({**whole, "mask": m})["loss"] for m in (batch["mask"], 1 - batch["mask"])]
    assert 0 < parts[0] < net(whole)["loss"]
    assert torch.allclose(sum(parts), net(whole)["loss"])


def test_sides_follow_from_the_configurations_alone(tiny: Any) -> None:
    assert shape_of(tiny("eps")) == (32, 8)
    assert Data("x").sizes(32, 8)


def test_the_recipe_runs_from_the_command_line(photos: Path, tiny: Any, tmp_path: Path, capsys: Any) -> None:
    words = ["--config", "configs/finetune.toml", "--set", f"data.path={photos}", "--set", f"task.model={tiny('v')}"]
    words += ["--set", f"data.cache={tmp_path / 'cache'}", "--set", f"job.output={tmp_path / 'run'}"]
    small = ["--set", "job.steps=2", "--set", "job.batch=2", "--set", "objective.weight=min_snr"]
    assert main(["check", *words, *small]) == 0
    assert "0 fault(s)" in capsys.readouterr().out
    assert main([*words, *small]) == 0
    assert load(tmp_path / "run" / "export")
    assert main([*words, *small, "--set", "objective.weight=p2"]) == 2
    assert "task.objective.weight was 'min_snr'" in capsys.readouterr().err


def test_an_average_of_another_width_is_exported(photos: Path, tiny: Any, tmp_path: Path) -> None:
    words = ["--config", "configs/finetune.toml", "--set", f"data.path={photos}", "--set", f"task.model={tiny('v')}"]
    words += ["--set", f"data.cache={tmp_path / 'cache'}", "--set", f"job.output={tmp_path / 'run'}"]
    words += ["--set", "job.steps=6", "--set", "job.batch=2", "--set", "job.save_every=2"]
    recipe = tmp_path / "mine.toml"
    recipe.write_text(Path("configs/finetune.toml").read_text().replace("[job]", "[job]\npost_hoc = [0.05, 0.1]"))
    words[1] = str(recipe)
    for stop in ("3", "0"):
        assert main([*words, "--set", f"job.stop={stop}"]) in (0, None)
    assert len(list((tmp_path / "run" / "averages").iterdir())) == 8  # at 2, 3, 4 and 6
    assert main(["average", *words, "--width", "0.08", "-o", str(tmp_path / "mid")]) == 0
    both = [load_file(tmp_path / f / UNET)["conv_out.weight"] for f in ("mid", "run/export")]
    assert not torch.equal(*both)
    assert torch.allclose(*both, atol=1e-3)
    assert load(tmp_path / "mid")


def test_check_names_file_and_line(photos: Path, tiny: Any, tmp_path: Path, capsys: Any) -> None:
    mine = shutil.copytree(photos, tmp_path / "mine")
    (mine / "2.txt").write_text("an owl and an owl and an owl and an owl on blue")
    (mine / "4.txt").unlink()
    text = Path("configs/finetune.toml").read_text().replace('path = "photos"', f'path = "{mine}"')
    config = tmp_path / "mine.toml"
    config.write_text(text.replace('model = "builtin" ', f'model = "{tiny("eps")}"'))
    assert main(["check", "--config", str(config)]) == 2
    said = capsys.readouterr().out
    assert "4.txt: '4.png' has no caption" in said
    assert "2.txt: note: " in said
    assert "behind the encoder's window of 8" in said
    config.write_text(text.replace("steps = 1000", "stepz = 1000").replace("dropout = 0.1", "droput = 0.1"))
    assert main(["check", "--config", str(config)]) == 2
    said = capsys.readouterr().out
    line = next(n for n, row in enumerate(config.read_text().splitlines(), 1) if row.startswith("stepz"))
    assert f"mine.toml:{line}: 'stepz' is not a field of [job]; did you mean 'steps'?" in said
    assert "mine.toml" in said
    assert "did you mean 'dropout'" in said
    assert "[job] needs steps" in said
