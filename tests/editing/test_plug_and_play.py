"""Plug-and-Play: what is injected is equal and what is not is not, neutral ends, the paper's blocks on the paper's layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import CFG, Cond, Level, Model, Noise, Pipeline, UsageError, build, guided, levels, sample
from ldm_pipe.attention import Site
from ldm_pipe.editing.pairs import until
from ldm_pipe.editing.plug_and_play import Inject, PlugAndPlay, middle
from ldm_pipe.patch import Attending, feature_tap

Make = Callable[[str], Any]
BLOCKS = {"unet": "up_blocks.0.resnets.1.conv2", "pixart": "transformer_blocks.1.ff"}
kinds = pytest.mark.parametrize("kind", ["unet", "pixart"])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conds(rows: int = 2, same: bool = False) -> dict[str, Cond]:
    """Row k < rows/2 a source, the others targets."""
    tokens = torch.cat([drawn(1, 6, 16, seed=1 if same else 1 + 2 * k // rows) for k in range(rows)])
    mask = torch.ones(rows, 6, dtype=torch.bool)
    return {"cond": Cond(tokens=4 * tokens, mask=mask), "uncond": Cond(tokens=0 * tokens, mask=mask)}


def guide(model: Model, inject: Inject) -> Any:
    return Attending(model, inject, {inject.block: inject.tap})


def draw(
    model: Model, inject: Inject | None = None, around: Any = None, scale: float = 2.0, rows: int = 2, same: bool = False
) -> Tensor:
    noise = Noise((7,) * rows, (4, 8, 8))
    denoise = guided(model.branches(**conds(rows, same)), CFG(scale))
    denoise = around(denoise) if around else denoise
    denoise = guide(model, inject)(denoise) if inject else denoise
    return sample(denoise, noise.start(), walk(model), build("sampler", "ddim"), noise)


def walk(model: Model, steps: int = 5) -> list[Level]:
    return levels.trailing(model.path, steps)


@kinds
def test_nothing_injected_changes_no_bit(diffusers_model: Make, kind: str) -> None:
    model = diffusers_model(kind)
    plain = draw(model)
    block = BLOCKS[kind]
    for fields in ({"attention": 1.0}, {"pairs": (), "attention": 0.0}, {"branch": "weak", "attention": 0.0}):
        assert torch.equal(draw(model, Inject(block, **{"features": 1.0, **fields})), plain)  # type: ignore[arg-type]
    for injected in (Inject(block, features=0.0, attention=1.0), Inject(block, features=1.0, attention=0.0)):
        out = draw(model, injected)
        assert torch.equal(out[0], plain[0])
        assert not torch.allclose(out[1], plain[1], atol=1e-3)
    assert torch.equal(draw(model), plain)


@kinds
def test_the_same_prompt_gives_the_source_itself(diffusers_model: Make, kind: str) -> None:
    model = diffusers_model(kind)
    out = draw(model, Inject(BLOCKS[kind], attention=0.0), scale=1.0, same=True)
    assert torch.equal(out[1], out[0])


@dataclass(frozen=True, eq=False)
class Watch:
    """Keeps, of every attention to the image itself, whether rows of the target have the source's queries, keys and values."""

    seen: dict[str, list[tuple[bool, ...]]] = field(default_factory=dict)

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        if not site.cross:
            source, targets = 0, [r for r in range(len(q)) if r % site.rows.size]
            maps = site.maps(q, k, slice(None))
            same = (all(torch.equal(t[r], t[source]) for r in targets) for t in (q, k, v, maps))
            self.seen.setdefault(site.name, []).append(tuple(same))
        return out


