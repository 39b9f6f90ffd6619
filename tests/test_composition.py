"""Runs drawn at random from the registry, sampler x rule x restoration, edit or mask x patch: they compose, or say why not."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_pipe import Pipeline, registry
from ldm_pipe.model import Branches
from ldm_pipe.plan import Plan
from ldm_pipe.walk import Wrapping

RUNS, SEED = 48, 4
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
drawing: Any = importlib.import_module("drawn_runs")
DRAWN = drawing.draws(RUNS, SEED)
Drawn, attempt, guide = drawing.Drawn, drawing.attempt, drawing.guide
# Settings under which a method is to change no bit. A rule's is compared with guidance 1, the others' with none of them.
NEUTRAL_RULES = {
    "apg": "scale=1", "between": "lo=0.4, hi=0.4", "cfg": "scale=1", "cfg_zero": "scale=1, zero=0", "compose": "weights=(1.0,)",
    "curve": "low=1, high=1", "pag": "scale=0", "sag": "scale=0", "seg": "scale=0", "skip_layer": "scale=0", "tcfg": "scale=1",
}  # fmt: skip
NEUTRAL_RESTORATIONS: dict[str, dict[str, Any]] = {
    "diffpir": {"blend": 0.0}, "dmps": {"weight": 0.0}, "dps": {"scale": 0.0}, "dps_score": {"scale": 0.0},
    "ilvr": {"weight": 0.0}, "psld": {"omega": 0.0, "gamma": 0.0}, "resample": {"scale": 0.0, "every": 0},
}  # fmt: skip
NEUTRAL_EDITINGS: dict[str, dict[str, Any]] = {
    "plug_and_play": {"features": 0.0, "attention": 0.0}, "prompt_to_prompt": {"cross": 0.0, "own": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe(tiny: Callable[[str], Path]) -> Pipeline:
    return Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")


def name(run: Any) -> str:
    return "-".join(filter(None, run))


def falls(plan: Plan) -> int:
    return sum(float(b.u) < float(a.u) for a, b in pairwise(plan.levels))


@pytest.mark.parametrize("run", DRAWN, ids=map(name, DRAWN))
def test_a_run_composes_or_is_refused_in_one_sentence(pipe: Pipeline, run: Any) -> None:
    """It is finite; the evaluations that it reports are the images that the network saw, for every call of the denoiser as
    many as the rule needs at its level; and the denoiser is called as often as the sampler's steps say."""
    found = attempt(pipe, run)
    if isinstance(found, str):
        assert "\n" not in found
        assert 20 < len(found) < 300
        assert "Error" not in found
        return
    assert torch.isfinite(found.latents).all()
    assert len(found.latents) == 2
    assert sum(found.reported.values()) == found.images > 0
    rule, sampler, steps = found.plan.rule, found.plan.sampler, falls(found.plan)
    if not stateful(rule):
        together = min(2, found.plan.given.batch_size)
        assert found.images == together * sum(len(rule.needs(level)) for level in found.asked)
    if sampler.calls and steps == len(found.plan.levels) - 1:
        assert len(found.asked) == sampler.calls * steps - (sampler.calls - 1)
    elif not sampler.calls or sampler.travels:
        assert len(found.asked) >= steps


def stateful(rule: Any) -> bool:
    """Does this rule, or one that it wraps, remember, or ask for some images only?"""
    return hasattr(rule, "fresh") or hasattr(rule, "rows") or (hasattr(rule, "rule") and stateful(rule.rule))


@pytest.mark.parametrize("rule", sorted(NEUTRAL_RULES))
def test_neutral_guidance_changes_no_bit_of_a_restoration(pipe: Pipeline, rule: str) -> None:
    """Under a sampler and a method that are drawn for each rule."""
    k = sorted(NEUTRAL_RULES).index(rule)
    methods = sorted(NEUTRAL_RESTORATIONS)
    run = Drawn(DRAWN[k].sampler, rule, "mask", methods[k % len(methods)])
    text = guide(rule, NEUTRAL_RULES[rule]).replace(drawing.WRAPPED, "cfg(1) | ")
    found, plain = attempt(pipe, run, guide=text), attempt(pipe, run, guide="cfg(1)")
    assert torch.equal(found.latents, plain.latents)
    assert found.images == plain.images


