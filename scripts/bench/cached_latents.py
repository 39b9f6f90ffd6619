"""What it saves to compute latents once: a training step with cached latents against one that encodes its pictures.

    python scripts/bench/cached_latents.py --side 512 --width 320
    python scripts/bench/cached_latents.py --builtin

Random weights in the shapes of Stable Diffusion 1: its codec (84 million parameters) and its U-Net (860 million at width 320).
CPU seconds of one thread, so that other work on the machine does not count. Prints one row: decoding and cutting a picture,
encoding it, reading its latent from the cache, the step forth and back, all for one sample, and the two ways' ratio.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

from ldm_pipe import image
from ldm_pipe.level import Level
from train.data.cache import Cache, key_of


def seconds(work: Callable[[], Any], repeat: int = 1) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    for _ in range(repeat):
        work()
    return (time.process_time() - began) / repeat


def codec() -> Any:
    """Stable Diffusion's autoencoder without its weights."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **blocks).eval()


def network(width: int) -> Any:
    """Stable Diffusion 1's U-Net at another width, without its weights."""
    widths = (width, 2 * width, 4 * width, 4 * width)
    return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, block_out_channels=widths)


def builtin() -> None:
    """The same of the built-in model, 64 pixels, batches of 8."""
    from ldm_pipe import loading

    bundle = loading.load(loading.BUILTIN)
    pixels, cond = torch.randn(8, 3, 64, 64), bundle.text(["a fox on a blue background"] * 8)
    with torch.no_grad():
        x = bundle.codec.encode(pixels)
        encode = seconds(lambda: bundle.codec.encode(pixels), 5) / 8
    level = Level(torch.full((8, 1, 1, 1), 0.5), torch.full((8, 1, 1, 1), 0.5))
    bundle.model.requires_grad_(True)
    step = seconds(lambda: bundle.model.raw(x, level, cond)[1].square().mean().backward(), 3) / 8
    print(f"built-in: encode {encode:.4f} s, forth and back {step:.4f} s: {(encode + step) / step:.2f} times the speed")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=512, help="pixels of a picture's side")
    parser.add_argument("--width", type=int, default=320, help="channels of the U-Net's first resolution")
    parser.add_argument("--builtin", action="store_true", help="measure the built-in model instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.builtin:
        builtin()
        return
    side, shape = args.side, (4, args.side // 8, args.side // 8)
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((side * 3 // 2, side * 3 // 2), 3).save(out, "JPEG", quality=92)

    def cut() -> torch.Tensor:
        return image.to_tensor([image.decode(out.getvalue(), "picture").resize((side, side), Image.Resampling.LANCZOS)])

    with tempfile.TemporaryDirectory() as temp:
        cache, key = Cache(Path(temp), "latents"), key_of(picture="one")
        cache.fill({key: None}, lambda rows: {"value": torch.randn(len(rows), *shape).half()})
        cached = seconds(lambda: cache.get(key), 50)
    read, pixels, vae = seconds(cut, 5), cut(), codec()
    with torch.no_grad():
        encode = seconds(lambda: vae.encode(pixels))
    unet = network(args.width)
    x, tokens = torch.randn(1, *shape), torch.randn(1, 77, 768)
    step = seconds(lambda: unet(x, torch.tensor([500]), tokens).sample.square().mean().backward())
    count = sum(p.numel() for p in unet.parameters()) / 1e6
    print(
        f"{side} pixels, U-Net of {count:.0f} million: cut {read:.3f} s, encode {encode:.2f} s, cached {cached:.5f} s, ", end=""
    )
    print(f"forth and back {step:.2f} s: {(read + encode + step) / (cached + step):.2f} times the speed")


if __name__ == "__main__":
    main()
