"""Trackers: the numbers of log.jsonl, once each, also when a run was stopped or killed in between."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import nn

from ldm_pipe.errors import UsageError
from scripts.train_kills import ToyTask
from train.job import Job
from train.loop import run


@dataclass(frozen=True)
class Judged(ToyTask):
    """The toy with a validation of one number and two pictures."""

    def validate(self, net: nn.Module, folder: Path) -> dict[str, float]:
        folder.mkdir(parents=True, exist_ok=True)
        for i, size in enumerate(((4, 4), (6, 4))):
            Image.new("RGB", size, (200, 0, 0)).save(folder / f"{i:02d}.png")
        return {"held_out": float(sum(p.double().sum() for p in net.parameters()))}


def job(folder: Path, **changes: Any) -> Job:
    start = Job(output=str(folder), steps=9, batch=4, lr=0.01, warmup=3, save_every=2, log_every=1, keep=9)
    return replace(start, **changes)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard" / "ldm_pipe"), size_guidance={"images": 0})
    found.Reload()
    told = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    return {**told, **{tag: [(e.step, e.width) for e in found.Images(tag)] for tag in found.Tags()["images"]}}


def test_tensorboard_has_every_line_once_across_stops_and_kills(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    plan = {"trackers": ("tensorboard",), "validate_every": 4}
    run(Judged(), job(tmp_path, stop=5, **plan))
    __import__("shutil").rmtree(tmp_path / "step-000005")  # as after a kill behind step 5: goes on after step 4
    run(Judged(), job(tmp_path, stop=7, **plan))
    run(Judged(), job(tmp_path, **plan))
    found = scalars(tmp_path)
    steps = [line for line in lines(tmp_path) if "loss" in line]
    assert [s for s, _ in found["loss"]] == list(range(1, 10))
    for tag in ("loss", "lr"):
        assert [v for _, v in found[tag]] == pytest.approx([line[tag] for line in steps], rel=1e-6)
    judged = [(line["step"], line["validation"]["held_out"]) for line in lines(tmp_path) if "validation" in line]
    assert [s for s, _ in found["validation/held_out"]] == [4, 8] == [s for s, _ in judged]
    assert [v for _, v in found["validation/held_out"]] == pytest.approx([v for _, v in judged], rel=1e-6)
    assert (found["validation/00"], found["validation/01"]) == ([(4, 4), (8, 4)], [(4, 6), (8, 6)])
    assert "step" not in found


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    run(Judged(), job(tmp_path))
    assert not (tmp_path / "tensorboard").exists()
    assert not (tmp_path / ".wandb_id").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(
        UsageError, match=rf"job\.trackers: {name} needs the package {name}: pip install 'ldm_pipe\[trackers\]'"
    ):
        run(Judged(), job(tmp_path / "run", trackers=(name,)))
    assert not (tmp_path / "run").exists()


def test_wandb_is_told_the_same_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in: offline, one id for all parts of a run, settings, numbers, pictures."""
    import types

    told: list[tuple[str, Any]] = []

    class Run:
        def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
            told.append(("log", (step, values)))

        def finish(self) -> None:
            told.append(("finish", None))

    fake = types.ModuleType("wandb")
    fake.init = lambda **given: told.append(("init", given)) or Run()  # type: ignore[attr-defined]
    fake.Image = lambda picture, **more: picture.shape  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    monkeypatch.setattr("train.trackers.check", lambda job: None)
    monkeypatch.setattr("accelerate.tracking.is_wandb_available", lambda: True)
    from accelerate.utils import LoggerType

    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for stop in (4, 0):
        run(Judged(), job(tmp_path, stop=stop, trackers=("wandb",), validate_every=4))
    begun = [given for kind, given in told if kind == "init"]
    assert [g["mode"] for g in begun] == ["offline", "offline"]
    assert begun[0]["id"] == begun[1]["id"] == (tmp_path / ".wandb_id").read_text()
    assert begun[0]["config"]["job.lr"] == 0.01
    assert begun[0]["dir"] == str(tmp_path)
    logged = [given for kind, given in told if kind == "log"]
    assert [step for step, values in logged if "loss" in values] == list(range(1, 10))
    assert [values for step, values in logged if "loss" in values][2]["loss"] == lines(tmp_path)[2]["loss"]
    assert [step for step, values in logged if "validation/held_out" in values] == [4, 8]
    assert sum(kind == "finish" for kind, _ in told) == 2


def test_a_tracker_that_is_not_known_is_refused_by_the_recipe(tmp_path: Path) -> None:
    from ldm_pipe import strict

    with pytest.raises(UsageError, match="choose from tensorboard, wandb"):
        strict.build(Job, {"output": "x", "steps": 1, "trackers": ["tensorbord"]}, "[job]")
