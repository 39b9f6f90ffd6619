"""Hostile and broken files: no code of theirs runs, nothing is loaded silently, everything is refused in one short sentence."""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from ldm_pipe import load, weights
from ldm_pipe.errors import LdmError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
tiny_families = importlib.import_module("tiny_families")
NETWORK = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.save("dit", tmp_path_factory.mktemp("whole") / "m")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "m"))


def refused(source: Path, words: str = "") -> None:
    """One sentence, soon."""
    started = time.perf_counter()
    with pytest.raises(LdmError, match=words) as caught:
        load(source)
    assert time.perf_counter() - started < 5
    assert len(str(caught.value)) <= 260
    assert "\n" not in str(caught.value)


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def disguises(mark: Path) -> dict[str, bytes]:
    """Pickles, and archives that hold one."""
    found = {f"protocol {p}": pickle.dumps(Bomb(mark), protocol=p) for p in range(6)}
    inner = found["protocol 2"]
    for name, kind in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", kind) as archive:
            archive.writestr("archive/data.pkl", inner)
            archive.writestr("archive/version", "3")
        found[f"zip {name}"] = data.getvalue()
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("model/archive.zip", found["zip stored"])
    found["zip in zip"] = data.getvalue()
    found["zip, bad sum"] = found["zip stored"].replace(inner[-8:], b"\0" * 8, 1)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        info = tarfile.TarInfo("pickle")
        info.size = len(inner)
        tar.addfile(info, io.BytesIO(inner))
    found["tar"] = data.getvalue()
    found["7z"] = b"7z\xbc\xaf\x27\x1c" + inner
    found["a header, then a pickle"] = save({"x": torch.zeros(1)}) + inner
    return found


@pytest.mark.parametrize("place", ["single.safetensors", "single.ckpt", "single.pt", "single.pt2", NETWORK, "bin"])
def test_no_disguise_of_a_pickle_is_opened(copy: Path, tmp_path: Path, place: str) -> None:
    """78 files: as a single file of four names, as a network's weights, and beside them as what others would read instead."""
    mark = tmp_path / "mark"
    for data in disguises(mark).values():
        if place == "bin":
            (copy / NETWORK).unlink(missing_ok=True)
            (copy / "transformer" / "diffusion_pytorch_model.bin").write_bytes(data)
            source = copy
        else:
            file = copy / place if place == NETWORK else tmp_path / place
            file.write_bytes(data)
            source = copy if place == NETWORK else file
        refused(source)
    assert not mark.exists()


