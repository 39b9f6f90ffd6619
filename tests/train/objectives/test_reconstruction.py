"""Adversarial and perceptual terms: who learns from what, the weight of eq. 7, and nothing of it where it is not asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm_pipe import files, loading
from ldm_pipe.errors import UsageError
from train.job import Job
from train.loop import run
from train.objectives.adversarial import Critic, balanced, hinge
from train.objectives.perceptual import Perceptual
from train.tasks.codec import Codec

SMALL: dict[str, Any] = {"channels": (8, 8), "latent_channels": 2, "groups": 4, "crop": 32, "critic_width": 8}
CLIP = loading.BUILTIN / "clip"


def gradients(task: Codec, **batch: Tensor) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """(net, what it says, gradients by name), always from the same weights and pictures."""
    torch.manual_seed(0)
    net: Any = task.net()
    out = net({**task.batch(0, range(4)), **batch})
    out["loss"].backward()
    return net, out, {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def test_without_the_terms_nothing_is_there() -> None:
    net, out, _ = gradients(Codec(**SMALL))
    assert set(out) == {"loss", "psnr", "kl"}
    assert all(n.startswith("codec.") for n in net.state_dict())
    assert "heard" not in Codec(**SMALL).batch(0, range(2))
    assert Codec(**SMALL).facts() == {}
    assert Codec(**SMALL).grouped(8) == Codec(**SMALL)


def test_critic_and_codec_learn_from_their_own_terms() -> None:
    """Unheard, the codec's gradients are those without a critic; heard, the critic's own do not change."""
    torch.manual_seed(0)
    _, _, plain = gradients(Codec(**SMALL))
    task = Codec(**SMALL, adversarial=0.5)
    _, _, deaf = gradients(task, heard=torch.zeros(4))
    net, out, heard = gradients(task, heard=torch.ones(4))
    for name, grad in plain.items():
        assert torch.allclose(deaf[name], grad, rtol=1e-4, atol=1e-7), name
    critics = [n for n in heard if n.startswith("critic.")]
    assert critics == [n for n in net.state_dict() if n.startswith("critic.")]
    for name in critics:
        assert torch.allclose(deaf[name], heard[name], rtol=1e-5, atol=1e-9), name
    assert sum(heard[n].abs().sum() > 0 for n in critics) >= len(critics) - 1  # all but the last offset, at the start
    last = "codec.decoder.conv_out.weight"
    extra, own = (heard[last] - plain[last]).norm(), plain[last].norm()
    assert extra.item() == pytest.approx(0.5 * own.item(), rel=1e-2)  # what eq. 7 is for (own: with the KL term, not felt here)
    assert out["balance"] > 0


def test_the_weight_is_that_of_the_equation() -> None:
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    one, two = (weight * torch.tensor([6.0, 8.0])).sum(), (weight * torch.tensor([0.0, 2.0])).sum()
    assert balanced(one, two, weight).item() == pytest.approx(10 / 2, rel=1e-6)
    assert balanced(one, two * 0, weight).item() == 1e4
    assert not balanced(one, two, weight).requires_grad


def test_the_hinge_is_that_of_the_paper() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images[:, :1]

    real, made = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    spread = [t[:, None, None, None].expand(3, 3, 2, 2) for t in (real, made)]
    found = hinge(Fixed(), *spread)  # type: ignore[arg-type]
    assert found.tolist() == [0.0, (0.5 + 1.0) / 2, (2.0 + 2.0) / 2]


def test_patches_are_seventy_pixels_and_samples_do_not_meet() -> None:
    critic = Critic(8, 3).double()
    for i in range(len(critic.net)):
        if isinstance(critic.net[i], torch.nn.GroupNorm):
            critic.net[i] = torch.nn.Identity()  # which looks at the whole picture
    picture = torch.randn(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    out = critic(picture)
    out[0, 0, out.shape[2] // 2, out.shape[3] // 2].backward()
    seen = picture.grad.abs().sum((0, 1))  # type: ignore[union-attr]
    assert (seen.sum(0) > 0).sum() == (seen.sum(1) > 0).sum() == 70  # Isola et al., appendix 6.1.2
    critic = Critic(8, 2)
    pictures = torch.randn(3, 3, 32, 32)
    assert torch.allclose(critic(pictures)[1], critic(pictures[1:2])[0], atol=1e-6)


def test_the_distance_is_a_distance_of_features() -> None:
    distance = Perceptual(CLIP)
    a, b = Codec().batch(0, range(2))["images"], Codec().batch(0, range(2, 4))["images"]
    assert distance(a, a).abs().max() < 1e-9
    assert torch.allclose(distance(a, b), distance(b, a))
    assert torch.allclose(distance(a, b)[1:], distance(a[1:], b[1:]), atol=1e-5)
    layers = [f[0] for f in distance._features(a)]
    assert all(torch.allclose(f.norm(dim=1), torch.ones(64), atol=1e-5) for f in layers)
    cosines = [(f[0] * g[0]).sum(1).mean() for f, g in zip(distance._features(a), distance._features(b), strict=True)]
    assert distance(a, b)[0].item() == pytest.approx(sum(2 - 2 * c.item() for c in cosines), rel=1e-4)
    assert not list(distance.parameters())
    assert not distance.state_dict()
    made = b.clone().requires_grad_()
    distance(a, made).sum().backward()
    assert made.grad.abs().sum() > 0  # type: ignore[union-attr]
    assert distance(a[..., :61], b[..., :61]).shape == (2,)  # scaled to 64x64
    assert distance._features(a[..., :61])[0].shape == layers[0][None].expand(2, -1, -1).shape


def test_the_tower_is_named_by_its_digest(tmp_path: Path) -> None:
    told = Codec(perceptual=0.1).facts()["perceptual"]
    assert told == f"clip(clip) {files.sha256(CLIP / 'model.safetensors')}"
    with pytest.raises(UsageError, match=r"holds no model\.safetensors"):
        Codec(perceptual=0.1, tower=str(tmp_path)).facts()
    with pytest.raises(UsageError, match="0 or more"):
        Codec(adversarial=-1)


class Quick(Codec):
    """Without the pictures that an export's scale is measured on."""

    def export(self, net: Any, folder: Path) -> None:
        pass


