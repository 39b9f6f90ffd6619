"""What small trainings put around frozen networks: low-rank branches of layers, and rows of the table of words."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.errors import UsageError
from train.deltas import Delta
from train.objectives.denoiser import DenoiserLoss


class Around(nn.Module):
    """A denoising loss whose networks are frozen but for `branches`: only those are in this module, and in checkpoints."""

    def __init__(self, inner: DenoiserLoss, branches: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({name.replace(".", "-"): branch for name, branch in branches.items()})
        self.uncertainty = inner.uncertainty
        inner.requires_grad_(False)
        if self.uncertainty is not None:
            self.uncertainty.requires_grad_(True)
        self.frozen = [inner]  # in a list: no module of this one

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of the inner module."""
        inner = self.frozen[0].to(next(self.parameters()).device)
        found: dict[str, Tensor] = inner(batch)
        return found


class Low(nn.Module):
    """What a layer's output is given beside it: alpha / rank * up(down(x)), nothing at first.

    LoRA, Hu et al. 2021, arXiv 2106.09685, section 4.1; a convolution's down keeps its kernel, stride and padding (LoCon).
    """

    def __init__(self, layer: Any, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self.place: Any = (layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else None
        self.down = nn.Parameter(torch.empty(rank, *layer.weight.shape[1:]))
        self.up = nn.Parameter(torch.zeros(len(layer.weight), rank, *((1, 1) if self.place else ())))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x as the layer is given it -> [..., out], or [B,out,H,W]."""
        if self.place is None:
            return F.linear(F.linear(x, self.down), self.up) * self.scale
        return F.conv2d(F.conv2d(x, self.down, None, *self.place), self.up) * self.scale

    def tensors(self) -> dict[str, Tensor]:
        """What it holds, by the names of `lora_names.LEAVES`."""
        return {"down": self.down, "up": self.up}

    def beside(self, layer: nn.Module) -> Any:
        """Add this branch to a layer's output; the handle takes it off."""
        return layer.register_forward_hook(lambda _, given, out: out + self(given[0]))


class Rows(nn.Module):
    """The vectors of a learned word, [n, width], in the place of what the table of an encoder holds at `ids`."""

    def __init__(self, rows: Tensor, ids: list[int]) -> None:
        super().__init__()
        self.rows, self.ids = nn.Parameter(rows.clone()), ids

    def beside(self, table: nn.Module) -> Any:
        """Take these rows wherever their ids occur; the handle takes them off."""

        def looked_up(_: nn.Module, given: tuple[Tensor], out: Tensor) -> Tensor:
            for k, i in enumerate(self.ids):
                out = torch.where((given[0] == i)[..., None], self.rows[k].to(out.dtype), out)
            return out

        return table.register_forward_hook(looked_up)


@dataclass(frozen=True)
class Shape:
    """The [lora] table.

    rank, alpha: of every branch, where its entry says nothing else (alpha 0: the rank). layers: which layers of the network
    get one, each entry a pattern of names with *, "PATTERN=RANK" or "PATTERN=RANK/ALPHA"; the first that matches counts.
    text_layers: the same of the text encoder. kind: what a branch is (train/deltas.py); of oft the rank, one for all, is the
    side of the blocks that turn, and there is no alpha.
    """

    kind: Literal["lora", "dora", "loha", "lokr", "oft"] = "lora"
    rank: int = 4
    alpha: float = 0.0
    layers: tuple[str, ...] = ("*attn*.to_q", "*attn*.to_k", "*attn*.to_v", "*attn*.to_out.0")
    text_layers: tuple[str, ...] = ("*self_attn.*_proj",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"lora.rank is {self.rank}; it takes 1 or more")
        for entry in (*self.layers, *self.text_layers):
            self._entry(entry)
        if self.kind == "oft" and (self.alpha or any("=" in text for text in (*self.layers, *self.text_layers))):
            raise UsageError("lora: oft takes one rank for every layer, and no alpha; leave out alpha and every =RANK")

    def _entry(self, text: str) -> tuple[str, int, float]:
        """(pattern, rank, alpha) of an entry."""
        pattern, equals, numbers = text.partition("=")
        rank, slash, alpha = numbers.partition("/")
        try:
            found = int(rank) if equals else self.rank
            own = float(alpha) if slash else (self.alpha or found)
        except ValueError:
            found, own = 0, 0.0
        if found < 1 or own <= 0:
            raise UsageError(f"lora: {text!r} is not of the form PATTERN, PATTERN=RANK or PATTERN=RANK/ALPHA, numbers above 0")
        return pattern, found, own

    def branches(self, network: nn.Module, patterns: tuple[str, ...]) -> dict[str, Low | Delta]:
        """A branch for every layer that matches, by its name. Raises UsageError on a pattern that matches none."""
        entries = [self._entry(text) for text in patterns]
        layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        for pattern, _, _ in entries:
            if not fnmatch.filter(layers, pattern):
                raise UsageError(
                    f"lora: {pattern!r} matches no layer of {type(network).__name__}, such as {next(iter(layers), '')!r}"
                )
        found: dict[str, Low | Delta] = {}
        for name, layer in layers.items():
            entry = next((e for e in entries if fnmatch.fnmatchcase(name, e[0])), None)
            if entry is not None:
                if getattr(layer, "groups", 1) != 1:
                    raise UsageError(f"lora: {name!r} is a convolution in groups, which has no low-rank branch here")
                found[name] = self._branch(name, layer, entry[1], entry[2])
        return found

    def _branch(self, name: str, layer: nn.Module, rank: int, alpha: float) -> Low | Delta:
        if self.kind == "lora":
            return Low(layer, rank, alpha)
        try:
            return Delta(self.kind, layer, rank, alpha)
        except UsageError as error:
            raise UsageError(f"lora: {name!r}: {error}") from error
