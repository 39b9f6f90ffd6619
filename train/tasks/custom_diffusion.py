"""Custom Diffusion: the keys and values of what attends to the text, and a new word, learn a concept; several merge.

Multi-Concept Customization of Text-to-Image Diffusion, Kumari et al. 2022, arXiv 2212.04488, section 3.1-3.2 and eq. 4. The
export is a file of weight differences, which `generate --lora` adds, and the word's vector, for `--embedding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_pipe import embedding, loading, lora
from ldm_pipe.errors import UsageError
from ldm_pipe.lora_names import NETWORK
from train.tasks import textual_inversion
from train.tasks.dreambooth import Dreambooth

DIFFERENCES = "custom_diffusion.safetensors"


class Whole(nn.Module):
    """A difference of a whole weight beside a layer that reads tokens [B,L,D], nothing at first.

    The first token, which begins every prompt, teaches it nothing (the authors' code detaches its keys and values).
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(layer.weight))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B,L,D] -> [B,L,out]."""
        out = F.linear(tokens, self.weight)
        return torch.cat([out[:, :1].detach(), out[:, 1:]], dim=1)


@dataclass(frozen=True)
class CustomDiffusion(Dreambooth):
    """Trains the keys and values of cross-attention and a word; the fields are those of the task dreambooth without [lora].

    word, begin: the new word, and a known one whose vector it begins with. instance: holds the word.
    """

    train_text: bool = True
    instance: str = "a photo of a <new> dog"
    word: str = "<new>"
    begin: str = "object"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.word not in self.instance:
            raise UsageError(f"instance is {self.instance!r}; it takes a caption with the word {self.word!r}")
        if self.lora or self.full or not self.train_text:
            raise UsageError("custom_diffusion takes no [lora] and no full, and train_text stays true")

    @cached_property
    def bundle(self) -> Any:
        """The model, loaded, with the word in it."""
        plain = loading.load(self.model)
        return embedding.taught(plain, self.word, [textual_inversion.begun(plain, self.begin)], "task.word")[0]

    def branches(self) -> dict[str, nn.Module]:
        """The word's vector, and a difference for every key and value that reads the text."""
        network = lora.parts(self.bundle)[NETWORK]
        found: dict[str, nn.Module] = {"word": textual_inversion.placed(self, self.word, 1)}
        for name, layer in network.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                branch = found[name] = Whole(layer)
                self.handles.append(layer.register_forward_hook(lambda _, given, out, own=branch: out + own(given[0])))
        if len(found) == 1:
            raise UsageError(f"custom_diffusion takes a U-Net that attends to text, not {type(network).__name__}")
        return found

    def export(self, net: Any, folder: Path) -> None:
        """The differences, and the word in both layouts."""
        moved = {n.replace("-", "."): b.weight.detach().cpu() for n, b in net.branches.items() if isinstance(b, Whole)}
        save_file({f"lora_unet_{n.replace('.', '_')}.diff": t.contiguous() for n, t in moved.items()}, folder / DIFFERENCES)
        textual_inversion.write(self.word, net.branches["word"].rows, folder)
