"""Rules through a pipeline: prompts as branches, models and fits from files, guides behind the rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm_pipe import CFG, Pipeline, UsageError
from ldm_pipe.guidance.linear_ag import Recording, solve
from ldm_pipe.guidance.perp_neg import PerpNeg

PROMPTS = ["a red fox", "two cats"]


@pytest.fixture(scope="module")
def pipe(tiny: Callable[..., Path]) -> Pipeline:
    return Pipeline.from_pretrained(str(tiny("eps")))


def test_prompts_can_be_branches_by_name_or_in_the_text_of_a_rule(pipe: Pipeline) -> None:
    run = {"seeds": (1, 2), "steps": 3, "sampler": "ddim"}
    named = pipe(PROMPTS, rule=PerpNeg(3.0), conds={"negative": "a blue dog"}, **run)
    written = pipe(PROMPTS, guide="perp_neg(3, ('text:a blue dog',))", **run)
    assert torch.equal(named.latents, written.latents)
    assert named.evaluations == {"cond": 6, "uncond": 6, "negative": 6}
    assert written.evaluations == {"cond": 6, "uncond": 6, "text:a blue dog": 6}
    alone = pipe(PROMPTS, rule=PerpNeg(3.0), conds={"negative": "a blue dog"}, batch_size=1, **run)
    assert torch.allclose(alone.latents, named.latents, atol=1e-4)
    other = pipe(PROMPTS, rule=PerpNeg(3.0), conds={"negative": "the sun"}, **run)
    assert not torch.allclose(other.latents, named.latents, atol=1e-3)
    with pytest.raises(UsageError, match="needs a branch 'negative'"):
        pipe(PROMPTS, rule=PerpNeg(3.0), **run)


def test_composing_a_prompt_with_itself_is_cfg(pipe: Pipeline) -> None:
    run = {"seed": 1, "steps": 3, "sampler": "ddim"}
    both = pipe("a red fox", guide="between(0, 1)", **run)
    composed = pipe("a red fox", guide="compose(('cond', 'text: a red fox'), (2, 3)) | between(0, 1)", **run)
    assert torch.allclose(both.latents, composed.latents, atol=1e-4)


def test_a_fit_is_read_from_a_file_and_refused_for_another_run(pipe: Pipeline, tmp_path: Path) -> None:
    recording, path = Recording(3.0), tmp_path / "fit.json"
    pipe(PROMPTS * 4, rule=recording, steps=4, sampler="ddim", seed=10)
    solve(recording.runs, "ddim", 4, 3.0).write(path)
    guide = f"linear_ag({str(path)!r})"
    found = pipe(PROMPTS, guide=guide, steps=4, sampler="ddim", seed=1)
    plain = pipe(PROMPTS, rule=CFG(3.0), steps=4, sampler="ddim", seed=1)
    assert found.evaluations == {"cond": 8, "uncond": 2}
    assert float((found.latents - plain.latents).norm() / plain.latents.norm()) < 0.05
    for wrong in ({"sampler": "euler"}, {"steps": 5}):
        with pytest.raises(UsageError, match="the fit is of 4 steps of ddim"):
            pipe(PROMPTS, guide=guide, seed=1, **{"steps": 4, "sampler": "ddim", **wrong})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the fit has other levels"):
        pipe(PROMPTS, guide=guide, seed=1, steps=4, sampler="ddim", spacing="trailing")


def test_a_weak_model_is_loaded_from_its_folder(pipe: Pipeline, tiny: Callable[..., Path]) -> None:
    """The same weights are no weaker: guidance by oneself changes nothing; those of another prediction do."""
    run = {"seed": 1, "steps": 3, "sampler": "ddim"}
    plain = pipe("a red fox", guidance_scale=1.0, **run)
    same = pipe("a red fox", guide=f"autoguidance(3, {str(tiny('eps'))!r})", **run)
    assert torch.allclose(same.latents, plain.latents, atol=1e-4)
    assert same.evaluations == {"cond": 3, "weak": 3}
    other = pipe("a red fox", guide=f"autoguidance(3, {str(tiny('flow'))!r}) | between(0.1, 0.9)", **run)
    assert not torch.allclose(other.latents, plain.latents, atol=1e-2)


def test_clip_sees_each_image_with_its_own_prompt(pipe: Pipeline) -> None:
    run = {"seeds": (1, 2), "steps": 2, "sampler": "ddim"}
    plain = pipe(PROMPTS, guide="cfg(2)", **run)
    found = pipe(PROMPTS, guide="cfg(2) | clip(500)", **run)
    assert not torch.allclose(found.latents, plain.latents, atol=1e-3)
    alone = pipe(PROMPTS, guide="cfg(2) | clip(500)", batch_size=1, **run)
    assert torch.allclose(found.latents, alone.latents, atol=1e-4)
    assert found.evaluations == plain.evaluations == {"cond": 4, "uncond": 4}
    swapped = pipe(PROMPTS[::-1], guide="cfg(2) | clip(500)", **run)
    assert not torch.allclose(swapped.latents, found.latents, atol=1e-4)
