"""Prompts along a walk: weights, chunks, schedules and AND are what their formulas say, in every sampler and in any batch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_pipe import Pipeline, UsageError, recipe, registry, replay, tokens
from ldm_pipe.codec import Identity
from ldm_pipe.cond import Cond
from ldm_pipe.doors.hires import Hires
from ldm_pipe.embedding import Worded
from ldm_pipe.emphasis import emphasised
from ldm_pipe.families import Defaults
from ldm_pipe.grammar import parse
from ldm_pipe.guidance.apg import APG
from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.level import Level
from ldm_pipe.loading import BUILTIN, Bundle
from ldm_pipe.model import Estimate, Model
from ldm_pipe.networks.light_clip import ClipTextModel, Config
from ldm_pipe.networks.sdxl import SDXLText
from ldm_pipe.noise import Noise
from ldm_pipe.path import VP
from ldm_pipe.prediction import EPS
from ldm_pipe.prompt import Wording
from ldm_pipe.replay import recipe_of
from ldm_pipe.text import ClipText, ClipTower, Words
from ldm_pipe.walk import sample
from ldm_pipe.wording import Script, notices

WORDS = ["fox", "cat", "owl", "red", "blue", "hat", "moon", "tree"]


def clip(window: int, width: int = 16, seed: int = 0) -> tuple[ClipTextModel, Any]:
    """A tiny random CLIP and the built-in model's tokenizer."""
    torch.manual_seed(seed)
    tokenizer = tokens.read(BUILTIN / "tokenizer", 10_000)
    assert tokenizer is not None
    ids = tokenizer([""], 2)[0]
    size = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = ClipTextModel(Config(vocab_size=2000, max_position_embeddings=window, eos_token_id=ids[1], **size))
    for weight in encoder.parameters():
        nn.init.normal_(weight, 0.02, 0.4)
    return encoder.eval().requires_grad_(False), tokenizer


def read(prompt: str) -> Wording:
    (words,) = parse(prompt).at(0, 1)
    return words


@pytest.fixture(scope="module")
def long() -> ClipText:
    return ClipText(*clip(77))


