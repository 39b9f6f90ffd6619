"""Laws that hold for every registered rule, on a U-Net and on a transformer; a new one joins by its row in the registry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_pipe import CLEAN, CLEAN_IMAGE, EPS, FLOW, VELOCITY, VP, Cond, Flow, Level, Model, Noise, build, levels, load, registry
from ldm_pipe.guidance.linear_ag import Fit
from ldm_pipe.model import Branches, guided
from ldm_pipe.samplers.ddim import DDIM
from ldm_pipe.walk import sample

WALK = [lv for lv in levels.leading(VP.scaled_linear(), 5) if lv.sigma] + [CLEAN]
PLACES = tuple(float(lv.u) for lv in WALK[:-1])
FIT = Fit("ddim", 5, 3.0, PLACES, tuple((0.1,) * t + (0.8,) for t in range(5)), ((), (0.1,), (0.1,), (0.1, 0.1), (0.1, 0.1)))
# Fields of rules that cannot do without, and those with which a rule guides nothing at all.
REQUIRED: dict[str, dict[str, Any]] = {"between": {"lo": 0.3, "hi": 0.8}, "linear_ag": {"fit": FIT}}
NEUTRAL: dict[str, dict[str, Any]] = {
    "adaptive": {"rule": build("rule", "cfg", scale=1.0)},
    "apg": {"scale": 1.0},
    "autoguidance": {"scale": 1.0},
    "between": {"lo": 0.4, "hi": 0.4},
    "cfg": {"scale": 1.0},
    "cfg_zero": {"scale": 1.0, "zero": 0},
    "compose": {"weights": (1.0,)},
    "curve": {"low": 1.0, "high": 1.0},
    "pag": {"scale": 0.0},
    "rescale": {"phi": 0.0, "rule": build("rule", "cfg", scale=1.0)},
    "sag": {"scale": 0.0},
    "seg": {"scale": 0.0},
    "skip_layer": {"scale": 0.0},
    "tcfg": {"scale": 1.0},
    "threshold": {"bound": 1e6, "rule": build("rule", "cfg", scale=1.0)},
}
WITHOUT_NEUTRAL = {"cfgpp", "linear_ag", "noise_damped", "perp_neg"}  # these always take something of another branch
RENOISES_OTHERWISE = {"cfgpp"}
every = pytest.mark.parametrize("name", sorted(registry.KINDS["rule"]))


class Transformer(nn.Module):
    """A tiny PixArt as a Network."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import PixArtTransformer2DModel

        torch.manual_seed(1)
        self.inner = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3, sample_size=8,
            patch_size=2, cross_attention_dim=16, caption_channels=16, use_additional_conditions=False, norm_num_groups=4,
        )  # fmt: skip

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        none = {"resolution": None, "aspect_ratio": None}
        tokens: Any = cond.tokens
        found: Tensor = self.inner(x, tokens, timestep=time, added_cond_kwargs=none, return_dict=False)[0]
        return found


