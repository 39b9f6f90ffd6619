"""Offloading: the same bits, wherever the weights lie between two uses, and all of them home at the end."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm_pipe import UsageError, cli
from ldm_pipe.doors.adapters import adapted
from ldm_pipe.level import Level
from ldm_pipe.offload import BLOCKS, Offload
from ldm_pipe.pipeline import Pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
tiny_families = importlib.import_module("tiny_families")
WAYS = ("model", "sequential")
GIVEN: dict[str, Any] = {"seed": 3, "steps": 2, "height": 32, "width": 32}


class Elsewhere:
    """A device that this machine does not have: at home every weight reads NaN, so that nothing computes with it there."""

    def __init__(self, pipe: Pipeline) -> None:
        self.real: dict[int, Tensor] = {}
        self.there: set[int] = set()
        self.most, self.fetched = 0, 0
        self.home: dict[int, Tensor] = {}
        held = [t for m in pipe.bundle.modules().values() for t in m.state_dict(keep_vars=True).values()]
        self.tensors = list({id(t): t for t in held if t.is_floating_point()}.values())  # T5 has one by two names
        for t in self.tensors:
            parked = torch.full_like(t.data, torch.nan)
            self.real[parked.data_ptr()] = t.data
            self.home[id(t)] = t.data = parked

    def fetch(self, parked: Tensor) -> Tensor:
        self.fetched += 1
        return self.real.get(parked.data_ptr(), parked).clone()

    @property
    def out(self) -> int:
        """Bytes that are away from home."""
        return sum(t.numel() * t.element_size() for t in self.tensors if t.data_ptr() != self.home[id(t)].data_ptr())


def visiting(pipe: Pipeline, how: str) -> tuple[Pipeline, Elsewhere]:
    far = Elsewhere(pipe)
    offload = Offload.of(pipe.bundle.modules(), how, torch.device("cpu"), far.fetch)
    for part in pipe.bundle.modules().values():
        for module in part.modules():
            module.register_forward_pre_hook(lambda *_: setattr(far, "most", max(far.most, far.out)))
    return replace(pipe, offload=offload), far


def sizes(pipe: Pipeline) -> dict[str, int]:
    held = {n: {id(t): t for t in m.state_dict(keep_vars=True).values()} for n, m in pipe.bundle.modules().items()}
    return {n: sum(t.numel() * t.element_size() for t in tensors.values()) for n, tensors in held.items()}


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "sana", "dit"])
def test_no_bit_changes_and_everything_comes_home(name: str, tmp_path: Path) -> None:
    """Weights that are away read NaN: an image without one has asked for all of them in time."""
    folder = str(tiny_families.save(name, tmp_path / "m"))
    prompt = "cock" if name == "dit" else "a fox"
    given = GIVEN | {"negative_prompt": "" if name == "dit" else "red", "sampler": "ddim"}
    given |= {"sampler": "euler", "height": 64, "width": 64} if name in ("sd3", "sana") else {}
    plain = Pipeline.from_pretrained(folder, "cpu", "fp32")(prompt, **given)
    most = {}
    for how in WAYS:
        pipe, far = visiting(Pipeline.from_pretrained(folder, "cpu", "fp32"), how)
        for _ in range(2):
            found = pipe(prompt, **given)
            assert torch.equal(found.latents, plain.latents)
            assert found.images[0].tobytes() == plain.images[0].tobytes()
            assert far.out == 0
        most[how], whole = far.most, sizes(pipe)
    assert max(whole.values()) <= most["model"] < sum(whole.values())  # the largest part alone
    assert most["sequential"] < 0.9 * most["model"]  # SD3's table of positions is one tensor


def test_a_block_is_a_small_share_of_a_large_part() -> None:
    """Twenty-four layers under a root: at most one of them, and what the root itself owns, are away."""

    class Root(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = torch.nn.Parameter(torch.ones(4))
            layers = (torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()) for _ in range(24))
            self.body = torch.nn.Sequential(*layers)  # too large to be a block

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.shift.sum()

    root, seen, fetched = Root(), list[int](), list[int]()
    part = {"network": root}
    offload = Offload.of(part, "sequential", torch.device("cpu"), lambda t: fetched.append(t.numel()) or t.clone())
    for layer in root.body:
        layer[0].register_forward_pre_hook(lambda *_: seen.append(sum(t.numel() for t, _ in offload.away.values())))
    before = {n: t.data_ptr() for n, t in root.state_dict().items()}
    root(torch.zeros(1, 64))
    assert max(seen) == 64 * 65 + 4
    assert max(seen) < sum(t.numel() for t in root.parameters()) / BLOCKS
    assert fetched == [4] + [64 * 64, 64] * 24  # each once
    assert {n: t.data_ptr() for n, t in root.state_dict().items()} == before


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_everything_is_home(tiny: Callable[[str], Path], how: str, error: type[BaseException]) -> None:
    plain = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")
    expected = plain("a fox", **GIVEN).latents
    pipe, far = visiting(plain, how)
    network: Any = pipe.bundle.model.network
    calls = []

    def fail(*_: Any) -> None:
        calls.append(far.out)
        if len(calls) == 2:
            raise error("in the middle")

    handle = network.unet.mid_block.resnets[0].register_forward_pre_hook(fail)
    with pytest.raises(error):
        pipe("a fox", **GIVEN)
    assert calls[1] > 0
    assert far.out == 0
    offload: Any = pipe.offload
    assert not offload.open
    with ThreadPoolExecutor() as others:
        assert others.submit(offload.lock.acquire, blocking=False).result()  # nobody holds it
    object.__setattr__(offload, "lock", threading.RLock())  # that thread is gone with the old one
    if error is RuntimeError:  # outside of a run too
        calls[:] = [0]
        with pytest.raises(error):
            pipe.bundle.model(torch.zeros(1, 4, 8, 8), Level(0.5, 0.5), pipe.bundle.empty(8))
        assert not offload.open
    handle.remove()
    assert torch.equal(pipe("a fox", **GIVEN).latents, expected)
    steps = pipe.steps("a fox", **GIVEN)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert far.out == 0


def test_a_part_stays_until_another_is_used(tiny: Callable[[str], Path]) -> None:
    """Each part once an image, however many steps; block by block, the network comes anew at every step."""
    counts = {}
    for how in WAYS:
        for steps in (2, 4):
            pipe, far = visiting(Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32"), how)
            pipe("a fox", **GIVEN | {"steps": steps, "sampler": "euler"})
            counts[how, steps] = far.fetched
    tensors = len(far.tensors)
    assert counts["model", 2] == counts["model", 4] <= tensors
    network = len(list(pipe.bundle.model.parameters()))
    assert counts["sequential", 4] - counts["sequential", 2] == 2 * network


def test_adapters_go_into_an_offloaded_model(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    plain = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = plain.bundle.model.network.unet.get_submodule(layer).weight.shape[0]  # type: ignore[operator, union-attr]
    held = {f"unet.{layer}.lora_A.weight": torch.randn(2, width), f"unet.{layer}.lora_B.weight": torch.randn(width, 2)}
    save_file(held, tmp_path / "a.safetensors")
    expected = adapted(plain, [str(tmp_path / "a.safetensors")])("a fox", **GIVEN).latents
    assert not torch.equal(expected, plain("a fox", **GIVEN).latents)
    for how in WAYS:
        pipe = plain.to("cpu", "fp32", offload=how)
        assert torch.equal(adapted(pipe, [str(tmp_path / "a.safetensors")])("a fox", **GIVEN).latents, expected)
        assert torch.equal(pipe("a fox", **GIVEN).latents, plain("a fox", **GIVEN).latents)
        plain = pipe.to("cpu", "fp32")
        assert plain.offload is None
        assert not any(m._forward_pre_hooks for m in plain.bundle.model.modules())


def test_the_flag(tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--model", str(tiny("eps")), "-p", "a fox", "--seed", "1", "--device", "cpu", "--dtype", "fp32", "--quiet"]
    for how in ("none", *WAYS):
        assert cli.main([*rest, "-o", str(tmp_path / f"{how}.png"), "--offload", how]) == 0
    from PIL import Image

    assert len({Image.open(p).tobytes() for p in tmp_path.glob("*.png")}) == 1
    assert cli.main([*rest, "--offload", "modle"]) == 2
    assert "did you mean 'model'" in capsys.readouterr().err
    with pytest.raises(UsageError, match="offload"):
        Pipeline.from_pretrained("builtin", offload="both")
