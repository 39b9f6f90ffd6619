"""LoRA and its relatives: small branches of a frozen model learn from a folder of pictures.

Low-Rank Adaptation of Large Language Models, Hu et al. 2021, arXiv 2106.09685. The export is a few megabytes in the layouts of
train/adapter_files.py. All load with `generate --lora FILE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ldm_pipe import families, lora, strict
from ldm_pipe.errors import UsageError
from ldm_pipe.lora_names import NETWORK
from train import adapter_files, text_encoders
from train.adapting import Around, Shape
from train.data.dataset import Data
from train.tasks.finetune import Finetune


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
        used = set[int]()
        if self.train_text:
            wanted |= dict.fromkeys(text_encoders.clips(self.bundle), self.shape.text_layers)
            used = text_encoders.reached(self.bundle)
        found: dict[str, nn.Module] = {}
        for part, patterns in wanted.items():
            for name, branch in self.shape.branches(known[part], patterns).items():
                layer: Any = known[part].get_submodule(name)
                if part == NETWORK or id(layer.weight) in used:
                    self.handles.append(branch.beside(layer))
                    found[f"{part}.{name}"] = branch
        return found

    def export(self, net: Any, folder: Path) -> None:
        """The branches in every layout that holds their kind."""
        named = {name.replace("-", "."): branch for name, branch in net.branches.items()}
        name = "transformer" if hasattr(self.bundle.model.network, "transformer") else "unet"
        alone = families.encoders(self.bundle.family) == ["text_encoder"]
        adapter_files.write(named, self.shape.kind, (name, lora.parts(self.bundle)[NETWORK]), folder, alone)
