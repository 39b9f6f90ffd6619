"""Models that have learned nothing yet: a fresh network in a whole folder, with the codec and the text encoder of another.

U-Net: Rombach et al. 2022, arXiv 2112.10752. DiT with adaLN-Zero: Scalable Diffusion Models with Transformers, Peebles and Xie
2022, arXiv 2212.09748, section 3.2: every block begins as the identity, and the output as zero. diffusers' classes leave those
layers at random; here they are really zero. A DiT that is told the caption is PixArt-alpha's, Chen et al. 2023, arXiv
2310.00426, section 2.3: one adaLN for all blocks, a table for each, and attention to the text that begins as nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ldm_pipe.errors import UsageError
from ldm_pipe.parts import read_json

Schedule = Literal["flow", "linear", "scaled_linear", "cosine"]


@dataclass(frozen=True)
class Fresh:
    """The [network] table.

    kind: "unet" or "text_dit" (told the caption), or "dit" (told a class: every distinct caption is one). channels: of each
    resolution, from the latents' own down by factors of two (U-Net), or the one width (DiT). attention, layers: of each
    resolution (U-Net); layers[0] blocks (DiT). heads: of every attention. patch: latent pixels of a side of a token (DiT).
    side: pixels of the pictures. schedule and prediction: the path and what is predicted; zero_terminal: the table's last entry
    has no signal. variance: the network also learns its variance (with objective.hybrid).
    """

    kind: Literal["unet", "dit", "text_dit"] = "unet"
    channels: tuple[int, ...] = (128, 256, 512)
    attention: tuple[bool, ...] = (False, True, True)
    layers: tuple[int, ...] = (2, 2, 2)
    heads: int = 8
    patch: int = 2
    side: int = 256
    schedule: Schedule = "flow"
    prediction: Literal["eps", "v", "x0", "flow"] = "flow"
    zero_terminal: bool = False
    variance: bool = False

    def __post_init__(self) -> None:
        if self.kind == "unet" and not len(self.channels) == len(self.attention) == len(self.layers):
            raise UsageError("network: channels, attention and layers take one value per resolution")
        if (self.schedule == "flow") != (self.prediction == "flow"):
            raise UsageError("network: prediction flow goes with schedule flow, and only with it")
        if self.zero_terminal and (self.schedule == "flow" or self.prediction == "eps"):
            raise UsageError("network: zero_terminal takes a table, and prediction v or x0")
        if self.channels[0] % self.heads:
            raise UsageError(f"network: channels of {self.channels[0]} are not a multiple of {self.heads} heads")
        if self.kind != "unet" and self.channels[0] % 4:
            raise UsageError(f"network: channels is {self.channels[0]}; a {self.kind} takes a multiple of 4, for its positions")

    def write(self, frame: Path, folder: Path, captions: Sequence[str], seed: int) -> None:
        """Fill `folder` with a whole model: fresh weights drawn from `seed`, the rest from the folder `frame`."""
        for part in ("vae",) if self.kind == "dit" else ("vae", "text_encoder", "tokenizer"):
            if not (frame / part).is_dir():
                raise UsageError(f"task.model {str(frame)!r} has no {part} to lend")
            shutil.copytree(frame / part, folder / part)
        config = read_json(frame / "vae" / "config.json")
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self._build(int(config["latent_channels"]), self.side // factor, frame, len(captions))
        network.save_pretrained(folder / ("unet" if self.kind == "unet" else "transformer"))
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(self._scheduler()))
        (folder / "model_index.json").write_text(json.dumps(self._index(captions), indent=1))
        flow = self.schedule == "flow"
        usual = {"sampler": "euler" if flow else "dpm2m", "spacing": "flow" if flow else "trailing"}
        (folder / "ldm_pipe.json").write_text(json.dumps({"size": [self.side, self.side], **usual}))

    def _build(self, channels: int, side: int, frame: Path, classes: int) -> Any:
        out = channels * (1 + self.variance)
        if self.kind == "dit":
            return _dit(self, channels, out, side, classes)
        text = read_json(frame / "text_encoder" / "config.json")
        if text.get("model_type", "clip_text_model") != "clip_text_model":
            raise UsageError(f"a {self.kind} is told captions by a CLIP; the text encoder of task.model {str(frame)!r} is none")
        return (_unet if self.kind == "unet" else _text_dit)(self, channels, out, side, text["hidden_size"])

    def _scheduler(self) -> dict[str, Any]:
        if self.schedule == "flow":  # by the class of diffusers that its pipelines of tables and of flows take alike
            flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0, "steps_offset": 1}
            return {"_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": 1000, **flow}
        names = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
        curve = {"cosine": "squaredcos_cap_v2"}.get(self.schedule, self.schedule)
        ends = {"beta_start": 0.00085, "beta_end": 0.012} if self.schedule == "scaled_linear" else {}
        named = {"_class_name": "DDIMScheduler", "prediction_type": names[self.prediction], "beta_schedule": curve, **ends}
        return {
            **named,
            "num_train_timesteps": 1000,
            "timestep_spacing": "trailing",
            "clip_sample": False,  # diffusers would, at 1, which latents pass
            "rescale_betas_zero_snr": self.zero_terminal,
        }

    def _index(self, captions: Sequence[str]) -> dict[str, Any]:
        both = {"scheduler": ["diffusers", self._scheduler()["_class_name"]], "vae": ["diffusers", "AutoencoderKL"]}
        if self.kind == "dit":
            classes = {str(i): c.replace(",", " ") for i, c in enumerate(captions)}
            return {
                "_class_name": "DiTPipeline",
                "transformer": ["diffusers", "DiTTransformer2DModel"],
                **both,
                "id2label": classes,
            }
        text = {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
        if self.kind == "text_dit":
            return {
                "_class_name": "PixArtSigmaPipeline",
                "transformer": ["diffusers", "PixArtTransformer2DModel"],
                **both,
                **text,
            }
        none = {part: [None, None] for part in ("feature_extractor", "image_encoder", "safety_checker")}
        return {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], **both, **text, **none}


def _unet(plan: Fresh, channels: int, out: int, side: int, width: int) -> Any:
    """A U-Net told the caption by cross-attention, its output zero."""
    from diffusers import UNet2DConditionModel

    kinds = ["CrossAttn" if a else "" for a in plan.attention]
    unet = UNet2DConditionModel(
        sample_size=side,
        in_channels=channels,
        out_channels=out,
        layers_per_block=plan.layers,
        block_out_channels=plan.channels,
        down_block_types=tuple(f"{k}DownBlock2D" for k in kinds),
        up_block_types=tuple(f"{k}UpBlock2D" for k in reversed(kinds)),
        cross_attention_dim=width,
        attention_head_dim=plan.heads,  # diffusers' name for the number of heads
        norm_num_groups=min(32, plan.channels[0] // 4),
    )
    _zero(unet.conv_out)
    return unet


def _dit(plan: Fresh, channels: int, out: int, side: int, classes: int) -> Any:
    """A DiT whose blocks are the identity and whose output is zero."""
    from diffusers import DiTTransformer2DModel

    dit = DiTTransformer2DModel(
        num_attention_heads=plan.heads,
        attention_head_dim=plan.channels[0] // plan.heads,
        in_channels=channels,
        out_channels=out,
        num_layers=plan.layers[0],
        sample_size=side,
        patch_size=plan.patch,
        num_embeds_ada_norm=classes,
    )
    for block in dit.transformer_blocks:
        _zero(block.norm1.linear)
    for layer in (dit.proj_out_1, dit.proj_out_2):
        _zero(layer)
    return dit


def _text_dit(plan: Fresh, channels: int, out: int, side: int, width: int) -> Any:
    """PixArt's transformer whose blocks are the identity and whose output is zero. width: of the text encoder."""
    from diffusers import PixArtTransformer2DModel

    dit = PixArtTransformer2DModel(
        num_attention_heads=plan.heads,
        attention_head_dim=plan.channels[0] // plan.heads,
        in_channels=channels,
        out_channels=out,
        num_layers=plan.layers[0],
        cross_attention_dim=plan.channels[0],
        caption_channels=width,
        sample_size=side,
        patch_size=plan.patch,
        use_additional_conditions=False,
    )
    for block in dit.transformer_blocks:
        nn.init.zeros_(block.scale_shift_table)
        _zero(block.attn2.to_out[0])
    for layer in (dit.adaln_single.linear, dit.proj_out):
        _zero(layer)
    return dit


def _zero(layer: Any) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
