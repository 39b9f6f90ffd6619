"""Features are the layer's own at the noised picture; the head is ridge regression and chooses its decay with sense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import Cond, UsageError
from ldm_pipe.analysis.features import LinearHead, features
from ldm_pipe.level import Level


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "layer"), [("unet", "mid_block"), ("pixart", "transformer_blocks.1")])
def test_they_are_what_the_layer_gives(kind: str, layer: str, diffusers_model: Callable[[str], Any]) -> None:
    """At x = mix(x0, noise), by torch's own hook, averaged over all positions."""
    model, level = diffusers_model(kind), Level(0.8, 0.6)
    x0, noise, cond = draw(3, 4, 8, 8), draw(3, 4, 8, 8, seed=1), Cond(tokens=draw(3, 6, 16, seed=2))
    network = model.network.inner
    found = features(model.bind(cond), network, x0, noise, level, [layer])
    seen: list[Tensor] = []
    hook = network.get_submodule(layer).register_forward_hook(lambda m, args, out: seen.append(out.double()))
    with torch.no_grad():
        model.bind(cond)(0.8 * x0 + 0.6 * noise, level)
    hook.remove()
    flat = seen[0].flatten(2) if kind == "unet" else seen[0].mT  # [B,C,positions]
    torch.testing.assert_close(found[layer], flat.mean(2))
    assert found[layer].shape == (3, 16)


def test_a_layer_without_features_is_refused(diffusers_model: Callable[[str], Any]) -> None:
    model = diffusers_model("unet")
    given = (model.bind(Cond(tokens=draw(2, 6, 16))), model.network.inner, draw(2, 4, 8, 8), draw(2, 4, 8, 8), Level(0.8, 0.6))
    with pytest.raises(UsageError, match=r"'down_blocks.0' gives no features"):
        features(*given, ["down_blocks.0"])
    with pytest.raises(UsageError, match="fits no modules"):
        features(*given, ["nowhere"])


def test_the_head_is_the_ridge_solution() -> None:
    """With more features than samples too, by the normal equations of the standardised features."""
    for count, width in ((40, 7), (12, 30)):
        x, labels = 3 * draw(count, width).double() + 5, torch.arange(count) % 3
        head = LinearHead.fit(x, labels, torch.tensor([2.5]))
        z = (x - x.mean(0)) / x.std(0)
        y = torch.nn.functional.one_hot(labels).double()
        weight = torch.linalg.solve(z.T @ z + 2.5 * torch.eye(width).double(), z.T @ (y - y.mean(0)))
        torch.testing.assert_close(head.weight, weight)
        torch.testing.assert_close(head(x), z @ weight + y.mean(0))


def test_the_decay_is_that_of_cross_validation() -> None:
    """Golub, Heath and Wahba: N |y - A y|^2 / (N - tr A)^2 with A the matrix of fitted values, the mean among them."""
    x, labels, decays = draw(30, 10).double(), torch.arange(30) % 2, torch.logspace(-2, 4, 13).double()
    z = (x - x.mean(0)) / x.std(0)
    y = torch.nn.functional.one_hot(labels).double()
    scores = []
    for decay in decays:
        a = z @ torch.linalg.solve(z.T @ z + decay * torch.eye(10).double(), z.T) + 1 / 30
        scores.append(((y - a @ y).square().sum() / (30 - a.trace()) ** 2).item())
    assert LinearHead.fit(x, labels, decays).decay == decays[scores.index(min(scores))]


def test_it_reads_what_is_there_and_nothing_else() -> None:
    labels = torch.arange(600) % 4
    x = draw(600, 20)
    assert LinearHead.fit(x[:400], labels[:400]).accuracy(x[400:], labels[400:]) < 0.4  # chance is 1/4
    x[:, :4] += 4 * torch.nn.functional.one_hot(labels)
    head = LinearHead.fit(x[:400], labels[:400])
    assert head.accuracy(x[400:], labels[400:]) > 0.95
    assert head.accuracy(x[400:], labels[400:].roll(1)) < 0.1
