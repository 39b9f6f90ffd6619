"""A random U-Net of two stages with two layers each, and what a patch does to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_pipe import CFG, EPS, VP, Cond, Model, Noise, build, guided, levels, sample
from ldm_pipe.networks.light_unet import Config
from ldm_pipe.networks.light_unet import UNet as Light
from ldm_pipe.networks.unet import UNet
from ldm_pipe.patch import Change, Patch, Patched, Run

SHAPE, GUIDED = (4, 8, 8), CFG(3)
CONFIG = Config(
    block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D",) * 2, cross_attention_dim=12, norm_num_groups=4, attention_head_dim=2,
)  # fmt: skip


@pytest.fixture(scope="session")
def model() -> Model:
    """In float64, no weight at a neutral value."""
    torch.manual_seed(0)
    unet = Light(CONFIG).double().eval().requires_grad_(False)
    for weight in unet.parameters():
        nn.init.normal_(weight, 0.02, 0.2)
    return Model(UNet(unet), VP.scaled_linear(), EPS)


class Counting(Patch):
    """How often modules are asked, by name."""

    def __init__(self, *names: str) -> None:
        self.names, self.found = names, Counter[str]()

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        def counted(name: str) -> Change:
            def change(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                self.found[name] += 1
                return call(*args, **kwargs)

            return change

        return {name: counted(name) for name in self.names}


@pytest.fixture
def draw(model: Model) -> Callable[..., Tensor]:
    """draw(*patches, steps=10, sampler="ddim", rule=CFG(3)): x at the end of a walk."""

    def run(*patches: Patch, steps: int = 10, sampler: Any = "ddim", rule: Any = GUIDED) -> Tensor:
        tokens = torch.randn(2, 1, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        denoise = guided(model.branches(cond=Cond(tokens[0]), uncond=Cond(tokens[1])), rule)
        walk, noise = levels.trailing(model.path, steps), Noise((3,), SHAPE, dtype=torch.float64)
        how = build("sampler", sampler) if isinstance(sampler, str) else sampler
        for patch in patches:
            how = patch.sampler(how, Run.of(model, walk))
        return sample(Patched(model, patches, Run.of(model, walk))(denoise), noise.start(), walk, how, noise)

    return run


@pytest.fixture
def counting() -> Callable[..., Counting]:
    """counting("conv_in", "mid_block"): a patch that counts."""
    return Counting
