"""ControlNet and T2I-Adapter: no bit changes at step 0, the model stays, they learn, resume, and steer what is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_pipe import Pipeline, UsageError, load
from ldm_pipe.doors.controls import Controls
from train.__main__ import main
from train.hints import edges
from train.loop import run
from train.tasks.controlnet import ControlNet

KINDS = ["controlnet", "t2i_adapter"]
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares of two greys, each with a picture beside it."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(4):
        pixels = np.full((32, 32, 3), 40, np.uint8)
        pixels[4 * i : 4 * i + 12, 8:20] = 220
        Image.fromarray(pixels).save(folder / f"{i}.png")
        Image.fromarray(255 - pixels).save(folder / f"{i}.condition.png")
        (folder / f"{i}.txt").write_text("a fox on red")
    return folder


@pytest.fixture
def make(photos: Path, tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., ControlNet]:
    def task(kind: str, **fields: Any) -> ControlNet:
        table = {"path": str(photos), "cache": str(tmp_path / "cache"), **fields.pop("data", {})}
        return ControlNet(table, str(fields.pop("model", tiny("eps"))), kind=kind, **fields)

    return task


@pytest.mark.parametrize("kind", KINDS)
def test_step_0_changes_no_bit_and_the_model_has_no_gradient(make: Any, tiny: Any, kind: str) -> None:
    task = make(kind).grouped(2)
    net, batch = task.net(), task.batch(0, range(2))
    plain = net.frozen[0](batch)["each"]
    out = net(batch)
    assert torch.equal(out["each"], plain)
    out["loss"].backward()
    assert all(p.grad is None for p in task.bundle.model.parameters())
    moving = {n for n, p in net.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
    assert moving
    assert all(n.startswith("branches.control.") for n, _ in net.named_parameters())
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05)
    assert not torch.equal(net(batch)["each"], plain)
    assert not torch.equal(net({**batch, "hint": batch["hint"].flip(0)})["each"], net(batch)["each"])
    before = load(tiny("eps")).model.state_dict()
    assert all(torch.equal(before[n], t) for n, t in task.bundle.model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_resumes_to_the_bit_and_steers(make: Any, tiny: Any, tmp_path: Path, kind: str, job: Any) -> None:
    straight = run(make(kind), job(tmp_path / "a"))
    for stop in (3, 0):
        again = run(make(kind), job(tmp_path / "b", stop=stop))
    assert (straight / FILE).read_bytes() == (again / FILE).read_bytes()
    pipe = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32", "sdpa")
    whole = pipe.plan("a fox", seed=3)
    steered = Controls.of([str(straight)], 1, [1.0], {}).applied(pipe, whole, [Image.new("RGB", (32, 32), "white")])
    latents = [next(pipe.run(p)).latents for p in (whole, steered)]
    assert not torch.equal(*latents)
    task = make(kind).grouped(4)
    net = task.net()
    batch, optimiser = task.batch(0, range(4)), torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        losses.append(net(batch)["loss"])
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.9 * losses[0]


def test_what_is_learned_is_what_the_door_applies(make: Any, tiny: Any, tmp_path: Path) -> None:
    """One evaluation of the trained net equals the patched one of the exported folder."""
    from ldm_pipe import Cond
    from ldm_pipe.control.controlnet import ControlNet as Patched
    from ldm_pipe.level import Level
    from ldm_pipe.patch import Run, changed, root
    from train.tasks.controlnet import controlnet

    task = make("controlnet").grouped(1)
    net = task.net()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05)
    g = torch.Generator().manual_seed(0)
    x, tokens, hint = (
        torch.randn(1, 4, 8, 8, generator=g),
        torch.randn(1, 8, 16, generator=g),
        torch.rand(1, 3, 32, 32, generator=g),
    )
    model = load(tiny("eps")).model
    network, walk = root(model), (Level(0.5, 0.5), Level(1.0, 0.0))
    outs = []
    with torch.no_grad():
        beside = net.branches["control"]
        for change in (controlnet(beside, network, hint), Patched(beside, hint).changes(network, Run(walk))[""]):
            with changed(network, {"": [change]}):
                outs.append(model.network(x, torch.tensor([500]), Cond(tokens=tokens)))
    assert torch.equal(*outs)
    both, hints, more = torch.cat([x, x]), torch.cat([hint, 1 - hint]), torch.cat([tokens, tokens])
    with torch.no_grad(), changed(network, {"": [controlnet(beside, network, hints)]}):
        rows = model.network(both, torch.tensor([500, 500]), Cond(tokens=more))
    assert torch.allclose(rows[:1], outs[0], atol=1e-5)
    assert not torch.allclose(rows[1:], outs[0], atol=1e-3)


def test_hints_are_given_or_edges(make: Any, photos: Path, tiny: Any) -> None:
    given = make("controlnet", data={"buckets": False}).grouped(1)
    net = given.net()
    batches = {b["names"][0]: b for b in (given.batch(0, [i]) for i in range(4))}
    wanted = torch.from_numpy(np.asarray(Image.open(photos / "2.condition.png"))).permute(2, 0, 1) / 255
    assert torch.allclose(batches["2.png"]["hint"][0], wanted, atol=1e-6)
    square = torch.full((3, 16, 16), -1.0)
    square[:, 4:12, 4:12] = 1.0
    lines = edges(square)
    assert lines.shape == square.shape
    assert float(lines[0, 7, 7]) == float(lines[0, 1, 1]) == 0.0
    assert float(lines[0, 4, 7]) == float(lines[0, 7, 11]) == 1.0
    assert torch.equal(lines, edges(-square))
    assert float(edges(0.05 * square).sum()) == 0.0
    alone = make("controlnet", data={"path": str(photos.parent / "bare")})
    (photos.parent / "bare").mkdir()
    Image.new("RGB", (32, 32)).save(photos.parent / "bare" / "x.png")
    (photos.parent / "bare" / "x.txt").write_text("a fox")
    with pytest.raises(UsageError, match=r"photo.condition.png; hint = .edges. makes one"):
        alone.grouped(1).batch(0, [0])
    assert net is not None


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_runs_from_the_command_line(photos: Path, tiny: Any, tmp_path: Path, kind: str) -> None:
    words = ["--config", f"configs/{kind}.toml", "--set", f"data.path={photos}", "--set", f"task.model={tiny('v')}"]
    words += ["--set", f"data.cache={tmp_path / 'cache'}", "--set", f"job.output={tmp_path / 'run'}"]
    words += ["--set", "job.steps=2", "--set", "job.batch=2", "--set", "task.hint=edges"]
    assert main(["check", *words]) == 0
    assert main(words) == 0
    assert (tmp_path / "run" / "export" / FILE).exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_of_uneven_levels_is_steered_too(make: Any, tmp_path: Path, kind: str, job: Any) -> None:
    """The built-in U-Net: no layer at the first resolution, which only halves. Nothing at step 0, then the export steers."""
    task = make(kind, model="builtin", data={"side": 64, "buckets": False}).grouped(2)
    net, batch = task.net(), task.batch(0, range(2))
    assert torch.equal(net(batch)["each"], net.frozen[0](batch)["each"])
    export = run(make(kind, model="builtin", data={"side": 64, "buckets": False}), job(tmp_path / "a"))
    pipe = Pipeline.from_pretrained("builtin", "cpu", "fp32", "sdpa")
    whole = pipe.plan("a fox", seed=3, steps=3)
    steered = Controls.of([str(export)], 1, [1.0], {}).applied(pipe, whole, [Image.new("RGB", (64, 64), "white")])
    latents = [next(pipe.run(p)).latents for p in (whole, steered)]
    assert not torch.equal(*latents)
