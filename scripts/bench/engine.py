"""A step of a U-Net of Stable Diffusion 1.5's size on the CPU: ours, part by part, against diffusers'.

    python scripts/bench/engine.py --latent 64 --rounds 3                   # bf16: about 2 minutes on one free core
    python scripts/bench/engine.py --latent 64 --rounds 3 --dtype float32   # about 6 minutes

The same random weights, batch 2 (guidance), CPU seconds of one thread, rounds interleaved, the best of each; the error is that
of the output against diffusers' in fp32. engine.json and .md are written into docs/results/ after every round; a later run of
the same size and dtype adds its rounds to those that stand there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measuring import write

from ldm_pipe import backends
from ldm_pipe.networks.light_unet import Config, UNet

PLAIN, LAST, CPU = torch.contiguous_format, torch.channels_last, torch.device("cpu")


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


def ours(weights: dict[str, Tensor], backend: str, layout: torch.memory_format, linear: Any = None) -> nn.Module:
    """The light network. linear: how its linear layers multiply, where not as the backend says; "packed": ahead."""
    with torch.device("meta"):
        unet = UNet(Config(cross_attention_dim=768))
    unet.load_state_dict(weights, assign=True)
    backends.choose(unet.requires_grad_(False), backend, CPU, next(iter(weights.values())).dtype)
    for module in (m for m in unet.modules() if linear is not None and hasattr(m, "multiply")):
        module.multiply = packed(module) if linear == "packed" else linear  # type: ignore[assignment]
    return unet.to(memory_format=layout)  # type: ignore[no-any-return, call-overload]


def packed(module: Any) -> Callable[..., Tensor]:
    """The product by a weight that oneDNN has packed, a second copy of it."""
    again = torch.ops.mkldnn._reorder_linear_weight(module.weight, None)
    return lambda x, weight, bias: torch.ops.mkldnn._linear_pointwise(x, again, bias, "none", [], "")  # type: ignore[no-any-return]


def theirs(weights: dict[str, Tensor]) -> nn.Module:
    """The network of diffusers, as it comes."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    unet.load_state_dict(weights, assign=True)
    return unet.requires_grad_(False).eval()


@torch.no_grad()
def step(unet: nn.Module, latent: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The output in fp32, and the CPU seconds of the evaluation."""
    draw = torch.Generator().manual_seed(1)
    x, tokens = (torch.randn(*s, generator=draw).to(dtype) for s in ((2, 4, latent, latent), (2, 77, 768)))
    began = time.process_time()
    out: Tensor = unet(x, torch.tensor(500.0), encoder_hidden_states=tokens, return_dict=False)[0]
    return out.float(), time.process_time() - began


def table(found: dict[str, Any]) -> str:
    """The page of results."""
    lines = ["# A step of a U-Net of Stable Diffusion 1.5's size on the CPU", ""]
    lines += [str(__doc__).split("\n\n")[2].split(" engine.json")[0].replace("\n", " "), ""]
    for name, rows in found.items():
        lines += [f"## {name}", "", "| | seconds | gain | error | rounds |", "|---|---|---|---|---|"]
        for row, r in rows.items():
            gain = rows["diffusers"]["seconds"] / r["seconds"]
            lines.append(f"| {row} | {r['seconds']:.3f} | x{gain:.2f} | {r['error']:.2g} | {r['rounds']} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    p.add_argument("--latent", type=int, default=64)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    p.add_argument("--output", type=Path, default=Path("docs/results"))
    args = p.parse_args()
    torch.set_num_threads(1)
    dtype, exactly = getattr(torch, args.dtype), random_weights()
    exact, _ = step(theirs(exactly), args.latent, torch.float32)
    weights = {n: t.to(dtype) for n, t in exactly.items()}
    networks = {
        "diffusers": theirs(weights),
        "ours, sdpa": ours(weights, "sdpa", PLAIN),
        "ours, fast attention alone": ours(weights, "fast", PLAIN, F.linear),
        "ours, fast": ours(weights, "fast", PLAIN),
        "ours, fast, packed ahead": ours(weights, "fast", PLAIN, "packed"),
        "ours, fast, channels last": ours(weights, "fast", LAST),
    }
    path = args.output / "engine.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    rows: dict[str, dict[str, float]] = found.setdefault(f"{args.latent}x{args.latent} latents, {args.dtype}", {})
    for _ in range(args.rounds):
        for name, unet in networks.items():
            out, seconds = step(unet, args.latent, dtype)
            row = rows.setdefault(name, {"seconds": seconds, "rounds": 0})
            row["seconds"], row["rounds"] = min(row["seconds"], seconds), row["rounds"] + 1
            row["error"] = float((out - exact).norm() / exact.norm())
            print(name, {k: round(v, 9) for k, v in row.items()}, flush=True)
        write(args.output, "engine", found, table(found))


if __name__ == "__main__":
    main()
