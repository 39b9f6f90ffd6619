"""Single files: written in the first layout, they load as the folder they came from; what is foreign is refused."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_pipe import ModelError, load, single, tokens
from ldm_pipe.networks import light_unet, light_vae

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
tiny_families = importlib.import_module("tiny_families")
Tensors = dict[str, torch.Tensor]


def to_unet(tensors: Mapping[str, torch.Tensor], layers: int, blocks: int) -> Tensors:
    """A U-Net in the first layout, as the original code numbers its blocks."""
    names: dict[str, str] = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    for i in (1, 2):
        names |= {
            f"time_embedding.linear_{i}": f"time_embed.{2 * i - 2}",
            f"add_embedding.linear_{i}": f"label_emb.0.{2 * i - 2}",
        }
    names |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1":
              "middle_block.2"}  # fmt: skip
    for b in range(blocks):
        for k in range(layers):
            n = 1 + b * (layers + 1) + k
            names |= {
                f"down_blocks.{b}.resnets.{k}": f"input_blocks.{n}.0",
                f"down_blocks.{b}.attentions.{k}": f"input_blocks.{n}.1",
            }
        names[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{(b + 1) * (layers + 1)}.0.op"
        for k in range(layers + 1):
            n = b * (layers + 1) + k
            names |= {
                f"up_blocks.{b}.resnets.{k}": f"output_blocks.{n}.0",
                f"up_blocks.{b}.attentions.{k}": f"output_blocks.{n}.1",
            }
        crossed = any(t.startswith(f"up_blocks.{b}.attentions.") for t in tensors)
        last = b * (layers + 1) + layers
        names[f"up_blocks.{b}.upsamplers.0.conv"] = f"output_blocks.{last}.{2 if crossed else 1}.conv"
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
             "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
    found = {}
    for name, tensor in tensors.items():
        old = max((o for o in names if name.startswith(f"{o}.")), key=len)
        rest = name.removeprefix(old)
        if ".resnets." in old:
            rest = re.sub(r"^\.(\w+)\.", lambda m: f".{inner[m[1]]}.", rest)
        found[f"model.diffusion_model.{names[old]}{rest}"] = tensor
    return found


def to_vae(tensors: Mapping[str, torch.Tensor], blocks: int) -> Tensors:
    """An autoencoder in the first layout."""
    found = {}
    for name, tensor in tensors.items():
        if ".attentions.0.to_" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        for old, new in (
            (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
            (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
            (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
            (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
            (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
            ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"),
        ):
            name = re.sub(old, new, name)
        name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{blocks - 1 - int(m[1])}.block.", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample.", name)
        found[f"first_stage_model.{name}"] = tensor.contiguous()
    return found


def to_open_clip(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    """A text tower as OpenCLIP has it: queries, keys and values in one."""
    bare = {n.removeprefix("text_model."): t for n, t in tensors.items()}
    tops = {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    found = {prefix + new: bare[old] for old, new in tops.items()}
    if "text_projection.weight" in bare:
        found[f"{prefix}text_projection"] = bare["text_projection.weight"].T.contiguous()
    for name, tensor in bare.items():
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
        if not layer:
            continue
        place, rest = f"{prefix}transformer.resblocks.{layer[1]}.", layer[2]
        joint = re.fullmatch(r"self_attn\.q_proj\.(weight|bias)", rest)
        if joint:
            three = [bare[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            found[f"{place}attn.in_proj_{joint[1]}"] = torch.cat(three)
        elif not re.match(r"self_attn\.[kv]_proj", rest):
            for old, new in (
                ("layer_norm", "ln_"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
                ("self_attn.", "attn."),
            ):
                rest = rest.replace(old, new)
            found[place + rest] = tensor
    return found


TOWERS = {"sd1": {"text_encoder": "cond_stage_model.transformer."}, "sd2": {"text_encoder": "cond_stage_model.model."},
          "sdxl": {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
          "sdxl-refiner": {"text_encoder_2": "conditioner.embedders.0.model."}}  # fmt: skip
FROM = {"sd1": "sd", "sd2": "sd v-prediction", "sdxl": "sdxl", "sdxl-refiner": "sdxl refiner"}
LEFT = {"betas": torch.zeros(3), "model_ema.decay": torch.zeros(1), "alphas_cumprod_prev": torch.zeros(3)}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Path, Path]]:
    """made(model): (a tiny folder, the same as a single file); the published configurations are the folder's own meanwhile."""

    def both(model: str) -> tuple[Path, Path]:
        folder, tensors = tiny_families.save(FROM[model], tmp_path / model), dict(LEFT)
        parts = {p: load_file(next((folder / p).glob("*.safetensors"))) for p in ("unet", "vae", *TOWERS[model])}
        configs = {p: json.loads((folder / p / "config.json").read_text()) for p in parts}
        tensors |= to_unet(parts["unet"], 1, 2) | to_vae(parts["vae"], 3)
        for part, prefix in TOWERS[model].items():
            if prefix.endswith("transformer."):
                tensors |= {f"{prefix}text_model.{n.removeprefix('text_model.')}": t for n, t in parts[part].items()}
                tensors[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(8)[None]
            else:
                tensors |= to_open_clip(parts[part], prefix) | {f"{prefix}logit_scale": torch.zeros(1)}
        published = json.loads((single.PUBLISHED / f"{model}.json").read_text()) | {
            p: {n: v for n, v in c.items() if n in _fields(p)} for p, c in configs.items()
        }
        (tmp_path / "published").mkdir()
        (tmp_path / "published" / f"{model}.json").write_text(json.dumps(published))
        monkeypatch.setattr(single, "PUBLISHED", tmp_path / "published")
        monkeypatch.setattr(single.FileParts, "tokenizer", lambda self, part, size: tokens.read(folder / part, size))
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / f"{model}.safetensors")
        return folder, tmp_path / f"{model}.safetensors"

    return both


