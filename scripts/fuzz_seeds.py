"""Small sound files of every kind that this package reads, for `fuzz_loading.py` to damage."""

from __future__ import annotations

from pathlib import Path

import tiny_controls
import tiny_families
import torch
from fuzz_loading import Seed
from safetensors.torch import save_file
from torch import Tensor

from ldm_pipe import embedding, lora, recipe, replay
from ldm_pipe.loading import Bundle, load
from ldm_pipe.networks.image_prompt import ImageAdapter
from ldm_pipe.networks.timed_prompt import TimedAdapter
from ldm_pipe.offload import modules
from ldm_pipe.settings import Settings

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def tensors(bundle: Bundle) -> dict[str, Tensor]:
    """Every weight of a bundle."""
    return {f"{part} {n}": t for part, m in bundle.modules().items() for n, t in m.state_dict().items()}


def sound(place: Path, families: tuple[str, ...] = ("sd", "dit")) -> list[Seed]:
    """Folders of these families, a LoRA, a learned word, IP-Adapters (for faces and of SD3), a single file and a PNG, below a
    folder."""
    found = []
    torch.manual_seed(0)
    for name in families:
        root = tiny_families.save(name, place / name)
        files = [f for f in root.rglob("*") if f.suffix in (".json", ".safetensors")]
        found.append(Seed(name, root, files, lambda root=root: tensors(load(root))))  # type: ignore[misc]
    bundle = load(place / families[0])
    width = next(len(t) for n, t in bundle.model.state_dict().items() if n.endswith(f"{LAYER}.weight"))
    given = {f"unet.{LAYER}.lora_A.weight": torch.ones(2, width), f"unet.{LAYER}.lora_B.weight": torch.ones(width, 2)}
    files = {name: place / name / f"{name}.safetensors" for name in ("lora", "word", "single", "face", "sd3")}
    for file in files.values():
        file.parent.mkdir()
    save_file(given, files["lora"])
    width = embedding.table(next(modules(bundle.text))).weight.shape[1]
    save_file({"emb_params": torch.ones(1, width)}, files["word"])
    first = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(8, 4, 3, 3), "first_stage_model.x": torch.ones(1)}
    save_file(first | {"cond_stage_model.transformer.x": torch.ones(1)}, files["single"])
    tiny_controls.image_prompt("face", 16, (8, 8, 8, 16))(files["face"].parent)
    save_file(tiny_controls.sd3_tensors(), files["sd3"])
    readers = {
        "lora": lambda: tensors(lora.merge(bundle, files["lora"])[0]),
        "word": lambda: tensors(embedding.learn(bundle, files["word"], "")[0]),
        "single": lambda: _refused(files["single"]),
        "face": lambda: _prompt(files["face"]),
        "sd3": lambda: _prompt(files["sd3"]),
    }
    found += [Seed(name, files[name].parent, [files[name]], read) for name, read in readers.items()]
    picture = place / "png" / "a.png"
    picture.parent.mkdir()
    picture.write_bytes(_png())
    return [*found, Seed("png", picture.parent, [picture], lambda: _recipe(picture))]


def _prompt(file: Path) -> dict[str, Tensor]:
    """Every weight of an IP-Adapter's file."""
    held, _ = lora.read(file)
    if TimedAdapter.knows(held):
        timed = TimedAdapter.of(held, file.name)
        parts = (timed.projection, *timed.beside)
        return {f"{k} {n}": t for k, m in enumerate(parts) for n, t in m.state_dict().items()}
    found = ImageAdapter.of(held, file.name)
    low = {f"{k} {n} {i}": t for k, row in enumerate(found.low) for n, pair in row.items() for i, t in enumerate(pair)}
    pairs = {f"{k} {i}": t for k, row in enumerate(found.weights) for i, t in enumerate(row)}
    return {**found.projection.state_dict(), **low, **pairs}


def _refused(file: Path) -> dict[str, Tensor]:
    """A file of the right names and the wrong sizes: always refused, whatever else is wrong with it."""
    from ldm_pipe.errors import ModelError

    try:
        load(file)
    except ModelError:
        return {}
    raise AssertionError("a file of the wrong sizes was loaded")


def _png() -> bytes:
    from PIL import Image

    made = recipe.Recipe("a fox", 7, steps=2, sampler="ddim", spacing="leading", height=32, width=32)
    return recipe.encode(Image.new("RGB", (8, 8)), made, "PNG")


def _recipe(picture: Path) -> dict[str, Tensor]:
    """What the recipe in a picture says may differ from the sound one: it is data. It must be read or refused."""
    Settings(**replay.settings_of(recipe.read(str(picture))))
    return {}
