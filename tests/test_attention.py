"""The attention hook on the light U-Net and on diffusers' own networks, rules that nest, taps; nothing is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import CFG, Cond, Level, Model, UsageError, guided
from ldm_pipe.attention import Site, attention_rule, set_backend
from ldm_pipe.cond import Rows
from ldm_pipe.patch import Attending, feature_tap

Make = Callable[[str], Any]
LEVEL = Level(0.8, 0.6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)
kinds = pytest.mark.parametrize("kind", ["unet", "pixart", "uncond"])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, COND = drawn(2, 4, 8, 8), Cond(tokens=4 * drawn(2, 6, 16, seed=1), mask=MASK)


def output(model: Model) -> Tensor:
    with torch.no_grad():
        return model.branches(cond=COND)(X, LEVEL, ("cond",))["cond"].x0


def processors(model: Model) -> list[Any]:
    return [m.processor for m in model.modules() if hasattr(m, "processor")]


@dataclass(frozen=True, eq=False)
class Watch:
    """Changes nothing; keeps how far its own maps are from the attention that was computed, and the values from those of
    `tokens`."""

    tokens: Tensor | None = None
    seen: dict[str, tuple[bool, float]] = field(default_factory=dict)

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        again = site.maps(q, k, slice(None)) @ v
        self.seen[site.name] = site.cross, float((again - out).abs().max())
        if site.cross and self.tokens is not None:
            assert torch.equal(site.values(self.tokens), v)
        return out


@kinds
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_watching_changes_no_bit_of_a_diffusers_network(diffusers_model: Make, kind: str, backend: Any) -> None:
    """Every attention is seen, masks included; the result, and afterwards every processor, is the same."""
    model, watch = diffusers_model(kind), Watch(COND.tokens if kind == "unet" else None)
    for module in model.modules():
        if hasattr(module, "processor"):
            set_backend(SimpleNamespace(set_attn_processor=module.set_processor), backend)
    plain, before = output(model), processors(model)
    with attention_rule(model, watch):
        assert torch.equal(output(model), plain)
        assert processors(model) != before
    assert processors(model) == before
    assert torch.equal(output(model), plain)
    assert len(watch.seen) == len(before) > 2
    assert all(error < 1e-5 for _, error in watch.seen.values())
    assert sum(cross for cross, _ in watch.seen.values()) == (0 if kind == "uncond" else len(before) // 2)


@kinds
def test_a_rule_reaches_the_result_of_a_diffusers_network(diffusers_model: Make, kind: str) -> None:
    """Each attention site by itself moves the result."""
    model = diffusers_model(kind)
    plain, names = output(model), [n for n, m in model.named_modules() if hasattr(m, "processor")]
    for name in names:
        with attention_rule(model, lambda site, q, k, v, out, name=name: 2 * out if site.name == name else out):
            assert not torch.allclose(output(model), plain, atol=1e-7), name


@kinds
def test_after_an_exception_and_in_another_thread_no_rule_is_there(diffusers_model: Make, kind: str) -> None:
    model, elsewhere = diffusers_model(kind), list[Tensor]()
    plain, before = output(model), processors(model)

    def fail(site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        raise ZeroDivisionError

    with attention_rule(model, lambda site, q, k, v, out: 0 * out):
        other = threading.Thread(target=lambda: elsewhere.append(output(model)))
        other.start()
        other.join()
        assert torch.equal(elsewhere[0], plain)
        with pytest.raises(ZeroDivisionError), attention_rule(model, fail):
            output(model)
        assert not torch.equal(output(model), plain)
    assert processors(model) == before
    assert torch.equal(output(model), plain)


def test_two_threads_may_come_and_go(diffusers_model: Make) -> None:
    """The one that leaves first does not take the other's rule away."""
    model, entered, left = diffusers_model("unet"), threading.Event(), threading.Event()
    plain, before, inside = output(model), processors(model), list[Tensor]()

    def stay() -> None:
        with attention_rule(model, lambda site, q, k, v, out: 0 * out):
            entered.set()
            left.wait(10)
            inside.append(output(model))

    other = threading.Thread(target=stay)
    with attention_rule(model, Watch()):
        other.start()
        entered.wait(10)
    left.set()
    other.join()
    assert not torch.equal(inside[0], plain)
    assert processors(model) == before


def test_what_takes_no_rule_is_refused_by_name(diffusers_model: Make) -> None:
    from diffusers.models.attention_processor import SlicedAttnProcessor

    model = diffusers_model("unet")
    model.network.inner.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(SlicedAttnProcessor(1))
    before = processors(model)
    with pytest.raises(UsageError, match=r"attn2 attends by SlicedAttnProcessor, which takes no rule"):
        Attending(model, Watch())(model.bind(COND))(X, LEVEL)
    assert processors(model) == before
    with pytest.raises(UsageError, match="no attention that takes a rule"), attention_rule(torch.nn.Linear(1, 1), Watch()):
        pass