def _fields(part: str) -> set[str]:
    from dataclasses import fields

    from ldm_pipe.networks import light_clip

    config = {"unet": light_unet.Config, "vae": light_vae.Config}.get(part, light_clip.Config)
    return {f.name for f in fields(config)}


@torch.no_grad()
@pytest.mark.parametrize("model", FROM)
def test_a_file_is_the_folder_it_came_from(made: Callable[[str], tuple[Path, Path]], model: str) -> None:
    """All weights, bit for bit, the same conditions and the same latents; diffusers reads the networks out of it alike."""
    folder, file = made(model)
    a, b = load(folder), load(file)
    for one, other in ((a.model.network.unet, b.model.network.unet), (a.codec.vae, b.codec.vae)):  # type: ignore[attr-defined]
        theirs = one.state_dict()
        assert theirs.keys() == other.state_dict().keys()
        assert all(torch.equal(t, theirs[n]) for n, t in other.state_dict().items())
    assert torch.equal(a.text(["a fox"]).tokens, b.text(["a fox"]).tokens)  # type: ignore[arg-type]
    assert a.family == b.family
    assert b.model.prediction.name == {"sd2": "v"}.get(model, "eps")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    tensors = {n: t for n, t in load_file(file).items() if n not in LEFT}
    unet, vae = (json.loads((folder / p / "config.json").read_text()) for p in ("unet", "vae"))
    unet |= {"num_class_embeds": None, "class_embed_type": None, "addition_embed_type": unet.get("addition_embed_type")}
    for found, ours in ((convert_ldm_unet_checkpoint(dict(tensors), unet), a.model.network.unet),  # type: ignore[attr-defined]
                        (convert_ldm_vae_checkpoint(dict(tensors), vae), a.codec.vae)):  # type: ignore[attr-defined]  # fmt: skip
        assert found.keys() == ours.state_dict().keys()
        assert all(torch.equal(t.flatten(), found[n].flatten()) for n, t in ours.state_dict().items())


def test_files_that_are_not_whole_are_refused(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, file = made("sd1")
    tensors = load_file(file)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    tower = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    for change, words in (
        ({first: None}, "missing tensor 'conv_in.weight'"),
        ({tower: None}, r"text_encoder\): missing tensor 'final_layer_norm.bias'"),
        ({"model.diffusion_model.evil": torch.zeros(1)}, "unexpected tensor 'model.diffusion_model.evil'"),
        ({"evil.weight": torch.zeros(1)}, "unexpected tensor 'evil.weight'"),
        ({first: torch.zeros(3)}, "mismatched tensor 'conv_in.weight'"),
        ({first: tensors[first] / 0}, "NaN or Inf in tensor 'conv_in.weight'"),
        ({first: tensors[first].int()}, "not floating point: tensor 'conv_in.weight'"),
        ({n: None for n in tensors if n.startswith("cond")}, "is not a Stable Diffusion 1, 2 or XL file"),
        ({n: None for n in tensors if n.startswith("first")}, "vae.*missing"),
    ):
        held = {n: t for n, t in {**tensors, **change}.items() if t is not None}
        save_file(held, file)
        with pytest.raises(ModelError, match=words) as caught:
            load(file)
        assert len(str(caught.value)) < 260
    (tmp_path / "x.ckpt").write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"no \.safetensors file; other formats may hold code"):
        load(tmp_path / "x.ckpt")


def test_the_published_vocabulary_is_that_of_clip() -> None:
    """Numbers every user of CLIP knows, as in transformers' CLIPTokenizer over the same merges."""
    import gzip

    merges = gzip.decompress((single.PUBLISHED / "clip_merges.txt.gz").read_bytes()).decode()
    ours = tokens.published(merges, "!")
    assert ours(["a photo of a cat", ""], 8) == [[49406, 320, 1125, 539, 320, 2368, 49407, 0], [49406, 49407, 0, 0, 0, 0, 0, 0]]
    from transformers import CLIPTokenizer

    vocab = ours.encoder.get_vocab()
    theirs = CLIPTokenizer(vocab=vocab, merges=[tuple(m.split(" ")) for m in merges.splitlines()], pad_token="!")
    for text in ("Füße, 3.5 km/h &amp; don't!", "red\u00a0fox  \n on 日本", "<|endoftext|> a", "🦊🦊 'LL"):
        assert ours.encoder.encode(text).ids == theirs(text).input_ids
    assert ours.encoder.encode("hi!").ids == [49406, 1883, 0, 49407]  # what fills rows up is a token of its own, as there


def test_a_file_whose_answers_say_otherwise_is_read_as_they_say(
    made: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Stable Diffusion 2 there are files of either prediction; random weights say nothing, and the usual one is assumed."""
    from ldm_pipe import Pipeline, one_step

    _, file = made("sd2")
    assert (load(file).model.prediction.name, load(file).notes) == ("v", ())
    monkeypatch.setattr(one_step, "candidates", lambda *_: frozenset({"eps"}))
    for dtype in ("fp32", "bf16"):
        bundle = Pipeline.from_pretrained(str(file), "cpu", dtype).bundle
        assert bundle.model.prediction.name == "eps"
        assert bundle.notes == ("the file says nothing of what it predicts; its answers are those of eps, not of v",)
    monkeypatch.setattr(one_step, "candidates", lambda *_: frozenset({"eps", "flow"}))
    assert load(file).model.prediction.name == "v"  # one of two: nothing is changed
