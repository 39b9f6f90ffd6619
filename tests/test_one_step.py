"""What a network predicts is told from three answers: right for every closed form, silent for random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm_pipe import VP, Cond, Flow, Model, cli, load, one_step
from ldm_pipe.analysis.gaussian import Gaussian
from ldm_pipe.analysis.network import ExactNetwork
from ldm_pipe.one_step import ALL, NOISE, candidates, colours, contradiction
from ldm_pipe.path import EDM
from ldm_pipe.prediction import PREDICTIONS

SHAPE = (4, 4, 8, 8)
X0 = torch.tensor([[1.2, -0.8, 0.3, 1.0], [-1.0, 1.1, 0.9, -0.9], [0.4, 0.2, -1.3, 0.8], [-0.6, -1.0, 1.2, 0.1]])
PLAIN = X0.double()[:, :, None, None].expand(SHAPE)
PATHS = {"scaled linear": VP.scaled_linear(), "zero terminal": VP.linear().zero_terminal(), "flow": Flow(), "edm": EDM(0.5)}


def smooth(reach: float, mean: float = 0.0) -> Gaussian:
    """Pictures whose neighbours are alike over `reach` pixels, unit variance, each channel for itself."""
    row = torch.arange(8, dtype=torch.float64)
    near = torch.exp(-((row[:, None] - row) ** 2) / (2 * reach**2))
    covariance = torch.kron(torch.eye(4, dtype=torch.float64), torch.kron(near, near))
    return Gaussian(torch.full((256,), mean, dtype=torch.float64), (covariance + covariance.T) / 2)


def white(deviation: float) -> Gaussian:
    return Gaussian.isotropic(torch.zeros(256), deviation)


def told(prior: Gaussian, path: str, prediction: str) -> frozenset[str]:
    where = PATHS[path]
    network = ExactNetwork((prior,), where, PREDICTIONS[prediction])
    return candidates(Model(network, where, PREDICTIONS["eps"]), Cond(), PLAIN)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("reach", [3.0, 8.0])
def test_the_perfect_denoiser_of_smooth_pictures_is_told_exactly(path: str, prediction: str, reach: float) -> None:
    assert told(smooth(reach, 0.2), path, prediction) == {prediction}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("deviation", [0.4, 0.5, 0.7, 1.0, 1.5])
def test_no_false_alarm_where_noise_cannot_be_told_from_pictures(path: str, prediction: str, deviation: float) -> None:
    """White Gaussians: a plain colour is no likely picture there. The truth is never ruled out, noise is told from the rest."""
    found = told(white(deviation), path, prediction)
    assert prediction in found
    if prediction in NOISE:
        assert found <= NOISE


def test_random_and_dull_networks_are_left_alone(diffusers_model: Callable[[str], Model]) -> None:
    def dull(x: torch.Tensor, time: torch.Tensor, cond: Cond) -> torch.Tensor:
        return torch.zeros_like(x)

    cond = Cond(tokens=torch.randn(1, 6, 16)).repeat(4)
    found = candidates(diffusers_model("unet"), cond, PLAIN.float())
    assert found == candidates(Model(dull, VP.linear(), PREDICTIONS["eps"]), cond, PLAIN.float()) == ALL
    for seed in range(20):
        torch.manual_seed(seed)
        mixed = torch.nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64).requires_grad_(False)

        def network(x: torch.Tensor, time: torch.Tensor, cond: Cond, mixed: torch.nn.Module = mixed) -> torch.Tensor:
            return mixed(x).tanh()

        assert candidates(Model(network, VP.linear(), PREDICTIONS["eps"]), Cond(), PLAIN) == ALL


@pytest.mark.parametrize("shown", ["noise", "pictures"])
def test_an_answer_that_is_mostly_something_else_is_no_answer(shown: str) -> None:
    """What it says of noise or of pictures is right, but it is a fifth of what it says; alone it would count."""
    pattern = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def network(x: torch.Tensor, time: torch.Tensor, cond: Cond, loud: float = 2.0) -> torch.Tensor:
        return (x if shown == "noise" else x.mean((2, 3), keepdim=True).expand_as(x)) + loud * pattern

    def quiet(x: torch.Tensor, time: torch.Tensor, cond: Cond) -> torch.Tensor:
        return network(x, time, cond, 0.0)

    told = [candidates(Model(n, VP.linear(), PREDICTIONS["v"]), Cond(), PLAIN) for n in (network, quiet)]
    assert told == [ALL, NOISE if shown == "noise" else frozenset({"x0"})]


def test_the_built_in_model_predicts_the_flow() -> None:
    """Whatever is declared of it, on its own path and on a table's."""
    bundle = load("builtin")
    side = 16
    x0 = bundle.codec.encode(colours(side * bundle.codec.factor))
    cond = bundle.empty(side).repeat(4)
    for path in (Flow(), VP.scaled_linear()):
        model = Model(bundle.model.network, path, PREDICTIONS["v"])
        assert candidates(model, cond, x0) == {"flow"}
    assert bundle.predicts() == {"flow"}
    for declared in ("eps", "v", "x0"):
        said = contradiction(declared, frozenset({"flow"}), "it")
        assert said.startswith(f"it says that the network predicts {declared}; its answers")
        assert said.endswith("are those of flow")
    assert contradiction("flow", frozenset({"flow"}), "it") == contradiction("v", ALL, "it") == ""


def test_the_check_reports_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldm_pipe.loading import BUILTIN

    folder = Path(shutil.copytree(BUILTIN, tmp_path / "wrong", ignore=shutil.ignore_patterns("SHA256SUMS")))
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    config |= {"prediction_type": "epsilon", "use_flow_sigmas": False, "_class_name": "DDIMScheduler"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(one_step, "candidates", lambda *_: frozenset({"flow"}))  # as the test above found
    assert cli.main(["--model", str(folder), "--check", "--device", "cpu", "--dtype", "fp32", "--height", "64"]) == 0
    assert "scheduler_config.json says that the network predicts eps; its answers" in capsys.readouterr().out
    monkeypatch.undo()
    assert cli.main(["--model", str(tiny("eps")), "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["contradiction"] == ""
    assert replace(load(tiny("v"))).predicts() == ALL
