"""Structured guidance: a value edit and nothing else, neutral without phrases, phrases in their own places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import CFG, Cond, Level, Model, Noise, Pipeline, UsageError, build, guided, levels, sample
from ldm_pipe.attention import Site, attention_rule
from ldm_pipe.blocks import Attention
from ldm_pipe.cond import ROWS, Rows
from ldm_pipe.doors.edit import Edit
from ldm_pipe.editing.pairs import spliced
from ldm_pipe.editing.structured import Values, phrases_of, spans, values_of
from ldm_pipe.patch import Attending

Make = Callable[[str], Any]
PROMPT = "a red fox above a blue cat on a green background"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained("builtin", "cpu", "fp32")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def estimates(model: Model, cond: Cond, rule: Values | None = None) -> dict[str, Tensor]:
    branches = model.branches(cond=cond, uncond=cond.map(torch.zeros_like))

    def denoise(x: Tensor, level: Level) -> Any:
        return branches(x, level, ("cond", "uncond"))

    with torch.no_grad():
        found = (Attending(model, rule)(denoise) if rule else denoise)(drawn(len(cond.tokens), 4, 8, 8), Level(0.6, 0.8))  # type: ignore[arg-type]
    return {name: estimate.x0 for name, estimate in found.items()}


def test_no_phrases_and_equal_values_change_nothing(diffusers_model: Make) -> None:
    model, tokens = diffusers_model("unet"), 4 * drawn(1, 6, 16, seed=1)
    cond = Cond(tokens=tokens.repeat(2, 1, 1))
    plain = estimates(model, cond)
    assert all(torch.equal(t, plain[n]) for n, t in estimates(model, cond, Values(tokens, None)).items())
    for name, t in estimates(model, cond, Values(tokens, tokens.clone())).items():
        torch.testing.assert_close(t, plain[name], rtol=1e-5, atol=1e-5)


def test_only_the_named_rows_of_the_conditional_half_change(diffusers_model: Make) -> None:
    model, tokens = diffusers_model("unet"), 4 * drawn(1, 6, 16, seed=1)
    cond, other = Cond(tokens=tokens.repeat(2, 1, 1)), tokens + 2 * drawn(1, 6, 16, seed=2)
    plain, one = estimates(model, cond), estimates(model, cond, Values(tokens, other, (1,)))
    both = estimates(model, cond, Values(tokens, other))
    assert torch.equal(one["uncond"], plain["uncond"])
    assert torch.equal(both["uncond"], plain["uncond"])
    assert torch.equal(one["cond"][0], plain["cond"][0])
    assert not torch.allclose(one["cond"][1], plain["cond"][1], atol=1e-3)
    torch.testing.assert_close(both["cond"][1], one["cond"][1])
    assert not torch.allclose(both["cond"][0], plain["cond"][0], atol=1e-3)


def test_it_is_the_mean_over_attentions_with_the_prompts_keys() -> None:
    """In float64: the edited attention is mean_i softmax(q k^T) V_i, to 1e-12."""
    torch.manual_seed(0)
    attention = Attention(8, 12, 2).double().requires_grad_(False)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    x, variants = torch.randn(2, 9, 8, dtype=torch.float64), torch.randn(4, 1, 5, 12, dtype=torch.float64)
    y, kept = variants[0].expand(2, 5, 12), list[tuple[Tensor, ...]]()

    def keep(site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        results = [site.maps(q, k, slice(None)) @ site.values(t) for t in variants]
        kept.append((out, torch.stack(results).mean(0)))
        return out

    token = ROWS.set(Rows(("cond",), 2, Level(0.6, 0.8)))
    try:
        with attention_rule(attention, Values(variants[0], variants.mean(0))), attention_rule(attention, keep):
            attention(x, y)
    finally:
        ROWS.reset(token)
    assert float((kept[0][0] - kept[0][1]).abs().max()) < 1e-12


def test_phrases_go_to_their_own_places(pipe: Pipeline) -> None:
    text: Any = pipe.bundle.text
    whole, alone = text([PROMPT]).tokens, text(["a blue cat"]).tokens
    where = spans(text, PROMPT, "a blue cat")
    assert where == [(1, range(5, 8))]
    mixed = spliced(whole, alone, where)
    assert torch.equal(mixed[:, 5:8], alone[:, 1:4])
    assert not torch.equal(mixed[:, 5:8], whole[:, 5:8])
    rest = [i for i in range(whole.shape[1]) if i not in (5, 6, 7)]
    assert torch.equal(mixed[:, rest], whole[:, rest])
    assert spans(text, "a fox, a cat, a fox", "a fox") == [(1, range(1, 3)), (1, range(7, 9))]
    rule = values_of(text, PROMPT, ["a blue cat", "a red fox", "background"])  # the last one is one word: dropped
    fox = spliced(whole, text(["a red fox"]).tokens, [(1, range(1, 4))])
    torch.testing.assert_close(rule.tokens, (whole + mixed + fox) / 3)
    assert values_of(text, PROMPT, []).tokens is None
    with pytest.raises(UsageError, match="'a green cat' does not stand in"):
        values_of(text, PROMPT, ["a green cat"])


def test_phrases_stand_between_connecting_words() -> None:
    assert phrases_of(PROMPT) == ["a red fox", "a blue cat", "a green background"]
    assert phrases_of("A red car, two sheep; fog") == ["a red car", "two sheep"]
    assert phrases_of("") == []


def test_a_network_that_changes_its_tokens_is_told_how_or_refused(diffusers_model: Make) -> None:
    """PixArt projects them first: as they come, they are another network's; projected, the rule moves the result."""
    model, tokens = diffusers_model("pixart"), 4 * drawn(1, 6, 16, seed=1)
    cond, other = Cond(tokens=tokens.repeat(2, 1, 1)), tokens + 2 * drawn(1, 6, 16, seed=2)
    with pytest.raises(UsageError, match="attends to other tokens than those of the prompt"):
        estimates(model, cond, Values(tokens, other))
    with torch.no_grad():
        projected = [model.network.inner.caption_projection(t) for t in (tokens, other)]
    plain, edited = estimates(model, cond), estimates(model, cond, Values(projected[0], projected[1]))
    assert torch.equal(edited["uncond"], plain["uncond"])
    assert not torch.allclose(edited["cond"], plain["cond"], atol=1e-3)


def test_as_an_edit_it_moves_the_target_alone(pipe: Pipeline) -> None:
    def draw(**fields: str) -> Tensor:
        return Edit(PROMPT, PROMPT, "structured", dict(fields))(pipe, seed=7, steps=3).latents

    out, one = draw(), draw(phrases="a blue cat")
    model, text = pipe.bundle.model, pipe.bundle.text
    noise = Noise((7, 7), (pipe.bundle.codec.channels, 16, 16))
    assert torch.equal(out[0], one[0])
    assert not torch.allclose(out[1], out[0], atol=1e-3)
    assert not torch.allclose(out[1], one[1], atol=1e-3)
    denoise = guided(model.branches(cond=text([PROMPT] * 2), uncond=text([""] * 2)), CFG(pipe.bundle.defaults.guidance_scale))
    walk = levels.trailing(model.path, 3)
    plain = sample(denoise, noise.start(), walk, build("sampler", "dpm2m"), noise)
    assert torch.equal(out[0], plain[0])
