"""Skip-layer guidance, as published with the code of Stable Diffusion 3.5 medium (Stability AI 2024).

A network with layers left out as the weak one is also Spatiotemporal Skip Guidance (Hyung et al. 2024, arXiv 2411.18664).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ldm_pipe.errors import UsageError
from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.level import Level
from ldm_pipe.model import Branches, Denoiser, Estimate, Rule
from ldm_pipe.perturb import pushed, self_attentions

_skipping: ContextVar[frozenset[object]] = ContextVar("_skipping", default=frozenset())


@dataclass(frozen=True)
class SkipLayer:
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
        if not 0 <= self.lo <= self.hi <= 1:
            raise UsageError(f"skip_layer: it takes 0 <= lo <= hi <= 1, got {self.lo}, {self.hi}")

    def others(self, branches: Branches) -> dict[str, Denoiser]:
        """The network without those layers, under the positive condition."""
        if self.scale == 0:
            return {}
        network: Any = branches.model.network
        parents = dict.fromkeys(name.rpartition(".")[0] for name in self_attentions(network, self.layers))
        modules, denoise = dict(network.named_modules()), branches.own(self.positive, self.branch)

        def run(x: Tensor, level: Level) -> Estimate:
            with skipped([modules[name] for name in parents]):
                return denoise(x, level)

        return {self.branch: run}

    def needs(self, level: Level) -> tuple[str, ...]:
        """The inner rule's branches and, inside the interval, the positive and the perturbed one."""
        return tuple(dict.fromkeys((*self.rule.needs(level), *((self.positive, self.branch) if self._acts(level) else ()))))

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """The guided estimate."""
        guided = self.rule(estimates, x, level)
        if not self._acts(level):
            return guided
        return pushed(guided, estimates[self.positive], estimates[self.branch], self.scale)

    def _acts(self, level: Level) -> bool:
        u = float(level.u)
        return self.scale != 0 and (self.lo <= u < self.hi or (self.hi == 1 and u == 1))


@contextmanager
def skipped(layers: list[nn.Module]) -> Iterator[None]:
    """Layers that give back what they were given while the `with` runs, in this thread alone; nothing is left behind.

    A layer that carries image and text side by side gives back both, in the order (text, image) of diffusers' joint layers.
    """
    me = object()

    def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        if me not in _skipping.get():
            return None
        image = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if not isinstance(out, tuple):
            return image
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
        return (None if out[0] is None else text, image)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        token = _skipping.set(_skipping.get() | {me})
        try:
            yield
        finally:
            _skipping.reset(token)
