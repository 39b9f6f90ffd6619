"""The text encoder, and a CLIP to score with: contrastive training on rendered scenes and their captions.

Learning Transferable Visual Models From Natural Language Supervision, Radford et al. 2021, arXiv 2103.00020, figure 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.job import Batch, Task
from train.world import render, scene_at
from train.world.words import make_tokenizer, save_tokenizer


@dataclass(frozen=True)
class Clip(Task):
    """A small CLIPModel. width, image_width: of the towers; window: tokens of a prompt; patch: pixels of an image patch."""

    width: int = 192
    image_width: int = 128
    text_layers: int = 3
    image_layers: int = 3
    heads: int = 4
    projection: int = 128
    window: int = 24
    patch: int = 8

    def net(self) -> nn.Module:
        """The trainable CLIP."""
        from transformers import CLIPConfig, CLIPModel

        tokenizer = make_tokenizer(self.window)
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        text = {"vocab_size": len(tokenizer), "max_position_embeddings": self.window, "num_hidden_layers": self.text_layers}
        image = {"image_size": 64, "patch_size": self.patch, "num_hidden_layers": self.image_layers}
        config = CLIPConfig(
            text_config={**self._tower(self.width), **text, **ends, "pad_token_id": tokenizer.pad_token_id},
            vision_config={**self._tower(self.image_width), **image},
            projection_dim=self.projection,
        )
        return ClipLoss(CLIPModel(config))

    def _tower(self, width: int) -> dict[str, int]:
        return {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": self.heads}

    def batch(self, seed: int, ids: Sequence[int]) -> Batch:
        """images: [B,3,64,64] in -1..1; tokens: [B,L]."""
        pairs = [scene_at(seed + 7, i) for i in ids]
        images = torch.from_numpy(np.stack([render(scene) for scene, _ in pairs]))
        tokens = make_tokenizer(self.window)(
            [words for _, words in pairs], padding="max_length", truncation=True, return_tensors="pt"
        )
        return {"images": images.permute(0, 3, 1, 2).float() / 127.5 - 1, "tokens": tokens.input_ids}

    def export(self, net: Any, folder: Path) -> None:
        """Write `clip/` (both towers), `text_encoder/` and `tokenizer/`."""
        from transformers import CLIPTextModel

        net.clip.save_pretrained(folder / "clip")
        text = CLIPTextModel(net.clip.config.text_config)
        own = {k.removeprefix("text_model."): v for k, v in net.clip.text_model.state_dict().items()}
        expected = text.state_dict()
        text.load_state_dict({k: own[k.removeprefix("text_model.")] for k in expected})
        text.save_pretrained(folder / "text_encoder")
        save_tokenizer(make_tokenizer(self.window), folder / "tokenizer")


class ClipLoss(nn.Module):
    """Symmetric cross-entropy over the similarities of a batch."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """images [B,3,H,W], tokens [B,L] -> loss in nats, accuracy of picking the caption among the batch's."""
        out = self.clip(input_ids=batch["tokens"], pixel_values=batch["images"])
        logits = out.logits_per_image.float()
        own = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return {"loss": loss, "accuracy": (logits.argmax(1) == own).float().mean()}
