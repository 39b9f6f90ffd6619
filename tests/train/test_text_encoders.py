"""Text encoders that learn along, and prompts encoded at every step: every family, one CLIP or several."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm_pipe import EPS, VP, Cond, Model, Pipeline, UsageError, adapted, load, lora
from train import scale, text_encoders
from train.adapter_files import DIFFUSERS, KOHYA, PEFT
from train.loop import run
from train.objectives.denoiser import DenoiserLoss
from train.objectives.objective import Objective
from train.tasks.dreambooth import Dreambooth
from train.tasks.finetune import Finetune
from train.tasks.lora import Lora

FAMILIES = ["sd", "unclip", "sdxl", "sdxl refiner", "sd3", "sd3 without T5", "flux dev", "pixart alpha", "sana", "dit"]
CLIPS = {  # what learns of each, by folder
    "sdxl": ["text_encoder", "text_encoder_2"], "sdxl refiner": ["text_encoder_2"], "sd3": ["text_encoder", "text_encoder_2"],
    "flux dev": ["text_encoder"],
}  # fmt: skip
PROMPT = "a fox on red"


@pytest.fixture
def table(pictures: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def data(*captions: str, **changes: Any) -> dict[str, Any]:
        plain = {"path": str(pictures(captions or ("a fox, red", PROMPT))), "cache": str(tmp_path / "cache"), "side": 16}
        return {**plain, "buckets": False, "half": False, **changes}

    return data


def same(one: Any, two: Any) -> bool:
    pairs = [(getattr(one, n), getattr(two, n)) for n in ("tokens", "pooled")]
    return all(a is b or torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def taught(task: Any, steps: int = 3) -> Any:
    net = task.net()
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 0.05)
    for step in range(steps):
        net(task.batch(0, range(2 * step, 2 * step + 2)))["loss"].backward()
        optimiser.step()
    return net


@pytest.mark.parametrize("name", FAMILIES)
def test_live_and_cached_texts_are_the_same(saved: Any, table: Any, name: str) -> None:
    """One batch's loss, from cached features, from shuffled captions of one part, and without a cache."""
    data = table(*(("cock",) if name == "dit" else (PROMPT, "a cat")), dropout=0.5)
    losses = []
    for changes in ({}, {"shuffle": True}, {"cache": ""}):
        task = Finetune({**data, **changes}, str(saved(name))).grouped(4)
        torch.manual_seed(0)
        net, batch = task.net(), task.batch(0, range(4))
        assert any(n.startswith("ids_") for n in batch) == bool(changes)
        losses.append(float(net(batch)["loss"].detach()))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-4)


def test_shuffled_captions_are_read_in_their_new_order(saved: Any, table: Any) -> None:
    task = Finetune(table("a fox, red, blue", shuffle=True, dropout=0.0, cache=""), str(saved("sdxl"))).grouped(4)
    rows = {tuple(row) for k in range(5) for row in task.batch(0, range(4 * k, 4 * k + 4))["ids_clip_1"].tolist()}
    said = task.bundle.text.ids(["a fox, red, blue", "red, blue, a fox", "blue, a fox, red"])["clip_1"].tolist()
    assert {tuple(row) for row in said} <= rows


@pytest.mark.parametrize("name", CLIPS)
def test_branches_of_every_clip_come_back_as_they_were_trained(saved: Any, table: Any, tmp_path: Path, name: str) -> None:
    """Both files, here and in diffusers, say what the trained model says of a prompt, and draw what it draws."""
    layers = ("transformer_blocks.*attn.to_?",) if name == "flux dev" else ("*attn*.to_q",)
    shape = {"rank": 2, "alpha": 1.0, "layers": layers, "text_layers": ("*self_attn.*_proj=3/1", "*mlp.fc?=3/1")}
    task = Lora(table(shuffle=True), str(saved(name)), train_text=True, lora=shape).grouped(2)
    plain = Pipeline.from_pretrained(str(saved(name)), "cpu", "fp32", "sdpa")
    net = task.net()
    assert same(task.bundle.text([PROMPT]), plain.bundle.text([PROMPT]))
    assert torch.equal(task.bundle.text([PROMPT]).pooled, plain.bundle.text([PROMPT]).pooled)
    net = taught(task)
    assert all(float(p.grad.abs().max()) > 0 for p in net.parameters())  # nothing learns that no prompt reaches
    parts = {n.partition("-")[0] for n in net.branches}
    assert parts == {"network", *CLIPS[name]}
    task.export(net, tmp_path)
    wanted = task.bundle.text([PROMPT])
    assert not torch.allclose(wanted.pooled, plain.bundle.text([PROMPT]).pooled, atol=1e-3)
    drawn = Pipeline(task.bundle)(PROMPT, seed=0, steps=1, width=16, height=16).latents
    for file in (KOHYA, DIFFUSERS):
        mine = adapted(plain, [str(tmp_path / file)])
        assert same(mine.bundle.text([PROMPT]), wanted), file
        assert torch.allclose(mine(PROMPT, seed=0, steps=1, width=16, height=16).latents, drawn, atol=1e-4), file
    heads = {n.split(".")[0].split("_text_model")[0] for n in load_file(tmp_path / KOHYA)}
    numbers = {f"lora_te{n.removeprefix('text_encoder').removeprefix('_') or '1'}" for n in CLIPS[name]}
    assert {h for h in heads if "lora_te" in h} == numbers


