"""Guidance by a model made worse on purpose: the layers that are perturbed, by name, and the rules that push away from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.attention import attention_rule
from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Branches, Denoiser, Estimate, Rule


def self_attentions(network: Any, layers: str = "") -> dict[str, nn.Module]:
    """The self-attentions of a network whose names hold one of `layers`, texts with commas between; "" is the innermost ones.

    A text holds whole parts of a name: "blocks.1" is not in "blocks.10". The innermost are those of the middle block, or the
    one halfway down where there is none. Raises UsageError that lists the names where a text is in none of them.
    """
    modules = dict(network.named_modules()) if isinstance(network, nn.Module) else {}
    found = {n: m for n, m in modules.items() if getattr(m, "takes_rules", False) or hasattr(m, "set_processor")}
    found = {n: m for n, m in found.items() if not n.endswith("attn2")}  # those attend to the tokens
    if not found:
        raise UsageError(f"{type(network).__name__} has no self-attention to perturb")
    if not layers:
        middle = [n for n in found if "mid_block" in n] or [list(found)[len(found) // 2]]
        return {n: found[n] for n in middle}
    chosen: dict[str, nn.Module] = {}
    for text in (part.strip() for part in layers.split(",")):
        hits = {n: m for n, m in found.items() if text and re.search(rf"(?<![^.]){re.escape(text)}(?![^.])", n)}
        if not hits:
            raise UsageError(f"layers: {text!r} is in the name of no self-attention; there are {', '.join(found)}")
        chosen |= hits
    return {n: m for n, m in found.items() if n in chosen}


def attending(branches: Branches, source: str, branch: str, layers: str, rule: Callable[[Tensor], Any]) -> Denoiser:
    """The model under the condition of the branch `source`, with an attention rule in the chosen self-attentions.

    rule: makes it of x. branch: the name under which its evaluations are counted.
    """
    network: Any = branches.model.network
    denoise, sites = branches.own(source, branch), self_attentions(network, layers)

    def run(x: Tensor, level: Level) -> Estimate:
        with attention_rule(network, rule(x), sites):
            return denoise(x, level)

    return run


class Perturbed:
    """Base of the rules that add scale (p - p') to another rule's estimate, p' from the same network made worse: frozen
    dataclasses that say how in `worse`. Linear, so the same in every space; one evaluation more, none at scale 0.
    """

    scale: float
    rule: Rule
    positive: str
    branch: str

    def worse(self, branches: Branches) -> Denoiser:
        """The perturbed model under the positive condition."""
        raise TypeError(f"{type(self).__name__} perturbs nothing")

    def acts(self, level: Level) -> bool:
        """Is anything added at this level?"""
        return self.scale != 0

    def others(self, branches: Branches) -> dict[str, Denoiser]:
        """The branch of the perturbed model."""
        return {} if self.scale == 0 else {self.branch: self.worse(branches)}

    def needs(self, level: Level) -> tuple[str, ...]:
        """The inner rule's branches and, where anything is added, the positive and the perturbed one."""
        return tuple(dict.fromkeys((*self.rule.needs(level), *((self.positive, self.branch) if self.acts(level) else ()))))

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """The guided estimate."""
        guided = self.rule(estimates, x, level)
        if not self.acts(level):
            return guided
        good, bad = estimates[self.positive], estimates[self.branch]
        x0, noise = guided.x0 + self.scale * (good.x0 - bad.x0), guided.noise + self.scale * (good.noise - bad.noise)
        return Estimate(x0, noise, guided.log_var)


def blurred(t: Tensor, deviation: float | None) -> Tensor:
    """[..., H, W] under a Gaussian of so many positions; at the border it is cut and normalised. None is the mean."""
    if deviation is None:
        return t.mean((-2, -1), keepdim=True).expand(t.shape)
    rows, columns = (_gaussian(side, deviation).to(t) for side in t.shape[-2:])
    return rows @ t @ columns.mT


def _gaussian(size: int, deviation: float) -> Tensor:
    places = torch.arange(size, dtype=torch.float64)
    return (-0.5 * ((places[:, None] - places) / deviation) ** 2).softmax(1)
