"""`generate --doctor`: what this machine gains by each dtype and attention backend, and what it loses against fp32."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm_pipe.errors import LdmError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm_pipe.pipeline import Pipeline

MOST_DIFFERENCE = 2.0  # of 255, in the mean: below what an eye tells apart
GAIN = 1.05
STEPS = 6
WAYS = (("fp32", "sdpa"), ("fp32", "math"), ("fp32", "fast"), ("bf16", "sdpa"), ("bf16", "math"), ("bf16", "fast"))
ON_CUDA = (("fp16", "sdpa"), ("fp16", "math"), ("fp16", "xformers"), ("bf16", "xformers"))


@dataclass(frozen=True)
class Finding:
    """One way of computing. seconds: of a step of one image under guidance. mean, most: the difference of the image to that of
    fp32, of 255. fault: why it could not be run."""

    dtype: str
    attention: str
    seconds: float = 0.0
    mean: float = 0.0
    most: int = 0
    fault: str = ""

    def __str__(self) -> str:
        name = f"{self.dtype:<5} {self.attention:<10}"
        if self.fault:
            return f"{name} cannot be run: {self.fault}"
        gap = f"difference to fp32: mean {self.mean:.2f}, most {self.most} of 255"
        return f"{name} {1000 * self.seconds:8.1f} ms a step   {gap}"


def examine(open_in: Callable[[str, str], Pipeline], cuda: bool, steps: int = STEPS) -> Iterator[Finding]:
    """Findings, fp32 with torch's fused attention first. open_in: a pipeline in a dtype and an attention, loaded anew."""
    reference = None
    for dtype, attention in WAYS if not cuda else (*WAYS, *ON_CUDA):
        try:
            seconds, picture = _run(open_in(dtype, attention), steps)
        except (LdmError, RuntimeError) as error:  # torch raises the latter where a kernel does not take a shape or a dtype
            yield Finding(dtype, attention, fault=" ".join(str(error).split())[:120])
            continue
        reference = reference or picture
        yield Finding(dtype, attention, seconds, *_difference(picture, reference))


def verdict(findings: list[Finding]) -> str:
    """The fastest way whose image is fp32's to the eye, in one sentence."""
    first = findings[0]
    good = [f for f in findings if not f.fault and f.mean <= MOST_DIFFERENCE]
    if first.fault or not good:
        return f"fp32 cannot be run here: {first.fault}"
    best = min(good, key=lambda f: f.seconds)
    if first.seconds <= GAIN * best.seconds:
        return "verdict: fp32 with torch's fused attention is as fast as anything here (--dtype fp32)"
    gain = first.seconds / best.seconds
    how = f" --attention {best.attention}" if best.attention != "sdpa" else ""
    loss = f"the mean difference is {best.mean:.2f} of 255"
    return f"verdict: --dtype {best.dtype}{how} is {gain:.1f} times as fast as fp32; {loss}"


def _run(pipe: Pipeline, steps: int) -> tuple[float, Image]:
    """(seconds of a step but the first, the image): the median, so that one interruption does not count."""
    times: list[float] = []

    def note(step: Any) -> None:
        if pipe.device.type == "cuda":
            import torch

            torch.cuda.synchronize(pipe.device)
        times.append(time.perf_counter())

    settings: dict[str, Any] = {"seed": 0, "steps": steps, "guidance_scale": 3.0, "sampler": "ddim", "spacing": "trailing"}
    made = pipe("a red apple on a white background", None, note, **settings)
    gaps = sorted(b - a for a, b in itertools.pairwise(times))
    return gaps[len(gaps) // 2], made.images[0]


def _difference(picture: Image, reference: Image) -> tuple[float, int]:
    import numpy as np

    gap = np.abs(np.asarray(picture, dtype=int) - np.asarray(reference, dtype=int))
    return float(gap.mean()), int(gap.max())