ENCODED: dict[str, Callable[[Any], Any]] = {
    "sdxl": lambda pipe: pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)[::2],
    "sdxl refiner": lambda pipe: pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)[::2],
    "sd3": lambda pipe: pipe.encode_prompt(PROMPT, PROMPT, PROMPT, do_classifier_free_guidance=False)[::2],
    "flux dev": lambda pipe: pipe.encode_prompt(PROMPT, PROMPT)[:2],
}


@pytest.mark.parametrize("name", ENCODED)
def test_diffusers_reads_the_branches_of_every_clip(saved: Any, table: Any, tmp_path: Path, name: str) -> None:
    pytest.importorskip("peft")
    from diffusers import DiffusionPipeline

    shape = {"rank": 2, "alpha": 1.0, "text_layers": ("*self_attn.*_proj=3/1",)}
    task = Lora(table(), str(saved(name)), train_text=True, train_network=False, lora=shape).grouped(2)
    task.export(taught(task), tmp_path)
    wanted = task.bundle.text([PROMPT])
    for file in (DIFFUSERS, *([] if name == "sd3" else [KOHYA])):  # its reader of SD3 knows no kohya
        theirs = DiffusionPipeline.from_pretrained(saved(name), local_files_only=True)
        with torch.no_grad():
            before = ENCODED[name](theirs)[1]
            theirs.load_lora_weights(str(tmp_path), weight_name=file)
            tokens, pooled = ENCODED[name](theirs)
        assert torch.allclose(wanted.tokens, tokens, atol=1e-5), file
        assert torch.allclose(wanted.pooled, pooled, atol=1e-5), file
        assert not torch.allclose(before, pooled, atol=1e-3), file


@pytest.mark.parametrize("kind", ["dora", "loha", "oft"])
def test_the_other_kinds_come_back_too(saved: Any, table: Any, tmp_path: Path, kind: str) -> None:
    """One file of kohya's layout, or a folder of peft for each part, told apart by the folders' names."""
    shape = {"kind": kind, "rank": 2, "layers": ("*attn*.to_q",)}
    task = Lora(table(), str(saved("sdxl")), train_text=True, lora=shape).grouped(2)
    task.export(taught(task), tmp_path)
    plain, wanted = Pipeline.from_pretrained(str(saved("sdxl")), "cpu", "fp32", "sdpa"), task.bundle.text([PROMPT])
    folders = [str(tmp_path / "peft" / part / PEFT) for part in ("text_encoder_2", "unet", "text_encoder")]
    files = {"dora": [[KOHYA], [DIFFUSERS]], "loha": [[KOHYA], folders], "oft": [folders]}[kind]
    for several in files:
        mine = adapted(plain, [str(tmp_path / file) for file in several])
        assert same(mine.bundle.text([PROMPT]), wanted)
    assert not same(plain.bundle.text([PROMPT]), wanted)


def test_all_weights_of_both_clips_learn_and_resume_to_the_bit(saved: Any, table: Any, tmp_path: Path, job: Any) -> None:
    def task() -> Finetune:
        return Finetune(table_, str(saved("sdxl")), train_text=True, train_network=False)

    table_ = table(shuffle=True)
    straight = run(task(), job(tmp_path / "a"))
    for stop in (1, 3, 0):
        again = run(task(), job(tmp_path / "b", stop=stop))
    old, new = load(saved("sdxl")), load(straight)
    for part, module in lora.encoders(new).items():
        name = f"{part}/model.safetensors"
        assert (straight / name).read_bytes() == (again / name).read_bytes()
        before = lora.encoders(old)[part].state_dict()
        still = {n for n, t in module.state_dict().items() if torch.equal(t, before[n])}
        unreached = {n for n in before if n.startswith(("encoder.layers.2", "final_layer_norm"))}
        assert still - {"embeddings.token_embedding.weight"} == (unreached if part == "text_encoder" else set())
    assert all(torch.equal(a, b) for a, b in zip(new.model.parameters(), old.model.parameters(), strict=True))
    assert not same(new.text([PROMPT]), old.text([PROMPT]))


