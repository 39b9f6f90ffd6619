"""The recorder and the previews: the same images to the bit, every fact of every step, a map that is the best one."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_pipe import CFG, Between, Level, UsageError
from ldm_pipe.codec import Identity
from ldm_pipe.looking.preview import Linear, fit, to_file, to_terminal
from ldm_pipe.looking.record import Recorder, read
from ldm_pipe.model import Estimate
from ldm_pipe.pipeline import Pipeline
from ldm_pipe.walk import Step

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def pipe(tiny: Tiny) -> Pipeline:
    return Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")


def recorded(
    pipe: Pipeline, path: Path, size: int = 0, **settings: Any
) -> tuple[dict[str, Tensor], dict[str, Any], list[Any], list[Step]]:
    plan = pipe.plan(["a fox", "two bees"], seed=3, num_images=2, **settings)
    recorder, steps = Recorder(plan, size), list[Step]()

    def both(step: Step) -> None:
        recorder.note(step)
        steps.append(step)

    outputs = list(pipe.run(recorder.watched, both))
    recorder.write(path)
    return (*read(path), outputs, steps)


def test_every_step_of_every_batch_is_in_the_file(pipe: Pipeline, tmp_path: Path) -> None:
    settings = {"steps": 5, "batch_size": 3, "sampler": "heun"}
    tensors, facts, outputs, steps = recorded(pipe, tmp_path / "r.safetensors", **settings)
    plain = pipe(["a fox", "two bees"], seed=3, num_images=2, **settings)
    assert torch.equal(torch.cat([o.latents for o in outputs]), plain.latents)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        "levels": (6, 2), "x0": (5, 4, 4, 8, 8), "guidance": (5, 4), "change": (5, 4), "evaluations": (5,),
    }  # fmt: skip
    walk = pipe.plan("a", **settings).levels
    assert tensors["levels"].tolist() == [list(map(float, lv)) for lv in walk]
    for k in range(5):
        assert torch.equal(tensors["x0"][k], torch.cat([steps[k].estimate.x0, steps[5 + k].estimate.x0]))
    assert tensors["evaluations"].tolist() == [16, 16, 16, 16, 8]
    assert int(tensors["evaluations"].sum()) == sum(sum(o.evaluations.values()) for o in outputs)
    assert torch.allclose(tensors["change"][1:], (tensors["x0"][1:] - tensors["x0"][:-1]).flatten(2).square().mean(2).sqrt())
    assert tensors["change"][0].tolist() == [0] * 4
    assert (facts["prompts"], facts["seeds"]) == (["a fox"] * 2 + ["two bees"] * 2, [3, 4, 3, 4])
    assert facts["settings"]["sampler"] == "heun"


def test_guidance_is_what_it_moved_x0_by(pipe: Pipeline, tmp_path: Path) -> None:
    tensors = recorded(pipe, tmp_path / "a", steps=4, guidance_scale=3.0)[0]
    other = recorded(pipe, tmp_path / "b", steps=4, guidance_scale=5.0)[0]
    none = recorded(pipe, tmp_path / "c", steps=4, guidance_scale=1.0)[0]
    assert torch.allclose(other["guidance"][0], 2 * tensors["guidance"][0], rtol=1e-4)  # s - 1 at the first step
    assert float(tensors["guidance"][0].min()) > 0
    assert float(none["guidance"].abs().max()) == 0
    assert none["evaluations"].tolist() == [4] * 4


def test_rules_that_change_on_the_way_are_followed(pipe: Pipeline, tmp_path: Path) -> None:
    plan = pipe.plan("a fox", rule=Between(0.5, 1.0, CFG(4.0)), seed=1, steps=6, spacing="trailing")
    recorder = Recorder(plan)
    list(pipe.run(recorder.watched, recorder.note))
    recorder.write(tmp_path / "r")
    tensors, _ = read(tmp_path / "r")
    active = [0.5 <= float(lv.u) < 1.0 for lv in plan.levels[:-1]]
    assert tensors["evaluations"].tolist() == [1 + a for a in active]
    assert [bool(g > 0) for g in tensors["guidance"][:, 0]] == active


def test_x0_is_averaged_to_a_size(pipe: Pipeline, tmp_path: Path) -> None:
    small = recorded(pipe, tmp_path / "a", size=4, steps=3)[0]["x0"]
    whole = recorded(pipe, tmp_path / "b", steps=3)[0]["x0"]
    assert small.shape == (3, 4, 4, 4, 4)
    assert torch.allclose(small, whole.unflatten(3, (4, 2)).unflatten(5, (4, 2)).mean((4, 6)), atol=1e-6)


def test_a_batch_that_was_left_is_run_again(pipe: Pipeline) -> None:
    plan = pipe.plan("a fox", seed=1, steps=3)
    recorder = Recorder(plan)
    with pytest.raises(UsageError, match="nothing to record"):
        recorder.data()
    steps: list[Step] = []
    list(pipe.run(recorder.watched, steps.append))
    for step in (steps[0], steps[1], *steps):
        recorder.note(step)
    assert [len(b) for b in recorder.batches] == [3]


@pytest.mark.parametrize("data", [b"", b"{}", b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 40])
def test_what_is_no_record_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "r").write_bytes(data)
    with pytest.raises(UsageError, match="is not a record of a run"):
        read(tmp_path / "r")
    with pytest.raises(UsageError, match="is not a record of a run"):
        read(tmp_path / "nothing")


@dataclasses.dataclass(frozen=True)
class Mixing:
    """A codec that is linear: colours by a matrix into 5 channels, each pixel 2x2 pixels."""

    channels: int = 5
    factor: int = 2

    @property
    def matrix(self) -> Tensor:
        return torch.arange(15.0).square().sin().reshape(5, 3)

    def encode(self, images: Tensor) -> Tensor:
        small = torch.nn.functional.avg_pool2d(images, 2)
        return torch.einsum("co,bohw->bchw", self.matrix, small) + 0.3

    def decode(self, latents: Tensor) -> Tensor:
        back = torch.einsum("oc,bchw->bohw", torch.linalg.pinv(self.matrix), latents - 0.3)
        return back.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def to(self, device: Any, dtype: Any) -> Mixing:
        return self


def test_the_map_of_a_linear_codec_is_exact() -> None:
    codec, picture = Mixing(), torch.rand(1, 3, 8, 8) * 2 - 1
    linear = fit(codec)
    shown = linear(codec.encode(picture))
    assert torch.allclose(shown, torch.nn.functional.avg_pool2d(picture, 2), atol=1e-5)
    assert linear.error < 1e-6
    same = fit(Identity())
    assert torch.allclose(same.weight, torch.eye(3), atol=1e-5)
    assert torch.allclose(same.bias, torch.zeros(3), atol=1e-5)


def test_no_other_map_is_nearer_to_the_tiny_codec(pipe: Pipeline) -> None:
    """Its weights are random; a step away from the fit in any direction fits worse."""
    from ldm_pipe.looking.preview import _colours

    codec, linear = pipe.bundle.codec, fit(pipe.bundle.codec)
    z = codec.encode(_colours(8 * codec.factor))
    seen = torch.nn.functional.avg_pool2d(codec.decode(z), codec.factor)

    def error(m: Linear) -> float:
        return float((m(z) - seen).square().mean().sqrt())

    assert error(linear) == pytest.approx(linear.error, rel=1e-3)
    for k in range(4):
        step = torch.zeros_like(linear.weight)
        step[k % 3, k] = 0.05
        assert error(Linear(linear.weight + step, linear.bias)) > error(linear)
        assert error(Linear(linear.weight, linear.bias + 0.05)) > error(linear)


def test_previews_go_to_a_file_and_to_a_terminal(tmp_path: Path) -> None:
    x0 = torch.tensor([[[[1.0, -1.0], [0.0, 1.0]]] * 3, [[[-1.0, -1.0], [-1.0, -1.0]]] * 3]).reshape(2, 3, 2, 2)
    linear, written = fit(Identity()), list[str]()
    for number in (0, 1):
        step = Step(x0, Estimate(x0, x0), None, Level(0.5, 0.5), Level(1.0, 0.0), number)
        to_file(tmp_path / "p.png", linear, 8)(step)
        to_terminal(written.append, linear)(step)
    with Image.open(tmp_path / "p.png") as sheet:
        assert sheet.size == (18, 8)
        assert [sheet.getpixel(p) for p in ((0, 0), (4, 0), (4, 4), (10, 0))] == [(255,) * 3, (0,) * 3, (255,) * 3, (0,) * 3]
        middle = sheet.getpixel((0, 4))
        assert isinstance(middle, tuple)
        assert abs(middle[0] - 128) <= 1
    cells = re.findall(r"\x1b\[38;2;(\d+);\d+;\d+m\x1b\[48;2;(\d+);\d+;\d+m", written[0])
    assert cells[:2] == [("255", "128"), ("0", "255")]
    assert (written[1].startswith("\x1b[1F"), written[0].startswith("\x1b[1F")) == (True, False)
    assert Counter(written[0])["\u2580"] == 6


def test_a_narrow_terminal_shows_fewer_images() -> None:
    x0, written = torch.zeros(5, 3, 4, 4), list[str]()
    to_terminal(written.append, fit(Identity()), columns=14)(Step(x0, Estimate(x0, x0)))
    assert Counter(written[0])["\u2580"] == 3 * 5 * 2
