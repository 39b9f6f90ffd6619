"""Attention maps: what is seen sums to one, belongs to its image and its word, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm_pipe import Pipeline, UsageError
from ldm_pipe.analysis.attention_maps import AttentionMaps, of_words
from ldm_pipe.attention import Site
from ldm_pipe.cli import main
from ldm_pipe.cond import Rows
from ldm_pipe.level import Level

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def pipe(tiny: Tiny) -> Pipeline:
    return Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")


def test_they_change_no_bit_and_sum_to_one(pipe: Pipeline) -> None:
    whole = pipe.plan(["a fox", "two bees on red"], seeds=(1, 2), steps=2)
    watch = AttentionMaps(pipe.bundle.model, (8, 8))
    seen = next(pipe.run(replace(whole, guides=(watch,)))).latents
    assert torch.equal(seen, next(pipe.run(whole)).latents)
    maps = watch.maps()
    assert maps.shape == (2, 8, 8, 8)
    torch.testing.assert_close(maps.sum(1), torch.ones(2, 8, 8))
    alone = AttentionMaps(pipe.bundle.model, (8, 8))
    next(pipe.run(replace(pipe.plan("two bees on red", seed=2, steps=2), guides=(alone,))))
    torch.testing.assert_close(alone.maps()[0], maps[1], rtol=1e-3, atol=1e-4)


def test_a_planted_map_is_found_in_its_place() -> None:
    """Two rows of a branch that is second; token 2 is looked at by one position, at half the size of an odd x."""
    watch = AttentionMaps(torch.nn.Identity(), (5, 6), "cond")
    site = Site("attn2", True, Rows(("uncond", "cond"), 2, Level(0.5, 0.5)), lambda t: t)
    k = torch.eye(4)[None, None].expand(4, 1, 4, 4) * 100
    q = torch.zeros(4, 1, 9, 4)
    q[:, :, :, 0] = 1
    q[3, 0, 5] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    watch._see(site, q, k, k, q)
    watch._see(site._replace(cross=False), q, k, k, q)
    total, count = watch.sums[3, 3]
    assert count == 1
    assert total[1, 5].argmax() == 2
    assert total[0, 5].argmax() == 0
    large = watch.maps()
    assert large.shape == (2, 4, 5, 6)
    assert divmod(int(large[1, 2].argmax()), 6) in ((2, 4), (2, 5))


def test_a_word_is_the_mean_of_its_tokens() -> None:
    maps = torch.arange(4.0)[:, None, None] * torch.eye(2)
    found = of_words(maps, {"a": range(1, 3), "none": range(3, 3)})
    assert set(found) == {"a"}
    assert torch.equal(found["a"], torch.eye(2))
    with pytest.raises(UsageError, match="no cross-attention was seen"):
        AttentionMaps(torch.nn.Identity(), (8, 8)).maps()


def test_sheets_are_written_beside_the_images(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["-p", "a fox on red", "--seed", "7", "--num-images", "3", "--batch-size", "2", "--dtype", "fp32", "--quiet"]
    assert main([*flags, "--model", str(tiny("eps")), "--attention-maps", "maps", "-o", "out"]) == 0
    assert sorted(p.name for p in Path("maps").iterdir()) == ["001-7.png", "002-8.png", "003-9.png"]
    assert Image.open("maps/001-7.png").size == (3 * 34 - 2, 2 * 46 - 2)  # the image and four words
