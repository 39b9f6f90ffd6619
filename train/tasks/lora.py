"""LoRA: low-rank branches of a frozen model learn from a folder of pictures.

Low-Rank Adaptation of Large Language Models, Hu et al. 2021, arXiv 2106.09685. The export is a file of a few megabytes in two
layouts: diffusers' with peft's metadata, and kohya's. Both load with `generate --lora FILE`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_pipe import lora, strict
from ldm_pipe.errors import UsageError
from ldm_pipe.lora_names import NETWORK
from train.adapting import Around, Low, Shape
from train.data.dataset import Data
from train.tasks.finetune import Finetune

PEFT, KOHYA = "pytorch_lora_weights.safetensors", "kohya.safetensors"


class Adapting(Finetune):
    """Base of the trainings that leave every weight of the model as it is, and learn `branches` beside them."""

    def branches(self) -> dict[str, nn.Module]:
        """What is trained, by name, put in place; the handles go to `handles`."""
        raise TypeError(f"{type(self).__name__} trains nothing")

    @cached_property
    def handles(self) -> list[Any]:
        """What takes the branches of the last `net` off again."""
        return []

    def net(self) -> nn.Module:
        """The branches around the frozen model."""
        if self.repa:
            raise UsageError("a second teacher (repa) goes with the task finetune, where the whole network learns")
        inner: Any = super().net()
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        return Around(inner, self.branches())


@dataclass(frozen=True)
class Lora(Adapting):
    """Trains low-rank branches; the fields are those of the task finetune, and the [lora] table (train/adapting.py: Shape).

    train_network, train_text: where the branches are.
    """

    TABLES: ClassVar[Mapping[str, type]] = {"data": Data, "lora": Shape}

    lora: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.shape

    @cached_property
    def shape(self) -> Shape:
        """The [lora] table."""
        return strict.build(Shape, self.lora, "[lora]")

    def branches(self) -> dict[str, nn.Module]:
        """One for every layer that is named, as "part.layer"."""
        known = lora.parts(self.bundle)
        wanted = {NETWORK: self.shape.layers} if self.train_network else {}
        wanted |= {"text_encoder": self.shape.text_layers} if self.train_text else {}
        found: dict[str, nn.Module] = {}
        for part, patterns in wanted.items():
            for name, branch in self.shape.branches(known[part], patterns).items():
                self.handles.append(branch.beside(known[part].get_submodule(name)))
                found[f"{part}.{name}"] = branch
        return found

    def export(self, net: Any, folder: Path) -> None:
        """The branches in both layouts."""
        named = {name.replace("-", "."): branch for name, branch in net.branches.items() if isinstance(branch, Low)}
        write(named, "transformer" if hasattr(self.bundle.model.network, "transformer") else "unet", folder)


def write(branches: Mapping[str, Low], network: str, folder: Path) -> None:
    """Branches by "part.layer" as the two files. network: what diffusers calls the network, "unet" or "transformer"."""
    peft, kohya, said = dict[str, Tensor](), dict[str, Tensor](), dict[str, Any]()
    alpha = next(iter(branches.values())).alpha  # one for the whole file: diffusers misreads a mixture in kohya's layout
    for name, branch in branches.items():
        part, _, layer = name.partition(".")
        head = network if part == NETWORK else part
        down, up = (t.detach().cpu().contiguous().clone() for t in (branch.down, branch.up))
        dotted = f"{head}.{layer}" if part == NETWORK else f"{head}.text_model.{layer}"
        peft |= {f"{dotted}.lora_A.weight": down, f"{dotted}.lora_B.weight": up}
        flat = ("lora_unet_" if part == NETWORK else "lora_te_text_model_") + layer.replace(".", "_")
        kohya |= {f"{flat}.lora_down.weight": down.clone(), f"{flat}.lora_up.weight": up * (branch.alpha / alpha)}
        kohya[f"{flat}.alpha"] = down.new_tensor(alpha)
        said.setdefault(f"{head}.r", len(down))
        said.setdefault(f"{head}.lora_alpha", branch.alpha)
        said.setdefault(f"{head}.target_modules", []).append(layer)
        said.setdefault(f"{head}.rank_pattern", {})[layer] = len(down)
        said.setdefault(f"{head}.alpha_pattern", {})[layer] = branch.alpha
    save_file(peft, folder / PEFT, metadata={lora.METADATA: json.dumps(said)})  # one entry: of several the order is random
    save_file(kohya, folder / KOHYA, metadata={"ss_network_module": "networks.lora"})