def test_both_sides_resume_bit_for_bit(tmp_path: Path) -> None:
    task = Quick(**SMALL, perceptual=0.1, adversarial=0.5, adversarial_from=2)

    def plan(name: str, stop: int = 0) -> Job:
        small = {"batch": 2, "accumulate": 2, "warmup": 1, "log_every": 1, "save_every": 2}
        return Job(output=str(tmp_path / name), steps=4, stop=stop, **small)

    run(replace(task, group=1), plan("a"))
    for stop in (1, 3, 0):
        run(task, plan("b", stop))
    for name in ("weights", "ema", "optimiser"):
        one, two = (load_file(tmp_path / n / "step-000004" / f"{name}.safetensors") for n in ("a", "b"))
        assert all(torch.equal(one[k], two[k]) for k in one)
    names = load_file(tmp_path / "a" / "step-000004" / "weights.safetensors")
    assert any(n.startswith("critic.") for n in names)
    assert all(n.startswith(("critic.", "codec.")) for n in names)
    logs = [[json.loads(x) for x in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("a", "b")]
    assert [r["loss"] for r in logs[0]] == [r["loss"] for r in logs[1]]
    assert {"perceptual", "critic", "balance"} <= set(logs[0][0])
    task = task.grouped(2)  # type: ignore[assignment]
    assert [task.batch(0, [i])["heard"].item() for i in range(6)] == [0, 0, 0, 0, 1, 1]


def test_a_critic_teaches_where_errors_do_not() -> None:
    """From noise of the right spread about a wrong mean: the critic sees real and made apart, and moves the made one."""
    torch.manual_seed(0)
    critic = Critic(8, 1)
    made = torch.zeros(1, 3, 1, 1, requires_grad=True)
    optimiser = torch.optim.Adam(
        [{"params": critic.parameters(), "lr": 2e-3}, {"params": [made], "lr": 2e-2}], betas=(0.5, 0.9)
    )
    for _ in range(60):
        real, fake = torch.randn(8, 3, 16, 16) * 0.3 + 0.8, torch.randn(8, 3, 16, 16) * 0.3 + made
        optimiser.zero_grad()
        (hinge(critic, real, fake).mean() - critic.judged(fake).mean()).backward()
        optimiser.step()
    assert made.mean() > 0.3
