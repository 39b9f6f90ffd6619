"""Optimisers, precision and compilation: every choice resumes bit for bit, and what is exported is what its paper averages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm_pipe.errors import NumericalError, UsageError
from train import scale
from train.job import Job, Task
from train.loop import run
from train.optimisers import Inside

CHOICES = {
    "adamw": "torch",
    "adafactor": "torch",
    "adamw8bit": "bitsandbytes",
    "schedulefree": "schedulefree",
    "prodigy": "prodigyopt",
}


class Net(nn.Module):
    """Large enough for states of 8 bits (4096 values)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 70), nn.Tanh(), nn.Linear(70, 1))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        each = (self.net(batch["x"]) - batch["y"]).square().mean(1)
        loss = each.mean() * batch["size"].mean()
        if batch["broken"].any():
            loss = loss + (self.net[0].weight.sum() * 0).abs().sqrt()  # zero, with a gradient that is not finite
        return {"loss": loss, "each": each.detach()}


@dataclass(frozen=True)
class Fit(Task):
    """A task that takes milliseconds. huge: steps (of 4) whose loss is that much larger; broken: first step whose gradient is
    not finite, nor those behind it."""

    huge: tuple[int, ...] = ()
    factor: float = 1.0
    broken: int = 10**9

    def net(self) -> nn.Module:
        return Net()

    def batch(self, seed: int, ids: Sequence[int]) -> dict[str, Any]:
        x = torch.from_numpy(np.stack([np.random.default_rng([seed, i]).standard_normal(3) for i in ids])).float()
        size = torch.tensor([self.factor if i // 4 in self.huge else 1.0 for i in ids])
        broken = torch.tensor([i // 4 >= self.broken for i in ids])
        return {"x": x, "y": x.sum(1, keepdim=True), "size": size, "broken": broken}

    def validate(self, net: Any, folder: Path) -> dict[str, float]:
        return {"sum": float(sum(p.double().sum() for p in net.parameters()))}

    def export(self, net: Any, folder: Path) -> None:
        (folder / "weights.json").write_text(json.dumps([p.tolist() for p in net.parameters()]))


def job(folder: Path, **changes: Any) -> Job:
    start = Job(output=str(folder), steps=10, batch=4, lr=0.01, warmup=3, save_every=4, log_every=1, keep=9)
    return replace(start, **changes)


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "samples_per_second"} for line in found]


def exported(folder: Path) -> str:
    return (folder / "export" / "weights.json").read_text()


def last(folder: Path) -> tuple[dict[str, bytes], Any]:
    newest = max(folder.glob("step-*"))
    return {f.name: f.read_bytes() for f in newest.glob("*.safetensors")}, json.loads((newest / "manifest.json").read_text())[
        "optimiser"
    ]


@pytest.mark.parametrize("name", CHOICES)
def test_every_optimiser_learns_and_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    pytest.importorskip(CHOICES[name])
    rate = {"prodigy": 1.0, "adafactor": 0.05}.get(name, 0.01)
    plan = {"optimiser": name, "lr": rate, "weight_decay": 0.01, "validate_every": 3}
    run(Fit(), job(tmp_path / "a", **plan))
    for stop in (1, 4, 7, 0):
        run(Fit(), job(tmp_path / "b", stop=stop, **plan))
    assert exported(tmp_path / "a") == exported(tmp_path / "b")
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert last(tmp_path / "a") == last(tmp_path / "b")
    run(Fit(), job(tmp_path / "c", **{**plan, "steps": 150, "save_every": 150, "validate_every": 0, "ema": 0.5}))
    losses = [line["loss"] for line in lines(tmp_path / "c")]
    assert np.mean(losses[-10:]) < 0.2 * np.mean(losses[:5])


def test_a_kept_schedule_free_run_exports_its_own_average(tmp_path: Path) -> None:
    schedulefree = pytest.importorskip("schedulefree")
    task, plan = Fit(), job(tmp_path, optimiser="schedulefree", steps=7, warmup=2, validate_every=2)
    run(task, plan)
    torch.manual_seed(0)
    net = Net()
    theirs = schedulefree.AdamWScheduleFree(net.parameters(), lr=0.01, betas=plan.betas, warmup_steps=2)
    for step in range(7):
        theirs.train()
        net(task.batch(0, range(4 * step, 4 * step + 4)))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), plan.clip)
        theirs.step()
        theirs.zero_grad()
    trained = load_file(tmp_path / "step-000007" / "weights.safetensors")
    assert all(torch.equal(trained[n], p) for n, p in net.state_dict().items())
    theirs.eval()
    mine = [torch.tensor(p) for p in json.loads(exported(tmp_path))]
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(mine, net.parameters(), strict=True))
    assert not torch.equal(mine[0], trained["net.0.weight"])
    with pytest.raises(UsageError, match=r"job\.post_hoc"):
        job(tmp_path, optimiser="schedulefree", post_hoc=(0.1,))
    assert plan.rate(6) == plan.lr


def test_before_its_first_step_the_average_is_the_weights() -> None:
    net = Net()
    inside = Inside(net, torch.optim.AdamW(net.parameters()))
    inside.update(net, 0)
    assert all(torch.equal(inside.shadow[n], t) for n, t in net.state_dict().items())


