"""IP-Adapter on Flux: its file is read whole or refused; a window, another network, several at once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_pipe import ModelError, Pipeline, UsageError
from ldm_pipe.control.flux_ip_adapter import FluxIPAdapter
from ldm_pipe.level import Level
from ldm_pipe.networks.image_prompt import ImageAdapter
from ldm_pipe.patch import Run
from ldm_pipe.plan import patched

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
controls, families = importlib.import_module("tiny_controls"), importlib.import_module("tiny_families")


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    place = tmp_path_factory.mktemp("flux-ip")
    controls.flux_prompt(place)
    return load_file(place / "flux.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {**t, "other": torch.zeros(1)}, "unexpected or missing tensor 'other'"),
        (
            lambda t: {n: v for n, v in t.items() if not n.endswith("v_proj.bias")},
            "missing tensor 'double_blocks.0.*v_proj.bias'",
        ),
        (lambda t: {n: v for n, v in t.items() if n != "ip_adapter_proj_model.norm.bias"}, "missing tensor 'norm.bias'"),
        (
            lambda t: {n: v[:5] if n.endswith("k_proj.bias") else v for n, v in t.items()},
            "mismatched tensors among double_blocks",
        ),
        (lambda t: {n: v for n, v in t.items() if "proj_model" not in n}, "none of the known forms"),
    ],
)
def test_a_wrong_file_names_the_tensor(change: Callable[..., Any], words: str, tensors: dict[str, Tensor]) -> None:
    assert ImageAdapter.of(tensors, "file")(torch.zeros(2, 12)).shape == (2, 4, 32)
    with pytest.raises(ModelError, match=words):
        ImageAdapter.of(change(tensors), "file")


def test_windows_sums_and_other_networks(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Two at half the scale are one, an empty window is none, no picture is what the unconditional branch sees."""
    pipe = Pipeline.from_pretrained(str(families.save("flux dev", tmp_path / "model")), "cpu", "fp32")
    whole = pipe.plan("a fox", steps=3, height=32, width=32, seed=1, guide="cfg(3)")
    weights = ImageAdapter.of(tensors, "file").weights
    tokens, absent = torch.randn(2, 1, 4, 32, generator=torch.Generator().manual_seed(0)).unbind()

    def drawn(*patches: FluxIPAdapter) -> Tensor:
        return next(pipe.run(patched(whole, pipe.bundle.model, patches))).latents

    one, half = FluxIPAdapter(tokens, absent, weights), FluxIPAdapter(tokens, absent, weights, 0.5)
    near = 1e-4 * float(drawn(one).abs().max())
    torch.testing.assert_close(drawn(half, half), drawn(one), rtol=1e-4, atol=near)
    assert torch.equal(drawn(FluxIPAdapter(tokens, absent, weights, lo=0.4, hi=0.4)), drawn())
    for other in (FluxIPAdapter(absent, absent, weights), FluxIPAdapter(tokens, tokens, weights)):
        assert not torch.allclose(drawn(other), drawn(one), atol=0.01)
    middle = float(whole.levels[1].u)
    assert not torch.equal(drawn(FluxIPAdapter(tokens, absent, weights, lo=middle)), drawn(one))
    run = Run((Level(0.1, 0.9), Level(1.0, 0.0)))
    with pytest.raises(UsageError, match="Linear has none"):
        one.changes(nn.Linear(1, 1), run)
    for wrong in ((*weights, *weights), tuple(tuple(w[:16] for w in layer) for layer in weights)):
        with pytest.raises(UsageError, match="made for another base model"):
            FluxIPAdapter(tokens, absent, wrong).changes(pipe.bundle.model.network, run)  # type: ignore[arg-type]