def bomb(text: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
HEADERS: dict[str, bytes] = {
    "nothing": b"",
    "a length alone": bomb(b""),
    "2^63": bomb(b"{}", 2**63),
    "2^64 - 1": bomb(b"{}", 2**64 - 1),
    "longer than the file": bomb(b"{}", 1000),
    "17 MB": bomb(b" " * 17_000_000),
    "deep": bomb(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "twice": bomb(f'{{"a": {ENTRY}, "a": {ENTRY}}}'.encode(), None, b"\0" * 4),
    "a long name": bomb(json.dumps({"a" * 1000: json.loads(ENTRY)}).encode(), None, b"\0" * 4),
    "many": bomb(("{" + ",".join(f'"{i}": {ENTRY}' for i in range(20_001)) + "}").encode(), None, b"\0" * 4),
    "a list": bomb(b"[1]"),
    "a number": bomb(b"12"),
    "not JSON": bomb(b"{]"),
    "not text": bomb(b"\xff\xfe{}"),
    "no shape": bomb(b'{"a": {"dtype": "F32"}}'),
    "a shape of text": bomb(b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}', None, b"\0" * 4),
    "a shape below zero": bomb(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', None, b"\0" * 4),
    "a broken shape": bomb(b'{"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}', None, b"\0" * 4),
    "a true shape": bomb(b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', None, b"\0" * 4),
    "a shape beyond the data": bomb(b'{"a": {"dtype": "F32", "shape": [900], "data_offsets": [0, 4]}}', None, b"\0" * 4),
    "an offset beyond the data": bomb(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', None, b"\0" * 4),
    "an entry of text": bomb(b'{"a": "b"}'),
    "an unknown type": bomb(b'{"a": {"dtype": "EVIL", "shape": [1], "data_offsets": [0, 4]}}', None, b"\0" * 4),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_no_file_has(copy: Path, name: str) -> None:
    (copy / NETWORK).write_bytes(HEADERS[name])
    refused(copy)


def test_cut_and_changed_files_are_refused_or_equal(copy: Path) -> None:
    """64 cuts, 8 tails and 200 changed bytes of the header: what still reads is what was written."""
    file = copy / NETWORK
    data = file.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    for i in range(64):
        file.write_bytes(data[: len(data) * i // 64])
        refused(copy)
    for i in range(8):
        file.write_bytes(data + bytes(4**i % 1000 + 1))
        refused(copy)
    expected, silent = weights.header(copy / "vae" / "diffusion_pytorch_model.safetensors"), 0
    small = copy / "vae" / "diffusion_pytorch_model.safetensors"
    original = small.read_bytes()
    for i in range(200):
        changed = bytearray(original)
        place = 8 + i * 7919 % (int.from_bytes(original[:8], "little"))
        changed[place] ^= 1 << i % 8
        small.write_bytes(changed)
        try:
            found = weights.header(small)
            silent += found == expected and load(copy) is not None and load_file(small).keys() != expected.keys()
        except LdmError:
            continue
    assert silent == 0
    assert length < len(data)


Change = Callable[[Path], Any]


def rewrite(part: str, **said: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / part
        file.write_text(json.dumps(json.loads(file.read_text()) | said))

    return change


INDEX, NET, SCHEDULER, VAE = "model_index.json", "transformer/config.json", "scheduler/scheduler_config.json", "vae/config.json"
FOLDERS: dict[str, Change] = {
    **{
        f"class {c!r:.30}": rewrite(INDEX, transformer=c)
        for c in (
            ["os", "system"],
            ["builtins", "eval"],
            ["diffusers", "Net"],
            ["../evil", "Net"],
            ["/tmp/evil.py", "Net"],
            ["https://example.org", "Net"],
            "diffusers.DiTTransformer2DModel",
            7,
            {"a": 1},
            [],
            [["diffusers"], "X"],
            [None, "X"],
            True,
            ["diffusers", "DiTTransformer2DModel", "x"],
            ["diffusers.models", "DiTTransformer2DModel"],
            "x" * 9999,
        )
    },
    "no classes": lambda f: (f / INDEX).write_text("{}"),
    "an index of nothing": lambda f: (f / INDEX).write_text(""),
    "an index of nulls": lambda f: (f / INDEX).write_text("null"),
    "a long index": lambda f: (f / INDEX).write_text(" " * 5_000_000 + "{}"),
    "a deep index": lambda f: (f / INDEX).write_text("[" * 100_000),
    "an index with a mark before it": lambda f: (f / INDEX).write_bytes(b"\xef\xbb\xbf{}"),
    "an index in another code": lambda f: (f / INDEX).write_bytes('{"a": 1}'.encode("utf-16")),
    "a folder as an index": lambda f: ((f / INDEX).unlink(), (f / INDEX).mkdir()),
    "a pipe as an index": lambda f: ((f / INDEX).unlink(), os.mkfifo(f / INDEX)),
    "a pipe as weights": lambda f: ((f / NETWORK).unlink(), os.mkfifo(f / NETWORK)),
    "a link to nowhere": lambda f: ((f / NETWORK).unlink(), (f / NETWORK).symlink_to("/nowhere")),
    "a link to itself": lambda f: ((f / NETWORK).unlink(), (f / NETWORK).symlink_to(f / NETWORK)),
    "a link out of the folder": lambda f: ((f / NETWORK).rename(f.parent / "out"), (f / NETWORK).symlink_to(f.parent / "out")),
    "a part that is a file": lambda f: (shutil.rmtree(f / "vae"), (f / "vae").write_text("x")),
    **{
        f"network {n}={v!r:.20}": rewrite(NET, **{n: v})
        for n, v in (
            ("num_layers", 10**9),
            ("num_layers", 10**5),
            ("num_layers", -1),
            ("num_layers", "2"),
            ("num_layers", None),
            ("num_layers", 3),
            ("attention_head_dim", 10**6),
            ("attention_head_dim", 0),
            ("num_attention_heads", [1, 2]),
            ("in_channels", 10**9),
            ("in_channels", float("nan")),
            ("patch_size", 0),
            ("sample_size", "big"),
            ("sample_size", 10**5),
            ("num_embeds_ada_norm", 10**6),
            ("auto_map", {"AutoModel": "evil.py--Net"}),
            ("quantization_config", {"a": 1}),
        )
    },
    **{
        f"codec {n}={v!r:.20}": rewrite(VAE, **{n: v})
        for n, v in (
            ("block_out_channels", []),
            ("block_out_channels", "8"),
            ("latent_channels", 10**9),
            ("scaling_factor", 0),
            ("scaling_factor", float("inf")),
            ("norm_num_groups", 3),
            ("down_block_types", ["Evil"] * 3),
        )
    },
    **{
        f"scheduler {n}={v!r:.20}": rewrite(SCHEDULER, **{n: v})
        for n, v in (
            ("num_train_timesteps", 0),
            ("num_train_timesteps", 10**9),
            ("num_train_timesteps", "1000"),
            ("beta_start", float("nan")),
            ("beta_end", 7),
            ("beta_start", -1),
            ("beta_schedule", "magic"),
            ("beta_schedule", None),
            ("prediction_type", "magic"),
            ("prediction_type", 3),
            ("trained_betas", [2.0, 3.0]),
            ("steps_offset", "1"),
        )
    },
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_lie(copy: Path, name: str) -> None:
    FOLDERS[name](copy)
    refused(copy)


def test_split_weights_may_not_lead_out_of_their_folder(copy: Path) -> None:
    file = copy / NETWORK
    tensors = load_file(file)
    names = sorted(tensors)
    for i, part in enumerate((names[:9], names[9:])):
        save_file({n: tensors[n] for n in part}, file.with_name(f"part-{i}.safetensors"))
    file.unlink()
    listing = {n: f"part-{int(n in names[9:])}.safetensors" for n in names}

    def listed(**changed: Any) -> None:
        content = {"metadata": {"total_size": 1}, "weight_map": listing | changed}
        file.with_name(f"{file.name}.index.json").write_text(json.dumps(content))

    listed()
    assert load(copy).family == "dit"
    for wrong in ("../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "part-9.safetensors", "evil.bin", 7, None):
        listed(**{names[0]: wrong})
        refused(copy)
