"""What the tests of the trainings share: a few pictures, a short job, what a network makes of the same input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_pipe import Cond
from train.job import Job


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """pictures(captions, beside): a new folder of four random pictures 32x32; caption k % n goes with picture k, and its
    negative stands beside it."""

    def drawn(captions: Sequence[str] = (), beside: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("photos")
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            if captions:
                (folder / f"{i}.txt").write_text(captions[i % len(captions)])
            if beside:
                Image.fromarray(255 - pixels).save(folder / f"{i}.condition.png")
        return folder

    return drawn


@pytest.fixture(scope="session")
def job() -> Callable[..., Job]:
    """job(folder, **changes): four steps, every one logged, every second one saved."""

    def made(folder: Path, **changes: Any) -> Job:
        return replace(Job(str(folder), 4, batch=2, lr=1e-2, warmup=1, ema=0.5, log_every=1, save_every=2), **changes)

    return made


@pytest.fixture(scope="session")
def seen() -> Callable[[Any], Tensor]:
    """seen(model): what the network of a tiny model makes of the same noise, times and tokens."""

    def out(model: Any) -> Tensor:
        g = torch.Generator().manual_seed(1)
        x, tokens = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 8, 16, generator=g)
        with torch.no_grad():
            return model.network(x, torch.tensor([500, 20]), Cond(tokens=tokens))

    return out


@pytest.fixture(scope="session")
def taught() -> Callable[..., Any]:
    """taught(task, steps=3): the net of a task after some steps of two samples."""

    def stepped(task: Any, steps: int = 3) -> Any:
        net = task.net()
        optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 0.05)
        for step in range(steps):
            optimiser.zero_grad()
            net(task.batch(0, range(2 * step, 2 * step + 2)))["loss"].backward()
            optimiser.step()
        return net

    return stepped
