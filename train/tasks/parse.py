"""The text encoder alone: it learns to say what stands where before a denoiser has to ask it.

Text encoders trained by contrast are bags of words: captions whose order says who stands left of whom look alike to them (When
and Why Vision-Language Models Behave like Bags-of-Words, Yuksekgonul et al. 2022, arXiv 2210.01936). A denoiser trained jointly
does not mend it: which object comes first tells nothing alone, nor does "left" against "right", so neither has a gradient to
begin with (4500 steps left the order at chance). Here the order comes first: while only "left of" and "above" are shown it
decides alone; then all relations are (Curriculum Learning, Bengio et al. 2009).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.job import Batch, Task
from train.world import objects, scene_at
from train.world.scenes import NUMBERS, OPPOSITE, Scene, captions
from train.world.words import read_tokenizer

# Where an object can stand by its caption: alone, on a side of another, in a pair, in a three.
SLOTS = ("one", "left of", "right of", "above", "below", "two", "three")
SHARES = (0.1, 0.8, 0.1)  # of scenes of one, two, and two or three of a kind


@dataclass(frozen=True)
class Parse(Task):
    """Goes on with the text encoder of an export, so that a linear head on its last token names the object in each of SLOTS.

    text: the export of the stage before, or a whole model folder; what else it holds is taken along. plain: the first so many
    samples show no other relation than "left of" and "above". keep: weight of the squared distance to the old tokens, so that
    a denoiser that knows those finds them again.
    """

    text: str
    plain: int = 26_000
    keep: float = 0.02

    def net(self) -> nn.Module:
        """The text encoder, its head, and a frozen copy of what it was."""
        return ParseLoss(self._encoder(), self._encoder().requires_grad_(False), self.keep)

    def _encoder(self) -> Any:
        from transformers import CLIPTextModel

        return CLIPTextModel.from_pretrained(Path(self.text) / "text_encoder", dtype=torch.float32)

    def batch(self, seed: int, ids: Sequence[int]) -> Batch:
        """tokens: [B,L]; slots: [B,7], the number of the object in each, 0 for none."""
        words, slots = [], []
        for i in ids:
            scene, _ = scene_at(seed + 13, i, SHARES)
            known = [c for c in captions(scene) if i >= self.plain or not {"right", "below"} & set(c.split())]
            words.append(known[np.random.Generator(np.random.Philox(key=[seed + 17, i])).integers(len(known))])
            slots.append(filled(scene))
        tokens = read_tokenizer(self.text)(words, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return {"tokens": tokens, "slots": torch.tensor(slots)}

    def export(self, net: Any, folder: Path) -> None:
        """Write `text_encoder/` and copies of the other parts."""
        shutil.copytree(self.text, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("text_encoder"))
        net.text.save_pretrained(folder / "text_encoder")


def filled(scene: Scene) -> list[int]:
    """Which object stands in each of SLOTS: its number from 1 on, 0 for none."""
    number = {name: 1 + i for i, name in enumerate(objects())}
    first, second = scene.placed[0].name, scene.placed[-1].name
    if scene.kind == "two":
        found = {scene.relation: first, OPPOSITE[scene.relation]: second}
    else:
        found = {{1: "one", **NUMBERS}[len(scene.placed)]: first}
    return [number[found[slot]] if slot in found else 0 for slot in SLOTS]


class ParseLoss(nn.Module):
    """Cross-entropy of the objects named in the slots, and the distance to the tokens of before."""

    def __init__(self, text: Any, before: Any, keep: float) -> None:
        super().__init__()
        self.text, self.before, self.keep = text, before, keep
        self.reader = nn.Linear(text.config.hidden_size, len(SLOTS) * (1 + len(objects())))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """tokens [B,L], slots [B,7] -> loss; named: nats per slot; moved: squared distance; right: share of whole scenes."""
        tokens = self.text(batch["tokens"]).last_hidden_state  # [B,L,width]
        with torch.no_grad():
            old = self.before(batch["tokens"]).last_hidden_state
        logits = self.reader(tokens[:, -1].float()).unflatten(-1, (len(SLOTS), -1))  # [B,7,objects + 1]
        named, moved = F.cross_entropy(logits.flatten(0, 1), batch["slots"].flatten()), (tokens - old).square().mean()
        right = (logits.argmax(-1) == batch["slots"]).all(1).float().mean()
        return {"loss": named + self.keep * moved, "named": named, "moved": moved, "right": right}
