"""Prompt-to-Prompt: maps that lose no attention, neutral settings that change no bit, a hook that leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import CFG, Cond, Level, Noise, Pipeline, UsageError, build, guided, levels, sample
from ldm_pipe.attention import Site, attention_rule
from ldm_pipe.cond import Rows
from ldm_pipe.editing.pairs import until
from ldm_pipe.editing.prompt_to_prompt import PromptToPrompt, TokenMap
from ldm_pipe.patch import Attending

Tiny = Callable[[str], Path]
FOX, CAT = "a fox on a blue background", "a cat on a blue background"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained("builtin", "cpu", "fp32")


def token_map(pipe: Pipeline, source: str, target: str, **weights: float) -> TokenMap:
    text: Any = pipe.bundle.text
    return TokenMap.of(text.tokenizer, text.window, source, target, weights)


def draw(pipe: Pipeline, prompts: list[str], rule: PromptToPrompt | None, steps: int = 6) -> Tensor:
    """Latents of prompts under one seed, with the rule in the U-Net's attention."""
    model, text = pipe.bundle.model, pipe.bundle.text
    branches = model.branches(cond=text(prompts), uncond=text([""] * len(prompts)))
    denoise = guided(branches, CFG(3))
    walk, noise = levels.trailing(model.path, steps), Noise((7,) * len(prompts), (pipe.bundle.codec.channels, 16, 16))
    if rule is not None:
        denoise = Attending(model, rule)(denoise)
    return sample(denoise, noise.start(), walk, build("sampler", "ddim"), noise)


@pytest.mark.parametrize(
    ("source", "target"),
    [(FOX, CAT), (FOX, "a strawberry on a blue field"), ("a pineapple", "a x"), (FOX, FOX), ("", ""), ("zebra quux", "a fox")],
)
def test_replacing_loses_no_attention(pipe: Pipeline, source: str, target: str) -> None:
    """Every real source token gives all of its attention, every real target token takes some: rows sum to 1."""
    tokens, text = token_map(pipe, source, target), pipe.bundle.text
    real = text.tokenizer.length(source), text.tokenizer.length(target)  # type: ignore[attr-defined]
    torch.testing.assert_close(tokens.take[: real[0] - 1].sum(1), torch.ones(real[0] - 1))
    assert bool((tokens.take[:, : real[1] - 1].sum(0) > 0).all())


def test_refining_keeps_equal_words(pipe: Pipeline) -> None:
    tokens = token_map(pipe, "a fox on a background", "a small fox on a blue background")
    words = ["a", "small", "fox", "on", "a", "blue", "background"]
    tokenizer: Any = pipe.bundle.text.tokenizer  # type: ignore[attr-defined]
    place = 1
    for word in words:
        size = tokenizer.length(word) - 2
        assert set(tokens.own[place : place + size].tolist()) == {float(word in ("small", "blue"))}, word
        place += size


def test_equal_prompts_give_equal_rows(pipe: Pipeline) -> None:
    out = draw(pipe, [FOX, FOX], PromptToPrompt(token_map(pipe, FOX, FOX)))
    torch.testing.assert_close(out[1], out[0], rtol=0, atol=2e-4)


def test_the_source_is_untouched_and_the_target_is_not(pipe: Pipeline) -> None:
    plain = draw(pipe, [FOX, CAT], None)
    edited = draw(pipe, [FOX, CAT], PromptToPrompt(token_map(pipe, FOX, CAT)))
    assert torch.equal(edited[0], plain[0])
    assert not torch.allclose(edited[1], plain[1], atol=1e-2)


def test_nothing_to_edit_changes_no_bit(pipe: Pipeline) -> None:
    plain = draw(pipe, [FOX, CAT], None)
    tokens = token_map(pipe, FOX, CAT)
    assert torch.equal(draw(pipe, [FOX, CAT], PromptToPrompt(tokens, cross=1.0, own=1.0)), plain)
    assert torch.equal(draw(pipe, [FOX, CAT], PromptToPrompt(tokens, pairs=())), plain)
    assert torch.equal(draw(pipe, [FOX, CAT], PromptToPrompt(tokens, branch="weak")), plain)
    assert torch.equal(draw(pipe, [FOX, CAT], None), plain)


def test_weights_scale_what_a_token_gives(pipe: Pipeline) -> None:
    plain = draw(pipe, [FOX, FOX], None)
    off = {"cross": 1.0, "own": 1.0}
    one = draw(pipe, [FOX, FOX], PromptToPrompt(token_map(pipe, FOX, FOX, fox=1.0), **off))  # type: ignore[arg-type]
    more = draw(pipe, [FOX, FOX], PromptToPrompt(token_map(pipe, FOX, FOX, fox=2.0), **off))  # type: ignore[arg-type]
    assert torch.equal(one, plain)
    assert torch.equal(more[0], plain[0])
    assert not torch.allclose(more[1], plain[1], atol=1e-2)
    with pytest.raises(UsageError, match="'owl' is not a word"):
        token_map(pipe, FOX, CAT, owl=2.0)


def test_a_share_of_the_steps_is_a_level(pipe: Pipeline) -> None:
    walk = levels.trailing(pipe.bundle.model.path, 10)
    for share, steps in ((0.0, 0), (0.4, 4), (1.0, 10)):
        assert sum(float(here.u) > until(walk, share) for here in walk[:-1]) == steps


