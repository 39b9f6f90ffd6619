"""Backends of attention: one formula, whatever computes it; the fast one where it wins, within the error of bf16."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe import EnvironmentFault, Pipeline, UsageError, backends
from ldm_pipe.attention import Site, attention_rule
from ldm_pipe.networks.light_unet import Config, UNet
from ldm_pipe.patch import changed

Tiny = Callable[[str], Path]
CPU = torch.device("cpu")


def qkv(length: int = 300, other: int = 300, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, 3, n, 8, generator=generator).to(dtype) for n in (length, other, other))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["sdpa", "math", "fast"])
def test_it_is_the_formula(name: str) -> None:
    """In float64, to rounding."""
    q, k, v = qkv(20, 7)
    expected = torch.softmax(torch.einsum("bhld,bhmd->bhlm", q, k) / 8**0.5, -1) @ v
    torch.testing.assert_close(backends.BACKENDS[name](q, k, v), expected)


@torch.no_grad()
@pytest.mark.parametrize("length", [256, 700])
def test_fast_is_near_in_bf16(length: int) -> None:
    """Also over several blocks of queries, one of them not full, and laid out so that the heads join without a copy."""
    exact = backends.math(*qkv(length, 300))
    out = backends.fast(*qkv(length, 300, torch.bfloat16))
    assert float((out - exact).norm() / exact.norm()) < 0.02
    assert out.transpose(1, 2).is_contiguous()
    fused = F.scaled_dot_product_attention(*qkv(length, 300, torch.bfloat16))
    assert not torch.equal(out, fused), "the fused kernel answered"


@torch.no_grad()
@pytest.mark.parametrize("length", [512, 700])
def test_fast_is_exact_in_fp32(length: int) -> None:
    exact = backends.math(*qkv(length, 600))
    given = qkv(length, 600, torch.float32)
    out = backends.fast(*given)
    assert float((out - exact).norm() / exact.norm()) < 2e-6
    assert out.transpose(1, 2).is_contiguous()
    assert not torch.equal(out, F.scaled_dot_product_attention(*given)), "the fused kernel answered"


def test_fast_leaves_the_rest_to_the_fused_kernel() -> None:
    few, own = qkv(64, 64, torch.bfloat16), qkv(dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(backends.fast(*few), F.scaled_dot_product_attention(*few))
        assert torch.equal(backends.fast(*own), F.scaled_dot_product_attention(*own))
    q, k, v = (t.requires_grad_() for t in qkv(dtype=torch.bfloat16))
    out = backends.fast(q, k, v)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v)), "the fused kernel has a gradient of its own"
    out.sum().backward()
    assert q.grad is not None


def wide() -> UNet:
    """A random U-Net whose layers are large enough for what is fast."""
    torch.manual_seed(0)
    unet = UNet(
        Config(
            block_out_channels=(32, 64), attention_head_dim=4, cross_attention_dim=16, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        )
    ).requires_grad_(False)  # fmt: skip
    for weight in unet.parameters():
        nn.init.normal_(weight, 0.02, 0.1)
    return unet


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "more"), [(torch.bfloat16, 1.2), (torch.float32, 2.5)])
def test_a_network_under_fast_is_no_further_from_the_exact_one(dtype: torch.dtype, more: float) -> None:
    """Than under the fused kernel in the same dtype, x1.2 in bf16, as it is asked of a whole Stable Diffusion step."""
    unet, x, time, tokens = wide().double(), torch.randn(1, 4, 32, 32), torch.tensor([500.0]), torch.randn(1, 5, 16)
    exact = unet(x.double(), time, tokens.double())[0]
    unet.to(dtype)
    errors = {}
    for name in ("sdpa", "fast"):
        assert backends.choose(unet, name, CPU, dtype) == name
        errors[name] = float((unet(x.to(dtype), time, tokens.to(dtype))[0].double() - exact).norm() / exact.norm())
    assert errors["fast"] != errors["sdpa"]
    assert errors["fast"] < more * errors["sdpa"]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_onednn_multiplies_is_as_exact(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a bias; in bf16 to the bit, but for what does not lie together."""
    asked, times = list[Tensor](), backends._times
    monkeypatch.setattr(backends, "_times", lambda *given: asked.append(given[0]) or times(*given))
    draw = torch.Generator().manual_seed(2)
    apart, weight = torch.randn(2, 96, 128, generator=draw).to(dtype).mT, torch.randn(160, 96, generator=draw).to(dtype)
    for x, bias in product((apart, apart.contiguous()), (None, torch.randn(160, generator=draw).to(dtype))):
        found, usual = backends.product(x, weight, bias), F.linear(x, weight, bias)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        error, mkl = (float((out - exact).norm() / exact.norm()) for out in (found, usual))
        assert found.shape == exact.shape
        assert error < (4 if dtype == torch.float32 else 1.1) * mkl
        assert dtype == torch.float32 or x is apart or torch.equal(found, usual)
    assert len(asked) == 4


