"""LoRA training: nothing changes at step 0, only branches learn, the export loads here and in diffusers with equal output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm_pipe import Pipeline, UsageError, adapted, load
from train.__main__ import main
from train.adapter_files import DIFFUSERS as PEFT
from train.adapter_files import KOHYA
from train.adapting import Shape
from train.loop import run
from train.tasks.lora import Lora

MIXED = {
    "rank": 3,
    "alpha": 1.5,
    "layers": ["*attn2.to_k=2/4", "*attn*.to_?", "*resnets.0.conv1=5", "*downsamplers.0.conv", "*proj_in"],
}


@pytest.fixture(scope="module")
def photos(pictures: Callable[..., Path]) -> Path:
    return pictures(("an owl on blue", "a fox on red"))


@pytest.fixture
def make(photos: Path, tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Lora]:
    def task(**fields: Any) -> Lora:
        table = {"path": str(photos), "cache": str(tmp_path / "cache"), **fields.pop("data", {})}
        return Lora(table, str(tiny("eps")), **{"lora": MIXED, **fields})

    return task


def said(text: Any) -> Tensor:
    return text(["a fox on red"]).tokens


def test_step_0_changes_no_bit_and_only_branches_have_gradients(make: Any, tiny: Any, seen: Any) -> None:
    task = make(train_text=True).grouped(2)
    plain = load(tiny("eps"))
    net = task.net()
    assert torch.equal(seen(task.bundle.model), seen(plain.model))
    assert torch.equal(said(task.bundle.text), said(plain.text))
    net(task.batch(0, range(2)))["loss"].backward()
    assert all(n.startswith("branches.") and p.grad is not None for n, p in net.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in task.bundle.model.parameters())
    ups = [(n, p) for n, p in net.named_parameters() if n.endswith("up")]
    assert all(float(p.grad.abs().max()) > 0 for _, p in ups)
    assert any("text_encoder" in n for n, _ in ups)
    shapes = {n.split("-", 1)[1]: tuple(b.down.shape) for n, b in net.branches.items()}
    assert shapes["down_blocks-0-attentions-0-transformer_blocks-0-attn2-to_k"] == (2, 16)
    assert shapes["down_blocks-0-attentions-0-transformer_blocks-0-attn1-to_k"] == (3, 8)
    assert shapes["down_blocks-0-resnets-0-conv1"] == (5, 8, 3, 3)
    assert not any("conv2" in n for n in shapes)


def test_the_export_is_what_was_trained_in_both_layouts(make: Any, tiny: Any, tmp_path: Path, seen: Any) -> None:
    task, folder = make(train_text=True).grouped(2), tmp_path
    net, plain = task.net(), Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32", "sdpa")
    optimiser = torch.optim.AdamW(net.parameters(), 0.1)
    for step in range(3):
        net(task.batch(0, range(2 * step, 2 * step + 2)))["loss"].backward()
        optimiser.step()
    task.export(net, folder)
    before, after = (m.state_dict() for m in (plain.bundle.model, task.bundle.model))
    assert all(torch.equal(before[n], t) for n, t in after.items())
    for name in (PEFT, KOHYA):
        mine = adapted(plain, [str(folder / name)])
        assert torch.allclose(seen(mine.bundle.model), seen(task.bundle.model), atol=1e-5)
        assert torch.allclose(said(mine.bundle.text), said(task.bundle.text), atol=1e-5)
        assert not torch.allclose(seen(mine.bundle.model), seen(plain.bundle.model), atol=1e-3)
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    for name in (PEFT, KOHYA):
        other = StableDiffusionPipeline.from_pretrained(tiny("eps"), safety_checker=None, local_files_only=True)
        other.load_lora_weights(str(folder), weight_name=name)
        g = torch.Generator().manual_seed(1)
        x, tokens = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 8, 16, generator=g)
        with torch.no_grad():
            out = other.unet(x, torch.tensor([500, 20]), tokens).sample
        assert torch.allclose(out, seen(task.bundle.model), atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"train_text": True, "log_variance": True}])
def test_resuming_is_bit_identical_and_checkpoints_hold_branches_alone(
    make: Any, tmp_path: Path, more: dict[str, Any], job: Any
) -> None:
    straight = run(make(**more), job(tmp_path / "a"))
    for stop in (1, 3, 0):
        again = run(make(**more), job(tmp_path / "b", stop=stop))
    assert (straight / PEFT).read_bytes() == (again / PEFT).read_bytes()
    held = load_file(next((tmp_path / "a").glob("step-*")) / "weights.safetensors")
    assert all(n.startswith(("branches.", "uncertainty.")) for n in held)
    with pytest.raises(UsageError, match=r"task.lora.rank was 3 when this run began and is 4 now"):
        run(make(**more, lora={**MIXED, "rank": 4}), job(tmp_path / "b"))
    with pytest.raises(UsageError, match=r"step-\d+ is of another network: size mismatch .* give another job.output"):
        run(make(**more, lora={**MIXED, "rank": 4}), job(tmp_path / "b"), allow_changed=True)


def test_it_learns_and_checkpointed_blocks_learn_the_same(make: Any, tmp_path: Path) -> None:
    grads = []
    for on in (False, True):
        torch.manual_seed(0)
        task = make(gradient_checkpointing=on).grouped(2)
        net = task.net()
        net(task.batch(0, range(2)))["loss"].backward()
        grads.append([p.grad for n, p in net.named_parameters() if n.endswith("up")])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    task = make(lora={"rank": 16, "layers": ["*"]})
    net = task.net()
    batch, optimiser = task.batch(0, range(4)), torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        losses.append(net(batch)["loss"])
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]


def test_the_network_alone_or_twice(make: Any, seen: Any) -> None:
    """A second net of one task takes the place of the first."""
    task = make()
    first, second = task.net(), task.net()
    plain = seen(task.bundle.model)
    with torch.no_grad():
        for p in first.parameters():
            p.fill_(1.0)
    assert torch.equal(seen(task.bundle.model), plain)
    with torch.no_grad():
        for p in second.parameters():
            p.fill_(1.0)
    assert not torch.equal(seen(task.bundle.model), plain)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"rank": 0}, "lora.rank is 0"),
        ({"layers": ["*to_q=many"]}, "PATTERN=RANK"),
        ({"layers": ["*to_q=4/-1"]}, "numbers above 0"),
        ({"layerz": []}, "did you mean 'layers'"),
    ],
)
def test_a_wrong_table_is_said_in_a_line(make: Any, table: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make(lora=table)


def test_a_pattern_that_matches_nothing_is_named(make: Any) -> None:
    with pytest.raises(UsageError, match=r"'\*nowhere' matches no layer of UNet"):
        make(lora={"layers": ["*nowhere"]}).net()
    with pytest.raises(UsageError, match="goes with the task finetune"):
        make(repa={"encoder": "x", "site": "y"}).net()
    assert Shape().alpha == 0


def test_the_recipe_runs_from_the_command_line(photos: Path, tiny: Any, tmp_path: Path, capsys: Any) -> None:
    words = ["--config", "configs/lora.toml", "--set", f"data.path={photos}", "--set", f"task.model={tiny('v')}"]
    words += ["--set", f"data.cache={tmp_path / 'cache'}", "--set", f"job.output={tmp_path / 'run'}"]
    words += ["--set", "job.steps=2", "--set", "job.batch=2"]
    assert main(["check", *words]) == 0
    assert main(words) == 0
    pipe = Pipeline.from_pretrained(str(tiny("v")), "cpu", "fp32")
    assert adapted(pipe, [str(tmp_path / "run" / "export" / KOHYA)])("a fox", seed=1, steps=2).images
    assert "lora" in (tmp_path / "run" / "export" / "README.md").read_text()
