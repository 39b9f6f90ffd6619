"""`train merge`: the folder is the stacked run, in every family that has adapters, and says what it was made of."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldm_pipe import Pipeline, adapted, files, load, lora
from train.__main__ import main

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
tiny_families = importlib.import_module("tiny_families")
HEADS = {"network": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


@pytest.fixture
def made(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[[str], tuple[Path, list[Path]]]:
    def model(name: str) -> tuple[Path, list[Path]]:
        """(a model's folder, two adapters: of every third layer, and of the network's attention alone)."""
        folder = tiny("eps") if name == "tiny" else tiny_families.save(name, tmp_path / "model")
        bundle, found = load(folder), []
        for k, (every, part_names) in enumerate(((3, list(HEADS)), (1, ["network"]))):
            g, tensors = torch.Generator().manual_seed(k), {}
            for part in part_names:
                layers = {n: m for n, m in lora.parts(bundle).get(part, nn.Module()).named_modules()
                          if isinstance(m, nn.Linear | nn.Conv2d) and (every == 3 or n.endswith("to_k"))}  # fmt: skip
                for name, layer in list(layers.items())[::every]:
                    stem = HEADS[part] + name.replace(".", "_")
                    ones = (1, 1) if layer.weight.ndim == 4 else ()
                    tensors[f"{stem}.lora_down.weight"] = 0.3 * torch.randn(2, *layer.weight.shape[1:], generator=g)
                    tensors[f"{stem}.lora_up.weight"] = 0.3 * torch.randn(len(layer.weight), 2, *ones, generator=g)
                    tensors[f"{stem}.alpha"] = torch.tensor(1.0)
            found.append(tmp_path / f"{k}.safetensors")
            save_file(tensors, found[-1])
        return folder, found

    return model


@pytest.mark.parametrize("name", ["tiny", "sdxl", "flux dev"])
def test_the_folder_is_the_stacked_run(made: Any, tmp_path: Path, name: str, capsys: Any) -> None:
    folder, (a, b) = made(name)
    texts = [f"{a}:0.7", f"{b}:-0.4"]
    assert main(["merge", "--model", str(folder), "--lora", texts[0], "--lora", texts[1], "-o", str(tmp_path / "new")]) == 0
    assert "tensors matched" in capsys.readouterr().err
    stacked = adapted(Pipeline.from_pretrained(str(folder), "cpu", "fp32", "sdpa"), texts)
    merged, plain = load(tmp_path / "new"), load(folder)
    moved = set()
    for part, module in lora.parts(merged).items():
        wanted, before = (lora.parts(bundle)[part].state_dict() for bundle in (stacked.bundle, plain))
        for n, t in module.state_dict().items():
            assert torch.allclose(t, wanted[n], atol=1e-6), n
            moved |= set() if torch.equal(t, before[n]) else {part}
    assert moved == set(lora.parts(plain)) & set(HEADS)
    kept = [p.relative_to(folder) for p in (folder / "vae").rglob("*") if p.is_file()]
    assert kept
    assert all((tmp_path / "new" / p).read_bytes() == (folder / p).read_bytes() for p in kept)
    told = json.loads((tmp_path / "new" / "merged.json").read_text())
    assert [(r["name"], r["scale"], r["sha256"]) for r in told["adapters"]] == [
        ("0.safetensors", 0.7, files.sha256(a)), ("1.safetensors", -0.4, files.sha256(b)),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["tiny", "sdxl", "flux dev"])
def test_one_file_is_the_stacked_run(made: Any, tmp_path: Path, name: str) -> None:
    """Ranks beside each other; of the layers of a third file of another kind the whole difference."""
    folder, (a, b) = made(name)
    pipe = Pipeline.from_pretrained(str(folder), "cpu", "fp32", "sdpa")
    layer, module = next((n, m) for n, m in lora.parts(pipe.bundle)["network"].named_modules() if n.endswith("to_k"))
    whole = {f"lora_unet_{layer.replace('.', '_')}.diff": torch.ones_like(module.weight)}
    save_file(whole, tmp_path / "c.safetensors")
    for k, texts in enumerate(([f"{a}:0.7", f"{b}:-0.4"], [f"{a}:0.7", f"{tmp_path / 'c.safetensors'}:0.1", f"{b}:-0.4"])):
        file = tmp_path / f"one{k}.safetensors"
        words = [w for text in texts for w in ("--lora", text)]
        assert main(["merge", "--model", str(folder), *words, "-o", str(file)]) == 0
        held = load_file(file)
        assert sum(n.endswith(".diff") for n in held) == k
        assert all(n.endswith((".diff", ".lora_A.weight", ".lora_B.weight")) for n in held)
        mine, wanted = adapted(pipe, [str(file)]).bundle, adapted(pipe, texts).bundle
        for part, new in lora.parts(mine).items():
            state = lora.parts(wanted)[part].state_dict()
            assert all(torch.allclose(t, state[n], atol=1e-6) for n, t in new.state_dict().items())


def test_one_file_of_several_loads_in_diffusers(made: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    folder, (a, b) = made("tiny")
    assert (
        main(["merge", "--model", str(folder), "--lora", f"{a}:0.7", "--lora", str(b), "-o", str(tmp_path / "one.safetensors")])
        == 0
    )
    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    theirs.load_lora_weights(str(tmp_path), weight_name="one.safetensors")
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    pipe = Pipeline.from_pretrained(str(folder), "cpu", "fp32", "sdpa")
    wanted = lora.parts(adapted(pipe, [f"{a}:0.7", str(b)]).bundle)
    for part, module in (("network", theirs.unet), ("text_encoder", theirs.text_encoder)):
        state = {n.removeprefix("text_model."): t for n, t in module.state_dict().items()}
        found = dict(wanted[part].named_modules())
        pairs = [(m.weight, state[f"{n}.weight"]) for n, m in found.items() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert len(pairs) > 5
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in pairs)


def test_only_what_changes_is_written_anew_and_halves_are_halves(made: Any, tmp_path: Path) -> None:
    folder, (_, network_only) = made("tiny")
    words = ["merge", "--model", str(folder), "--lora", str(network_only), "--dtype", "fp16", "-o", str(tmp_path / "new")]
    assert main(words) == 0
    unet, text = Path("unet/diffusion_pytorch_model.safetensors"), Path("text_encoder/model.safetensors")
    assert {t.dtype for t in load_file(tmp_path / "new" / unet).values()} == {torch.float16}
    assert (tmp_path / "new" / text).read_bytes() == (folder / text).read_bytes()


def test_what_does_not_go_is_one_line_and_leaves_nothing(made: Any, tmp_path: Path, capsys: Any) -> None:
    folder, (file, _) = made("tiny")
    save_file({"lora_unet_nowhere.lora_up.weight": torch.zeros(8, 2)}, tmp_path / "wrong.safetensors")
    new = tmp_path / "new"
    for model, given, said in (
        (folder, [], "one --lora FILE:scale or more"),
        (file, [str(file)], "a folder in diffusers' layout"),
        (folder, [str(file), str(tmp_path / "wrong.safetensors")], "find no layer"),
        (folder, [f"{file}:x"], "takes a finite number"),
    ):
        assert main(["merge", "--model", str(model), *[w for g in given for w in ("--lora", g)], "-o", str(new)]) in (2, 3)
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1
        assert not new.exists()
    new.mkdir()
    assert main(["merge", "--model", str(folder), "--lora", str(file), "-o", str(new)]) != 0
    assert not list(new.iterdir())
