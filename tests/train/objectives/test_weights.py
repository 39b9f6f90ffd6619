"""Weights are said once, for x0, and so hold for every prediction: the published forms, and equality across predictions."""

from __future__ import annotations

import pytest
import torch

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.prediction import PREDICTIONS
from train.objectives.objective import read
from train.objectives.weights import WEIGHTS, Constant, slope2

ANGLE = torch.linspace(0.05, 1.5, 40, dtype=torch.float64)[:, None, None, None]
CIRCLE = Level(ANGLE.cos(), ANGLE.sin())
SNR = (CIRCLE.alpha / CIRCLE.sigma).square().flatten()


def weight(name: str, prediction: str, **fields: float) -> torch.Tensor:
    return WEIGHTS[name](**fields)(SNR, slope2(PREDICTIONS[prediction], CIRCLE))


@pytest.mark.parametrize(
    ("name", "prediction", "expected"),
    [
        ("min_snr", "eps", SNR.clamp(max=5) / SNR),
        ("min_snr", "v", SNR.clamp(max=5) / (SNR + 1)),
        ("min_snr", "x0", SNR.clamp(max=5)),
        ("soft_min_snr", "eps", 4 / (SNR + 4)),
        ("p2", "eps", 1 / (1 + SNR)),
        ("debiased", "eps", 1 / SNR.sqrt()),
        ("debiased", "v", SNR.sqrt() / (SNR + 1)),
        ("edm", "v", torch.ones_like(SNR)),
        ("edm", "x0", SNR + 1),
    ],
)
def test_the_published_forms(name: str, prediction: str, expected: torch.Tensor) -> None:
    assert torch.allclose(weight(name, prediction), expected, rtol=1e-12)


def test_the_fields_of_p2_and_min_snr() -> None:
    assert torch.allclose(weight("p2", "eps", k=2.0, gamma=0.5), (2 + SNR) ** -0.5)
    assert torch.allclose(weight("min_snr", "x0", gamma=2.0), SNR.clamp(max=2))


@pytest.mark.parametrize("name", sorted(set(WEIGHTS) - {"constant"}))
@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
def test_a_weight_is_the_same_loss_for_every_prediction(name: str, prediction: str) -> None:
    x0, guess, noise = torch.randn(3, 40, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, rule = CIRCLE.mix(x0, noise), PREDICTIONS[prediction]
    out = rule.target(guess, CIRCLE.noise(x, guess), CIRCLE)
    error = (out - rule.target(x0, noise, CIRCLE)).square().mean(dim=(1, 2, 3))
    plain = (guess - x0).square().mean(dim=(1, 2, 3))
    assert torch.allclose(error * weight(name, prediction), plain * weight(name, "x0"), rtol=1e-9)


def test_constant_is_one_of_the_output_itself() -> None:
    assert all((weight("constant", p) == 1).all() for p in PREDICTIONS)
    assert isinstance(read({}).weight, Constant)


def test_soft_min_snr_stays_below_min_snr_and_meets_it_at_the_ends() -> None:
    hard, soft = weight("min_snr", "x0", gamma=4.0), weight("soft_min_snr", "x0")
    assert (soft < hard).all()
    assert torch.allclose(soft[[0, -1]], hard[[0, -1]], rtol=0.02)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"weight": "min_snrr"}, "did you mean 'min_snr'"),
        ({"weight": {"name": "min_snr", "gama": 1}}, "did you mean 'gamma'"),
        ({"weight": {"name": "min_snr", "gamma": 0}}, "above 0"),
        ({"levels": "logitnormal"}, "did you mean 'logit_normal'"),
        ({"levels": {"name": "mode", "scale": 3.0}}, "1.75"),
        ({"levels": {"name": "beta", "a": -1}}, "above 0"),
        ({"huber": -1}, "0 or more"),
        ({"ofset": 1}, "did you mean 'offset'"),
    ],
)
def test_a_wrong_table_is_refused_by_name(table: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read(table)