def test_two_pairs_in_a_batch_equal_two_runs(pipe: Pipeline) -> None:
    tokens = token_map(pipe, FOX, CAT)
    both = draw(pipe, [FOX, FOX, CAT, CAT], PromptToPrompt(tokens, pairs=((0, 2), (1, 3))))
    alone = draw(pipe, [FOX, CAT], PromptToPrompt(tokens))
    torch.testing.assert_close(both[2], alone[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(both[3], alone[1], rtol=1e-3, atol=1e-3)


def test_the_hook_leaves_nothing_behind(pipe: Pipeline) -> None:
    """After an exception, and in another thread, no rule is active; every site has a name and says what it attends to."""
    model, seen, elsewhere = pipe.bundle.model, dict[str, bool](), list[str]()

    def watch(site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        seen[site.name] = site.cross
        assert site.rows.branches == ("cond",)
        return out

    def fail(site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        raise ZeroDivisionError

    denoise = model.bind(pipe.bundle.text([FOX]))
    x, level = torch.randn(1, pipe.bundle.codec.channels, 16, 16), levels.trailing(model.path, 4)[1]
    with torch.no_grad():
        plain = denoise(x, level).x0
        with attention_rule(model, watch):
            assert torch.equal(denoise(x, level).x0, plain)
            other = threading.Thread(target=lambda: elsewhere.extend(seen) or seen.clear() or denoise(x, level))
            other.start()
            other.join()
            assert seen == {}
            denoise(x, level)
        with pytest.raises(ZeroDivisionError), attention_rule(model, fail):
            denoise(x, level)
        assert torch.equal(denoise(x, level).x0, plain)
    assert len(seen) == 14
    assert all(cross == name.endswith("attn2") for name, cross in seen.items())
    with pytest.raises(UsageError, match="no attention that takes a rule"), attention_rule(torch.nn.Linear(1, 1), watch):
        pass


def crossed(model: Any, rule: PromptToPrompt | None, same: bool = False, counted: int = 4) -> Tensor:
    """Latents of a pair under tokens that are drawn, of which `counted` of 6 count."""
    generator = torch.Generator().manual_seed(1)
    tokens = 4 * torch.randn(2, 6, 16, generator=generator)
    tokens = tokens[:1].expand(2, 6, 16) if same else tokens
    mask = (torch.arange(6) < counted).expand(2, 6)
    branches = model.branches(cond=Cond(tokens=tokens, mask=mask), uncond=Cond(tokens=0 * tokens, mask=mask))
    noise, denoise = Noise((7, 7), (4, 8, 8)), guided(branches, CFG(2.0))
    denoise = Attending(model, rule)(denoise) if rule else denoise
    return sample(denoise, noise.start(), levels.trailing(model.path, 4), build("sampler", "ddim"), noise)


@pytest.mark.parametrize("kind", ["unet", "pixart"])
def test_diffusers_networks_are_edited_by_the_same_laws(diffusers_model: Callable[[str], Any], kind: str) -> None:
    """Equal prompts give equal rows, the source keeps every bit, nothing to edit changes none, each kind of map counts."""
    model = diffusers_model(kind)
    tokens = TokenMap(torch.eye(6), torch.zeros(6), torch.ones(6))
    plain = crossed(model, None)
    assert torch.equal(crossed(model, PromptToPrompt(tokens, cross=1.0, own=1.0)), plain)
    for rule in (PromptToPrompt(tokens, cross=0.0, own=1.0), PromptToPrompt(tokens, cross=1.0, own=0.0)):
        edited = crossed(model, rule)
        assert torch.equal(edited[0], plain[0])
        assert not torch.allclose(edited[1], plain[1], atol=1e-3)
    alike = crossed(model, PromptToPrompt(tokens, cross=0.0, own=0.0), same=True)
    torch.testing.assert_close(alike[1], alike[0], rtol=1e-4, atol=1e-3)
    both = crossed(model, PromptToPrompt(tokens, cross=0.0, own=0.0), same=True, counted=6)
    assert kind == "unet" or not torch.allclose(both[1], alike[1], atol=1e-3), "the mask of the tokens is minded"


def test_the_targets_maps_are_the_sources_brought_to_its_tokens() -> None:
    """By hand (eq. 6-8): column j of the source goes where `take` says, but its own where `own` says, times its weight."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 5, generator=generator) for n in (7, 4, 4))
    take, own, weight = torch.rand(4, 4, generator=generator), torch.tensor([0.0, 1, 0, 0]), torch.tensor([1.0, 1, -2, 0.5])
    site = Site("a", True, Rows(("cond",), 2, Level(0.6, 0.8)), lambda t: t)
    usual = torch.softmax(q @ k.mT / 5**0.5, -1)
    out = PromptToPrompt(TokenMap(take, own, weight))(site, q, k, v, usual @ v)
    columns = [usual[1, ..., j] if own[j] else sum(usual[0, ..., i] * take[i, j] for i in range(4)) for j in range(4)]
    wanted = torch.stack([c * weight[j] for j, c in enumerate(columns)], -1) @ v[1]  # type: ignore[operator]
    torch.testing.assert_close(out[1], wanted)
    assert torch.equal(out[0], (usual @ v)[0])
