"""Single files of SD3 and Flux: written as their authors name them, they load as the folder they came from."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_pipe import ModelError, UsageError, load, single_flow, tokens
from ldm_pipe.pipeline import Pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
tiny_families = importlib.import_module("tiny_families")
to_vae = importlib.import_module("test_single").to_vae
Tensors = dict[str, torch.Tensor]


def shift_first(t: torch.Tensor) -> torch.Tensor:
    scale, shift = t.chunk(2)
    return torch.cat([shift, scale])


def to_sd3(t: Mapping[str, torch.Tensor]) -> Tensors:
    """The transformer as the original code has it, layer by layer."""
    found = {"pos_embed": t["pos_embed.pos_embed"]}
    last = max(int(n.split(".")[1]) for n in t if n.startswith("transformer_blocks"))
    for leaf in ("weight", "bias"):
        found[f"x_embedder.proj.{leaf}"] = t[f"pos_embed.proj.{leaf}"]
        found[f"context_embedder.{leaf}"] = t[f"context_embedder.{leaf}"]
        for old, new in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
            for k in (1, 2):
                found[f"{old}.mlp.{2 * k - 2}.{leaf}"] = t[f"time_text_embed.{new}.linear_{k}.{leaf}"]
        found[f"final_layer.linear.{leaf}"] = t[f"proj_out.{leaf}"]
        found[f"final_layer.adaLN_modulation.1.{leaf}"] = shift_first(t[f"norm_out.linear.{leaf}"])
        for i in range(last + 1):
            for side, attn, norm, ff in (
                ("x", "to_{}", "norm1", "ff"),
                ("context", "add_{}_proj", "norm1_context", "ff_context"),
            ):
                at, here = f"joint_blocks.{i}.{side}_block", f"transformer_blocks.{i}"
                found[f"{at}.attn.qkv.{leaf}"] = torch.cat([t[f"{here}.attn.{attn.format(x)}.{leaf}"] for x in "qkv"])
                modulation = t[f"{here}.{norm}.linear.{leaf}"]
                final = side == "context" and i == last
                found[f"{at}.adaLN_modulation.1.{leaf}"] = shift_first(modulation) if final else modulation
                if not final:
                    out = "to_out.0" if side == "x" else "to_add_out"
                    found[f"{at}.attn.proj.{leaf}"] = t[f"{here}.attn.{out}.{leaf}"]
                    found[f"{at}.mlp.fc1.{leaf}"] = t[f"{here}.{ff}.net.0.proj.{leaf}"]
                    found[f"{at}.mlp.fc2.{leaf}"] = t[f"{here}.{ff}.net.2.{leaf}"]
                for x in "qk" if leaf == "weight" else "":
                    found[f"{at}.attn.ln_{x}.weight"] = t[f"{here}.attn.norm_{'added_' * (side == 'context')}{x}.weight"]
            if f"transformer_blocks.{i}.attn2.to_q.weight" in t:
                at, here = f"joint_blocks.{i}.x_block.attn2", f"transformer_blocks.{i}.attn2"
                found[f"{at}.qkv.{leaf}"] = torch.cat([t[f"{here}.to_{x}.{leaf}"] for x in "qkv"])
                found[f"{at}.proj.{leaf}"] = t[f"{here}.to_out.0.{leaf}"]
                found |= {f"{at}.ln_{x}.weight": t[f"{here}.norm_{x}.weight"] for x in "qk"}
    return found


def to_flux(t: Mapping[str, torch.Tensor]) -> Tensors:
    found: Tensors = {}
    for leaf in ("weight", "bias"):
        for old, new in (("img_in", "x_embedder"), ("txt_in", "context_embedder"), ("final_layer.linear", "proj_out")):
            found[f"{old}.{leaf}"] = t[f"{new}.{leaf}"]
        found[f"final_layer.adaLN_modulation.1.{leaf}"] = shift_first(t[f"norm_out.linear.{leaf}"])
        for old, new in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
            for layer, k in (("in", 1), ("out", 2)):
                name = f"time_text_embed.{new}_embedder.linear_{k}.{leaf}"
                found |= {f"{old}.{layer}_layer.{leaf}": t[name]} if name in t else {}
        here, at = "transformer_blocks.0", "double_blocks.0"
        for side, q, added, out, rest in (
            ("img", "to_{}", "", "to_out.0", ""),
            ("txt", "add_{}_proj", "added_", "to_add_out", "_context"),
        ):
            found[f"{at}.{side}_mod.lin.{leaf}"] = t[f"{here}.norm1{rest}.linear.{leaf}"]
            found[f"{at}.{side}_attn.qkv.{leaf}"] = torch.cat([t[f"{here}.attn.{q.format(x)}.{leaf}"] for x in "qkv"])
            found[f"{at}.{side}_attn.proj.{leaf}"] = t[f"{here}.attn.{out}.{leaf}"]
            found[f"{at}.{side}_mlp.0.{leaf}"] = t[f"{here}.ff{rest}.net.0.proj.{leaf}"]
            found[f"{at}.{side}_mlp.2.{leaf}"] = t[f"{here}.ff{rest}.net.2.{leaf}"]
            for x, long in (("q", "query"), ("k", "key")):
                found[f"{at}.{side}_attn.norm.{long}_norm.scale"] = t[f"{here}.attn.norm_{added}{x}.weight"]
        here, at = "single_transformer_blocks.0", "single_blocks.0"
        parts = [*(f"attn.to_{x}" for x in "qkv"), "proj_mlp"]
        found[f"{at}.linear1.{leaf}"] = torch.cat([t[f"{here}.{p}.{leaf}"] for p in parts])
        found[f"{at}.linear2.{leaf}"] = t[f"{here}.proj_out.{leaf}"]
        found[f"{at}.modulation.lin.{leaf}"] = t[f"{here}.norm.linear.{leaf}"]
        for x, long in (("q", "query"), ("k", "key")):
            found[f"{at}.norm.{long}_norm.scale"] = t[f"{here}.attn.norm_{x}.weight"]
    return found


def write(name: str, folder: Path, file: Path, leave_out: tuple[str, ...] = ()) -> None:
    """A folder as one file."""
    model = name.split()[0]
    held = {p.parent.name: load_file(p) for p in folder.glob("*/*.safetensors")}
    whole = (to_sd3 if model == "sd3" else to_flux)(held["transformer"])
    tensors = {f"model.diffusion_model.{n}": t for n, t in whole.items()}
    prefixes = single_flow.MODELS[model][1]
    vae = {n.removeprefix("first_stage_model."): t for n, t in to_vae(held["vae"], 3).items()}
    for part, prefix in prefixes.items():
        if part in held and part not in leave_out:
            clip = "text_model." if part in ("text_encoder",) or (model, part) == ("sd3", "text_encoder_2") else ""
            inner = vae if part == "vae" else held[part]
            top = ("text_projection", "text_model.")
            tensors |= {f"{prefix}{n if n.startswith(top) or not clip else clip + n}": t for n, t in inner.items()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, file)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, Path]]:
    """made(family, parts to leave out): (a tiny folder, the same as a single file)."""

    def both(name: str, *leave_out: str) -> tuple[Path, Path]:
        model = name.split()[0]
        folder = tiny_families.save(name, tmp_path / "folder")
        published = json.loads((single_flow.PUBLISHED / f"{model}.json").read_text())
        for part in ("vae", *(p for p in published if p.startswith("text_encoder") and (folder / p).exists())):
            config = json.loads((folder / part / "config.json").read_text())
            light = {"architectures", "model_type", "dtype", "transformers_version", "act_fn", "latents_mean", "latents_std"}
            published[part] = {
                n: v for n, v in config.items() if n not in light | {"attention_dropout", "dropout", "tie_word_embeddings"}
            }
        own = json.loads((folder / "transformer" / "config.json").read_text())
        published["transformer"] = {n: own[n] for n in ("attention_head_dim", "sample_size", "axes_dims_rope") if n in own}
        published["transformer"] |= {"patch_size": own["patch_size"]}
        for key in ("scheduler", "scheduler_of_schnell"):
            published[key] = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        (tmp_path / "published").mkdir()
        (tmp_path / "published" / f"{model}.json").write_text(json.dumps(published))
        monkeypatch.setattr(single_flow, "PUBLISHED", tmp_path / "published")
        own_words = single_flow.FlowParts.tokenizer

        def words(self: Any, part: str, size: int) -> tokens.Tokenizer:
            clip = part != single_flow.T5[self.model][1]
            return tokens.read(folder / part, size) if clip else own_words(self, part, size)  # type: ignore[return-value]

        monkeypatch.setattr(single_flow.FlowParts, "tokenizer", words)
        write(name, folder, tmp_path / "single.safetensors", leave_out)
        return folder, tmp_path / "single.safetensors"

    return both


def image(pipe: Pipeline) -> torch.Tensor:
    return pipe("a fox", negative_prompt="red", seed=2, steps=2, height=32, width=32).latents


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of sums: a mapped tensor lies elsewhere in memory, and kernels mind where."""
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["sd3", "flux dev", "flux schnell"])
def test_a_file_gives_the_latents_of_its_folder(made: Callable[..., tuple[Path, Path]], name: str) -> None:
    """T5 in the file, its vocabulary from --tokenizer; both from folders; everything but the transformer from a folder."""
    folder, file = made(name)
    encoder, words = single_flow.T5[name.split()[0]]
    expected = image(Pipeline.from_pretrained(str(folder), "cpu", "fp32"))
    whole = Pipeline.from_pretrained(str(file), "cpu", "fp32", tokenizer=str(folder / words))
    ours, theirs = (p.transformer.state_dict() for p in (whole.bundle.model.network, load(folder).model.network))  # type: ignore[union-attr]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items())
    same(image(whole), expected)
    assert whole.bundle.notes == ()
    write(name, folder, file, (encoder,))
    given = {"text_encoder": str(folder / encoder), "tokenizer": str(folder / words)}
    same(image(Pipeline.from_pretrained(str(file), "cpu", "fp32", **given)), expected)
    write(name, folder, file, ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"))
    same(image(Pipeline.from_pretrained(str(file), "cpu", "fp32", text_encoder=str(folder))), expected)
    if name == "sd3":
        from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as convert

        found = convert(dict(load_file(file)))
        assert found.keys() == ours.keys()
        assert all(torch.equal(t, found[n]) for n, t in ours.items())


def test_what_is_missing_is_named_with_its_flag(made: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    folder, file = made("flux dev")
    with pytest.raises(
        ModelError, match=r"the vocabulary of T5 is not shipped: --tokenizer FOLDER names the folder tokenizer_2"
    ):
        load(file)
    with pytest.raises(ModelError, match=r"--tokenizer .* is not a folder"):
        load(file, tokenizer=tmp_path / "none")
    with pytest.raises(UsageError, match="go with a single file"):
        load(folder, tokenizer=folder / "tokenizer_2")
    write("flux dev", folder, file, ("vae", "text_encoder_2"))
    with pytest.raises(ModelError, match=r"holds no vae, text_encoder_2; --text-encoder FOLDER names a model"):
        load(file)
    for change, words in (
        ({"model.diffusion_model.img_in.weight": None}, r"single.safetensors \(transformer\): missing tensor 'img_in.weight'"),
        ({"model.diffusion_model.evil.weight": torch.zeros(1)}, "unexpected tensor 'model.diffusion_model.evil.weight'"),
        ({"evil": torch.zeros(1)}, "unexpected tensor 'evil'"),
        ({"model.diffusion_model.img_in.weight": torch.zeros(3)}, "or one of another shape"),
        ({"model.diffusion_model.single_blocks.0.linear1.bias": torch.zeros(5)}, "mismatched tensor"),
        ({"model.diffusion_model.img_in.bias": torch.full((32,), torch.nan)}, "NaN or Inf"),
    ):
        held = {n: t for n, t in {**load_file(file), **change}.items() if t is not None}
        (tmp_path / "broken").mkdir(exist_ok=True)
        save_file(held, tmp_path / "broken" / "single.safetensors")
        with pytest.raises(ModelError, match=words):
            load(tmp_path / "broken" / "single.safetensors", text_encoder=folder)


def test_sd3_runs_without_t5_and_says_so(made: Callable[..., tuple[Path, Path]]) -> None:
    folder, file = made("sd3 without T5")
    bundle = load(file)
    assert torch.equal(bundle.text(["a fox"]).tokens, load(folder).text(["a fox"]).tokens)  # type: ignore[arg-type]
    assert bundle.notes == (
        "T5 is left out, which reads the prompt best; single.safetensors comes without T5: --text-encoder FOLDER names it",
    )


def eight(file: Path, kind: torch.dtype, part: str = "") -> int:
    """Rewrite the matrices of a file in 8 bits, where their names hold `part`; how many."""
    held = load_file(file)
    less = {n: t.to(kind) for n, t in held.items() if t.ndim > 1 and part in n}
    save_file(held | less, file)
    return len(less)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_8_bits_are_cast_up_and_said(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path, kind: torch.dtype
) -> None:
    """T5 in the file, the whole file, and T5 in a file of its own are what the same values are in 32 bits."""
    folder, file = made("flux dev")
    held = load_file(file)
    save_file(
        {n: t.to(kind).float() if t.ndim > 1 and "t5xxl" in n else t for n, t in held.items()}, tmp_path / "exact.safetensors"
    )
    words = {"tokenizer": folder / "tokenizer_2"}
    exact = load(tmp_path / "exact.safetensors", **words)
    tokens = exact.text(["a red fox"]).tokens
    assert tokens is not None
    assert not torch.equal(tokens, load(file, **words).text(["a red fox"]).tokens)  # type: ignore[arg-type]
    stem = "text_encoders.t5xxl.transformer."
    alone = {n.removeprefix(stem): t.to(kind) if t.ndim > 1 else t for n, t in held.items() if n.startswith(stem)}
    save_file(alone, tmp_path / "t5.safetensors")
    count, name = eight(file, kind, "t5xxl"), str(kind).removeprefix("torch.")
    found = load(file, **words)
    assert torch.equal(found.text(["a red fox"]).tokens, tokens)  # type: ignore[arg-type]
    said = "holds {} tensors in {}, which are cast up; a file in 16 bits is more exact"
    assert found.notes == (f"single.safetensors {said.format(count, name)}",)
    write("flux dev", folder, file, ("text_encoder_2",))
    beside = load(file, **words, text_encoder=tmp_path / "t5.safetensors")
    assert torch.equal(beside.text(["a red fox"]).tokens, tokens)  # type: ignore[arg-type]
    assert beside.notes == (f"t5.safetensors {said.format(count, name)}",)
    eight(file, kind)
    half = load(file, **words, text_encoder=tmp_path / "t5.safetensors", kind=lambda wide: torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert len(half.notes) == 2


@pytest.mark.parametrize("name", ["scaled_fp8", "x.scale_weight", "x.weight_scale", "x.input_scale"])
def test_scaled_weights_of_8_bits_are_refused(made: Callable[..., tuple[Path, Path]], tmp_path: Path, name: str) -> None:
    folder, file = made("flux dev")
    held = {n: t.to(torch.float8_e4m3fn) if "img_in.weight" in n else t for n, t in load_file(file).items()}
    save_file({**held, f"model.diffusion_model.{name}": torch.ones(1)}, file)
    with pytest.raises(ModelError, match=f"its 8-bit tensors are scaled .*{name}'.*give the file in plain 8 bits, or in 16"):
        load(file, tokenizer=folder / "tokenizer_2")
    t5 = {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), name: torch.ones(1)}
    save_file(t5, tmp_path / "t5.safetensors")
    write("flux dev", folder, file, ("text_encoder_2",))
    with pytest.raises(ModelError, match=f"t5.safetensors: its 8-bit tensors are scaled .*{name}"):
        load(file, tokenizer=folder / "tokenizer_2", text_encoder=tmp_path / "t5.safetensors")


def test_a_file_that_is_no_t5_is_refused(made: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    folder, file = made("flux dev")
    write("flux dev", folder, file, ("text_encoder_2",))
    save_file({"evil": torch.ones(1)}, tmp_path / "t5.safetensors")
    (tmp_path / "t5.bin").write_bytes(b"x")
    for name, words in (("t5.safetensors", "or the file of a T5; t5.safetensors holds 'evil'"), ("t5.bin", "may hold code")):
        with pytest.raises(ModelError, match=words):
            load(file, tokenizer=folder / "tokenizer_2", text_encoder=tmp_path / name)
    with pytest.raises(ModelError, match="is not a folder or the file of a T5"):
        load(file, tokenizer=folder / "tokenizer_2", text_encoder=tmp_path / "none")


def test_a_folder_in_8_bits_stays_refused(made: Callable[..., tuple[Path, Path]]) -> None:
    folder, _ = made("flux dev")
    eight(folder / "vae" / "diffusion_pytorch_model.safetensors", torch.float8_e4m3fn)
    with pytest.raises(ModelError, match="not floating point: tensor"):
        load(folder)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ("attention_y_norm.weight", "y_embedder.y_proj.fc1.weight", "blocks.0.attn.qkv.weight"),
            "is Sana in its authors' .*Gemma",
        ),
        (
            ("y_embedder.y_proj.fc1.weight", "blocks.0.attn.qkv.weight"),
            "is PixArt in its authors' layout; give --model the folder",
        ),
        (("y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight"), "is DiT in its authors' layout"),
        (("encoder.block.0.layer.0.SelfAttention.q.weight",), "is T5 alone; give it as --text-encoder beside"),
        (("model.layers.0.pre_feedforward_layernorm.weight",), "is Gemma alone; .*of Sana, which holds it as text_encoder"),
        (("model.layers.0.mlp.gate_proj.weight",), "is a language model alone"),
        (("transformer_blocks.0.attn.to_q.weight",), "is one part of a model in diffusers' layout; give --model the folder"),
        (
            ("down_blocks.0.resnets.0.conv1.weight", "up_blocks.0.resnets.0.conv1.weight"),
            "is one part of a model in diffusers'",
        ),
        (("unet.down_blocks.0.x.lora_A.weight",), "is an adapter; give it as --lora beside a model"),
        (("evil",), "is not a Stable Diffusion 1, 2 or XL file: it holds 'evil'"),
    ],
)
def test_other_files_say_what_to_give(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=f"a.safetensors {words}"):
        load(tmp_path / "a.safetensors")


def test_the_published_configurations_have_the_published_sizes() -> None:
    """Numbers that the papers and the files tell: 2.0 and 11.9 billion parameters, 4.8 of T5, 84 million of the codec."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
    from transformers import T5Config, T5EncoderModel

    read = {m: json.loads((single_flow.PUBLISHED / f"{m}.json").read_text()) for m in single_flow.MODELS}
    given = {
        "sd3": {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "in_channels": 16, "patch_size": 2,
                "out_channels": 16, "pos_embed_max_size": 192, "joint_attention_dim": 4096, "pooled_projection_dim": 2048},
        "flux": {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "in_channels": 64,
                 "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True},
    }  # fmt: skip
    with torch.device("meta"):
        sd3 = SD3Transformer2DModel.from_config(read["sd3"]["transformer"] | given["sd3"])
        flux = FluxTransformer2DModel.from_config(read["flux"]["transformer"] | given["flux"])
        t5 = T5EncoderModel(T5Config.from_dict(read["flux"]["text_encoder_2"]))
    counts = [sum(p.numel() for p in m.parameters()) for m in (sd3, flux, t5)]
    assert [round(c / 1e6) for c in counts] == [2028, 11901, 4762]
