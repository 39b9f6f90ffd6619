"""Faster Diffusion: Rethinking the Role of the Encoder for Diffusion Model Inference, Li et al. 2023, arXiv 2312.09608.

The way down changes little from step to step, the way up much: at key steps all of the U-Net runs, at the others the way up
alone, with the features of the last key step and its own time (section 3.2). The steps up to the next key no longer wait for
each other, so that their ways up may be one call (section 3.2, parallel). Prior noise injection (section 3.3) adds a little
of the first noise to x late in the walk, against the loss of texture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ldm_pipe.ahead import Ahead
from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate
from ldm_pipe.noise import StepNoise
from ldm_pipe.patch import Change, Patch, Run, check_unet
from ldm_pipe.reuse import Reuse
from ldm_pipe.walk import Sampler, Step, Wrapping

PAPER, OF = (0, 1, 2, 3, 5, 10, 15, 25, 35), 50  # key steps of a walk of 50, from the official code
ALWAYS = 4  # the first steps are keys in a walk of any length: our choice, the paper gives no rule


@dataclass(frozen=True)
class Faster(Patch):
    """Run the way down of the U-Net at key steps only.

    keys: "paper" (9 of 50, scaled to the walk), "all", or step numbers such as "0 1 2 5".
    inject: how much of the first noise joins x in every step of the second half of the walk (the paper's .003), 0 = none.
    parallel: the ways up of all steps to the next key as one batch, which gains on a GPU and takes the memory of one.
    """

    keys: str = "paper"
    inject: float = 0.003
    parallel: bool = False
    neutral: ClassVar[Mapping[str, Any]] = {"keys": "all", "inject": 0.0}

    def __post_init__(self) -> None:
        numbers = self.keys.split()
        if self.keys not in ("paper", "all") and not (numbers and all(n.isdecimal() and len(n) < 6 for n in numbers)):
            raise UsageError(f'faster: keys is {self.keys!r:.60}; it takes "paper", "all" or step numbers such as "0 1 2 5"')

    def at(self, steps: int) -> tuple[int, ...]:
        """The key steps of a walk."""
        if self.keys == "all":
            return tuple(range(steps))
        if self.keys == "paper":
            return tuple(sorted({*range(min(ALWAYS, steps)), *(round(k * steps / OF) for k in PAPER)} & {*range(steps)}))
        return tuple(sorted({0, *map(int, self.keys.split())} & {*range(steps)}))

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """The way down and the middle answer from memory between the key steps."""
        net: Any = network
        check_unet(net, "faster")
        names = ["conv_in", *(f"down_blocks.{i}" for i in range(len(net.down_blocks))), "mid_block"]
        if self.parallel:
            return Ahead(run.clock, self.at(run.steps)).changes(names)
        return Reuse(run.index, self.at(run.steps)).changes(names)

    def sampler(self, inner: Any, run: Run) -> Any:
        """The sampler with prior noise injection."""
        walk = run.levels[: run.steps]
        return PriorNoise(inner, self.inject, float(walk[len(walk) // 2].u)) if self.inject and len(walk) > 1 else inner


@dataclass(frozen=True)
class PriorNoise(Wrapping):
    """A sampler whose x is joined by scale * (the first x of the walk) once the estimate is made, at levels of noise u up to
    `until`. The network's noise stays; x0 follows from it, as in the official code's scheduler step."""

    sampler: Sampler
    scale: float = 0.003
    until: float = 0.5

    def down(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """One step of the sampler inside, from x with a little of the first one."""
        first, inside = (x, None) if memory is None else memory
        if float(here.u) <= self.until:
            added = self.scale * first

            def joined(x: Tensor, level: Level) -> Estimate:
                if level != here:
                    return denoise(x, level)
                found = denoise(x - added, level)
                return found._replace(x0=(x - level.sigma * found.noise) / level.alpha)

            done = self.sampler.step(joined, x + added, here, there, inside, noise)
        else:
            done = self.sampler.step(denoise, x, here, there, inside, noise)
        return done._replace(memory=(first, done.memory))