@dataclass(frozen=True, eq=False)
class Step:
    """Writes down when it is asked; multiplies values by `factor` on the way in and adds `more` on the way out."""

    name: str
    log: list[str]
    factor: float = 1.0
    more: float = 0.0

    def inputs(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.log.append(f"{self.name} in")
        return q, k, v * self.factor

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        self.log.append(f"{self.name} out")
        return out + self.more


@pytest.mark.parametrize("kind", ["unet", "pixart"])
def test_nested_rules_all_apply_like_parcels(diffusers_model: Make, kind: str) -> None:
    model, log = diffusers_model(kind), list[str]()
    branches = model.branches(cond=COND, uncond=COND)
    base = guided(branches, CFG(2.0))
    two = Attending(model, Step("outer", log, 2.0))(Attending(model, Step("inner", log, 3.0))(base))
    one = Attending(model, Step("only", [], 6.0))(base)
    with torch.no_grad():
        assert torch.allclose(two(X, LEVEL).x0, one(X, LEVEL).x0, atol=1e-5)
        assert log[:4] == ["outer in", "inner in", "inner out", "outer out"]
        twice = Attending(model, Step("a", [], 1.0, 0.5))(Attending(model, Step("b", [], 1.0, 0.25))(base))
        once = Attending(model, Step("c", [], 1.0, 0.75))(base)
        assert torch.allclose(twice(X, LEVEL).x0, once(X, LEVEL).x0, atol=1e-5)
        assert not torch.allclose(one(X, LEVEL).x0, base(X, LEVEL).x0, atol=1e-4)


def test_light_and_diffusers_take_a_rule_alike(diffusers_model: Make) -> None:
    """The same weights, the same rule on inputs and result: the same image."""
    from ldm_pipe.networks import light_unet

    theirs = diffusers_model("unet")
    config = light_unet.Config(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
    )  # fmt: skip
    light = light_unet.UNet(config).eval()
    light.load_state_dict(theirs.network.inner.state_dict())
    rule = Step("both", [], 3.0, 0.5)
    time = torch.full((2,), 500.0)
    with torch.no_grad():
        with attention_rule(theirs, rule):
            a = theirs.network(X, time, COND)
        with attention_rule(light, rule):
            b = light(X, time, COND.tokens)[0]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), [("unet", "up_blocks.1.resnets.0"), ("pixart", "transformer_blocks.1.ff")])
def test_a_tap_reads_and_replaces_and_goes(diffusers_model: Make, kind: str, name: str) -> None:
    model, seen, other = diffusers_model(kind), list[tuple[Rows, Tensor]](), list[Tensor]()
    plain = output(model)

    def read(rows: Rows, out: Tensor) -> Tensor:
        seen.append((rows, out))
        return out

    with feature_tap(model, {name: read}):
        assert torch.equal(output(model), plain)
        thread = threading.Thread(target=lambda: other.append(output(model)))
        thread.start()
        thread.join()
    assert torch.equal(other[0], plain)
    assert len(seen) == 1, "once, and not for the other thread"
    assert seen[0][0].branches == ("cond",)
    assert seen[0][0].size == 2
    with feature_tap(model, {name: lambda rows, out: seen[0][1]}):  # what it gave anyway
        assert torch.equal(output(model), plain)
    with feature_tap(model, {name: lambda rows, out: out + 1}), feature_tap(model, {name: lambda rows, out: 2 * out}):
        both = output(model)
    with feature_tap(model, {name: lambda rows, out: 2 * out + 1}):
        assert torch.allclose(output(model), both, atol=1e-6)
    assert not torch.allclose(both, plain, atol=1e-4)
    with pytest.raises(ZeroDivisionError), feature_tap(model, {name: lambda rows, out: out / (1 // 0)}):
        output(model)
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert torch.equal(output(model), plain)


def test_a_tap_with_a_wrong_name_says_what_would_fit(diffusers_model: Make) -> None:
    model = diffusers_model("unet")
    for name, words in (
        ("up_blocks.1.resnets.9", r"fits no modules of the network; one would fit .*up_blocks\.1\.resnets\.[01]"),
        ("attn2", r"fits \d+ modules of the network; one would fit .*attn2, .*attn2"),
    ):
        with pytest.raises(UsageError, match=words), feature_tap(model, {name: lambda rows, out: out}):
            pass
