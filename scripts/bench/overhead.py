"""Time per step outside the network: our loop against a bare loop, and against diffusers' scheduler of the same method.

    python scripts/bench/overhead.py

The network is a constant; 64x64x4 latents, batch 1, one thread; median of 5 interleaved rounds; slope over 5 to 45 steps.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm_pipe import CFG, VP, Cond, Model, Noise, build, guided, levels, sample
from ldm_pipe.prediction import EPS

SHAPE, FEW, MANY, ROUNDS = (4, 64, 64), 5, 45, 5


def ours(name: str) -> Callable[[int], None]:
    """Our whole loop, guidance rule and model included."""
    out = torch.zeros(1, *SHAPE)
    model = Model(lambda x, time, cond: out, VP.scaled_linear(), EPS)
    sampler, noise = build("sampler", name), Noise((0,), SHAPE)
    start = noise.start()

    def run(steps: int) -> None:
        denoise = guided(model.branches(cond=Cond()), CFG(1))
        sample(denoise, start, levels.trailing(model.path, steps), sampler, noise)

    return run


def theirs(name: str) -> Callable[[int], None]:
    """diffusers' scheduler in the loop that its pipelines write."""
    import diffusers

    table = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    out, start = torch.zeros(1, *SHAPE), torch.randn(1, *SHAPE)

    @torch.no_grad()
    def run(steps: int) -> None:
        scheduler = getattr(diffusers, name)(**table, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        x = start
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            x = scheduler.step(out, t, x).prev_sample

    return run


def bare(steps: int) -> None:
    """The least there is to do: DDIM's two lines with coefficients at hand."""
    x, out = torch.zeros(1, *SHAPE), torch.zeros(1, *SHAPE)
    for _ in range(steps):
        x0 = (x - 0.5 * out) / 0.9
        x = 0.9 * x0 + 0.5 * out


def main() -> None:
    torch.set_num_threads(1)
    rows: dict[str, Callable[[int], None]] = {"bare loop": bare}
    pairs = {"euler": "EulerDiscreteScheduler", "ddim": "DDIMScheduler", "dpm2m": "DPMSolverMultistepScheduler"}
    for name, scheduler in pairs.items():
        rows[f"ours, {name}"] = ours(name)
        rows[f"diffusers, {scheduler}"] = theirs(scheduler)
    times: dict[str, list[float]] = {n: [] for n in rows}
    for run in rows.values():
        run(MANY)
    for _ in range(ROUNDS):
        for name, run in rows.items():
            spent = {}
            for steps in (FEW, MANY):
                began = time.perf_counter()
                run(steps)
                spent[steps] = time.perf_counter() - began
            times[name].append((spent[MANY] - spent[FEW]) / (MANY - FEW) * 1e3)
    base = statistics.median(times["bare loop"])
    for name, found in times.items():
        median = statistics.median(found)
        print(f"{name:45} {median:7.3f} ms a step, {median - base:+.3f} over the bare loop")


if __name__ == "__main__":
    main()
