"""Every family: a tiny checkpoint of the real classes gives the latents that diffusers' own pipeline gives."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
families, tiny_families = importlib.import_module("families"), importlib.import_module("tiny_families")
CASES = [(name, sampler) for name in tiny_families.MADE for sampler in families.samplers(name)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """saved(name): the folder of a tiny checkpoint."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tiny_families.save(name, tmp_path_factory.mktemp("tiny") / "model")
        return made[name]

    return folder


@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_the_finished_latents_equal_diffusers(saved: Callable[[str], Path], name: str, sampler: str) -> None:
    """Same folder, prompts, start and steps, guidance included: 1e-4 of the largest value in fp32."""
    found, expected = families.both(name, saved(name), sampler)
    assert expected.abs().max() > 0.5
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