@pytest.mark.parametrize("method", sorted(NEUTRAL_RESTORATIONS))
def test_neutral_restorations_change_no_bit_of_guided_sampling(pipe: Pipeline, method: str) -> None:
    """Nor what it costs: a method that wraps asks nothing more, at any setting."""
    k = sorted(NEUTRAL_RESTORATIONS).index(method)
    sampler, rule = DRAWN[k + 10].sampler, sorted(NEUTRAL_RULES)[k]
    neutral = NEUTRAL_RESTORATIONS[method]
    kind = "mask" if method in ("ilvr", "dmps") else "restoration"
    found = attempt(pipe, Drawn(sampler, rule, kind, method), fields=neutral)
    plan = drawing.planned(pipe, Drawn(sampler, rule))
    if kind == "mask":  # a mask starts from the picture
        plan = drawing.planned(pipe, Drawn(sampler, rule, kind, method), fields=neutral)
        inner = plan.sampler.sampler if isinstance(plan.sampler, Wrapping) else plan.sampler
        plan = drawing.replace(plan, sampler=inner, guides=())
    plain = drawing.done(pipe, plan)
    assert torch.equal(found.latents, plain.latents)
    assert (found.images, found.reported) == (plain.images, plain.reported)
    if isinstance(found.plan.sampler, Wrapping):
        active = attempt(pipe, Drawn(sampler, rule, kind, method))
        assert stateful(plan.rule) or active.images == plain.images


@pytest.mark.parametrize("method", sorted(NEUTRAL_EDITINGS))
def test_neutral_edits_change_no_bit_of_guided_sampling(pipe: Pipeline, method: str) -> None:
    k = sorted(NEUTRAL_EDITINGS).index(method)
    sampler, rule = DRAWN[k + 20].sampler, sorted(NEUTRAL_RULES)[-k]
    found = attempt(pipe, Drawn(sampler, rule, "editing", method), fields=NEUTRAL_EDITINGS[method])
    plan = drawing.planned(pipe, Drawn(sampler, rule))
    plain = drawing.done(pipe, drawing.replace(plan, given=found.plan.given))  # in one batch too
    assert torch.equal(found.latents, plain.latents)
    assert found.reported == plain.reported


def test_every_registered_method_is_drawn_and_some_are_refused(pipe: Pipeline) -> None:
    """The draw is a deck: nothing is left out before anything comes twice."""
    many = drawing.draws(200, 1)
    assert {r.sampler for r in many} == set(registry.KINDS["sampler"])
    assert {r.rule for r in many} == set(registry.KINDS["rule"])
    for kind in ("restoration", "editing"):
        assert {r.method for r in many if r.kind == kind} == set(registry.KINDS[kind])
    assert {r.method for r in many if r.kind == "mask"} == {"keep", *registry.KINDS["restoration"]}
    assert {r.patch for r in many} == set(drawing.patches()) > {"", "deepcache", "hidiffusion", "tome"}
    assert drawing.draws(200, 1) == many != drawing.draws(200, 2)
    plain, tomed = (attempt(pipe, Drawn("ddim", "cfg", patch=patch)).latents for patch in ("", "tome"))
    assert not torch.equal(plain, tomed), "the patch that was drawn did not act"
    one = attempt(pipe, Drawn("ddim", "cfg", "restoration", "ddrm"))
    assert isinstance(one, str)
    assert "no singular values" in one


def test_a_miscount_would_be_seen(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the law above: a network that is asked behind the run's back is not reported."""
    call = Branches.__call__

    def twice(self: Branches, x: torch.Tensor, level: Any, names: Any, rows: Any = None) -> Any:
        self.model(x, level, self.conds["cond"])
        return call(self, x, level, names, rows)

    monkeypatch.setattr(Branches, "__call__", twice)
    found = attempt(pipe, Drawn("ddim", "cfg"))
    assert sum(found.reported.values()) < found.images


def test_a_drawn_run_on_the_built_in_model() -> None:
    pipe = Pipeline.from_pretrained("builtin", "cpu", "fp32")
    found = attempt(pipe, Drawn("dpm2m", "apg", "restoration", "ddnm"), steps=2)
    assert found.reported == {"cond": 4, "uncond": 4}
    assert found.images == 8
    assert torch.isfinite(found.latents).all()
