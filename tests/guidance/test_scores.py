"""Classifier guidance by the exact posterior is the conditional model; experts share the noise; CLIP gives a gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import VP, Flow, Gaussian, Level, Mixture, ModelError, UsageError
from ldm_pipe.codec import Identity
from ldm_pipe.guidance.classifier import Classifier, Experts
from ldm_pipe.guidance.clip import Clip, Toward, read

SPAN = torch.arange(8, dtype=torch.float64)
PRIOR = Mixture.isotropic(torch.tensor([0.25, 0.25, 0.5]), torch.stack([SPAN.sin(), -SPAN.cos(), SPAN / 8]), 0.4)
LIKELIHOOD = torch.tensor([[0.9, 0.2, 0.3], [0.1, 0.8, 0.7]]).double()
X = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
LEVELS = [*(VP.scaled_linear().level(t) for t in (10, 300, 700, 999)), *(Flow().level(t) for t in (20, 400, 970)), Level(2, 3)]


def label(which: int) -> Callable[[Tensor, Level], Tensor]:
    return lambda x, level: PRIOR.log_classes(x, level, LIKELIHOOD)[:, which]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("which", [0, 1])
def test_the_exact_classifier_makes_the_conditional_model(which: int, level: Level) -> None:
    with torch.no_grad():
        found, exact = Classifier(label(which))(PRIOR)(X, level), PRIOR.given(LIKELIHOOD[which])(X, level)
    assert float((found.x0 - exact.x0).abs().max()) < 1e-12
    assert float((found.noise - exact.noise).abs().max()) < 1e-12
    if 0.2 < level.u < 0.7:  # where x does not yet say, or says already, which class it is
        assert not torch.allclose(found.x0, PRIOR(X, level).x0, atol=1e-3)


def test_twice_the_scale_is_twice_the_shift_and_none_is_the_denoiser_itself() -> None:
    level = LEVELS[1]
    one, two, none = (Classifier(label(0), scale)(PRIOR) for scale in (1.0, 2.0, 0.0))
    plain = PRIOR(X, level).x0
    assert torch.allclose(two(X, level).x0 - plain, 2 * (one(X, level).x0 - plain))
    assert none is PRIOR
    assert torch.equal(one(X, Level(0.0, 1.0)).x0, PRIOR(X, Level(0.0, 1.0)).x0)


def test_a_clean_classifier_is_asked_about_x0_through_the_network() -> None:
    """Of a Gaussian J = dx0/dx is known: for log p = -|y - x0|^2 / 2 the score moves by J' (y - x0)."""
    prior, y, level = Gaussian(SPAN.sin(), 0.9 ** (SPAN[:, None] - SPAN).abs()), SPAN.cos().reshape(1, 2, 2, 2), LEVELS[1]

    def log_prob(x: Tensor, at: Level) -> Tensor:
        assert at == Level(1.0, 0.0)
        return -0.5 * (y - x).flatten(1).square().sum(1)

    found, plain = Classifier(log_prob, 0.5, clean=True)(prior)(X, level), prior(X, level)
    gradient = ((y - plain.x0).flatten(1) @ prior.gain(level)).reshape(X.shape)
    assert torch.allclose(found.x0 - plain.x0, 0.5 * level.sigma**2 / level.alpha * gradient)
    assert torch.allclose(level.mix(found.x0, found.noise), X)


def test_every_level_has_one_expert_and_the_ranges_are_half_open() -> None:
    guide = Experts((label(0), label(1), label(0), label(1)), 1.0)
    seen = [guide.experts.index(guide.expert(Level(1 - u, u))) for u in (0.0, 0.24, 0.25, 0.5, 0.74, 0.75, 1.0)]
    assert [guide.expert(Level(1 - u, u)) for u in (0.25, 0.5, 0.75, 1.0)] == [*guide.experts[1:], guide.experts[3]]
    assert seen == [0, 0, 1, 2, 2, 3, 3]
    for u in (0.1, 0.3, 0.6, 0.9):
        level = Level(1 - u, u)
        assert torch.equal(guide(PRIOR)(X, level).x0, Classifier(guide.expert(level))(PRIOR)(X, level).x0)
    with pytest.raises(UsageError, match="one expert or several"):
        Experts(())