def test_the_branches_of_both_clips_resume_to_the_bit(saved: Any, table: Any, tmp_path: Path, job: Any) -> None:
    def task() -> Dreambooth:
        return Dreambooth(table_, str(saved("sdxl")), train_text=True, lora={"rank": 2}, instance="a red fox", prior="")

    table_ = table()
    straight = run(task(), job(tmp_path / "a"))
    for stop in (3, 0):
        again = run(task(), job(tmp_path / "b", stop=stop))
    assert (straight / DIFFUSERS).read_bytes() == (again / DIFFUSERS).read_bytes()
    held = load_file(next((tmp_path / "a").glob("step-*")) / "weights.safetensors")
    assert {n.split("-")[0] for n in held} == {f"branches.{p}" for p in ("network", "text_encoder", "text_encoder_2")}
    rows = [json.loads(line)["loss"] for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 4


class Wide(torch.nn.Conv2d):
    """A network of one layer that minds its tokens."""

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:  # type: ignore[override]
        return super().forward(x) + cond.tokens.mean((1, 2))[:, None, None, None]


def test_a_compiled_loss_is_the_same(saved: Any) -> None:
    """Through the text encoder and the objective; gradients reach the encoder."""
    text = load(saved("sd")).text
    bundle = SimpleNamespace(model=Model(Wide(4, 4, 1), VP.linear(), EPS), codec=None, text=text)
    net = DenoiserLoss(bundle, Objective(), {"text_encoder": text.encoder.requires_grad_(True)})
    draws = {n: torch.randn(2, *shape) for n, shape in (("x0", (4, 8, 8)), ("noise", (4, 8, 8)), ("normal", ()))}
    batch = draws | {"ids_clip": text.ids([PROMPT, ""])["clip"]}
    wanted = net(batch)["loss"]
    found = scale.compiled(net, "eager")(batch)["loss"]
    assert torch.allclose(found, wanted)
    found.backward()
    assert all(p.grad is not None for p in net.text.parameters())


@pytest.mark.parametrize("name", ["sd3", "flux dev"])
def test_t5_stays_as_it_is(saved: Any, table: Any, tmp_path: Path, job: Any, name: str) -> None:
    folder = run(Finetune(table(), str(saved(name)), train_text=True), job(tmp_path / "run", steps=2))
    old, new = (lora.encoders(load(f)) for f in (saved(name), folder))
    states = {n: [e[n].state_dict() for e in (old, new)] for n in new}
    moved = {n for n, (a, b) in states.items() if any(not torch.equal(a[k], b[k]) for k in a)}
    assert moved == set(CLIPS[name])
    assert Pipeline(load(folder))(PROMPT, seed=0, steps=1, width=16, height=16).images


def test_what_no_prompt_reaches_is_told_from_the_graph(saved: Any, table: Any) -> None:
    """SDXL's first CLIP gives its states before the last layer; of Flux's the pooled vector is used, behind all layers."""
    for name in CLIPS:
        bundle = load(saved(name))
        flags = [p.requires_grad for m in bundle.modules().values() for p in m.parameters()]
        used = text_encoders.reached(bundle)
        assert flags == [p.requires_grad for m in bundle.modules().values() for p in m.parameters()]
        left = {n for m in text_encoders.clips(bundle).values() for n, p in m.named_parameters() if id(p) not in used}
        assert bool(left) == (name == "sdxl")
        cond: Tensor = bundle.text.encode(bundle.text.ids([PROMPT])).pooled
        assert not cond.requires_grad
    task = Finetune(table(), str(saved("sdxl")), train_text=True).grouped(2)
    net = task.net()
    net(task.batch(0, range(2)))["loss"].backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())  # else two processes wait for each other


def test_patterns_that_name_only_what_is_not_reached_are_refused(saved: Any, table: Any) -> None:
    shape = {"text_layers": ("*layers.2.self_attn.q_proj",)}
    task = Lora(table(), str(saved("sdxl")), train_text=True, train_network=False, lora=shape)
    assert {n.partition("-")[0] for n in task.net().branches} == {"text_encoder_2"}
    with pytest.raises(UsageError, match="matches no layer"):
        Lora(table(), str(saved("sdxl")), train_text=True, lora={"text_layers": ("*nowhere",)}).net()
