"""The laws of every registered patch: neutral to the bit, gone without a trace, blind to other runs and to other images."""

from __future__ import annotations

import importlib
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ldm_pipe import CFG, Pipeline, UsageError, recipe, registry
from ldm_pipe.cli import main
from ldm_pipe.doors.patches import SPEED, Patches
from ldm_pipe.level import Level
from ldm_pipe.networks.pixart import PixArt
from ldm_pipe.networks.timed_prompt import TimedAdapter
from ldm_pipe.networks.unet import UNet
from ldm_pipe.patch import Patch, Patched, Run, changed, root
from ldm_pipe.plan import patched

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
tiny_controls, tiny_families = importlib.import_module("tiny_controls"), importlib.import_module("tiny_families")
Tiny = Callable[[str], Path]
FOX, BEES = "a fox on a blue background", "two bees on red"
NAMES = sorted(registry.KINDS["patch"])
# Patches of a network that is no U-Net, and whose they are.
TRANSFORMERS = {
    "first_block": "pixart",
    "flux_controlnet": "flux dev",
    "sd3_controlnet": "sd3",
    "sana_controlnet": "sana",
    "flux_ip_adapter": "flux dev",
    "sd3_ip_adapter": "sd3",
}
UNETS = [n for n in NAMES if n not in TRANSFORMERS]
END = {False: "conv_out", True: "transformer.proj_out"}  # the last layer of a U-Net and of a transformer
EXACT = {"text_cache"}  # patches that change no bit whatever their settings
# What changes a small image in a short walk, where the defaults do not.
ACTIVE: dict[str, dict[str, Any]] = {
    "faster": {"keys": "0 2"},
    "attention_scale": {"size": 4},
    "tiles": {"size": 6},
    "first_block": {"threshold": 0.4},
}
every = pytest.mark.parametrize("name", NAMES)