def test_exact_experts_are_the_conditional_model() -> None:
    for level in LEVELS:
        found = Experts((label(0),) * 5)(PRIOR)(X, level)
        assert torch.allclose(found.x0, PRIOR.given(LIKELIHOOD[0])(X, level).x0, atol=1e-12)


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP of transformers, with its tokenizer and its own normalisation."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from train.world.words import make_tokenizer, save_tokenizer

    torch.manual_seed(0)
    tokenizer, place = make_tokenizer(8), tmp_path_factory.mktemp("clip")
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 8}
    vision = {**size, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(place)
    CLIPImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]).save_pretrained(place)
    save_tokenizer(tokenizer, place)
    return place


def test_a_clip_folder_is_read_as_transformers_reads_it(folder: Path) -> None:
    from transformers import CLIPModel

    from train.world.words import make_tokenizer

    prompts, images = ["a red fox", "two cats"], torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    ids = make_tokenizer(8)(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    with torch.no_grad():
        out = CLIPModel.from_pretrained(folder)(input_ids=ids, pixel_values=(images - mean) / std)
    scorer = read(str(folder))
    assert torch.allclose(scorer.embed(prompts), out.text_embeds, atol=1e-5)
    assert torch.allclose(scorer.look(2 * images - 1), out.image_embeds, atol=1e-5)
    assert scorer.look(torch.zeros(1, 3, 40, 24)).shape == (1, 8)


def test_clip_moves_the_score_by_the_gradient_of_the_cosine(folder: Path) -> None:
    """Against central differences along three directions, through a denoiser whose gradient is known; weights get none."""
    scorer = read(str(folder))
    prior = Gaussian(torch.zeros(768).double(), torch.eye(768).double())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    level, scale = Flow().level(400), 7.0
    guide = Clip(scale, str(folder)).prepared(Identity(), ["a red fox", "a blue cat"])
    with torch.no_grad():
        found, plain = guide(prior)(x, level), prior(x, level)
    shift = (found.x0 - plain.x0) * level.alpha / level.sigma**2 / scale
    scorer.network.double()
    exact = Toward(scorer, Identity(), guide.wanted.double(), scale)
    for seed in range(3):
        way = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        ends = [exact.similarity(prior(x + e * way, level).x0) for e in (1e-4, -1e-4)]
        slope = (ends[0] - ends[1]) / 2e-4
        assert torch.allclose((shift * way).flatten(1).sum(1), slope, rtol=1e-3, atol=1e-6)
    scorer.network.float()
    assert torch.allclose(level.mix(found.x0, found.noise), x)
    assert all(p.grad is None for p in scorer.network.parameters())
    assert Clip(0.0, str(folder)).prepared(Identity(), ["a fox"])(prior) is prior
    assert torch.equal(guide(prior)(x, Level(0.0, 1.0)).x0, prior(x, Level(0.0, 1.0)).x0)


def test_clip_takes_a_text_of_its_own_for_every_image(folder: Path) -> None:
    own = Clip(1.0, str(folder), "two cats").prepared(Identity(), ["a fox", "a dog"]).wanted
    assert torch.equal(own[0], own[1])
    assert torch.allclose(own[0], read(str(folder)).embed(["two cats"])[0])
    prompts = Clip(1.0, str(folder)).prepared(Identity(), ["a fox", "a dog"]).wanted
    assert not torch.allclose(prompts[0], prompts[1])


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read as a CLIP"):
        read(str(tmp_path))
    unprepared: Any = Clip(1.0)
    with pytest.raises(TypeError, match="prepared"):
        unprepared(PRIOR)
