"""Adapters of SDXL, SD3 and Flux: kohya's fused names written, read and compared with diffusers; both text encoders of SDXL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm_pipe import ModelError, Pipeline, UsageError, adapted, lora, lora_fused, lora_names
from ldm_pipe.flow_names import FLUX, LAYOUTS
from train.adapter_files import DIFFUSERS, KOHYA, write
from train.adapting import Low
from train.job import Job
from train.loop import run
from train.tasks.lora import Lora


def weights(bundle: Any, part: str) -> dict[str, Tensor]:
    return {n: m.weight.detach() for n, m in lora.parts(bundle)[part].named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def branches(network: nn.Module, skip: str = "") -> dict[str, Low]:
    """One for every linear layer and convolution but those of names with `skip`, ranks 2 and 3, alpha 1 and 2."""
    g = torch.Generator().manual_seed(0)
    found = {}
    for k, (name, layer) in enumerate((n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)):
        if not skip or skip not in name:
            found[f"network.{name}"] = low = Low(layer, 2 + k % 2, 1.0 + k % 2)
            with torch.no_grad():
                for p in low.parameters():
                    p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return found


def after(pipe: Pipeline, file: Path) -> dict[str, Tensor]:
    return weights(adapted(pipe, [str(file)]).bundle, "network")


@pytest.mark.parametrize(("name", "skip"), [("flux dev", ""), ("flux dev", "to_k"), ("sd3", ""), ("sd3", "proj")])
def test_the_first_names_are_read_back_as_the_present_ones(saved: Any, tmp_path: Path, name: str, skip: str) -> None:
    """W + alpha / r B A of every layer, the same from both files; layers without a branch stay to the bit."""
    pipe = Pipeline.from_pretrained(str(saved(name)), "cpu", "fp32", "sdpa")
    network, before = lora.parts(pipe.bundle)["network"], weights(pipe.bundle, "network")
    made = branches(network, skip)
    write(made, "lora", ("transformer", network), tmp_path)
    held = load_file(tmp_path / KOHYA)
    assert any("_qkv" in n for n in held)
    assert not any("to_q" in n for n in held)
    layout = lora_fused.layout_of(known := lora_names.layers(network))
    assert layout is not None
    named = {layer for first in lora_fused.firsts(known, layout).values() for layer in first.layers}
    assert named | {"context_embedder"} == set(before)  # of SD3 it was never called otherwise
    for file in (KOHYA, DIFFUSERS):
        found = after(pipe, tmp_path / file)
        for layer, weight in before.items():
            low = made.get(f"network.{layer}")
            if low is None:
                assert torch.allclose(found[layer], weight, atol=1e-7)
            else:
                delta = low.alpha / low.rank * (low.up.flatten(1) @ low.down.flatten(1)).reshape(weight.shape)
                assert torch.allclose(found[layer], weight + delta, atol=1e-5), (file, layer)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_rows_lie_as_the_reader_of_single_files_has_them(name: str) -> None:
    """Every layer of two blocks of each kind: order and halves are those of `flow_names.Layout.present`."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    few = {"patch_size": 1, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16}
    more: dict[str, Any] = {"num_single_layers": 2, "axes_dims_rope": (2, 2, 4), "guidance_embeds": True}
    if name == "sd3":
        more = {"sample_size": 4, "caption_projection_dim": 16, "pos_embed_max_size": 4}
    kind = FluxTransformer2DModel if name == "flux" else SD3Transformer2DModel
    network = kind(in_channels=4, pooled_projection_dim=12, **few, **more)
    known, layout = lora_names.layers(network), LAYOUTS[name]
    firsts = lora_fused.firsts(known, layout)
    assert lora_fused.layout_of(known) is layout
    inside = [f"{block}.{k}.{old}" for block in layout.blocks for k in range(2) for old in [*layout.inside, *layout.joint]]
    dotted = {d.replace(".", "_"): d for d in [*layout.tops, *inside]}
    covered = set()
    for flat, first in firsts.items():
        rows = [len(network.get_submodule(layer).weight) for layer in first.layers]
        tensor = torch.randn(sum(rows), 3)
        wanted = dict(layout.present(f"{dotted[flat]}.weight", tensor, 2, 16))
        pieces = lora_fused.split("up", tensor, rows, first.swapped)
        found = {f"{layer}.weight": piece for layer, piece in zip(first.layers, pieces, strict=True)}
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n], wanted[n]) for n in found), flat
        again = lora_fused.joined([(torch.eye(3), piece) for piece in pieces], rows, first.swapped)
        assert torch.equal(again[1] @ again[0], tensor)
        assert not covered & {*first.layers}  # one name each
        covered |= {*first.layers}
    assert covered | {"context_embedder"} == set(known.values())


