"""Adapters from files: equal to diffusers, strict, recorded, and the model they were merged into keeps every bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_pipe import Cond, ModelError, Pipeline, UsageError, adapted, lora, lora_delta, recipe
from ldm_pipe.cli import main

Tiny = Callable[[str], Path]
SCALES = (0.7, -0.4)


@pytest.fixture(scope="module")
def pipe(tiny: Tiny) -> Pipeline:
    return Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32", "sdpa")


def layers(pipe: Pipeline, part: str, every: int = 1) -> dict[str, Any]:
    found = {n: m for n, m in lora.parts(pipe.bundle)[part].named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return dict(list(found.items())[::every])


def factors(layer: Any, rank: int, seed: int, mid: bool = False) -> tuple[Tensor, Tensor]:
    """(down, up) of a layer, as large as its weight is."""
    g = torch.Generator().manual_seed(seed)
    convolved = isinstance(layer, nn.Conv2d)
    down = torch.randn(rank, *layer.weight.shape[1:], generator=g) / layer.weight[0].numel() ** 0.5
    up = torch.randn(len(layer.weight), rank, *((1, 1) if convolved else ()), generator=g) / rank**0.5
    return down.contiguous(), up.contiguous()


def write(pipe: Pipeline, file: Path, layout: str, seed: int = 0, every: int = 1, text: bool = True) -> Path:
    """An adapter on every n-th layer, ranks 2 and 3, alpha 1.5."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, dict[str, int]] = {}
    heads = {
        "network": ("unet.", "lora_unet_"),
        **({"text_encoder": ("text_encoder.text_model.", "lora_te_text_model_")} if text else {}),
    }
    for part, (dotted, flat) in heads.items():
        for k, (name, layer) in enumerate(layers(pipe, part, every).items()):
            rank = 2 + k % 2
            down, up = factors(layer, rank, seed + k)
            ranks.setdefault(part, {})[name] = rank
            if layout == "peft":
                tensors |= {f"{dotted}{name}.lora_A.weight": down, f"{dotted}{name}.lora_B.weight": up}
            elif layout == "old":
                of = "lora" if part == "network" else "lora_linear_layer"
                tensors |= {f"{dotted}{name}.{of}.down.weight": down, f"{dotted}{name}.{of}.up.weight": up}
            else:
                stem = flat + name.replace(".", "_")
                tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.5)}
    said = {}
    for part, of in ranks.items():
        head = "unet" if part == "network" else part
        said |= {f"{head}.r": 2, f"{head}.lora_alpha": 1.5, f"{head}.target_modules": list(of), f"{head}.rank_pattern": of}
    save_file(tensors, file, metadata={lora.METADATA: json.dumps(said)} if layout == "peft" else {"format": "pt"})
    return file


def ours(pipe: Pipeline) -> tuple[Tensor, Tensor]:
    """(the network's output, the text's features)."""
    g = torch.Generator().manual_seed(1)
    x, tokens = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 8, 16, generator=g)
    with torch.no_grad():
        out = pipe.bundle.model.network(x, torch.tensor([500, 20]), Cond(tokens=tokens))
        return out, pipe.bundle.text(["a fox on red"]).tokens


