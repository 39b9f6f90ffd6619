"""ControlNet and T2I-Adapter: a second network learns to steer a frozen one by a picture, and changes nothing at first.

Adding Conditional Control to Text-to-Image Diffusion Models, Zhang et al. 2023, arXiv 2302.05543, section 3: a copy of the way
down behind zero convolutions, learning rate 1e-5, half of the captions dropped. T2I-Adapter, Mou et al. 2023, arXiv 2302.08453,
section 3.3: a small network that reads the picture alone, learning rate 1e-5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ldm_pipe.control.t2i_adapter import T2IAdapter
from ldm_pipe.errors import UsageError
from ldm_pipe.parts import foreign
from ldm_pipe.patch import Change, Run, changed, root
from train.adapting import Around
from train.data.precomputed import pixels
from train.hints import hint
from train.job import Batch
from train.tasks.lora import Adapting

WIDTHS = (16, 32, 96, 256)  # of the layers that read the picture of a ControlNet, one more than the halvings of the codec


class Steered(Around):
    """The loss of a model that a network beside it steers by the batch's "hint", [B,3,H,W] in 0..1."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses."""
        network, beside = root(self.frozen[0].model), self.branches["control"]
        kind = t2i if type(beside).__name__ == "T2IAdapter" else controlnet
        with changed(network, {"": [kind(beside, network, batch["hint"])]}):
            return super().forward(batch)


def t2i(adapter: Any, network: nn.Module, picture: Tensor) -> Change:
    """The change that adds an adapter's features of a picture."""
    return T2IAdapter(tuple(adapter(picture))).changes(network, Run(()))[""]


def controlnet(beside: Any, network: nn.Module, picture: Tensor) -> Change:
    """The change that adds what a ControlNet makes of a picture."""

    def steered(call: Any, x: Tensor, time: Tensor, **given: Any) -> Any:
        names = ("encoder_hidden_states", "timestep_cond", "added_cond_kwargs")
        taken = {n: given[n] for n in names if given.get(n) is not None}
        down, middle = beside(x, time.expand(len(x)), controlnet_cond=picture.to(x), return_dict=False, **taken)
        more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return call(x, time, **given, **more)

    return steered


@dataclass(frozen=True)
class ControlNet(Adapting):
    """Trains a network beside a U-Net; the fields are those of the task finetune, of which nothing learns.

    kind: "controlnet" or "t2i_adapter". hint: "given" (photo.condition.png beside photo.png) or "edges" (of the picture). The
    export is a folder of diffusers, for `generate --control`.
    """

    shows: ClassVar[bool] = False

    kind: Literal["controlnet", "t2i_adapter"] = "controlnet"
    hint: Literal["given", "edges"] = "given"

    def branches(self) -> dict[str, nn.Module]:
        """The network."""
        if not (self.source / "unet").is_dir():
            raise UsageError(f"{self.kind} takes a model with a U-Net")
        if self.kind == "controlnet" and self.bundle.vectors is not None:
            raise UsageError('a model that is told pictures (unCLIP) takes no controlnet; kind = "t2i_adapter" steers it')
        unet, factor = foreign(self.source / "unet", "diffusers", "UNet2DConditionModel"), self.bundle.codec.factor
        made = _controlnet(unet, factor) if self.kind == "controlnet" else _adapter(unet, factor)
        return {"control": made.requires_grad_(True).train(False)}

    def net(self) -> nn.Module:
        """The network beside the frozen model."""
        around: Any = super().net()
        return Steered(around.frozen[0], {"control": around.branches["control"]})

    def batch(self, seed: int, ids: Any) -> Batch:
        """The samples, and what steers them."""
        data = self.dataset
        seen = [data.seen(seed, i) for i in ids]
        hints = [hint(data, s, self.hint, pixels(data, s)) for s in seen]
        return {**super().batch(seed, ids), "hint": torch.stack(hints)}

    def export(self, net: Any, folder: Path) -> None:
        """The network as a folder of diffusers."""
        net.branches["control"].save_pretrained(folder)


def _controlnet(unet: Any, factor: int) -> Any:
    """A copy of the way down, its zero convolutions still zero."""
    from diffusers import ControlNetModel

    widths = WIDTHS[: int(math.log2(factor)) + 1]
    if 2 ** (len(widths) - 1) != factor:
        raise UsageError(f"a controlnet takes a codec of factor 1 to {2 ** (len(WIDTHS) - 1)}, this model's has {factor}")
    if isinstance(unet.config.layers_per_block, int):
        return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths)
    from ldm_pipe.networks.level_controlnet import LevelControlNet

    return LevelControlNet.from_unet(unet, conditioning_embedding_out_channels=widths)


def _adapter(unet: Any, factor: int) -> Any:
    """An adapter that gives zeros: its first convolution and every bias are zero, and the skips let gradients through."""
    from diffusers import T2IAdapter as Adapter

    made = Adapter(in_channels=3, channels=list(unet.config.block_out_channels), num_res_blocks=2, downscale_factor=factor)
    nn.init.zeros_(made.adapter.conv_in.weight)
    for name, weight in made.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weight)
    return made