def test_eight_bits_are_eight_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    run(Fit(), job(tmp_path, optimiser="adamw8bit", steps=2))
    held = load_file(tmp_path / "step-000002" / "optimiser.safetensors")
    assert held["2.state1"].dtype == torch.uint8
    assert held["2.state1"].shape == (70, 64)
    assert held["0.state1"].dtype == torch.float32  # 192 values: not worth it


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, package in CHOICES.items():
        if package != "torch":
            for module in (package, f"{package}.optim"):
                monkeypatch.setitem(__import__("sys").modules, module, None)
            with pytest.raises(UsageError, match=rf"{name} needs the package {package}: pip install 'ldm_pipe\[optimisers\]'"):
                run(Fit(), job(tmp_path, optimiser=name))


def test_another_optimiser_is_refused_or_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(Fit(), job(tmp_path, stop=4))
    changed = job(tmp_path, optimiser="adafactor")
    with pytest.raises(UsageError, match=r"job\.optimiser was 'adamw'"):
        run(Fit(), changed)
    run(Fit(), changed, allow_changed=True)
    assert "its state begins anew" in capsys.readouterr().out


def test_a_checkpoint_from_before_there_was_a_choice_goes_on(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(Fit(), job(tmp_path / name, stop=4))
    manifest = tmp_path / "a" / "step-000004" / "manifest.json"
    told = json.loads(manifest.read_text())
    del told["optimiser"], told["facts"]["job.optimiser"], told["facts"]["task.factor"]
    manifest.write_text(json.dumps(told))
    for name in ("a", "b"):
        run(Fit(), job(tmp_path / name))
    assert exported(tmp_path / "a") == exported(tmp_path / "b")
    manifest = tmp_path / "a" / "step-000004" / "manifest.json"
    for step in (8, 10):
        __import__("shutil").rmtree(tmp_path / "a" / f"step-{step:06d}")
    with pytest.raises(UsageError, match=r"task\.factor was 1\.0 when this run began and is 2\.0"):
        run(Fit(factor=2.0), job(tmp_path / "a"))


# --- half precision: Accelerate makes a scaler on GPUs only, so the tests put the CPU's in its place


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scale.accelerator

    def with_scaler(job: Job) -> Any:
        found = made(job)
        found.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        return found

    monkeypatch.setattr("train.scale.accelerator", with_scaler)


@pytest.mark.usefixtures("scaled")
def test_the_scaler_goes_on_where_it_was(tmp_path: Path) -> None:
    task = Fit(huge=(5,), factor=1e36)
    run(task, job(tmp_path / "a"))
    for stop in (2, 5, 6, 0):
        run(task, job(tmp_path / "b", stop=stop))
    assert exported(tmp_path / "a") == exported(tmp_path / "b")
    for folder in ("a", "b"):
        state = json.loads((tmp_path / folder / "step-000010" / "manifest.json").read_text())["state"]["scaler"]
        assert state["scale"] == 2.0**11  # up after 3 steps, down at the sixth, up after 3 more
        assert state["_growth_tracker"] == 1


@pytest.mark.usefixtures("scaled")
def test_a_step_that_overflows_moves_nothing(tmp_path: Path) -> None:
    run(Fit(huge=(5,), factor=1e36), job(tmp_path, save_every=1, post_hoc=(0.1,)))
    held = [{f.name: f.read_bytes() for f in (tmp_path / f"step-{n:06d}").glob("*.safetensors")} for n in (5, 6, 7)]
    assert held[0] == held[1] != held[2]


@pytest.mark.usefixtures("scaled")
def test_steps_that_overflow_at_any_scale_stop_the_run(tmp_path: Path) -> None:
    # up to 2^11 at step 3, below 1 by steps 4..15, and three faults
    with pytest.raises(NumericalError, match=r"3 steps in a row were not finite, step 18 last: the gradient of"):
        run(Fit(broken=3), job(tmp_path, steps=40))


def test_half_precision_without_a_gpu_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"job\.precision 'fp16' is not to be had here"):
        run(Fit(), job(tmp_path, precision="fp16"))


# --- compilation


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_run_has_the_names_and_goes_on_either_way(tmp_path: Path, backend: Any) -> None:
    run(Fit(), job(tmp_path / "plain", steps=4))
    run(Fit(), job(tmp_path / "mixed", steps=4, compile=backend, stop=2))
    run(Fit(), job(tmp_path / "mixed", steps=4))
    run(Fit(), job(tmp_path / "whole", steps=4, compile=backend))
    names = [sorted(load_file(tmp_path / n / "step-000004" / "weights.safetensors")) for n in ("plain", "mixed", "whole")]
    assert names[0] == names[1] == names[2]
    one, two, three = ([np.array(p) for p in json.loads(exported(tmp_path / n))] for n in ("plain", "mixed", "whole"))
    for a, b, c in zip(one, two, three, strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-7)
        assert np.allclose(a, c, rtol=1e-5, atol=1e-7)


def test_compiling_is_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append("compiled")
        return graph.forward

    net = Net()
    assert scale.compiled(net, "no") is net
    batch = Fit().batch(0, range(4))
    expected = net(batch)["loss"]
    assert not seen
    assert torch.equal(scale.compiled(net, backend)(batch)["loss"], expected)  # type: ignore[arg-type]
    assert seen
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UsageError, match=r"takes a C\+\+ compiler"):
        scale.compiled(Net(), "inductor")