def theirs(folder: Path, *files: Path) -> tuple[Tensor, Tensor]:
    """The same of diffusers' pipeline with its own loader."""
    from diffusers import StableDiffusionPipeline

    other = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    for k, file in enumerate(files):
        other.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"a{k}")
    other.set_adapters([f"a{k}" for k in range(len(files))], list(SCALES[: len(files)]))
    g = torch.Generator().manual_seed(1)
    x, tokens = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 8, 16, generator=g)
    with torch.no_grad():
        out = other.unet(x, torch.tensor([500, 20]), tokens).sample
        ids = other.tokenizer(["a fox on red"], padding="max_length", max_length=8, truncation=True, return_tensors="pt")
        return out, other.text_encoder(ids.input_ids)[0]


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("layouts", [["peft"], ["kohya"], ["old"], ["peft", "kohya"]])
def test_it_is_what_diffusers_makes_of_the_same_files(pipe: Pipeline, tiny: Tiny, tmp_path: Path, layouts: list[str]) -> None:
    pytest.importorskip("peft")
    files = [write(pipe, tmp_path / f"{k}.safetensors", kind, seed=7 * k) for k, kind in enumerate(layouts)]
    before = [t.clone() for t in ours(pipe)]
    texts = [f"{file}:{scale}" for file, scale in zip(files, SCALES, strict=False)]
    mine = ours(adapted(pipe, texts))
    for a, b, plain in zip(mine, theirs(tiny("eps"), *files), before, strict=True):
        assert far(a, b) < 1e-5
        assert far(a, plain) > 0.05
    assert all(torch.equal(a, b) for a, b in zip(ours(pipe), before, strict=True))


