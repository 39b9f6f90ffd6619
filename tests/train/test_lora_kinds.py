"""DoRA, LoHa, LoKr and OFT: nothing at first, then what is trained is what our loader, peft and diffusers read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_pipe import ModelError, Pipeline, UsageError, adapted, lora, lora_delta
from train.adapter_files import DIFFUSERS, KOHYA, PEFT
from train.deltas import KINDS, Delta
from train.loop import run
from train.tasks.lora import Lora

LAYERS = ["*attn2.to_k=2/4", "*attn*.to_?", "*resnets.0.conv1=5", "*downsamplers.0.conv", "*conv_shortcut", "*proj_in"]


@pytest.fixture(scope="module")
def photos(pictures: Callable[..., Path]) -> Path:
    return pictures(("an owl on blue", "a fox on red"))


@pytest.fixture
def make(photos: Path, tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Lora]:
    def task(kind: str, **fields: Any) -> Lora:
        plain = [p.partition("=")[0] for p in LAYERS]
        table = {"rank": 4, "layers": plain} if kind == "oft" else {"rank": 3, "alpha": 1.5, "layers": LAYERS}
        data = {"path": str(photos), "cache": str(tmp_path / "cache")}
        return Lora(data, str(tiny("eps")), **{"lora": {"kind": kind, **table, **fields.pop("lora", {})}, **fields})

    return task


@pytest.fixture(scope="module")
def plain(tiny: Callable[[str], Path]) -> Pipeline:
    return Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32", "sdpa")


def said(text: Any) -> Tensor:
    return text(["a fox on red"]).tokens


def taught(task: Lora) -> Any:
    """The net of a task after three steps."""
    net = task.net()
    optimiser = torch.optim.AdamW(net.parameters(), 0.05)
    for step in range(3):
        optimiser.zero_grad()
        net(task.batch(0, range(2 * step, 2 * step + 2)))["loss"].backward()
        optimiser.step()
    return net


def theirs(tiny: Any, kind: str, folder: Path) -> tuple[Tensor, Tensor]:
    """(the network's output, the text's features) of diffusers' pipeline with what diffusers or peft read and merge."""
    from diffusers import StableDiffusionPipeline
    from peft import PeftModel

    pipe = StableDiffusionPipeline.from_pretrained(tiny("eps"), safety_checker=None, local_files_only=True)
    if kind == "dora":
        pipe.load_lora_weights(str(folder), weight_name=DIFFUSERS)
    else:
        for part in ("unet", "text_encoder"):
            whole = PeftModel.from_pretrained(getattr(pipe, part), str(folder / "peft" / part)).merge_and_unload()
            setattr(pipe, part, whole)
    g = torch.Generator().manual_seed(1)
    x, tokens = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 8, 16, generator=g)
    ids = pipe.tokenizer(["a fox on red"], padding="max_length", max_length=8, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.unet(x, torch.tensor([500, 20]), tokens).sample, pipe.text_encoder(ids)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_at_first_then_equal_here_and_elsewhere(
    make: Any, tiny: Any, plain: Pipeline, tmp_path: Path, seen: Any, kind: str
) -> None:
    task = make(kind, train_text=True).grouped(2)
    net = task.net()
    assert torch.equal(seen(task.bundle.model), seen(plain.bundle.model))
    assert torch.equal(said(task.bundle.text), said(plain.bundle.text))
    net(task.batch(0, range(2)))["loss"].backward()
    assert all(n.startswith("branches.") for n, _ in net.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in task.bundle.model.parameters())
    moving = [
        b for b in net.branches.values() if any(float(p.grad.abs().max()) > 0 for p in b.parameters() if p.grad is not None)
    ]
    assert len(moving) == len(net.branches) > 10
    net = taught(task)
    task.export(net, tmp_path)
    before, after = (m.state_dict() for m in (plain.bundle.model, task.bundle.model))
    assert all(torch.equal(before[n], t) for n, t in after.items())
    wanted = seen(task.bundle.model), said(task.bundle.text)
    assert float((wanted[0] - seen(plain.bundle.model)).abs().max()) > 1e-2
    pairs = [str(tmp_path / "peft" / part / PEFT) for part in ("unet", "text_encoder")]
    for files in {"dora": ([tmp_path / DIFFUSERS], [tmp_path / KOHYA]), "oft": (pairs,)}.get(kind, (pairs, [tmp_path / KOHYA])):
        mine = adapted(plain, [str(f) for f in files]).bundle
        assert torch.allclose(seen(mine.model), wanted[0], atol=1e-5)
        assert torch.allclose(said(mine.text), wanted[1], atol=1e-5)
    assert not (tmp_path / KOHYA).exists() or kind != "oft"
    pytest.importorskip("peft")
    for a, b in zip(theirs(tiny, kind, tmp_path), wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_resuming_is_bit_identical(make: Any, job: Any, tmp_path: Path, kind: str) -> None:
    straight = run(make(kind), job(tmp_path / "a"))
    for stop in (3, 0):
        again = run(make(kind), job(tmp_path / "b", stop=stop))
    assert (straight / KOHYA).read_bytes() == (again / KOHYA).read_bytes()
    with pytest.raises(UsageError, match=f"task.lora.kind was '{kind}' when this run began and is 'loha' now"):
        run(make("loha"), job(tmp_path / "b"))


def test_the_shapes_and_scales_of_each_kind() -> None:
    g = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(12, 18, 3)
    kron = Delta("lokr", layer, 4, 2.0)
    assert {n: tuple(t.shape) for n, t in kron.leaves.items()} == {
        "lokr_w1": (3, 3), "lokr_w2": (6, 4, 3, 3),
    }  # fmt: skip
    assert kron.alpha == 4.0  # nothing is scaled where both factors are whole
    low = Delta("lokr", layer, 2, 1.0)
    assert {n: tuple(t.shape) for n, t in low.leaves.items()} == {
        "lokr_w1": (3, 3), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 36),
    }  # fmt: skip
    hada = Delta("loha", layer, 2, 3.0)
    with torch.no_grad():
        for p in hada.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    x, t = torch.randn(1, 12, 5, 5, generator=g), hada.leaves
    delta = 1.5 * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    assert torch.allclose(hada(x), nn.functional.conv2d(x, delta.reshape(layer.weight.shape)), rtol=1e-3, atol=1e-3)
    dora = Delta("dora", layer, 2, 2.0)
    with torch.no_grad():
        dora.leaves["up"].copy_(torch.randn(18, 2, 1, 1, generator=g))
    y = layer(x) + dora(x) - layer.bias[:, None, None]
    moved = layer.weight + (dora.leaves["up"].flatten(1) @ dora.leaves["down"].flatten(1)).reshape(layer.weight.shape)
    length = moved.flatten(1).norm(dim=1) / layer.weight.flatten(1).norm(dim=1)
    wanted = nn.functional.conv2d(x, moved / length[:, None, None, None])
    assert torch.allclose(y, wanted, atol=1e-4)
    y.square().sum().backward()  # the lengths are constants: the gradient is that of the quotient with a fixed divisor
    up = dora.leaves["up"].detach().requires_grad_()
    again = layer.weight.detach() + (up.flatten(1) @ dora.leaves["down"].detach().flatten(1)).reshape(layer.weight.shape)
    nn.functional.conv2d(x, again / length.detach()[:, None, None, None]).square().sum().backward()
    assert torch.allclose(dora.leaves["up"].grad, up.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_small_differences_survive_mixed_precision(kind: str) -> None:
    """The change of the weight is made in fp32: in bf16 it would drown in the weight's own rounding."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 48)
    branch, x = Delta(kind, layer, 4, 4.0), torch.randn(5, 32)
    with torch.no_grad():
        for p in branch.parameters():
            p.add_(1e-3 * torch.randn(p.shape))
        wanted = branch(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = branch(x)
    assert float((mixed - wanted).abs().max() / wanted.abs().max()) < 0.02


def test_a_rotation_keeps_lengths_and_angles_and_its_negative_is_the_way_back() -> None:
    g = torch.Generator().manual_seed(0)
    weight, leaves = torch.randn(7, 12, generator=g), {"rotation": torch.randn(3, 6, generator=g)}
    new = lora_delta.changed(weight, leaves, 1.0)
    assert torch.allclose(new @ new.T, weight @ weight.T, atol=1e-4)
    assert not torch.allclose(new, weight, atol=0.1)
    assert torch.allclose(lora_delta.changed(new, leaves, -1.0), weight, atol=1e-5)
    assert torch.allclose(lora_delta.changed(weight, leaves, 0.0), weight)
    assert torch.allclose(new[:, :4], lora_delta.changed(weight[:, :4], {"rotation": leaves["rotation"][:1]}, 1.0), atol=1e-5)
    for wrong in ({"rotation": torch.zeros(2, 6)}, {"rotation": torch.zeros(3, 5)}):
        with pytest.raises(ValueError, match="do not fit a weight of 7x12"):
            lora_delta.changed(weight, wrong, 1.0)


def test_lengths_of_inputs_are_those_of_columns() -> None:
    """LyCORIS' dora_scale [1,in] where the lengths are of inputs, [out,1] where they are of outputs; of a square weight too."""
    g = torch.Generator().manual_seed(0)
    weight, down, up = (torch.randn(s, generator=g) for s in ((6, 6), (2, 6), (6, 2)))
    moved, wanted = weight + up @ down, torch.rand(6, generator=g) + 1
    low = {"down": down, "up": up}
    columns = lora_delta.changed(weight, {**low, "dora_scale": wanted[None]}, 1.0)
    assert torch.allclose(columns, moved / moved.norm(dim=0) * wanted, atol=1e-5)
    rows = lora_delta.changed(weight, {**low, "dora_scale": wanted[:, None]}, 1.0)
    assert torch.allclose(rows, moved / moved.norm(dim=1, keepdim=True) * wanted[:, None], atol=1e-5)
    assert torch.equal(rows, lora_delta.changed(weight, {**low, "magnitude": wanted}, 1.0))
    with pytest.raises(ValueError, match="holds 5 magnitudes for 6"):
        lora_delta.changed(weight, {**low, "dora_scale": wanted[None, :5]}, 1.0)


def test_what_a_kind_does_not_take_is_said_in_a_line(make: Any, plain: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"oft takes one rank for every layer, and no alpha"):
        make("oft", lora={"layers": ["*to_q=8"]})
    with pytest.raises(UsageError, match=r"'down_blocks.*to_q': oft turns 8 inputs in blocks of rank 3; .* such as 2, 4, 8"):
        make("oft", lora={"rank": 3, "layers": ["*to_q"]}).net()
    with pytest.raises(UsageError, match="kind"):
        make("lora", lora={"kind": "vera"})
    name, layer = next((n, m) for n, m in lora.parts(plain.bundle)["network"].named_modules() if n.endswith("to_q"))
    file = tmp_path / PEFT
    save_file({f"{lora.PEFT}{name}.oft_R.weight": torch.zeros(layer.in_features // 4, 6)}, file)
    told = {"peft_type": "OFT", "use_cayley_neumann": False}
    for config, words in ((None, "use_cayley_neumann: false"), ({**told, "coft": True}, "and no coft"), (told, "")):
        (tmp_path / lora.CONFIG).unlink(missing_ok=True)
        if config is not None:
            (tmp_path / lora.CONFIG).write_text(json.dumps(config))
        if words:
            with pytest.raises(ModelError, match=words):
                adapted(plain, [str(file)])
        else:
            assert adapted(plain, [str(file)]).bundle.adapters


def test_the_alpha_of_a_folder_of_peft_is_read_from_its_configuration(plain: Pipeline, tmp_path: Path) -> None:
    name, layer = next((n, m) for n, m in lora.parts(plain.bundle)["network"].named_modules() if n.endswith("to_q"))
    down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
    file = tmp_path / PEFT
    save_file({f"{lora.PEFT}{name}.lora_A.weight": down, f"{lora.PEFT}{name}.lora_B.weight": up}, file)
    for alpha, config in ((2.0, None), (6.0, {"r": 2, "lora_alpha": 6}), (5.0, {"lora_alpha": 6, "alpha_pattern": {name: 5}})):
        if config is not None:
            (tmp_path / lora.CONFIG).write_text(json.dumps(config))
        mine: Any = lora.parts(adapted(plain, [str(file)]).bundle)["network"].get_submodule(name)
        assert torch.allclose(mine.weight, layer.weight + alpha / 2 * up @ down, atol=1e-5)