def test_the_rest_is_multiplied_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, little work, float64, weights that lie apart; whatever is to be derived, in reverse or forward."""
    x, weight = torch.randn(256, 128), torch.randn(128, 128)
    with torch.no_grad():
        assert torch.equal(backends.product(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    monkeypatch.setattr(backends, "_times", lambda *given: pytest.fail("oneDNN was asked"))
    with torch.no_grad():
        for a, w in ((x[:63], torch.randn(9999, 128)), (x, weight[:16]), (x, weight.T)):
            assert torch.equal(backends.product(a, w), F.linear(a, w))
        _, moved = torch.func.jvp(lambda t: backends.product(t, weight), (x,), (torch.ones_like(x),))
        torch.testing.assert_close(moved, F.linear(torch.ones_like(x), weight))
    a = x.requires_grad_()
    backends.product(a, weight).sum().backward()
    assert a.grad is not None


@torch.no_grad()
def test_no_weight_is_moved_packed_or_kept_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under fast the network holds what it held, and one that goes back gives the bits it gave."""
    unet, x, time, tokens = wide(), torch.randn(1, 4, 32, 32), torch.tensor([500.0]), torch.randn(1, 5, 16)

    def holds() -> dict[str, tuple[int, Any]]:
        return {n: (t.data_ptr(), t.clone()) for n, t in unet.state_dict().items()}

    before, plain = holds(), unet(x, time, tokens)[0]
    asked, times = list[int](), backends._times
    monkeypatch.setattr(backends, "_times", lambda *given: asked.append(len(given)) or times(*given))
    backends.choose(unet, "fast", CPU, torch.float32)
    fast = unet(x, time, tokens)[0]
    assert 3 in asked, "no linear layer was asked"
    after = holds()
    assert all(after[n][0] == place and torch.equal(after[n][1], t) for n, (place, t) in before.items())
    assert not [n for m in unet.modules() for n, v in vars(m).items() if isinstance(v, Tensor)]
    backends.choose(unet, "sdpa", CPU, torch.float32)
    assert torch.equal(unet(x, time, tokens)[0], plain)
    assert not torch.equal(fast, plain)


def test_auto_takes_fast_where_it_can_win(tiny: Tiny) -> None:
    folder = str(tiny("eps"))
    assert Pipeline.from_pretrained(folder, "cpu", "bf16").attention == "fast"
    assert Pipeline.from_pretrained(folder, "cpu", "fp32").attention == "fast"
    assert Pipeline.from_pretrained(folder, "cpu", "bf16", "math").attention == "math"


def test_the_layout_goes_with_the_backend(tiny: Tiny) -> None:
    """Channels together in bf16 under fast, and back; the values stay."""
    unet = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "bf16").bundle.model
    weight, before = unet.network.unet.conv_in.weight, unet.network.unet.conv_in.weight.clone()  # type: ignore[union-attr]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    backends.choose(unet, "sdpa", CPU, torch.bfloat16)
    assert weight.is_contiguous()
    assert torch.equal(weight, before)


@torch.no_grad()
def test_rules_see_what_a_backend_gave(tiny: Tiny) -> None:
    """And every backend gives the same images in fp32."""
    images = {}
    for name in ("sdpa", "math", "fast"):
        pipe, seen = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32", name), list[Tensor]()

        def watch(site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor, seen: list[Tensor] = seen) -> Tensor:
            torch.testing.assert_close(out, backends.math(q, k, v))
            seen.append(out)
            return out

        with attention_rule(pipe.bundle.model, watch):
            images[name] = pipe("a fox", seed=1, steps=2).latents
        assert seen
    for latents in images.values():
        torch.testing.assert_close(latents, images["sdpa"], rtol=1e-4, atol=1e-4)


def test_wrong_names_and_machines_are_told(tiny: Tiny) -> None:
    from diffusers import UNet2DConditionModel

    with pytest.raises(UsageError, match="did you mean 'fast'"):
        Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32", "fsat")
    with pytest.raises(EnvironmentFault, match="xformers needs"):
        Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32", "xformers")
    theirs = UNet2DConditionModel.from_pretrained(tiny("eps") / "unet")
    with pytest.raises(UsageError, match="takes sdpa or math"):
        backends.choose(theirs, "fast", CPU, torch.bfloat16)
    assert backends.choose(theirs, "auto", CPU, torch.bfloat16) == "sdpa"
    assert backends.choose(theirs, "math", CPU, torch.float32) == "math"
    assert "AttnProcessor'" in str({type(p).__name__ for p in theirs.attn_processors.values()})


@torch.no_grad()
def test_the_chosen_one_is_asked(tiny: Tiny) -> None:
    """In every attention of the U-Net."""
    pipe, asked = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32", "math"), 0

    def counting(call: Callable[..., Tensor], *args: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return call(*args)

    names = [n for n, m in pipe.bundle.model.named_modules() if getattr(m, "takes_rules", False)]
    assert all(m.attend is backends.math for m in map(pipe.bundle.model.get_submodule, names))
    with changed(pipe.bundle.model, {n: [counting] for n in names}):
        pipe("a fox", seed=1, steps=1, guidance_scale=1.0)
    assert asked == len(names)