def light(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(str(folder), "cpu", "fp32")


def foreign(folder: Path) -> Pipeline:
    """The same weights in the network of diffusers."""
    from diffusers import UNet2DConditionModel

    pipe = light(folder)
    pipe.bundle.model.network = UNet(UNet2DConditionModel.from_pretrained(folder / "unet").eval())
    return pipe


def transformer(folder: Path) -> Pipeline:
    """The same model with a PixArt of the same tokens and latents in the place of its U-Net."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(1)
    inner = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=4, sample_size=8,
        norm_num_groups=4, cross_attention_dim=16, caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip
    pipe = light(folder)
    pipe.bundle.model.network = PixArt(inner.eval().requires_grad_(False), 4, False)
    return pipe


Homes = Callable[[str], Pipeline]


@pytest.fixture(scope="module")
def homes(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Homes:
    """homes(""): a pipeline with a U-Net; homes(name): with the transformer of that name."""

    def home(name: str) -> Pipeline:
        if name in ("", "pixart"):
            return transformer(tiny("eps")) if name else light(tiny("eps"))
        pipe = light(tiny_families.save(name, tmp_path_factory.mktemp("home") / "model"))
        return replace(pipe, bundle=replace(pipe.bundle, defaults=replace(pipe.bundle.defaults, size=(32, 32))))

    return cache(home)


@pytest.fixture
def pipe(homes: Homes, request: pytest.FixtureRequest) -> Pipeline:
    """One with the network that the patch of the test is for."""
    return homes(TRANSFORMERS.get(_named(request), ""))


def _named(request: pytest.FixtureRequest) -> str:
    return str(request.node.callspec.params.get("name")) if hasattr(request.node, "callspec") else ""


@pytest.fixture(scope="module")
def theirs(tiny: Tiny) -> Pipeline:
    return foreign(tiny("eps"))


def controlnet(pipe: Pipeline) -> dict[str, Any]:
    """A random ControlNet of the tiny network's shape, and a picture."""
    from diffusers import ControlNetModel

    torch.manual_seed(3)
    config = {"cross_attention_dim": 16, "attention_head_dim": 2, "norm_num_groups": 4, "layers_per_block": 1}
    down = ("CrossAttnDownBlock2D", "DownBlock2D")
    net = ControlNetModel(
        block_out_channels=(8, 16), down_block_types=down, conditioning_embedding_out_channels=(4, 4, 4), **config
    )
    for weight in net.parameters():
        nn.init.normal_(weight, 0.02, 0.2)
    return {"network": net.eval().requires_grad_(False), "hint": torch.rand(1, 3, 32, 32)}


def adapter(pipe: Pipeline) -> dict[str, Any]:
    """Features of the sizes of the tiny network's stages."""
    generator = torch.Generator().manual_seed(4)
    return {"features": tuple(torch.randn(1, c, s, s, generator=generator) for c, s in ((8, 8), (16, 4)))}


def direction(pipe: Pipeline) -> dict[str, Any]:
    return {"direction": torch.randn(16, 4, 4, generator=torch.Generator().manual_seed(5))}


def reference(pipe: Pipeline) -> dict[str, Any]:
    """Tokens of a picture and of none, with keys and values for the tiny network's four attentions to the text."""
    generator = torch.Generator().manual_seed(6)
    pairs = (torch.randn(2, c, 16, generator=generator).unbind() for c in (8, 8, 8, 16))
    tokens, absent = torch.randn(2, 1, 4, 16, generator=generator).unbind()
    return {"tokens": tokens, "absent": absent, "weights": tuple(pairs)}


def flux_reference(pipe: Pipeline) -> dict[str, Any]:
    """The same for the one block of the tiny Flux."""
    generator = torch.Generator().manual_seed(7)
    tokens, absent = torch.randn(2, 1, 4, 32, generator=generator).unbind()
    weights, biases = torch.randn(2, 32, 32, generator=generator), torch.randn(2, 32, generator=generator)
    return {"tokens": tokens, "absent": absent, "weights": ((weights[0], biases[0], weights[1], biases[1]),)}


def sd3_reference(pipe: Pipeline) -> dict[str, Any]:
    """An adapter for the three attentions of the tiny SD3, and what an encoder saw of a picture."""
    torch.manual_seed(8)
    adapter = TimedAdapter.of(tiny_controls.sd3_tensors(), "file")
    return {"adapter": adapter, "states": torch.randn(1, 4, 16)}


def latents_of(name: str) -> Callable[[Pipeline], dict[str, Any]]:
    """A random ControlNet of a transformer, and the latents of a picture."""

    def given(pipe: Pipeline) -> dict[str, Any]:
        torch.manual_seed(3)
        shape = (1, 16, 16) if name == "flux_controlnet" else (1, 4, *(32 // pipe.bundle.codec.factor,) * 2)
        return {"network": tiny_controls.lively(getattr(tiny_controls, name)(), 0.8), "hint": torch.randn(shape)}

    return given


NEEDS = {"controlnet": controlnet, "h_space": direction, "t2i_adapter": adapter, "ip_adapter": reference}
NEEDS |= {name: latents_of(name) for name in TRANSFORMERS if name.endswith("controlnet")}
NEEDS |= {"flux_ip_adapter": flux_reference, "sd3_ip_adapter": sd3_reference}


# Fields that say when a patch acts, with values that say never; and what else of it acts at other times.
WINDOWS: tuple[dict[str, Any], ...] = ({"lo": 0.5, "hi": 0.5}, {"share": 0.0})
BESIDE: dict[str, dict[str, Any]] = {"hidiffusion": {"windows": False}}


def fields_of(name: str) -> set[str]:
    return {field for field, _ in registry.entry("patch", name).fields}


def never(name: str) -> dict[str, Any]:
    """The fields under which a patch has an empty window; {} where it has none."""
    found = next((window for window in WINDOWS if window.keys() <= fields_of(name)), {})
    return found and {**found, **BESIDE.get(name, {})}


def made(name: str, pipe: Pipeline, neutral: bool = False, **fields: Any) -> Patch:
    """A patch by its registered name, one that acts or one that does nothing."""
    module, _, cls = registry.target("patch", name).partition(":")
    neutral_fields = getattr(importlib.import_module(module), cls).neutral
    given = NEEDS[name](pipe) if name in NEEDS else {}
    return registry.build("patch", name, **{**given, **(neutral_fields if neutral else ACTIVE.get(name, {})), **fields})


def draw(pipe: Pipeline, patches: Sequence[Patch], prompts: Sequence[str] = (FOX, BEES), **given: Any) -> Tensor:
    """Latents of prompts with seeds 7, 8."""
    settings = {"seeds": tuple(range(7, 7 + len(prompts))), "steps": 5, "sampler": "ddim", **given}
    whole = patched(pipe.plan(prompts, CFG(3), **settings), pipe.bundle.model, patches)
    return torch.cat([out.latents for out in pipe.run(whole)])


@pytest.fixture(scope="module")
def plains(homes: Homes) -> Callable[[str], Tensor]:
    return cache(lambda name: draw(homes(name), []))


@pytest.fixture
def plain(plains: Callable[[str], Tensor], request: pytest.FixtureRequest) -> Tensor:
    """What the pipeline makes without a patch."""
    return plains(TRANSFORMERS.get(_named(request), ""))


def traces(network: nn.Module) -> list[Any]:
    """All that a module holds: its weights, to the bit, and everything that could have been hung onto it."""
    found: list[Any] = [t.clone() for t in network.state_dict().values()]
    for name, module in network.named_modules():
        found.append((name, {k: id(v) for k, v in vars(module).items() if not k.startswith("_")}, *map(len, _hooks(module))))
    return found


def _hooks(module: nn.Module) -> list[Any]:
    return [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._modules, module._parameters]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(torch.equal(p, q) if isinstance(p, Tensor) else p == q for p, q in zip(a, b, strict=True))


@every
def test_the_neutral_setting_changes_no_bit(name: str, pipe: Pipeline, plain: Tensor) -> None:
    assert torch.equal(draw(pipe, [made(name, pipe, neutral=True)]), plain)


@pytest.mark.parametrize("name", [n for n in NAMES if never(n)])
def test_an_empty_window_changes_no_bit(name: str, pipe: Pipeline, plain: Tensor) -> None:
    assert torch.equal(draw(pipe, [made(name, pipe, **never(name))]), plain)


@pytest.mark.parametrize("name", [n for n in NAMES if fields_of(n) & {"layer", "layers"}])
def test_a_layer_that_is_none_is_told_with_those_at_its_place(name: str, pipe: Pipeline) -> None:
    (field,) = fields_of(name) & {"layer", "layers"}
    with pytest.raises(UsageError, match=r"'down_blocks.7' is not a layer of UNet; .*down_blocks.0, down_blocks.1$"):
        draw(pipe, [made(name, pipe, **{field: "down_blocks.7"})])


@every
def test_it_does_something(name: str, pipe: Pipeline, plain: Tensor) -> None:
    assert torch.equal(draw(pipe, [made(name, pipe)]), plain) == (name in EXACT)


@every
def test_it_leaves_nothing_behind(name: str, pipe: Pipeline, plain: Tensor) -> None:
    """After a run, an exception in the middle of one, and one that is given up after a step."""
    patch, network = made(name, pipe), root(pipe.bundle.model)
    before = traces(network)
    first = draw(pipe, [patch])
    assert same(traces(network), before)
    whole = patched(pipe.plan([FOX], CFG(3), seed=7, steps=5), pipe.bundle.model, [patch])

    def failing(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call(*args, **kwargs)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), changed(network, {END[name in TRANSFORMERS]: [failing]}):
        next(pipe.run(whole))
    assert same(traces(network), before)
    for _ in zip(range(1), pipe._walk(whole, Counter()), strict=False):
        assert same(traces(network), before)
    assert torch.equal(draw(pipe, []), plain)
    assert torch.equal(draw(pipe, [patch]), first), "the second run sees the first one's state"


@every
def test_runs_do_not_see_each_other(name: str, pipe: Pipeline, plain: Tensor) -> None:
    """A plain one and two patched ones, in threads at once; and two in one thread, a step of each in turn."""
    patch, found = made(name, pipe), dict[str, Tensor]()
    alone = draw(pipe, [patch])

    def run(key: str, patches: list[Patch]) -> None:
        found[key] = draw(pipe, patches)

    threads = [threading.Thread(target=run, args=a) for a in (("plain", []), ("one", [patch]), ("two", [patch]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found["plain"], plain)
    assert torch.equal(found["one"], alone)
    assert torch.equal(found["two"], alone)
    whole = patched(pipe.plan((FOX, BEES), CFG(3), seeds=(7, 8), steps=5, sampler="ddim"), pipe.bundle.model, [patch])
    steps = list(zip(*(pipe._walk(whole, Counter()) for _ in range(2)), strict=True))
    assert all(torch.equal(step.x, alone) for step in steps[-1])


@every
def test_two_images_at_once_are_two_runs_of_one(name: str, pipe: Pipeline) -> None:
    patch = made(name, pipe)
    both = draw(pipe, [patch])
    for k, prompt in enumerate((FOX, BEES)):
        near = 1e-4 * max(1.0, float(both.abs().max()))
        torch.testing.assert_close(draw(pipe, [patch], [prompt], seeds=(7 + k,))[0], both[k], rtol=1e-4, atol=near)


@pytest.mark.parametrize("name", UNETS)
def test_the_light_network_and_diffusers_agree(name: str, pipe: Pipeline, theirs: Pipeline) -> None:
    patch = made(name, pipe)
    torch.testing.assert_close(draw(theirs, [patch]), draw(pipe, [patch]), rtol=1e-3, atol=1e-3)


@every
@pytest.mark.parametrize("sampler", ["heun", "dpm2m", "euler_ancestral"])
def test_it_goes_with_samplers_and_guidance(name: str, sampler: str, pipe: Pipeline) -> None:
    """Finite, as many evaluations as without it, and guidance on some of the steps alone."""
    settings: dict[str, Any] = {"seed": 7, "steps": 4, "sampler": sampler, "guide": "cfg(3) | between(0.1, 0.8)"}
    whole = pipe.plan([FOX], None, **settings)
    with_it, without = (next(pipe.run(p)) for p in (patched(whole, pipe.bundle.model, [made(name, pipe)]), whole))
    assert with_it.evaluations == without.evaluations
    assert bool(torch.isfinite(with_it.latents).all())


@pytest.mark.parametrize("name", [n for n in NAMES if n != "tiles"])  # which asks any network of a known size
def test_a_network_without_its_layers_is_refused(name: str, pipe: Pipeline) -> None:
    model = replace(pipe.bundle).model
    levels = (Level(0.1, 0.9), Level(1.0, 0.0))
    with pytest.raises(UsageError, match="Linear"):
        made(name, pipe).changes(nn.Linear(1, 1), Run(levels))
    assert Patched(model, (made(name, pipe),), Run(levels))(lambda x, level: None) is not None  # type: ignore[arg-type, return-value]


def test_a_name_that_is_no_layer_lists_those_at_its_place(pipe: Pipeline) -> None:
    network = root(pipe.bundle.model)
    listed = r"'down_blocks.7' is not a layer of UNet; .*down_blocks.0, down_blocks.1$"
    with pytest.raises(UsageError, match=listed), changed(network, {"down_blocks.7": []}):
        pass
    with pytest.raises(UsageError, match="did you mean 'conv_in'"), changed(network, {"conv_inn": []}):
        pass


def test_every_file_of_the_folders_of_patches_is_registered() -> None:
    package = Path(registry.__file__).parent
    files = {f"ldm_pipe.{d}.{p.stem}" for d in ("control", "resolution", "speed") for p in (package / d).glob("[a-z]*.py")}
    assert files <= {target.partition(":")[0] for target in registry.KINDS["patch"].values()}


def test_changes_nest_the_first_one_inside(pipe: Pipeline) -> None:
    """And one that is hung up inside another `with` stands inside that."""
    network, said = root(pipe.bundle.model), list[str]()

    def saying(word: str) -> Callable[..., Any]:
        def change(call: Callable[..., Any], *args: Any) -> Any:
            said.append(word)
            return call(*args)

        return change

    with changed(network, {"conv_in": [saying("b"), saying("a")]}), changed(network, {"conv_in": [saying("c")]}):
        network.conv_in(torch.zeros(1, 4, 8, 8))
    assert said == ["a", "b", "c"]
    network.conv_in(torch.zeros(1, 4, 8, 8))
    assert said == ["a", "b", "c"]


def test_a_step_is_the_number_of_noisier_levels() -> None:
    walk = (Level(0.0, 1.0), Level(0.5, 0.5), Level(0.75, 0.25), Level(0.5, 0.5), Level(0.75, 0.25), Level(1.0, 0.0))
    run = Run(walk)
    assert run.steps == 3
    assert [run.index(level) for level in walk[:-1]] == [0, 1, 2, 1, 2]
    assert run.index(Level(0.6, 0.4)) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("deepcash(2)", "did you mean 'deepcache'"), ("deepcache(2, 0, 1)", "takes 2 value"), ("deepcache(", "of the form"),
        ("tome(rat=0.5)", "did you mean 'ratio'"), ("deepcache(0)", "an interval from 1"), ("tome(0.9)", "from 0 to 0.75"),
        ("faster(often)", "step numbers"), ("deepcache(x)", "a whole number"), ("deepcache(2, branch=9)", "has 1 layer"),
    ],
)  # fmt: skip
def test_a_wrong_patch_is_one_sentence(text: str, words: str, pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match=words):
        Patches((text,)).applied(pipe, pipe.plan([FOX], seed=7))


def test_from_the_command_line_and_back(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--patch and --speed stand in the recipe, alone replay from it, and may stand in a TOML file."""
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(tiny("eps")), "--dtype", "fp32", "--quiet"]
    assert main(["-p", FOX, "--seed", "7", "--patch", "deepcache(2)", "--speed", "exact", "-o", "fast.png", *flags]) == 0
    assert recipe.read("fast.png").patches == ("text_cache", "deepcache(2)")
    assert recipe.read("fast.png").speed == "exact"
    Path("run.toml").write_text(f'prompt = "{FOX}"\nseed = 7\nspeed = "exact"\npatch = ["deepcache(2)"]\n')
    assert main(["--config", "run.toml", "-o", "again.png", *flags]) == 0
    assert main(["-p", FOX, "--seed", "7", "-o", "plain.png", *flags]) == 0
    fast, again, plain = (list(Image.open(f"{n}.png").getdata()) for n in ("fast", "again", "plain"))
    assert fast == again != plain
    capsys.readouterr()
    assert main(["--replay", "fast.png", "--verify", *flags]) == 0
    assert capsys.readouterr().out == "fast.png: bit-equal\n"


@pytest.mark.parametrize("name", SPEED)
def test_every_preset_runs_and_exact_changes_no_bit(name: str, pipe: Pipeline, plain: Tensor) -> None:
    whole = pipe.plan((FOX, BEES), CFG(3), seeds=(7, 8), steps=5, sampler="ddim")
    found = torch.cat([out.latents for out in pipe.run(Patches.of(name, ()).applied(pipe, whole))])
    assert torch.equal(found, plain) == (name == "exact")
    with pytest.raises(UsageError, match="did you mean 'fast'"):
        Patches.of("fats", ())


RULES = ("cfg(3)", "cfg(3) | rescale(0.7)", "cfg(2) | between(0.2, 0.9)")
SAMPLERS = ("ddim", "ddpm", "dpm2m", "euler", "euler_ancestral", "heun", "lms", "unipc")


@pytest.mark.parametrize("seed", range(12))
def test_random_compositions(seed: int, pipe: Pipeline) -> None:
    """Two or three patches, a sampler, a rule and, for some, a picture to start from: finite, the same again, as many
    evaluations as without the patches. Refused are those that add features of one size with those that change the size."""
    draws = random.Random(seed)
    names = set(draws.sample(UNETS, draws.choice((2, 3))))
    patches = [made(name, pipe) for name in sorted(names)]
    settings: dict[str, Any] = {"seed": seed, "steps": 4, "sampler": draws.choice(SAMPLERS), "guide": draws.choice(RULES)}
    picture = Image.effect_noise((32, 32), 60).convert("RGB") if draws.random() < 0.4 else None
    whole = pipe.plan([FOX, BEES], None, picture, **settings)
    over = patched(whole, pipe.bundle.model, patches)
    if names & {"controlnet", "h_space", "t2i_adapter"} and names & {"hidiffusion", "tiles"}:
        with pytest.raises(UsageError, match=r"size of the features|the middle"):
            next(pipe.run(over))
        return
    first, again, without = (next(pipe.run(p)) for p in (over, over, whole))
    assert bool(torch.isfinite(first.latents).all())
    assert torch.equal(first.latents, again.latents)
    assert first.evaluations == without.evaluations