def test_fused_layers_are_divided_by_rows(saved: Any, tmp_path: Path) -> None:
    """One down for all, as most published files have it; dots as ComfyUI writes them; LoHa; what cannot be divided."""
    pipe = Pipeline.from_pretrained(str(saved("flux dev")), "cpu", "fp32", "sdpa")
    before, g = weights(pipe.bundle, "network"), torch.Generator().manual_seed(0)
    stem, parts = "single_blocks.0.linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    layers = [f"single_transformer_blocks.0.{p}" for p in parts]
    rows = [len(before[n]) for n in layers]
    down, up = torch.randn(2, 32, generator=g), torch.randn(sum(rows), 2, generator=g)
    flat = "lora_unet_" + stem.replace(".", "_")
    one, two = {"w1_a": up, "w1_b": down}, {"w2_a": up.flip(0), "w2_b": down.flip(1)}
    files: list[tuple[dict[str, Tensor], Tensor]] = [
        ({f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(1.0)}, 0.5 * up @ down),
        ({f"diffusion_model.{stem}.lora_A.weight": down, f"diffusion_model.{stem}.lora_B.weight": up}, up @ down),
        ({f"{flat}.hada_{n}": t for n, t in (one | two).items()}, (up @ down) * (up.flip(0) @ down.flip(1))),
    ]
    for k, (tensors, delta) in enumerate(files):
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / f"{k}.safetensors")
        found = after(pipe, tmp_path / f"{k}.safetensors")
        for layer, piece in zip(layers, delta.split(rows), strict=True):
            assert torch.allclose(found[layer], before[layer] + piece, atol=1e-5)
        assert sum(not torch.equal(found[n], before[n]) for n in before) == 4
    save_file({"lora_te3_encoder_block_0_layer_0_SelfAttention_q.diff": torch.ones(32, 32)}, tmp_path / "t5.safetensors")
    t5 = adapted(pipe, [str(tmp_path / "t5.safetensors")]).bundle  # kohya's third encoder is the second one here
    name = "encoder.block.0.layer.0.SelfAttention.q"
    assert torch.allclose(weights(t5, "text_encoder_2")[name], weights(pipe.bundle, "text_encoder_2")[name] + 1)
    wrong = [
        (
            {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up[1:]},
            f"up has {sum(rows) - 1} rows; .* have {sum(rows)}",
        ),
        ({f"{flat}.lokr_w1": down}, "lokr_w1 cannot be divided between the layers that it is for$"),
        ({f"{flat}.alpha": torch.tensor(1.0), f"transformer.{layers[0]}.alpha": torch.tensor(1.0)}, "is a second alpha"),
    ]
    for k, (tensors, words) in enumerate(wrong):
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / f"wrong{k}.safetensors")
        with pytest.raises(ModelError, match=words):
            adapted(pipe, [str(tmp_path / f"wrong{k}.safetensors")])


def test_flux_is_what_diffusers_makes_of_the_same_file(saved: Any, tmp_path: Path) -> None:
    """Its conversion knows the full size of linear1 alone: that one is compared as tensors, all others as a merged network."""
    pytest.importorskip("peft")
    from diffusers import FluxPipeline
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    pipe = Pipeline.from_pretrained(str(saved("flux dev")), "cpu", "fp32", "sdpa")
    network = lora.parts(pipe.bundle)["network"]
    blocks = {n: b for n, b in branches(network).items() if "blocks" in n and ("single" not in n or "attn" not in n)}
    blocks = {n: b for n, b in blocks.items() if "proj_mlp" not in n}
    write(blocks, "lora", ("transformer", network), tmp_path)
    found = after(pipe, tmp_path / KOHYA)
    theirs = FluxPipeline.from_pretrained(saved("flux dev"), local_files_only=True)
    theirs.load_lora_weights(str(tmp_path), weight_name=KOHYA)
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    merged = {n: m.weight.detach() for n, m in theirs.transformer.named_modules() if isinstance(m, nn.Linear)}
    moved = 0
    for layer, weight in weights(pipe.bundle, "network").items():
        assert torch.allclose(found[layer], merged[layer], atol=1e-5), layer
        moved += not torch.allclose(found[layer], weight, atol=1e-3)
    assert moved == len(blocks) > 10
    rows = [3072, 3072, 3072, 12288]
    down, up, stem = torch.randn(3, 3072), torch.randn(sum(rows), 3), "lora_unet_single_blocks_0_linear1"
    layers = [f"transformer.single_transformer_blocks.0.{n}" for n in FLUX.joint["linear1"]]
    given = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(3.0)}
    wanted = _convert_kohya_flux_lora_to_diffusers(dict(given))
    for layer, piece in zip(layers, lora_fused.split("up", up, rows, False), strict=True):
        assert torch.equal(wanted[f"{layer}.lora_B.weight"], piece)
        assert torch.equal(wanted[f"{layer}.lora_A.weight"], down)