class Net(nn.Module):
    """Looks at every token: its output is another function of x for other tokens, their order and their number."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(16, 3))

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        assert cond.tokens is not None
        shift = (cond.tokens @ self.mix).tanh().mean(1)
        return 0.6 * x.tanh() + 0.3 * shift[:, :, None, None] * (1 + 0.2 * x.sin())


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    """A model in pixels with a window of 8 tokens."""
    text = ClipText(*clip(8))
    defaults = Defaults((4, 4), 6, 3.0, "euler", "trailing")
    return Pipeline(Bundle(Model(Net(), VP.linear(), EPS).eval(), Identity(), text, "tiny", defaults))


def tensor(cond: Cond) -> Tensor:
    assert cond.tokens is not None
    return cond.tokens


def test_text_alone_and_weights_of_1_change_no_bit(long: ClipText) -> None:
    plain = "a fox on a blue hat, red moon"
    for text in (plain, "a (fox:1) on a (blue:1.0) hat, ((red:1):1) moon"):
        assert torch.equal(tensor(long([read(text)])), tensor(long([plain])))
    both = tensor(long([read("a (fox:1) on a blue hat, red moon"), read("a (fox:1.4) on")]))
    assert torch.equal(both[:1], tensor(long([plain, "a fox on"]))[:1])


def test_weights_multiply_the_tokens_and_restore_the_mean(long: ClipText) -> None:
    """The web UI's formula, on the places of the words: begin, a, fox, on, (red, hat:1.3), ..., end."""
    plain = tensor(long(["a fox on red hat"]))
    weights = torch.ones(77)
    weights[2], weights[4:6] = 0.7, 1.3
    changed = plain * weights[:, None]
    expected = changed * plain.mean() / changed.mean()
    found = tensor(long([read("a (fox:0.7) on (red hat:1.3)")]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    other = long([read("((a [(moon)] BREAK")])
    assert tensor(other).shape[1] == 154


def test_a_mean_near_0_does_not_scale_a_row(long: ClipText) -> None:
    states = torch.randn(2, 9, 5)
    states -= states.mean((1, 2), keepdim=True)
    weights = torch.ones(2, 9)
    weights[0, 3] = 1.5
    found = emphasised(states, weights)
    assert torch.equal(found[1], states[1])
    assert found[0].abs().mean() == pytest.approx(float(states[0].abs().mean()), rel=0.3)
    assert torch.equal(emphasised(states, torch.zeros(2, 9)), torch.zeros(2, 9, 5))
    half = emphasised(states.bfloat16(), weights)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half[1], states[1].bfloat16())


def test_a_weight_changes_no_token_and_counts_for_the_words_it_holds(long: ClipText) -> None:
    for text in ("a (fox)es", "(a:1.2)(b:1.3), (red hat)!", " (tree:2) ", "( red hat :1.5)"):
        (chunk,) = read(text).chunks
        found = tokens.weighed(long.tokenizer, read(text).text, chunk)
        plain = long.tokenizer([read(text).text], len(found))[0]
        assert [i for i, _, _ in found] == plain
        heavy = {"".join(read(text).text[s:].split()[:1])[:1] for _, w, s in found if w != 1}
        assert heavy <= set("abfrht")
        assert heavy
        assert [w for _, w, s in found if s < 0] == [1.0, 1.0]


def test_learned_words_take_weights(long: ClipText) -> None:
    """A word of three vectors, twice, and another one behind it: all their tokens have the weight of the word."""
    learned = Worded(long.tokenizer, {"zork": "fox red hat", "quux": "moon tree"})
    text = "a (zork:1.3), Zork (a quux:0.5)"
    (chunk,) = read(text).chunks
    found = [(w, s) for _, w, s in tokens.weighed(learned, read(text).text, chunk)]
    weights = [1.0, 1.0, 1.3, 1.3, 1.3, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 1.0]
    assert [w for w, _ in found] == weights
    assert [s for _, s in found] == [-1, 0, 2, 2, 2, 6, 8, 8, 8, 13, 15, 15, -1]


def test_a_prompt_within_the_window_is_one_chunk(long: ClipText) -> None:
    prompt = " ".join(WORDS * 4)[:140]
    assert long.chunks(read(prompt)) == 1
    assert torch.equal(tensor(long([read(prompt)])), tensor(long([prompt])))
    assert long.chunks(read(" ".join(WORDS * 20))) > 1


@pytest.mark.parametrize("sign", [" BREAK ", " "])
def test_chunks_are_the_encodings_of_their_texts_side_by_side(long: ClipText, sign: str) -> None:
    """BREAK begins one, and so does a full window: 75 tokens."""
    first = " ".join(["red"] * 75) if sign == " " else "a red hat"
    whole = tensor(long([read(first + sign + "blue (moon:1.2)")]))
    parts = [tensor(long([w])) for w in (read(first), read("blue (moon:1.2)"))]
    torch.testing.assert_close(whole, torch.cat(parts, 1), rtol=1e-5, atol=1e-6)
    filled = tensor(long([read(first + sign + "blue (moon:1.2)"), "a fox"], 3))
    blank = tensor(long([""]))
    torch.testing.assert_close(filled[0], torch.cat([*parts, blank], 1)[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(filled[1], torch.cat([tensor(long(["a fox"])), blank, blank], 1)[0], rtol=1e-5, atol=1e-6)


def test_no_word_is_cut_in_two_where_it_need_not_be() -> None:
    text = ClipText(*clip(8))
    pieces = text._tower._pieces(read("fox fox fox fox fox qqqq fox"))  # qqqq is several tokens
    assert [len(p) for p in pieces][:1] == [5]
    assert all(len(p) <= 6 for p in text._tower._pieces(read("qwxz" * 20)))
    assert sum(len(p) for p in text._tower._pieces(read("qwxz" * 20))) == text.tokenizer.length("qwxz" * 20) - 2


def test_more_chunks_than_there_may_be_are_cut_and_said() -> None:
    text = ClipText(*clip(8))
    (said,) = text.notices(read("fox " * 250))
    assert "10 token(s) longer than the 240" in said
    assert tensor(text([read("fox " * 250)])).shape[1] == 320


def test_two_towers_take_it_and_the_pooled_vector_is_of_the_first_chunk() -> None:
    text = SDXLText((ClipTower(*clip(8)), ClipTower(*clip(8, 12, 1))), zeros=True, scored=False)
    prompt = read("a (fox:1.3) BREAK blue")
    cond, first = text([prompt]), text(["a fox"])
    assert tensor(cond).shape == (1, 16, 28)
    assert cond.pooled is not None
    torch.testing.assert_close(cond.pooled, first.pooled, rtol=1e-5, atol=1e-6)
    assert float(tensor(text.negative([read("")], 2)).abs().max()) == 0
    assert tensor(text.negative([read("")], 2)).shape == (1, 16, 28)
    for k, tower in enumerate(text.towers):
        own = slice(0, 16) if k == 0 else slice(16, 28)
        torch.testing.assert_close(tensor(cond)[..., own], tower.states([prompt])[0], rtol=1e-5, atol=1e-6)


def by_hand(pipe: Pipeline, said: Callable[[Level], list[Words]], settings: dict[str, Any], rule: Any = None) -> Tensor:
    """The latents of one image whose branches are encoded one by one: u + s * sum of w (p - u), or `rule` of that sum."""
    whole = pipe.plan("a", **settings)

    def denoise(x: Tensor, level: Level) -> Estimate:
        words = said(level)
        found = [pipe.bundle.model(x, level, pipe.bundle.text([w], 1)) for w in words]
        return rule(found, x, level) if rule else CFG(3.0)(dict(zip(("cond", "uncond"), found, strict=True)), x, level)

    noise = Noise(whole.seeds, whole.shape, pipe.device)
    with torch.no_grad():
        start = whole.sampler.start(noise.start(), whole.levels[0])
        return sample(denoise, start, whole.levels, whole.sampler, noise)


SAMPLERS = [n for n in registry.KINDS["sampler"] if n not in ("restart", "ode", "score_sde", "sa_solver")]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_schedule_is_the_prompts_run_by_hand_and_switched_at_a_level(pipe: Pipeline, sampler: str) -> None:
    """In every sampler, whatever it asks between the levels, with exactly as many evaluations as without a schedule."""
    settings = {"seed": 5, "steps": 6, "sampler": sampler, "negative_prompt": "a [owl:hat:2]"}
    try:
        plain = pipe("a fox", **settings)
    except UsageError:
        pytest.skip("not for these levels")
    found = pipe("a [fox|red moon] [cat:tree:0.5]", **settings)
    levels = [float(level.u) for level in pipe.plan("a", **settings).levels]

    def said(level: Level) -> list[Words]:
        step = max(k for k in range(6) if levels[k] >= level.u) if level.u <= levels[0] else 0
        return [f"a {('fox', 'red moon')[step % 2]} {'cat' if step < 3 else 'tree'}", f"a {'owl' if step < 2 else 'hat'}"]

    torch.testing.assert_close(found.latents, by_hand(pipe, said, settings), rtol=1e-4, atol=1e-4)
    assert found.evaluations == plain.evaluations
    assert (found.latents - plain.latents).abs().max() > 1e-3


def test_steps_are_counted_along_the_levels(pipe: Pipeline) -> None:
    levels = [Level(0.0, 1.0), Level(0.6, 0.8), Level(0.8, 0.6), Level(0.6, 0.8), Level(0.8, 0.6), Level(1.0, 0.0)]
    script = Script.of(["[a|b|c]"], "", {}, levels)  # a walk that rises again visits its levels twice
    assert script.steps == 3
    assert [script.step(level) for level in levels] == [0, 1, 2, 1, 2, 2]
    assert script.step(Level(0.7, 0.7)) == 1
    assert Script.of(["a"], "", {}, levels).steps == 1


def test_and_is_the_formula(pipe: Pipeline) -> None:
    """u + s sum of w_i (p_i - u), with a weight below 0; evaluations one for each part and step."""
    settings = {"seed": 5, "steps": 6}
    found = pipe("a fox :1.2 AND a (blue hat:1.3) AND a cat :-0.5", **settings, negative_prompt="owl")

    def summed(estimates: list[Estimate], x: Tensor, level: Level) -> Estimate:
        *parts, u = estimates
        weights = (1.2, 1.0, -0.5)
        x0, noise = (getattr(u, n) + 3.0 * sum(w * (getattr(p, n) - getattr(u, n)) for w, p in zip(weights, parts, strict=True))
                     for n in ("x0", "noise"))  # fmt: skip
        return Estimate(x0, noise)

    words: list[Words] = ["a fox", read("a (blue hat:1.3)"), "a cat", "owl"]
    torch.testing.assert_close(found.latents, by_hand(pipe, lambda level: words, settings, summed), rtol=1e-4, atol=1e-4)
    assert found.evaluations == {"cond": 6, "and:1": 6, "and:2": 6, "uncond": 6}
    halves = pipe("a fox :0.5 AND a cat :0.5", **settings, guidance_scale=1.0)
    assert halves.evaluations == {"cond": 6, "and:1": 6}
    alone = pipe("a fox :1 AND a cat :0", **settings).latents
    torch.testing.assert_close(alone, pipe("a fox", **settings).latents, rtol=1e-4, atol=1e-4)
    once = pipe("[fox:cat:0.5] AND hat", **settings).latents
    assert (once - pipe("fox AND hat", **settings).latents).abs().max() > 1e-3


def test_and_joins_before_rules_that_are_not_linear(pipe: Pipeline) -> None:
    settings = {"seed": 5, "steps": 6}
    found = pipe("a fox AND a cat :0.5", rule=APG(3.0, momentum=0.0), **settings)

    def projected(estimates: list[Estimate], x: Tensor, level: Level) -> Estimate:
        p, q, u = estimates
        parts = {"cond": Estimate(*(a + 0.5 * (b - c) for a, b, c in zip(p[:2], q[:2], u[:2], strict=True))), "uncond": u}
        return APG(3.0, momentum=0.0)(parts, x, level)

    words: list[Words] = ["a fox", "a cat", ""]
    torch.testing.assert_close(found.latents, by_hand(pipe, lambda level: words, settings, projected), rtol=1e-4, atol=1e-4)
    for guide in ("cfg(5) | rescale(0.7)", "cfg(5) | between(0.2, 0.8)", "curve(1, 5)", "perp_neg(4, ('text:owl',))"):
        assert torch.isfinite(pipe("a fox AND a cat", guide=guide, **settings).latents).all()
    for guide in ("cfg(5) | adaptive", "cfg(5) | pag(3)", "autoguidance(2)"):
        with pytest.raises(UsageError, match=r"AND does not go with (adaptive|pag|autoguidance), which takes one prompt"):
            pipe.plan("a fox AND a cat", guide=guide, **settings)
    with pytest.raises(UsageError, match="names its own prompts"):
        pipe.plan("a fox AND a cat", guide="compose(('text:a', 'text:b'), (2,))", **settings)


def test_an_image_is_the_same_in_any_batch(pipe: Pipeline) -> None:
    """Prompts of other lengths, other parts and other schedules beside it; counts are those of what was asked."""
    prompts = ["a fox", "a [fox|cat]", "a fox BREAK a hat", "fox AND cat :0.5", "owl :2 AND cat :0.5", "(moon:1.4)"]
    prompts.append(" ".join(WORDS))
    together = pipe(prompts, seeds=tuple(range(7)), steps=4, negative_prompt="tree")
    for row, prompt in enumerate(prompts):
        alone = pipe(prompt, seed=row, steps=4, negative_prompt="tree")
        torch.testing.assert_close(together.latents[row], alone.latents[0], rtol=1e-4, atol=1e-5)
    assert together.evaluations == {"cond": 28, "uncond": 28, "and:1": 8}
    assert [size for size, _ in together.places] == [2, 2, 1, 1, 1, 1, 1]
    assert together.prompts == tuple(prompts)


def test_conditions_of_all_images_at_once_fit_each_batch(pipe: Pipeline) -> None:
    """As a door makes them that puts something into every condition."""
    whole = pipe.plan(["a fox", "fox AND cat :0.5", "a [red|blue] hat"], seed=2, steps=4)
    early = dataclasses.replace(whole, conds=pipe.conds(whole))
    found, usual = (torch.cat([out.latents for out in pipe.run(plan)]) for plan in (early, whole))
    torch.testing.assert_close(found, usual, rtol=1e-4, atol=1e-5)


def test_positive_and_negative_are_filled_up_to_one_length(pipe: Pipeline) -> None:
    for prompt, negative in (("fox", "cat BREAK owl"), ("fox BREAK hat BREAK red", "owl")):
        whole = pipe.plan(prompt, negative_prompt=negative)
        conds = pipe.conds(whole)
        lengths = {tensor(c).shape[1] for c in conds.values() if isinstance(c, Cond)}
        assert lengths == {8 * (1 + max(prompt.count("BREAK"), negative.count("BREAK")))}
    named = pipe("fox BREAK hat", guide="perp_neg(4, ('text:a (red:1.2) owl',))", steps=3)
    assert torch.isfinite(named.latents).all()


def test_without_the_grammar_everything_is_text(pipe: Pipeline) -> None:
    text: Any = pipe.bundle.text
    plain = pipe.conds(pipe.plan("a (fox:1.3) AND [a|b]", plain_prompt=True))
    assert torch.equal(tensor(plain["cond"]), tensor(text(["a (fox:1.3) AND [a|b]", ""]))[:1])  # type: ignore[arg-type]
    for prompt in ("a fox", "a red hat, blue moon"):
        found, same = pipe(prompt, seed=3), pipe(prompt, seed=3, plain_prompt=True)
        assert torch.equal(found.latents, same.latents)
    assert pipe("a fox", steps=2, plain_prompt=True).settings.plain_prompt


def test_a_replay_reads_the_prompt_as_it_was_read(pipe: Pipeline) -> None:
    prompt = "a (fox:1.3) [cat:owl:0.5] AND hat"
    made, plain = pipe(prompt, seed=3, steps=4), pipe(prompt, seed=3, steps=4, plain_prompt=True)
    for out in (made, plain):
        found = recipe_of(out, pipe, 0)
        assert torch.equal(replay.again(found, pipe).latents, out.latents)
    old = {k: v for k, v in json.loads(json.dumps(dataclasses.asdict(recipe_of(made, pipe, 0)))).items() if k != "plain_prompt"}
    old["adapters"], old["controls"], old["patches"] = (), (), ()
    assert torch.equal(replay.again(recipe.Recipe(**old), pipe).latents, plain.latents)
    assert not torch.equal(made.latents, plain.latents)


def test_the_second_pass_counts_the_steps_of_the_first(pipe: Pipeline) -> None:
    """What was switched in the first pass stays switched."""
    whole = pipe.plan("[fox:cat:0.5]", seed=3, steps=6)
    large = Hires(2.0, 0.5).applied(pipe, whole, lambda plan: plan)
    asked = {float(tensor(cond(level)).sum()) for cond in [pipe.conds(large)["cond"]] for level in large.levels[:-1]}  # type: ignore[operator]
    assert asked == {float(tensor(pipe.bundle.text([read("cat")])).sum())}


def test_what_is_said_of_a_prompt() -> None:
    text = ClipText(*clip(8), words=frozenset(WORDS) | {"a"})
    assert notices(text, "a (fox:1.3) [cat:owl:0.5] AND ((hat)) BREAK [red|blue]", False) == []
    assert notices(text, " ".join(WORDS * 3), False) == []
    assert len(notices(text, " ".join(WORDS * 3), True)) == 1
    (unknown,) = notices(text, "a [fox|parrot]", False)
    assert "does not know 'parrot'" in unknown
    (note,) = notices(text, "a (fox", False)
    assert "never closed" in note
    assert "'3'" in notices(text, "a (fox:1.3)", True)[0]


def test_state_of_a_rule_starts_fresh_within_a_conjunction(pipe: Pipeline) -> None:
    rule = APG(3.0, momentum=-0.5)
    first, second = (pipe("a fox AND a cat", rule=rule, seed=1, steps=3).latents for _ in range(2))
    assert torch.equal(first, second)
