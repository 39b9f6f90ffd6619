"""The training loop: stopping anywhere and resuming is the same run, a broken checkpoint is named and skipped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm_pipe.errors import NumericalError, UsageError
from train.__main__ import main, read_recipe
from train.ema import Ema
from train.loop import Job, ids_of, run


class Line(nn.Module):
    """Least squares."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": (self.layer(batch["x"]) - batch["y"]).square().mean()}


@dataclass(frozen=True)
class Fit:
    """A task that takes milliseconds."""

    poison: int = -1

    def net(self) -> nn.Module:
        return Line()

    def batch(self, seed: int, ids: Sequence[int]) -> dict[str, Any]:
        x = np.stack([np.random.default_rng([seed, i]).standard_normal(3) for i in ids])
        x[0] *= np.nan if self.poison in ids else 1
        x = torch.from_numpy(x).float()
        return {"x": x, "y": x.sum(1, keepdim=True)}

    def export(self, net: Any, folder: Path) -> None:
        (folder / "weights.json").write_text(json.dumps(net.layer.weight.tolist()))


def job(folder: Path, **changes: Any) -> Job:
    start = Job(output=str(folder), steps=12, batch=4, lr=0.1, warmup=2, save_every=3, log_every=1, keep=9)
    return replace(start, **changes)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stops", [(1,), (4,), (6,), (11,), (2, 5, 9)])
def test_resuming_is_bit_identical(tmp_path: Path, stops: tuple[int, ...]) -> None:
    run(Fit(), job(tmp_path / "straight"))
    for stop in (*stops, 0):
        run(Fit(), job(tmp_path / "stopped", stop=stop))
    straight, stopped = (json.loads((tmp_path / n / "export" / "weights.json").read_text()) for n in ("straight", "stopped"))
    assert straight == stopped
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")


def test_it_learns(tmp_path: Path) -> None:
    run(Fit(), job(tmp_path, steps=200, ema=0.9))
    weights = json.loads((tmp_path / "export" / "weights.json").read_text())
    assert np.allclose(weights, 1, atol=0.02)


@pytest.mark.parametrize("damage", ["truncate", "manifest", "empty"])
def test_a_broken_checkpoint_is_named_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    run(Fit(), job(tmp_path, stop=6))
    newest = tmp_path / "step-000006"
    if damage == "truncate":
        (newest / "weights.safetensors").write_bytes((newest / "weights.safetensors").read_bytes()[:-1])
    elif damage == "manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text("")
    run(Fit(), job(tmp_path))
    said = capsys.readouterr().out
    assert "skipping step-000006" in said
    assert "resuming after step 3" in said
    run(Fit(), job(tmp_path / "straight"))
    found, straight = (json.loads((f / "export" / "weights.json").read_text()) for f in (tmp_path, tmp_path / "straight"))
    assert found == straight


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match="the loss of step 7"):
        run(Fit(poison=30), job(tmp_path))
    assert (tmp_path / "step-000006" / "manifest.json").exists()
    assert not (tmp_path / "export").exists()


def test_no_two_processes_or_steps_share_a_sample() -> None:
    seen = [i for step in range(5) for rank in range(3) for i in ids_of(step, 4, rank, 3)]
    assert seen == list(range(60))
    one = [i for step in range(5) for i in ids_of(step, 12, 0, 1)]
    assert one == seen


def test_the_rate_warms_up_and_falls_to_its_end() -> None:
    plan = Job(output="", steps=100, lr=1.0, lr_end=0.1, warmup=10)
    assert plan.rate(0) == pytest.approx(0.1)
    assert plan.rate(9) == plan.rate(10) == 1
    assert plan.rate(55) == pytest.approx(0.55)
    assert plan.rate(100) == pytest.approx(0.1)


def test_the_average_comes_and_goes_without_a_trace() -> None:
    net = Line()
    ema = Ema(net, 0.5)
    with torch.no_grad():
        net.layer.weight += 1
    before = net.layer.weight.detach().clone()
    for _ in range(3):
        ema.update(net, 1000)
    with ema.swapped(net):
        assert torch.allclose(net.layer.weight, before - 0.125)
    assert torch.equal(net.layer.weight, before)


def test_a_recipe_is_read_strictly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "job.toml"
    recipe.write_text('[task]\nname = "codec"\n[job]\noutput = "x"\nsteps = 1\n')
    assert read_recipe(str(recipe), ["job.steps=5"])["job"]["steps"] == "5"
    with pytest.raises(UsageError, match="form table"):
        read_recipe(str(recipe), ["steps=5"])
    for text, words in [
        ('[task]\nname = "codek"', "did you mean 'codec'"),
        ('[task]\nname = "codec"\n[job]\noutput = "x"\nstepz = 1', "did you mean 'steps'"),
        ('[task]\nname = "codec"\nlayers = "many"\n[job]\noutput = "x"\nsteps = 1', "a whole number"),
        ("[task", "is not TOML"),
    ]:
        recipe.write_text(text)
        assert main(["--config", str(recipe)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert words in err
        assert err.count("\n") == 1
    assert main(["--config", str(tmp_path / "none.toml")]) == 2
