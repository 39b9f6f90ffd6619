"""A trained model as a folder again: the old folder's files, the new weights, and digests that `load` compares."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_pipe import files, loading
from ldm_pipe.errors import UsageError
from ldm_pipe.loading import SUMS
from ldm_pipe.parts import WEIGHTS, read_json


def copy(source: Path, folder: Path, without: Sequence[str]) -> None:
    """Copy a model's folder, all but the weights of the parts named in `without` and the digests."""

    def skip(place: str, names: list[str]) -> set[str]:
        weights = {n for n in names if Path(place).name in without and n.endswith((".safetensors", ".bin", ".index.json"))}
        return weights | {n for n in names if n == SUMS or n.startswith(".")}

    shutil.copytree(source, folder, ignore=skip, dirs_exist_ok=True)


def rebuilt(source: Path, folder: Path, part: str, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Copy a model with another network: `change` alters its configuration and its weights, by name. Raises UsageError where
    they are not in one file, ModelError where the model does not load. The digests are left to be written."""
    file = Path(part) / WEIGHTS["diffusers"]
    if not (source / file).is_file():
        raise UsageError(f"a model is widened whose weights are in one file, {file.as_posix()}")
    loading.load(source)  # its digests too, which the copy's own will stand for
    copy(source, folder, [part])
    config = json.loads((source / part / "config.json").read_text(encoding="utf-8"))
    state = load_file(source / file)
    change(config, state)
    (folder / part / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(state, folder / file, metadata={"format": "pt"})


def write_part(source: Path, folder: Path, part: str, module: Any, renamed: Callable[[str], str | None] = str) -> None:
    """Write the weights of one part: by its own library, or (a light network) under the names of the file they came from."""
    if hasattr(module, "save_pretrained"):
        module.save_pretrained(folder / part)
        return
    state = module.state_dict()
    file = WEIGHTS["transformers" if part.startswith("text_encoder") else "diffusers"]
    with safe_open(source / part / file, framework="pt") as old:
        names = {n: renamed(n) for n in old.keys()}  # noqa: SIM118  (it is no mapping)
        kept = {n: state[own].detach().cpu().contiguous() if own else old.get_tensor(n) for n, own in names.items()}
    (folder / part).mkdir(exist_ok=True)
    save_file(kept, folder / part / file, metadata={"format": "pt"})


def add_words(folder: Path, captions: Sequence[str]) -> None:
    """Where a model lists the words it knows, add those that it was now taught."""
    from ldm_pipe.prompt import plain_words

    path = folder / "ldm_pipe.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if settings.get("words"):
        settings["words"] = sorted({*settings["words"], *(w for c in captions for w in plain_words(c))})
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def write_sums(folder: Path) -> None:
    """SHA256SUMS of every weight file."""
    found = sorted(folder.rglob("*.safetensors"))
    lines = [f"{files.sha256(f)}  {f.relative_to(folder).as_posix()}\n" for f in found]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def shape_of(source: Path) -> tuple[int, int]:
    """(side in pixels that a model is made for, what a side must be a multiple of), from its configuration alone."""
    vae, network = (read_json(source / part / "config.json") for part in ("vae", network_part(source)))
    factor = 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1)
    unit = 2 ** (len(network["block_out_channels"]) - 1) if "block_out_channels" in network else network.get("patch_size", 2)
    defaults = read_json(source / "ldm_pipe.json") if (source / "ldm_pipe.json").exists() else {}
    size = network.get("sample_size", 64)
    own = int(size if isinstance(size, int) else min(size)) * factor
    return min(defaults.get("size", [own])), factor * unit


def network_part(source: Path) -> str:
    """The folder of a model's network."""
    return "unet" if (source / "unet").is_dir() else "transformer"
