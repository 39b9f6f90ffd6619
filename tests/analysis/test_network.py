"""Every closed form through the whole stack: as a raw network of any prediction on any path, wrapped by Model, it is itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm_pipe import CFG, EDM, EPS, FLOW, PREDICTIONS, VP, Cond, Flow, Gaussian, Level, Mixture, Model, UsageError, guided
from ldm_pipe.analysis import ExactNetwork

SPAN = torch.arange(4, dtype=torch.float64)
GAUSSIAN = Gaussian(torch.cos(SPAN), 0.25 * 0.8 ** (SPAN[:, None] - SPAN).abs())
MIXTURE = Mixture.isotropic(torch.tensor([0.3, 0.7]), torch.stack([SPAN.sin(), -SPAN.cos()]), 0.4)
OPERATOR, Y = torch.eye(4, dtype=torch.float64)[:2], torch.tensor([0.5, -0.5], dtype=torch.float64)
FIRST = torch.tensor([0.9, 0.2], dtype=torch.float64)
ORACLES: dict[str, Any] = {
    "gaussian": GAUSSIAN,
    "gaussian given y": GAUSSIAN.measured(OPERATOR, Y, 0.1),
    "gaussian given y exactly": GAUSSIAN.measured(OPERATOR, Y, 0.0),
    "mixture": MIXTURE,
    "mixture of a class": MIXTURE.given(FIRST),
    "mixture given y": MIXTURE.measured(OPERATOR, Y, 0.1),
    "mixture given y exactly": MIXTURE.measured(OPERATOR, Y, 0.0),
}
# Times that fp32, the clock of networks, holds exactly.
PATHS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "table": (VP.scaled_linear(), (0.0, 250.25, 999.0)),
    "zero terminal": (VP.linear().zero_terminal(), (1.0, 500.0, 998.5)),
    "flow": (Flow(), (1.0, 250.0, 937.5)),
    "edm": (EDM(), (-1.0, -0.25, 1.0)),
}
X = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
predictions = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS.keys())


@predictions
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES.keys())
def test_a_model_around_it_is_the_denoiser(oracle: Any, name: str, prediction: Any) -> None:
    """Estimates to rounding (eps divides by alpha, x0 and flow by sigma), on the network's own path and off it."""
    path, times = PATHS[name]
    denoise = Model(ExactNetwork((oracle,), path, prediction), path, prediction).bind(Cond())
    for time in times:
        for factor in (1.0, 0.3):
            level = Level(*(factor * side for side in path.level(time)))
            ours, exact = denoise(X, level), oracle(X, level)
            size = max(1.0, float(exact.x0.abs().max()), float(exact.noise.abs().max()))
            assert float((ours.x0 - exact.x0).abs().max()) < 1e-10 * size
            assert float((ours.noise - exact.noise).abs().max()) < 1e-10 * size * max(1, 1 / level.sigma)


@pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES.keys())
@pytest.mark.parametrize("path", [VP.linear().zero_terminal(), Flow()])
def test_pure_noise_is_answered_or_refused_by_name(oracle: Any, path: Any) -> None:
    pure = Level(0.0, 1.0)
    for prediction in PREDICTIONS.values():
        denoise = Model(ExactNetwork((oracle,), path, prediction), path, prediction).bind(Cond())
        if prediction is EPS:
            with pytest.raises(UsageError, match="eps network cannot start at alpha = 0"):
                denoise(X, pure)
        else:
            assert torch.allclose(denoise(X, pure).x0, oracle(X, pure).x0)
            assert torch.allclose(denoise(X, pure).noise, X)


@predictions
def test_rows_of_one_batch_have_times_of_their_own(prediction: Any) -> None:
    """As in training."""
    path, times, cond = VP.linear(), torch.tensor([10.0, 500.0, 999.0]), Cond()
    network = ExactNetwork((GAUSSIAN,), path, prediction)
    together = network(X, times, cond)
    for i in range(3):
        assert torch.allclose(together[i], network(X[i : i + 1], times[i : i + 1], cond)[0], atol=1e-12)


def test_labels_choose_the_denoiser_and_guidance_joins_them() -> None:
    """Classifier-free guidance on exact branches: at scale 1 the class itself, beyond it the score it promises."""
    path, level = Flow(), Flow().level(500.0)
    classes = (MIXTURE, MIXTURE.given(FIRST), MIXTURE.given(1 - FIRST))
    model = Model(ExactNetwork(classes, path, FLOW), path, FLOW)
    label = torch.tensor([1, 2, 1])
    branches = model.branches(cond=Cond(extras={"label": label}), uncond=Cond(extras={"label": torch.zeros(3)}))
    right = torch.stack([classes[k](X[i : i + 1], level).x0[0] for i, k in enumerate(label.tolist())])
    assert torch.allclose(guided(branches, CFG(1.0))(X, level).x0, right, atol=1e-12)
    steered = guided(branches, CFG(3.0))(X, level).x0
    scores = torch.stack([classes[k].score(X[i : i + 1], level)[0] for i, k in enumerate(label.tolist())])
    push = 3 * level.sigma**2 / level.alpha * (scores - MIXTURE.score(X, level))
    assert torch.allclose(steered, MIXTURE(X, level).x0 + push, atol=1e-12)
    with pytest.raises(UsageError, match="labels are 0 to 2"):
        model.bind(Cond(extras={"label": torch.tensor([0, 3, 1])}))(X, level)


def test_keeps_the_dtype_of_x() -> None:
    found = ExactNetwork((MIXTURE,), Flow(), FLOW)(X.float(), torch.full((3,), 500.0), Cond())
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), ExactNetwork((MIXTURE,), Flow(), FLOW)(X, torch.full((3,), 500.0), Cond()), atol=1e-6)
