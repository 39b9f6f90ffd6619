"""Custom Diffusion: the keys and values of what attends to the text, and a new word, learn a concept; several merge.

Multi-Concept Customization of Text-to-Image Diffusion, Kumari et al. 2022, arXiv 2212.04488, section 3.1-3.2 and eq. 4. The
export is a file of weight differences, which `generate --lora` adds, and the word's vector, for `--embedding`.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def merged(weight: Tensor, targets: Sequence[tuple[Tensor, Tensor]], regular: Tensor, ridge: float = 0.0) -> Tensor:
    """One weight that gives every concept what its own gave, and changes the least elsewhere.

    weight: [out,d] before any training. targets: for each concept (tokens [s,d] of its words, its trained weight [out,d]).
    regular: tokens [n,d] of many captions, n at least d (else a ridge). Returns [out,d] in float64: minimises
    |W C_reg' - W0 C_reg'| under W C*' = V (eq. 4 and its Lagrangian solution); a token that stands twice counts once, as the
    first concept has it. Raises UsageError where the captions hold too few tokens.
    """
    plain, seen = weight.double(), regular.double()
    wanted = torch.cat([tokens.double() for tokens, _ in targets])
    values = torch.cat([tokens.double() @ own.double().T for tokens, own in targets])
    kept = [i for i, row in enumerate(wanted) if not any(torch.allclose(row, other) for other in wanted[:i])]
    wanted, values = wanted[kept], values[kept]
    gram = _filled(seen.T @ seen, ridge)
    d = torch.linalg.solve(gram, wanted.T).T  # [s,d]
    missing = values.T - plain @ wanted.T  # [out,s]
    return plain + torch.linalg.solve(d @ wanted.T, missing.T).T @ d


def weighed(
    weight: Tensor, targets: Sequence[tuple[Tensor, Tensor]], regular: Tensor, importance: float, ridge: float = 0.0
) -> Tensor:
    """One weight that nearly gives every concept what its own gave, and changes little elsewhere.

    The arguments are those of `merged`. Returns [out,d] in float64: minimises mean |(W - W0) c'|^2 over the regular tokens +
    importance * mean |(W - W_own) c'|^2 over the concepts' + ridge |W - W0|^2. Unlike `merged` it takes any number of tokens,
    and such as are nearly the same under different concepts.
    """
    plain, seen = weight.double(), regular.double()
    wanted = torch.cat([tokens.double() for tokens, _ in targets])
    moved = torch.cat([tokens.double() @ (own.double() - plain).T for tokens, own in targets])
    gram = seen.T @ seen / len(seen) + importance * wanted.T @ wanted / len(wanted)
    return plain + torch.linalg.solve(_filled(gram, ridge), importance * wanted.T @ moved / len(wanted)).T


def _filled(gram: Tensor, ridge: float) -> Tensor:
    """A Gram matrix [d,d] with a ridge on it. Raises UsageError where it has no inverse."""
    gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    if torch.linalg.matrix_rank(gram) < len(gram):
        raise UsageError(f"the captions do not fill the text's {len(gram)} widths; give more captions, or a ridge above 0")
    return gram
