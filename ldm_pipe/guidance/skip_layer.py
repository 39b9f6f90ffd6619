"""Skip-layer guidance, as published with the code of Stable Diffusion 3.5 medium (Stability AI 2024).

A network with layers left out as the weak one is also Spatiotemporal Skip Guidance (Hyung et al. 2024, arXiv 2411.18664).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ldm_pipe.errors import check_interval
from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.level import Level, inside
from ldm_pipe.model import Branches, Denoiser, Estimate, Rule
from ldm_pipe.patch import changed
from ldm_pipe.perturb import Perturbed, self_attentions


@dataclass(frozen=True)
class SkipLayer(Perturbed):
    """The rule, plus scale (p - p'), where p' comes from the network with whole transformer layers left out.

    layers: parts of the names of their self-attentions, commas between, such as "transformer_blocks.7,transformer_blocks.8";
    "" the innermost. lo, hi: only where lo <= u < hi (hi = 1 includes u = 1). Alone it guides without a negative branch. One
    evaluation more. Linear, so the same in every space.
    """

    scale: float = 2.8
    layers: str = ""
    lo: float = 0.0
    hi: float = 1.0
    rule: Rule = field(default_factory=lambda: CFG(1.0))
    positive: str = "cond"
    branch: str = "skipped"

    def __post_init__(self) -> None:
        check_interval("skip_layer", self.lo, self.hi)

    def worse(self, branches: Branches) -> Denoiser:
        """The network without those layers."""
        network: Any = branches.model.network
        parents = {name.rpartition(".")[0]: [skip] for name in self_attentions(network, self.layers)}
        denoise = branches.own(self.positive, self.branch)

        def run(x: Tensor, level: Level) -> Estimate:
            with changed(network, parents):
                return denoise(x, level)

        return run

    def acts(self, level: Level) -> bool:
        """Inside the interval, unless the scale is 0."""
        return self.scale != 0 and inside(level, self.lo, self.hi)


def skip(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A change of a layer: it gives back what it was given.

    A layer that carries image and text side by side gives back both, in the order (text, image) of diffusers' joint layers.
    """
    out = call(*args, **kwargs)  # what it gives tells what it carries
    image = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if not isinstance(out, tuple):
        return image
    text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
    return None if out[0] is None else text, image
