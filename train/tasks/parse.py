"""The text encoder alone: it learns to say what stands where before a denoiser has to ask it.

Text encoders trained by contrast are bags of words: captions whose order says who stands left of whom look alike to them (When
and Why Vision-Language Models Behave like Bags-of-Words, Yuksekgonul et al. 2022, arXiv 2210.01936). A denoiser trained jointly
does not mend it: which object comes first tells nothing alone, nor does "left" against "right", so neither has a gradient to
begin with (4500 steps left the order at chance). Here the order comes first: while only "left of" and "above" are shown it
decides alone; then all relations are (Curriculum Learning, Bengio et al. 2009). What is found is written where a denoiser can
attend to it: on a token of its own for every side, as the object's own word would stand there (train/world/slots.py).
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
from train.world.scenes import article, captions
from train.world.slots import SLOT, roles
from train.world.words import read_tokenizer

SHARES = (0.1, 0.8, 0.1)  # of scenes of one, two, and two or three of a kind
SHARP, NEAR = 20.0, 3.5  # of the cross-entropy, and weight of the distance beside it, both of distances relative to the spread


@dataclass(frozen=True)
class Parse(Task):
    """Goes on with the text encoder of an export, so that its last four tokens name what stands left, right, above and below.

    text: the export of the stage before, or a whole model folder; what else it holds is taken along. plain: the first so many
    samples show no other relation than "left of" and "above". keep: weight of the squared distance of all other tokens to what
    they were, relative to the spread of the objects' tokens, so that a denoiser that knows those finds them again.
    """

    text: str
    plain: int = 26_000
    keep: float = 1.0

    def net(self) -> nn.Module:
        """The text encoder, a frozen copy of what it was, and where the objects' words stand."""
        before = self._encoder().requires_grad_(False)
        tokens = self._tokens([article(n) for n in objects()])
        last = tokens.eq(before.config.eos_token_id).int().argmax(1) - 1  # of the object's word
        with torch.no_grad():
            named = before(tokens).last_hidden_state[torch.arange(len(tokens)), last]
        return ParseLoss(self._encoder(), before, named, self.keep)

    def _encoder(self) -> Any:
        from transformers import CLIPTextModel

        return CLIPTextModel.from_pretrained(Path(self.text) / "text_encoder", dtype=torch.float32)

    def _tokens(self, words: Sequence[str]) -> Tensor:
        return torch.as_tensor(
            read_tokenizer(self.text)(list(words), padding="max_length", truncation=True, return_tensors="pt").input_ids
        )

    def batch(self, seed: int, ids: Sequence[int]) -> Batch:
        """tokens: [B,L]; slots: [B,4], the number of the object on each side, 0 for none."""
        words, slots = [], []
        numbers = {name: 1 + i for i, name in enumerate(objects())}
        for i in ids:
            scene, _ = scene_at(seed + 13, i, SHARES)
            known = [c for c in captions(scene) if i >= self.plain or not {"right", "below"} & set(c.split())]
            words.append(known[np.random.Generator(np.random.Philox(key=[seed + 17, i])).integers(len(known))])
            found = roles(scene)
            slots.append([numbers[found[side]] if side in found else 0 for side in SLOT])
        return {"tokens": self._tokens(words), "slots": torch.tensor(slots)}

    def export(self, net: Any, folder: Path) -> None:
        """Write `text_encoder/` and copies of the other parts."""
        shutil.copytree(self.text, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("text_encoder"))
        net.text.save_pretrained(folder / "text_encoder")


class ParseLoss(nn.Module):
    """How far the slots' tokens are from the words that they are to hold, and all others from what they were.

    named: [objects,width], where the objects' words stand. A slot's token is to stand there, moved by an offset of the slot's
    own at a right angle to the main differences of words: by it attention tells one side from another.
    """

    named: Tensor
    offsets: Tensor
    sides: Tensor

    def __init__(self, text: Any, before: Any, named: Tensor, keep: float) -> None:
        super().__init__()
        self.text, self.before, self.keep = text, before, keep
        differences = named - named.mean(0)
        self.spread = float(differences.square().sum(1).mean())
        offsets = torch.randn(len(SLOT), named.shape[1], generator=torch.Generator().manual_seed(0))
        main = torch.linalg.svd(differences, full_matrices=False)[2][: named.shape[1] // 2]  # directions, the strongest first
        offsets = offsets - offsets @ main.T @ main
        self.register_buffer("named", named, persistent=False)
        self.register_buffer("offsets", F.normalize(offsets) * self.spread**0.5, persistent=False)
        self.register_buffer("sides", torch.tensor(list(SLOT.values())), persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """tokens [B,L], slots [B,4] -> loss; named: nats per slot that is filled; near: its squared distance; moved: the other
        tokens' (both relative to the spread of words); right: share of filled slots whose nearest word is the right one."""
        tokens = self.text(batch["tokens"]).last_hidden_state  # [B,L,width]
        with torch.no_grad():
            old = self.before(batch["tokens"]).last_hidden_state
        filled = batch["slots"] > 0
        words = (tokens[:, self.sides] - self.offsets)[filled].float()  # [filled,width]
        wanted = batch["slots"][filled] - 1
        far = torch.cdist(words, self.named).square() / self.spread  # [filled,objects]
        count = max(1, len(wanted))
        named = F.cross_entropy(-SHARP * far, wanted, reduction="sum") / count
        near = far.gather(1, wanted[:, None]).sum() / count
        others = torch.ones(tokens.shape[:2], device=tokens.device)
        others[:, self.sides] -= filled.float()
        moved = ((tokens - old).square().sum(-1) * others).sum() / others.sum() / self.spread
        right = (far.argmin(1) == wanted).float().sum() / count
        return {"loss": named + NEAR * near + self.keep * moved, "named": named, "near": near, "moved": moved, "right": right}
