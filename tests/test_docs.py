"""What the documents show, runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_pipe import VP, Gaussian, Noise, build, levels, sample

ROOT = Path(__file__).resolve().parent.parent


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)


def test_the_sampler_of_the_contributing_guide_works() -> None:
    space: dict[str, Any] = {"__name__": "euler_ancestral"}
    import sys
    import types

    module = types.ModuleType("euler_ancestral")
    sys.modules["euler_ancestral"] = module  # dataclasses look their module up
    exec(compile(blocks("CONTRIBUTING.md")[0], "CONTRIBUTING.md", "exec"), space)
    sampler = space["EulerAncestral"]
    exact = Gaussian.isotropic(torch.zeros(12, dtype=torch.float64), 0.5)
    walk, noise = levels.trailing(VP.scaled_linear(), 200), Noise(tuple(range(400)), (3, 2, 2), dtype=torch.float64)
    plain, drawn = (sample(exact, noise.start(), walk, s, noise) for s in (sampler(eta=0.0), sampler()))
    assert torch.allclose(plain, sample(exact, noise.start(), walk, build("sampler", "ddim"), noise), atol=1e-9)
    assert drawn.std().item() == pytest.approx(0.5, rel=0.05)
    assert not torch.allclose(plain, drawn)


@pytest.mark.parametrize("k", range(len(blocks("README.md"))))
def test_the_python_of_the_readme_runs(k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("README.md")[k], f"README.md block {k}", "exec"), {"__name__": "readme"})


def test_every_file_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
    for config in re.findall(r"configs/[\w/.]+\.toml", text):
        assert (ROOT / config).exists(), config
    for script in re.findall(r"scripts/[\w/]+\.py", text):
        assert (ROOT / script).exists(), script