@pytest.fixture(scope="session", params=["unet", "transformer"])
def network(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> Any:
    found: Any = load(tiny("eps")).model.network if request.param == "unet" else Transformer()
    return found.double().eval().requires_grad_(False)


def run_of(network: Any, rows: list[int], prediction: Any = EPS, path: Any = None) -> Branches:
    """The branches that rules name by default, with the conditions of some of four images."""
    generator = torch.Generator().manual_seed(2)
    tokens = {
        n: torch.randn(4, 5, 16, generator=generator).double()[rows] for n in ("cond", "uncond", "negative", "weak", "base")
    }
    model = Model(network, path or VP.scaled_linear(), prediction)
    conds = {n: Cond(tokens=t) for n, t in tokens.items()}
    others = {n: model.bind(conds.pop(n), n) for n in ("weak", "base")}
    return replace(model.branches(**conds), others=others)


def walked(run: Branches, rule: Any, rows: list[int], walk: list[Level] = WALK) -> Tensor:
    noise = Noise(tuple(rows), (4, 8, 8), dtype=torch.float64)
    return sample(guided(run, rule), DDIM().start(noise.start(), walk[0]), walk, DDIM(), noise)


def made(name: str, fields: dict[str, Any] | None = None) -> Any:
    return build("rule", name, **{**REQUIRED.get(name, {}), **(fields or {})})


@every
def test_evaluations_are_those_that_the_network_sees(name: str, network: Any) -> None:
    run, seen = run_of(network, [0, 1, 2]), 0

    def count(module: Any, args: Any, out: Any) -> None:
        nonlocal seen
        seen += len(args[0])

    handle = network.register_forward_hook(count)
    walked(run, made(name), [0, 1, 2])
    handle.remove()
    assert seen == sum(run.evaluations.values()) == sum(run.model.evaluations.values())
    assert run.evaluations == run.model.evaluations


@every
def test_an_image_does_not_depend_on_its_batch(name: str, network: Any) -> None:
    fields = {"guard": 1.0, "threshold": 0.9} if name == "adaptive" else {}
    both = run_of(network, [0, 1])
    together = walked(both, made(name, fields), [0, 1])
    counts: Counter[str] = Counter()
    for k in (0, 1):
        run = run_of(network, [k])
        assert torch.allclose(walked(run, made(name, fields), [k])[0], together[k], rtol=1e-9, atol=1e-9)
        counts += run.evaluations
    assert counts == both.evaluations


@every
def test_a_run_leaves_nothing_behind_in_the_rule_or_the_network(name: str, network: Any) -> None:
    rule, plain = made(name), made("cfg")
    before = walked(run_of(network, [0, 1]), plain, [0, 1])
    first, second = (walked(run_of(network, [0, 1]), rule, [0, 1]) for _ in range(2))
    assert torch.equal(first, second)
    assert rule == made(name)
    assert torch.equal(walked(run_of(network, [0, 1]), plain, [0, 1]), before)


@every
def test_without_guidance_it_is_the_positive_branch_bit_for_bit(name: str, network: Any) -> None:
    assert (name in NEUTRAL) != (name in WITHOUT_NEUTRAL)
    if name in WITHOUT_NEUTRAL:
        return
    run = run_of(network, [0, 1])
    found = walked(run, made(name, NEUTRAL[name]), [0, 1])
    alone = run_of(network, [0, 1])
    assert torch.equal(found, walked(alone, made("cfg", {"scale": 1.0}), [0, 1]))
    assert run.evaluations == alone.evaluations


@every
def test_guidance_changes_the_image(name: str, network: Any) -> None:
    found = walked(run_of(network, [0, 1]), made(name), [0, 1])
    plain = walked(run_of(network, [0, 1]), made("cfg", {"scale": 1.0}), [0, 1])
    assert ((found - plain).flatten(1).norm(dim=1) > 1e-4).all()


@every
@pytest.mark.parametrize("prediction", [EPS, VELOCITY, CLEAN_IMAGE, FLOW], ids=lambda p: p.name)
def test_estimates_agree_with_x_and_do_not_depend_on_the_path(name: str, prediction: Any, network: Any) -> None:
    """Every level and its x scaled by a factor: x0 and noise do not notice. CFG++ renoises with the other branch's noise."""
    a, b = (guided(run_of(network, [0, 1], prediction), made(name)) for _ in range(2))
    generator = torch.Generator().manual_seed(5)
    for k, level in enumerate(WALK[:-1]):
        x = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
        c = 0.4 + k
        here, there = a(x, level), b(c * x, Level(c * level.alpha, c * level.sigma))
        assert torch.allclose(here.x0, there.x0, rtol=1e-7, atol=1e-9)
        assert torch.allclose(here.noise, there.noise, rtol=1e-7, atol=1e-9)
        assert torch.allclose(level.mix(here.x0, here.noise), x) != (name in RENOISES_OTHERWISE)


@every
def test_pure_noise_and_hardly_any_are_finite(name: str, network: Any) -> None:
    walk = [Flow().level(t) for t in (1000, 750, 400, 50, 0.001, 0)]
    fields = {"fit": replace(FIT, levels=tuple(float(lv.u) for lv in walk[:-1]))} if name == "linear_ag" else {}
    found = walked(run_of(network, [0, 1], FLOW, Flow()), made(name, fields), [0, 1], walk)
    assert torch.isfinite(found).all()


@every
def test_a_learned_variance_is_the_positive_branch_s(name: str, network: Any) -> None:
    fields = {"zero": 0} if name == "cfg_zero" else {"negative": "uncond"} if name == "cfgpp" else {}
    rule, run = made(name, fields), run_of(network, [0, 1])
    x, level = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), WALK[0]
    names = {*rule.needs(level), "cond", "uncond"}
    brought = rule.others(run) if hasattr(rule, "others") else {}
    found = replace(run, others={**run.others, **brought})(
        x, level, sorted(names, key=lambda n: n in brought and n != "uncond")
    )
    marked = {n: e._replace(log_var=torch.tensor(float(n == "cond"))) for n, e in found.items()}
    assert rule(marked, x, level).log_var == 1.0