FAMILIES = ["unclip", "sd lcm", "sdxl", "sdxl refiner", "sd3", "flux dev", "pixart sigma", "sana", "dit"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_saves_and_draws(saved: Any, pictures: Any, tmp_path: Path, name: str) -> None:
    """Two steps; both files give the same latents, which are not the model's own."""
    caption = "cock" if name == "dit" else "a fox on red"
    data = {"path": str(pictures((caption,))), "cache": str(tmp_path / "cache"), "side": 16, "buckets": False}
    layers = ("*attn*.to_?", "*proj_mlp") if "flux" in name else ("*to_q",)
    task = Lora(data, str(saved(name)), lora={"rank": 2, "layers": layers})
    export = run(task, Job(str(tmp_path / "run"), 2, batch=2, lr=0.1, warmup=1, save_every=2))
    pipe = Pipeline.from_pretrained(str(saved(name)), "cpu", "fp32", "sdpa")

    def drawn(loras: list[str]) -> Tensor:
        return adapted(pipe, loras)(caption, seed=0, steps=1, width=16, height=16).latents

    one, two = (drawn([str(export / file)]) for file in (KOHYA, DIFFUSERS))
    assert torch.allclose(one, two, atol=1e-5)
    assert not torch.allclose(one, drawn([]), atol=1e-4)


def test_a_family_that_cannot_is_one_line(saved: Any, pictures: Any, tmp_path: Path) -> None:
    data = {"path": str(pictures(("a fox",))), "cache": str(tmp_path / "cache"), "side": 16, "buckets": False}
    with pytest.raises(UsageError, match="are trained by the task concat"):
        Lora(data, str(saved("sd inpainting"))).net()
    for name, title in (("pixart sigma", "PixArt-alpha and -sigma"), ("sana", "Sana"), ("dit", "DiT, by class")):
        with pytest.raises(UsageError, match=f"train_text trains text encoders of CLIP's kind, and {title} has none"):
            Lora({**data, "cache": ""}, str(saved(name)), train_text=True).net()


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_sdxl_with_both_text_encoders_is_what_diffusers_makes_of_it(saved: Any, tmp_path: Path, layout: str) -> None:
    pytest.importorskip("peft")
    from diffusers import StableDiffusionXLPipeline

    pipe = Pipeline.from_pretrained(str(saved("sdxl")), "cpu", "fp32", "sdpa")
    heads = {"network": ("lora_unet_", "unet."), "text_encoder": ("lora_te1_text_model_", "text_encoder.text_model."),
             "text_encoder_2": ("lora_te2_text_model_", "text_encoder_2.text_model.")}  # fmt: skip
    g, tensors = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for part, (flat, dotted) in heads.items():
        for name, weight in weights(pipe.bundle, part).items():
            if not ("attn" in name or (part == "network" and ".ff.net" in name)):
                continue
            down, up = torch.randn(2, weight.shape[1], generator=g) / 4, torch.randn(len(weight), 2, generator=g) / 4
            if layout == "kohya":
                stem = flat + name.replace(".", "_")
                tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
            else:
                tensors |= {f"{dotted}{name}.lora_A.weight": down, f"{dotted}{name}.lora_B.weight": up}
    save_file(tensors, tmp_path / "a.safetensors")
    mine = adapted(pipe, [f"{tmp_path / 'a.safetensors'}:1"])
    theirs = StableDiffusionXLPipeline.from_pretrained(saved("sdxl"), local_files_only=True)
    theirs.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    for part, module in zip(heads, (theirs.unet, theirs.text_encoder, theirs.text_encoder_2), strict=True):
        state = {
            lora_names._flat(n): m.weight.detach() for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
        }
        before, moved = weights(pipe.bundle, part), 0
        for name, weight in weights(mine.bundle, part).items():
            assert torch.allclose(weight, state[lora_names._flat(name)], atol=1e-5), (part, name)
            moved += not torch.allclose(weight, before[name], atol=1e-3)
        assert moved == sum(n.startswith(heads[part]) and n.endswith(("down.weight", "A.weight")) for n in tensors)
    with torch.no_grad():
        tokens, _, pooled, _ = theirs.encode_prompt("a fox", num_images_per_prompt=1, do_classifier_free_guidance=False)
    cond = mine.bundle.text(["a fox"])
    assert torch.allclose(cond.tokens, tokens, atol=1e-5)
    assert torch.allclose(cond.pooled, pooled, atol=1e-5)
    assert not torch.allclose(pipe.bundle.text(["a fox"]).tokens, tokens, atol=1e-3)
