"""Prompt to image: seeds belong to images, batches do not matter, scale 1 costs one branch, errors say what is allowed."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_pipe import CFG, Between, ModelError, NumericalError, Pipeline, Rescale, UsageError, registry

Tiny = Callable[[str], Path]
PROMPTS = ["a fox on a blue background", "two bees on red"]


@pytest.fixture(scope="module", params=["eps", "v", "flow"])
def pipe(request: pytest.FixtureRequest, tiny: Tiny) -> Pipeline:
    return Pipeline.from_pretrained(str(tiny(request.param)), "cpu", "fp32")


@pytest.mark.parametrize("sampler", sorted(registry.KINDS["sampler"]))
def test_an_image_is_the_same_in_any_batch(pipe: Pipeline, sampler: str) -> None:
    spacing = "trailing" if pipe.bundle.model.prediction.name != "eps" else "leading"
    settings: dict[str, Any] = {"sampler": sampler, "spacing": spacing, "steps": 3, "guidance_scale": 2.0}
    together = pipe(PROMPTS, seed=5, num_images=3, **settings)
    assert together.seeds == (5, 6, 7, 5, 6, 7)
    for row in (1, 5):
        alone = pipe(together.prompts[row], seed=together.seeds[row], **settings)
        difference = (together.latents[row] - alone.latents[0]).abs().max() / alone.latents.abs().max()
        assert difference < 1e-4
    again = pipe(PROMPTS, seed=5, num_images=3, batch_size=2, **settings)
    assert (together.latents - again.latents).abs().max() / together.latents.abs().max() < 1e-4


def test_the_same_call_gives_the_same_bits(pipe: Pipeline) -> None:
    a, b = (pipe(PROMPTS[0], seed=3, sampler="ddpm", steps=3) for _ in range(2))
    assert torch.equal(a.latents, b.latents)
    assert a.images[0].tobytes() == b.images[0].tobytes()
    assert not torch.equal(a.latents, pipe(PROMPTS[0], seed=4, sampler="ddpm", steps=3).latents)


def test_evaluations_are_counted_exactly(pipe: Pipeline) -> None:
    assert pipe(PROMPTS, seed=1, steps=4, guidance_scale=1).evaluations == {"cond": 8}
    assert pipe(PROMPTS, seed=1, steps=4, guidance_scale=2).evaluations == {"cond": 8, "uncond": 8}
    heun = pipe(PROMPTS[0], seed=1, steps=4, guidance_scale=2, sampler="heun")
    assert heun.evaluations == {"cond": 7, "uncond": 7}  # the last step is Euler's


def test_an_own_rule_is_used(pipe: Pipeline) -> None:
    plain = pipe(PROMPTS[0], seed=1, steps=4, guidance_scale=3)
    same = pipe(PROMPTS[0], rule=CFG(3), seed=1, steps=4)
    nested = pipe(PROMPTS[0], rule=Between(0.0, 0.5, Rescale(0.7, CFG(5))), seed=1, steps=4)
    assert torch.equal(plain.latents, same.latents)
    assert not torch.equal(plain.latents, nested.latents)
    assert nested.evaluations["uncond"] < nested.evaluations["cond"] == 4


def test_a_negative_prompt_is_the_other_branch(pipe: Pipeline) -> None:
    plain, negative = (pipe(PROMPTS[0], seed=1, negative_prompt=n) for n in ("", "two bees"))
    assert not torch.equal(plain.latents, negative.latents)
    itself = pipe(PROMPTS[0], seed=1, negative_prompt=PROMPTS[0], guidance_scale=7)
    alone = pipe(PROMPTS[0], seed=1, guidance_scale=1)
    assert (itself.latents - alone.latents).abs().max() < 1e-4


def test_threads_do_not_disturb_each_other(pipe: Pipeline) -> None:
    expected = [pipe(p, seed=2).latents for p in PROMPTS]
    found: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda k=k: found.update({k: pipe(PROMPTS[k], seed=2).latents})) for k in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(found[k], expected[k]) for k in (0, 1))


def test_steps_yields_previews_and_leaves_grad_mode_alone(pipe: Pipeline) -> None:
    seen = 0
    for step in pipe.steps(PROMPTS[0], seed=1, steps=3):
        assert torch.is_grad_enabled()
        assert pipe.decode(step.estimate.x0).shape == (1, 3, 32, 32)
        seen += 1
    assert seen == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": -1}, "steps is -1"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": 10**8}, "steps is 100000000"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan"),
        ({"guidance_scale": math.inf}, "guidance_scale is inf"),
        ({"height": 33}, "height is 33"),
        ({"width": 0}, "width is 0"),
        ({"width": -16}, "width is -16"),
        ({"height": 10**9}, "height is 1000000000"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": 2**64 - 1, "num_images": 2}, "seed is 18446744073709551615"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"num_images": 0}, "num_images is 0"),
        ({"sampler": "dimm"}, "did you mean 'ddim'"),
        ({"spacing": "karas"}, "did you mean 'karras'"),
        ({"sampler_set": {"etta": 1}}, "did you mean 'eta'"),
        ({"sampler_set": {"eta": "much"}}, "it takes a finite number"),
        ({"seeds": (1, 2)}, "it takes one for each"),
    ],
)
def test_wrong_settings_are_named(pipe: Pipeline, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        pipe(PROMPTS[0], **settings)


@pytest.mark.parametrize("prompt", ["", "\0", "\ud800", "fox " * 10_000, "🦊 on 🟦"])
def test_odd_prompts_run(pipe: Pipeline, prompt: str) -> None:
    assert len(pipe(prompt, seed=1, steps=1).images) == 1


def test_a_network_that_returns_nan_is_named(tiny: Tiny) -> None:
    broken = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")
    next(broken.bundle.model.parameters()).data.fill_(math.nan)
    with pytest.raises(NumericalError, match="network's estimate at step 1 of 4 holds NaN"):
        broken(PROMPTS[0], seed=1)


def test_a_decoder_that_returns_nan_is_named(tiny: Tiny) -> None:
    broken = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")
    broken.bundle.codec.vae.decoder.conv_out.bias.data.fill_(math.nan)  # type: ignore[attr-defined]
    with pytest.raises(NumericalError, match="decoder"):
        broken(PROMPTS[0], seed=1)


def test_fp16_on_a_cpu_becomes_bf16(tiny: Tiny) -> None:
    half = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp16")
    assert half.dtype == torch.bfloat16
    out = half(PROMPTS[0], seed=1, steps=2)
    assert out.latents.dtype == torch.float32
    exact = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")(PROMPTS[0], seed=1, steps=2)
    assert (out.latents - exact.latents).abs().max() < 0.1 * exact.latents.abs().max()


def test_unknown_devices_and_dtypes_are_named(tiny: Tiny) -> None:
    for device, dtype, words in [("tpu", "fp32", "choose from auto, cpu"), ("cpu", "fp8", "did you mean")]:
        with pytest.raises(UsageError, match=words):
            Pipeline.from_pretrained(str(tiny("eps")), device, dtype)


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ModelError, match="no/such/folder"):
        Pipeline.from_pretrained("no/such/folder")


def test_the_cuda_pipeline_agrees_with_the_cpu(tiny: Tiny) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: fp16 on a GPU is not tested here")
    cpu = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")(PROMPTS[0], seed=1)
    gpu = Pipeline.from_pretrained(str(tiny("eps")), "cuda", "fp16")(PROMPTS[0], seed=1)
    assert (cpu.latents - gpu.latents.cpu()).abs().max() < 0.05 * cpu.latents.abs().max()
