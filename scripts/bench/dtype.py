"""Does bf16 gain on this CPU, and from which width of network on? fp32 against bf16, one forward of a U-Net, batch 2.

python scripts/bench/dtype.py
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm_pipe.device import cpu_has_bf16

WIDTHS = {(64, 128, 256): 16, (128, 256, 512): 32, (320, 640, 1280): 32}
ROUNDS = 5


def network(widths: tuple[int, ...]) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=192,
        attention_head_dim=4,
    ).eval()


@torch.no_grad()
def main() -> None:
    print(f"bf16 in hardware: {cpu_has_bf16()}; {torch.get_num_threads()} threads")
    for widths, side in WIDTHS.items():
        times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
        nets = {dtype: torch.nn.Module.to(network(widths), dtype=dtype) for dtype in times}
        for _ in range(ROUNDS + 1):
            for dtype, net in nets.items():
                x, tokens = torch.randn(2, 4, side, side, dtype=dtype), torch.randn(2, 24, 192, dtype=dtype)
                began = time.perf_counter()
                net(x, 500, encoder_hidden_states=tokens)
                times[dtype].append(time.perf_counter() - began)
        fp32, bf16 = (statistics.median(t[1:]) for t in times.values())
        speed = f"fp32 {fp32 * 1e3:7.1f} ms, bf16 {bf16 * 1e3:7.1f} ms, x{fp32 / bf16:.2f}"
        print(f"widest {max(widths):5}, {side}x{side}: {speed}")


if __name__ == "__main__":
    main()