@kinds
def test_queries_and_keys_are_the_sources_and_values_are_not(diffusers_model: Make, kind: str) -> None:
    """In both branches, from the block on, for the share of the steps; no other site is touched."""
    model, watch, block = diffusers_model(kind), Watch(), BLOCKS[kind]
    inject = Inject(block, features=1.0, attention=until(walk(model), 0.4))
    draw(model, inject, Attending(model, watch))
    later = [n for n in watch.seen if ("up_blocks.1" in n if kind == "unet" else int(n.split(".")[-2]) >= 1)]
    assert 0 < len(later) < len(watch.seen)
    for name, steps in watch.seen.items():
        injected = [name in later and step < 2 for step in range(5)]
        own = steps[0][0]  # the first site of a first step has not seen the prompts yet: equal without injection
        assert [(s[0], s[1], s[3]) for s in steps[1:]] == [(i,) * 3 for i in injected[1:]]
        assert own or not injected[0]
        assert not any(s[2] for s in steps[1:]), "the values are the target's own"


@kinds
def test_features_are_the_sources_for_their_share_of_the_steps(diffusers_model: Make, kind: str) -> None:
    model, same = diffusers_model(kind), list[tuple[bool, ...]]()

    def read(rows: Any, out: Tensor) -> Tensor:
        same.append(tuple(torch.equal(out[r], out[0]) for r in (1, 3)))
        return out

    inject = Inject(BLOCKS[kind], features=until(walk(model), 0.6), attention=1.0)

    def tapped(denoise: Any) -> Any:
        run = guide(model, inject)(denoise)

        def call(x: Tensor, level: Level) -> Any:
            with feature_tap(model, {BLOCKS[kind]: read}):  # the outer one sees what the inner one has put there
                return run(x, level)

        return call

    draw(model, None, tapped)
    assert same == [(True, True)] * 3 + [(False, False)] * 2


@kinds
def test_two_pairs_equal_each_alone(diffusers_model: Make, kind: str) -> None:
    model = diffusers_model(kind)
    both = draw(model, Inject(BLOCKS[kind], pairs=((0, 2), (1, 3)), attention=0.3), rows=4)
    alone = draw(model, Inject(BLOCKS[kind], attention=0.3))
    for row in (2, 3):
        torch.testing.assert_close(both[row], alone[1], rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="needs its pictures in one batch"):
        draw(model, Inject(BLOCKS[kind], pairs=((0, 2),)))


def test_the_papers_blocks_on_the_papers_layout() -> None:
    """Stable Diffusion's shape, narrow: features of block 4, attention of blocks 4 to 11."""
    from ldm_pipe.networks import light_unet

    net = light_unet.UNet(light_unet.Config(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, cross_attention_dim=8))
    block, empty = middle(net), torch.zeros(1)
    assert block == "up_blocks.1.resnets.1.conv2"
    inject = Inject(block, attention=-1.0)
    touched = []
    for name, module in net.named_modules():
        if getattr(module, "takes_rules", False):
            site = Site(name, name.endswith("attn2"), _rows(), lambda t: t)
            q, _, v = inject.inputs(site, torch.eye(2), torch.eye(2), empty)
            assert v is empty
            touched += [name] if not torch.equal(q, torch.eye(2)) else []
    wanted = {f"up_blocks.{i}.attentions.{j}" for i in (1, 2, 3) for j in range(3)} - {"up_blocks.1.attentions.0"}
    assert touched == [f"{n}.transformer_blocks.0.attn1" for n in sorted(wanted)]


def _rows() -> Any:
    from ldm_pipe.cond import Rows

    return Rows(("cond",), 2, Level(0.8, 0.6))


def test_other_layouts(diffusers_model: Make) -> None:
    pipe = Pipeline.from_pretrained("builtin", "cpu", "fp32")
    assert middle(pipe.bundle.model).endswith(".up_blocks.1.resnets.0.conv2")
    assert middle(diffusers_model("unet")).endswith(".up_blocks.0.resnets.1.conv2")
    with pytest.raises(UsageError, match="name a module of it as its block"):
        middle(diffusers_model("pixart"))
    with pytest.raises(UsageError, match="fits no modules of the network"):
        draw(diffusers_model("unet"), Inject("up_blocks.7.resnets.0"))
    with pytest.raises(UsageError, match="take 0 to 1"):
        PlugAndPlay(features=1.5)
