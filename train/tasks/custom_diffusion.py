"""Custom Diffusion: the keys and values of what attends to the text, and a new word, learn a concept, or several together.

Multi-Concept Customization of Text-to-Image Diffusion, Kumari et al. 2022, arXiv 2212.04488, section 3.1-3.2. The export is a
file of weight differences, which `generate --lora` adds, and the vector of every word, for `--embedding`.
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
from train.data.dataset import Seen
from train.data.source import Fault, Row
from train.job import Job
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

    word, begin: the new word, and a known one whose vector it begins with; or a list of words, which learn together, and of
    what they begin with. instance: holds the word. With several, every picture has a caption that holds one.
    """

    train_text: bool = True
    instance: str = "a photo of a <new> dog"
    word: str | tuple[str, ...] = "<new>"
    begin: str | tuple[str, ...] = "object"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.words) == 1 and self.words[0] not in self.instance:
            raise UsageError(f"instance is {self.instance!r}; it takes a caption with the word {self.words[0]!r}")
        if not 1 <= len(self.words) == len(set(self.words)) == len(self._begins):
            raise UsageError("word and begin take a text each, or lists of one length, no word twice")
        if self.lora or self.full or not self.train_text:
            raise UsageError("custom_diffusion takes no [lora] and no full, and train_text stays true")

    @property
    def words(self) -> tuple[str, ...]:
        """The new words."""
        return (self.word,) if isinstance(self.word, str) else self.word

    @property
    def _begins(self) -> tuple[str, ...]:
        return (self.begin,) if isinstance(self.begin, str) else self.begin

    @cached_property
    def bundle(self) -> Any:
        """The model, loaded, with the words in it."""
        found = plain = loading.load(self.model)
        for word, begin in zip(self.words, self._begins, strict=True):
            found = embedding.taught(found, word, [textual_inversion.begun(plain, begin)], "task.word")[0]
        return found

    def said(self, seed: int, seen: Seen) -> str:
        """Of one word, the instance where a picture has no caption; of several, the caption, dropped or not."""
        return super().said(seed, seen) if len(self.words) == 1 else seen.caption

    def check(self, job: Job) -> list[Fault]:
        """Also pictures that tell of none of several words."""
        found = super().check(job)
        return found if any(f.fatal for f in found) else found + [Fault(row.where, self._wanted) for row in self._silent()]

    def net(self) -> nn.Module:
        """What learns."""
        for row in self._silent():
            raise UsageError(f"{row.name!r}: {self._wanted}")
        return super().net()

    @property
    def _wanted(self) -> str:
        return f"its caption holds none of {', '.join(self.words)}; with several words every picture has a caption with one"

    def _silent(self) -> list[Row]:
        rows = self.dataset.rows if len(self.words) > 1 else ()
        return [row for row in rows if not all(any(w in said for w in self.words) for said in row.captions or ("",))]

    def branches(self) -> dict[str, nn.Module]:
        """The words' vectors, and a difference for every key and value that reads the text."""
        network = lora.parts(self.bundle)[NETWORK]
        found: dict[str, nn.Module] = {n: textual_inversion.placed(self, w, 1) for n, w in self._named().items()}
        for name, layer in network.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                branch = found[name] = Whole(layer)
                self.handles.append(layer.register_forward_hook(lambda _, given, out, own=branch: out + own(given[0])))
        if len(found) == len(self.words):
            raise UsageError(f"custom_diffusion takes a U-Net that attends to text, not {type(network).__name__}")
        return found

    def export(self, net: Any, folder: Path) -> None:
        """The differences, and the words in both layouts, each in files of its own."""
        moved = {n.replace("-", "."): b.weight.detach().cpu() for n, b in net.branches.items() if isinstance(b, Whole)}
        save_file({f"lora_unet_{n.replace('.', '_')}.diff": t.contiguous() for n, t in moved.items()}, folder / DIFFERENCES)
        for name, word in self._named().items():
            textual_inversion.write(word, net.branches[name].rows, folder, name.removeprefix("word"))

    def _named(self) -> dict[str, str]:
        """The words by the names of their branches: word, word_2, ..."""
        return {f"word_{k}" if k > 1 else "word": word for k, word in enumerate(self.words, 1)}