@pytest.mark.parametrize("layout", ["peft", "kohya", "old"])
def test_the_weight_is_the_equation(pipe: Pipeline, tmp_path: Path, layout: str) -> None:
    """W + scale alpha / r B A, in a copy that shares every other weight."""
    file = write(pipe, tmp_path / "a.safetensors", layout, every=3, text=False)
    state = {n: t.clone() for n, t in pipe.bundle.model.state_dict().items()}
    mine = adapted(pipe, [f"{file}:0.5"])
    touched = layers(pipe, "network", 3)
    new = dict(lora.parts(mine.bundle)["network"].named_modules())
    for k, (name, layer) in enumerate(touched.items()):
        down, up = factors(layer, 2 + k % 2, k)
        alpha = 1.0 if layout == "old" else 1.5 / (2 + k % 2)
        wanted = layer.weight + 0.5 * alpha * (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
        assert torch.allclose(new[name].weight, wanted, atol=1e-6)
    for name, layer in layers(pipe, "network").items():
        assert (new[name].weight is layer.weight) == (name not in touched)
    assert all(torch.equal(t, state[n]) for n, t in pipe.bundle.model.state_dict().items())


def test_scale_0_changes_no_bit_and_opposite_scales_cancel(pipe: Pipeline, tmp_path: Path) -> None:
    file = write(pipe, tmp_path / "a.safetensors", "kohya")
    assert all(torch.equal(a, b) for a, b in zip(ours(adapted(pipe, [f"{file}:0"])), ours(pipe), strict=True))
    both = ours(adapted(pipe, [f"{file}:1.5", f"{file}:-1.5"]))
    assert all(far(a, b) < 1e-5 for a, b in zip(both, ours(pipe), strict=True))


def test_magnitudes_at_scale_0_and_the_rank_stabilised_scale(pipe: Pipeline, tmp_path: Path) -> None:
    """DoRA (arXiv 2402.09353) at scale 0 is no adapter at all; rsLoRA (arXiv 2312.03732, eq. 4) scales by alpha / sqrt(r)."""
    name, layer = next((n, m) for n, m in layers(pipe, "network").items() if n.endswith("attn2.to_k"))
    down, up = factors(layer, 4, 0)
    low = {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    save_file({**low, f"unet.{name}.lora_magnitude_vector": torch.ones(len(layer.weight))}, tmp_path / "dora.safetensors")
    said = json.dumps({"unet.r": 4, "unet.lora_alpha": 3, "unet.use_rslora": True})
    save_file(low, tmp_path / "rs.safetensors", metadata={lora.METADATA: said})

    def new(text: str) -> Tensor:
        mine: Any = lora.parts(adapted(pipe, [f"{tmp_path}/{text}"]).bundle)["network"].get_submodule(name)
        return mine.weight

    assert new("dora.safetensors:0") is layer.weight
    assert torch.allclose(new("dora.safetensors").norm(dim=1), torch.ones(len(layer.weight)))
    assert torch.allclose(new("rs.safetensors"), layer.weight + 1.5 * up @ down, atol=1e-6)


def test_every_kind_of_delta_against_its_formula() -> None:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    weight, alpha = draw(6, 4, 3, 3), torch.tensor(3.0)
    up, mid, down = draw(6, 2, 1, 1), draw(2, 2, 3, 3), draw(2, 4, 1, 1)
    with_mid = nn.functional.conv2d(nn.functional.conv2d(nn.functional.conv2d(x := draw(1, 4, 5, 5), down), mid, padding=1), up)
    new = lora_delta.changed(weight, {"up": up, "mid": mid, "down": down, "alpha": alpha}, 0.5)
    assert torch.allclose(nn.functional.conv2d(x, new - weight, padding=1), 0.75 * with_mid, atol=1e-4)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    hada = dict(zip(names, (draw(6, 2), draw(2, 36), draw(6, 2), draw(2, 36)), strict=True))
    one, two = hada["hada_w1_a"] @ hada["hada_w1_b"], hada["hada_w2_a"] @ hada["hada_w2_b"]
    new = lora_delta.changed(weight, {**hada, "alpha": alpha}, 1.0)
    assert torch.allclose(new, weight + 1.5 * (one * two).reshape(weight.shape), atol=1e-5)
    flat = draw(6, 4)
    lokr = {"lokr_w1": draw(2, 2), "lokr_w2_a": draw(3, 2), "lokr_w2_b": draw(2, 2)}
    new = lora_delta.changed(flat, {**lokr, "alpha": alpha}, 1.0)
    assert torch.allclose(new, flat + 1.5 * torch.kron(lokr["lokr_w1"], lokr["lokr_w2_a"] @ lokr["lokr_w2_b"]), atol=1e-5)
    length = flat.norm(dim=1, keepdim=True)
    low = {"up": draw(6, 2), "down": draw(2, 4)}
    dora = lora_delta.changed(flat, {**low, "magnitude": 2 * length}, 1.0, alpha=1.0)
    moved = flat + 0.5 * low["up"] @ low["down"]
    assert torch.allclose(dora, 2 * length * moved / moved.norm(dim=1, keepdim=True), atol=1e-5)
    assert torch.equal(lora_delta.changed(flat, {"whole": flat}, 2.0), 3 * flat)
    for wrong in ({"up": low["up"]}, {**low, "mid": mid}, {"up": low["down"], "down": low["up"]}, {"whole": weight}):
        with pytest.raises(ValueError, match=r"no whole adapter|do not fit"):
            lora_delta.changed(flat, wrong, 1.0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_norm", "down_blocks.1.attentions.0.transformer_blocks.0.norm"),
        ("lora_unet_input_blocks_5_0_in_layers_2", "down_blocks.1.resnets.1.conv1"),
        ("lora_unet_input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_middle_block_1_proj_in", "mid_block.attentions.0.proj_in"),
        ("lora_unet_middle_block_2_emb_layers_1", "mid_block.resnets.1.time_emb_proj"),
        ("lora_unet_output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("lora_te2_text_model_encoder_layers_31_mlp_fc2", "encoder.layers.31.mlp.fc2"),
        ("unet.x.attn2.processor.to_out_lora.down.weight", "x.attn2.to_out.0"),
        ("unet.x.attn1.processor.to_k_lora.down.weight", "x.attn1.to_k"),
        ("base_model.model.conv_in.lora_A.default.weight", "conv_in"),
    ],
)  # fmt: skip
def test_the_names_of_every_layout(old: str, new: str) -> None:
    from ldm_pipe import lora_names

    name = old if old.endswith("weight") else f"{old}.lora_down.weight"
    found = lora_names.key(name)
    assert found is not None
    assert (found.part, found.leaf) == ("text_encoder_2" if "te2" in old else "network", "down")
    assert lora_names.found(found, {new.replace(".", "_"): new}, 2) == new


def test_what_does_not_fit_is_said_in_a_line(pipe: Pipeline, tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    sdxl = {f"{stem}.lora_down.weight": torch.zeros(2, 2048), f"{stem}.lora_up.weight": torch.zeros(8, 2)}
    cases: list[tuple[dict[str, Tensor], str]] = [
        (sdxl, "made for Stable Diffusion XL, loaded is a model with text features of width 16"),
        ({f"{stem}.hada_w1_b": torch.zeros(2, 1024)}, "made for Stable Diffusion 2, loaded is"),
        ({"lora_unet_nowhere.lora_up.weight": torch.zeros(8, 2)}, "nowhere.lora_up.weight' and 0 more find no layer"),
        ({"strange": torch.zeros(1)}, "'strange' and 0 more find no layer"),
        ({"lora_te3_x.lora_up.weight": torch.zeros(8, 2)}, "find no layer"),
        ({f"{stem}.lora_up.weight": torch.zeros(8, 2)}, "holds up, which is no whole adapter"),
        ({f"{stem}.diff": torch.full((8, 16), torch.nan)}, "NaN or Inf in tensor"),
        ({f"{stem}.diff": torch.zeros(8, 16, dtype=torch.int8)}, "not floating point"),
        ({"unet.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 8)}, "made for Flux, loaded is"),
    ]  # fmt: skip
    before = ours(pipe)
    for k, (tensors, words) in enumerate(cases):
        file = tmp_path / f"{k}.safetensors"
        save_file(tensors, file)
        with pytest.raises(ModelError, match=words):
            adapted(pipe, [str(file)])
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(ModelError, match="may hold code"):
        adapted(pipe, [str(tmp_path / "a.pt")])
    for text, words in (("no.safetensors:1", "is not a file"), (f"{tmp_path}/0.safetensors:much", "takes a finite number")):
        with pytest.raises(UsageError, match=words):
            adapted(pipe, [text])
    assert all(torch.equal(a, b) for a, b in zip(ours(pipe), before, strict=True))


# --- learned words


def word(file: Path, layout: str, vectors: int) -> Path:
    rows = torch.randn(vectors, 16, generator=torch.Generator().manual_seed(3))
    save_file({"emb_params": rows} if layout == "a1111" else {"<toy>": rows}, file)
    return file


@pytest.mark.parametrize(("layout", "vectors"), [("a1111", 1), ("diffusers", 1), ("diffusers", 3)])
def test_a_learned_word_is_what_diffusers_makes_of_it(
    pipe: Pipeline, tiny: Tiny, tmp_path: Path, layout: str, vectors: int
) -> None:
    from diffusers import StableDiffusionPipeline

    file = word(tmp_path / "toy.safetensors", layout, vectors)
    mine = adapted(pipe, embeddings=[f"{file}:<toy>" if layout == "a1111" else str(file)])
    other = StableDiffusionPipeline.from_pretrained(tiny("eps"), safety_checker=None, local_files_only=True)
    other.load_textual_inversion(str(file.parent), weight_name=file.name, token="<toy>")
    for prompt in ("a <toy> on red", "<toy>", "a fox on red"):
        said = other.maybe_convert_prompt(prompt, other.tokenizer)
        ids = other.tokenizer([said], padding="max_length", max_length=8, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            wanted = other.text_encoder(ids)[0]
        assert far(mine.bundle.text([prompt]).tokens, wanted) < 1e-5
    plain = pipe.bundle.text(["a <toy> on red"]).tokens
    assert far(mine.bundle.text(["a <toy> on red"]).tokens, plain) > 0.05
    assert torch.equal(mine.bundle.text(["a fox"]).tokens, pipe.bundle.text(["a fox"]).tokens)
    old, new = (p.bundle.text.encoder.embeddings.token_embedding.weight for p in (pipe, mine))
    assert len(new) == len(old) + vectors
    assert torch.equal(new[: len(old)], old)


def test_the_end_of_a_prompt_is_found_below_the_new_words(pipe: Pipeline, tmp_path: Path) -> None:
    """Where a configuration says 2 for the end token, the largest id is meant: of the model's own tokens."""
    from dataclasses import replace

    mine = adapted(pipe, embeddings=[f"{word(tmp_path / 'toy.safetensors', 'a1111', 1)}:<toy>"]).bundle.text
    ids = torch.tensor(mine.tokenizer(["a <toy> on red"], 8))
    wanted = mine.encoder(ids).pooler_output
    own = mine.encoder.config
    mine.encoder.config = replace(own, eos_token_id=2)
    highest = int(ids[ids < own.vocab_size].max())
    assert torch.equal(mine.encoder(ids).pooler_output, mine.encoder(ids).last_hidden_state[:, ids[0].tolist().index(highest)])
    mine.encoder.config = replace(own, eos_token_id=highest)
    assert torch.equal(mine.encoder(ids).pooler_output, mine.encoder(ids).last_hidden_state[:, ids[0].tolist().index(highest)])
    assert wanted.shape == (1, 16)


def test_two_words_and_what_is_no_word(pipe: Pipeline, tmp_path: Path) -> None:
    one, two = (word(tmp_path / f"{n}.safetensors", "a1111", 2) for n in ("blip", "blop"))
    both = adapted(pipe, embeddings=[str(one), str(two)])
    assert both.bundle.text.tokenizer.length("Blip blop") == 6
    assert pipe.bundle.text.tokenizer.length("blip blop") != 6 or pipe.bundle.text(["blip"]).tokens is not None
    with pytest.raises(UsageError, match="'fox' is a token of the model already"):
        adapted(pipe, embeddings=[f"{one}:fox"])
    save_file({"emb_params": torch.zeros(1, 24)}, tmp_path / "wide.safetensors")
    with pytest.raises(ModelError, match="width 24, the text encoder of this model takes 16"):
        adapted(pipe, embeddings=[str(tmp_path / "wide.safetensors")])
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "many.safetensors")
    with pytest.raises(ModelError, match="holds 2 tensors; an embedding holds one"):
        adapted(pipe, embeddings=[str(tmp_path / "many.safetensors")])


# --- the command line


def test_it_is_recorded_and_a_replay_asks_for_the_files(
    pipe: Pipeline, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(pipe, Path("style.safetensors"), "kohya")
    write(pipe, Path("other.safetensors"), "kohya", seed=9)
    word(Path("toy.safetensors"), "a1111", 2)
    flags = ["--model", str(tiny("eps")), "--dtype", "fp32"]
    given = ["--lora", "style.safetensors:0.6", "--embedding", "toy.safetensors:<toy>"]
    assert main(["-p", "a <toy>", "--seed", "3", *flags, *given, "-o", "with.png"]) == 0
    said = capsys.readouterr().err
    assert re.search(r"style\.safetensors: all \d+ tensors matched, \d+ layers of the network and 6 of the text encoder", said)
    assert main(["-p", "a <toy>", "--seed", "3", *flags, "-o", "plain.png"]) == 0
    made, plain = (np.asarray(Image.open(f"{n}.png")) for n in ("with", "plain"))
    assert not np.array_equal(made, plain)
    rows = recipe.read("with.png").adapters
    assert [(r["kind"], r["name"], r.get("scale"), r.get("word")) for r in rows] == [
        ("lora", "style.safetensors", 0.6, None), ("embedding", "toy.safetensors", None, "<toy>"),
    ]  # fmt: skip
    capsys.readouterr()
    again = ["--replay", "with.png", "--verify", *flags]
    files = ["--lora", "style.safetensors", "--embedding", "toy.safetensors"]  # scale and word are the recipe's
    assert main([*again, *files]) == 0
    assert capsys.readouterr().out == "with.png: bit-equal\n"
    assert main(again) == 2
    assert "--lora: the image was made with 1 (style.safetensors), got 0" in capsys.readouterr().err
    assert main([*again, *[w.replace("style", "other") for w in files]]) == 2
    assert "is not the file that the image was made with" in capsys.readouterr().err
    shutil.copy("other.safetensors", "style.safetensors")
    assert main([*again, *files]) == 2
