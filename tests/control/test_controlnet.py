"""ControlNet equals diffusers' pipeline: one and several, in a window, in guess mode; the picture is read once a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import Model, UsageError, levels
from ldm_pipe.control.controlnet import ControlNet
from ldm_pipe.patch import changed
from ldm_pipe.speed.faster import Faster

Draw = Callable[..., Tensor]
PIPELINE = "StableDiffusionControlNetPipeline"


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_one(ours: Draw, theirs: Draw, nets: list[Any], hints: list[Tensor]) -> None:
    expected = theirs(PIPELINE, {"controlnet": nets[0]}, image=hints[0], controlnet_conditioning_scale=0.7)
    close(ours(ControlNet(nets[0], hints[0], 0.7)), expected)
    assert not torch.allclose(ours(), expected, atol=0.1)


def test_two_add_up_in_any_order(ours: Draw, theirs: Draw, nets: list[Any], hints: list[Tensor]) -> None:
    from diffusers import MultiControlNetModel

    both = {"controlnet": MultiControlNetModel(nets)}
    expected = theirs(PIPELINE, both, image=hints, controlnet_conditioning_scale=[0.7, 0.4])
    one, two = ControlNet(nets[0], hints[0], 0.7), ControlNet(nets[1], hints[1], 0.4)
    close(ours(one, two), expected)
    close(ours(two, one), expected)


def test_guess_mode(ours: Draw, theirs: Draw, nets: list[Any], hints: list[Tensor]) -> None:
    expected = theirs(PIPELINE, {"controlnet": nets[0]}, image=hints[0], guess_mode=True)
    close(ours(ControlNet(nets[0], hints[0], guess=True)), expected)


def test_a_window_is_the_steps_inside_it(ours: Draw, theirs: Draw, nets: list[Any], hints: list[Tensor], model: Model) -> None:
    walk = levels.leading(model.path, 4)
    first = theirs(PIPELINE, {"controlnet": nets[0]}, image=hints[0], control_guidance_end=0.5)
    close(ours(ControlNet(nets[0], hints[0], lo=float(walk[1].u))), first)
    rest = theirs(PIPELINE, {"controlnet": nets[0]}, image=hints[0], control_guidance_start=0.5)
    close(ours(ControlNet(nets[0], hints[0], hi=float(walk[1].u))), rest)


def test_an_empty_window_changes_no_bit(ours: Draw, nets: list[Any], hints: list[Tensor]) -> None:
    assert torch.equal(ours(ControlNet(nets[0], hints[0], lo=0.4, hi=0.4)), ours())
    with pytest.raises(UsageError, match="0 <= lo <= hi <= 1"):
        ControlNet(nets[0], hints[0], lo=0.5, hi=0.4)


def test_the_picture_is_read_once_and_the_network_at_its_keys(ours: Draw, nets: list[Any], hints: list[Tensor]) -> None:
    count = {"controlnet_cond_embedding.conv_in": 0, "mid_block": 0}

    def counted(name: str) -> Callable[..., Any]:
        def change(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return call(*args, **kwargs)

        return change

    counting = {name: [counted(name)] for name in count}
    keys = Faster("0 2").at(4)
    with changed(nets[0], counting):
        whole = ours(ControlNet(nets[0], hints[0]))
        assert count == {"controlnet_cond_embedding.conv_in": 1, "mid_block": 4}
        fewer = ours(ControlNet(nets[0], hints[0], keys=keys), Faster("0 2", inject=0.0))
        assert count == {"controlnet_cond_embedding.conv_in": 2, "mid_block": 6}
    assert not torch.equal(whole, fewer)
