"""A step of a U-Net of Stable Diffusion 1.5's size on the CPU: ours, by backend of attention, against diffusers'.

    python scripts/bench/engine.py --latent 64 --rounds 3

The same random weights, batch 2 (guidance), CPU seconds of one thread, rounds interleaved, the best of each; the error is that
of the output against diffusers' in fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm_pipe import backends, files
from ldm_pipe.networks.light_unet import Config, UNet


def random_weights() -> dict[str, Tensor]:
    """Of the light U-Net in Stable Diffusion 1.5's shape, in fp32."""
    torch.manual_seed(0)
    unet = UNet(Config(cross_attention_dim=768)).requires_grad_(False)
    for name, weight in unet.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, 0, weight[0].numel() ** -0.5)
        else:
            nn.init.constant_(weight, float("norm" in name and name.endswith("weight")))
    return unet.state_dict()


def ours(weights: dict[str, Tensor], dtype: torch.dtype, backend: str, layout: torch.memory_format) -> nn.Module:
    """The light network."""
    with torch.device("meta"):
        unet = UNet(Config(cross_attention_dim=768))
    unet.load_state_dict({n: t.to(dtype) for n, t in weights.items()}, assign=True)
    unet = unet.requires_grad_(False).to(memory_format=layout)
    backends.choose(unet, backend, torch.device("cpu"), dtype)
    return unet


def theirs(weights: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """The network of diffusers, as it comes."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    unet.load_state_dict({n: t.to(dtype) for n, t in weights.items()}, assign=True)
    return unet.requires_grad_(False).eval()


def main() -> None:
    p = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    p.add_argument("--latent", type=int, default=64)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    p.add_argument("--output", type=Path, default=Path("docs/results/engine.json"))
    args = p.parse_args()
    dtype, weights = getattr(torch, args.dtype), random_weights()
    plain, last = torch.contiguous_format, torch.channels_last
    x, tokens, at = torch.randn(2, 4, args.latent, args.latent), torch.randn(2, 77, 768), torch.tensor(500.0)
    made: dict[str, Callable[[], nn.Module]] = {
        "diffusers": lambda: theirs(weights, dtype),
        "ours, sdpa": lambda: ours(weights, dtype, "sdpa", plain),
        "ours, fast": lambda: ours(weights, dtype, "fast", plain),
        "ours, fast, channels last": lambda: ours(weights, dtype, "fast", last),
    }

    @torch.no_grad()
    def step(unet: nn.Module, kind: torch.dtype) -> tuple[Tensor, float]:
        began = time.process_time()
        out: Tensor = unet(x.to(kind), at, encoder_hidden_states=tokens.to(kind), return_dict=False)[0]
        return out.float(), time.process_time() - began

    torch.set_num_threads(1)
    exact, _ = step(theirs(weights, torch.float32), torch.float32)
    networks = {name: make() for name, make in made.items()}
    rows: dict[str, dict[str, float]] = {}
    for _ in range(args.rounds):
        for name, unet in networks.items():
            out, seconds = step(unet, dtype)
            row = rows.setdefault(name, {"seconds": seconds, "error": float((out - exact).norm() / exact.norm())})
            row["seconds"] = min(row["seconds"], seconds)
    for name, row in rows.items():
        row["gain"] = rows["diffusers"]["seconds"] / row["seconds"]
        print(name, {k: round(v, 4) for k, v in row.items()}, flush=True)
    files.write(
        args.output, json.dumps({"latent": args.latent, "dtype": args.dtype, "rows": rows}, indent=1).encode(), replace=True
    )


if __name__ == "__main__":
    main()
