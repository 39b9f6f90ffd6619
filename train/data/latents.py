"""Latents computed once and kept on disk, under a key of the codec's weights and of what was encoded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ldm_pipe import files
from train.world import render, scene_at

SEED = 23  # of the stream of cached scenes


@dataclass(frozen=True, eq=False)
class LatentCache:
    """Scaled latents [N,C,h,w] of scenes 0..N-1 of the stream `seed`, half precision on disk and in memory."""

    latents: Tensor
    seed: int = SEED

    @classmethod
    def of(cls, vae: Path, scenes: int, folder: Path | None = None) -> LatentCache:
        """Read the cache that belongs to this codec and this world, or make it. Where either changed the key is another."""
        digest = files.sha256(vae / "diffusion_pytorch_model.safetensors") + files.sha256(vae / "config.json")
        world = hashlib.sha256(b"".join(render(scene_at(SEED, i)[0]).tobytes() for i in range(64))).hexdigest()
        key = hashlib.sha256(f"{digest} {world} scenes {SEED} {scenes} fp16".encode()).hexdigest()[:16]
        path = (folder or vae.parent.parent) / f"latents-{key}.safetensors"
        if not path.exists():
            files.write(path, save({"latents": _encode(vae, range(scenes))}), replace=True)
        return cls(load_file(path)["latents"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        c, h, w = self.latents.shape[1:]
        return c, h, w

    def row(self, seed: int, index: int) -> int:
        """The scene of sample `index`: every epoch visits all scenes once, in an order of its own."""
        epoch, place = divmod(index, len(self.latents))
        return int(_order(seed, epoch, len(self.latents))[place])

    def take(self, rows: Sequence[int]) -> Tensor:
        """Latents of some scenes, fp32 [B,C,h,w]."""
        return self.latents[list(rows)].float()


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    key = (seed, epoch, count)
    if key not in _orders:
        _orders.clear()  # only the running epoch is needed
        _orders[key] = np.random.Generator(np.random.Philox(key=[seed + 3, epoch])).permutation(count)
    return _orders[key]


@torch.no_grad()
def _encode(vae: Path, scenes: range, batch: int = 32) -> Tensor:
    from diffusers import AutoencoderKL

    codec = AutoencoderKL.from_pretrained(vae).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # the other processes of the run wait for this one
    parts = []
    for first in range(0, len(scenes), batch):
        images = np.stack([render(scene_at(SEED, i)[0]) for i in scenes[first : first + batch]])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            mean = codec.encode(pixels).latent_dist.mean.float()
        parts.append(((mean - codec.config.shift_factor) * codec.config.scaling_factor).half())
    torch.set_num_threads(threads)
    return torch.cat(parts).contiguous()
