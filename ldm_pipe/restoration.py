"""`--restore "pool(4)" --input small.png`: a picture from a degraded one, by any registered method, on pixels or on latents."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ldm_pipe import registry
from ldm_pipe.errors import UsageError, unknown
from ldm_pipe.restore.text import call, parse

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ldm_pipe.codec import Codec
    from ldm_pipe.pipeline import Pipeline
    from ldm_pipe.plan import Plan

MADE_HERE = ("measurement", "sampler", "codec")  # fields that come from the run, not from the user


@dataclass(frozen=True)
class Restoration:
    """operator: what degraded the picture, such as "pool(4)". method: a registered restoration, with its fields. deviation:
    of the noise in the picture, whose values are -1..1. Raises UsageError on unknown names and fields."""

    operator: str
    method: str = "dps"
    fields: dict[str, Any] = field(default_factory=dict)
    deviation: float = 0.0

    def __post_init__(self) -> None:
        call(self.operator)
        known = [n for n, _ in registry.entry("restoration", self.method).fields if n not in MADE_HERE]
        for name in self.fields:
            if name not in known:
                raise UsageError("--set restore: " + unknown(f"field of {self.method}", name, (*known, "deviation")))
        needs = [n for n, d in registry.entry("restoration", self.method).fields if d == "required" and n not in MADE_HERE]
        if needs:
            raise UsageError(f"--method {self.method} needs {needs[0]}, which is no text; use it from Python")
        if not 0 <= self.deviation <= 2:
            raise UsageError(f"the deviation of the noise is {self.deviation}; it takes 0 to 2")

    def applied(self, pipe: Pipeline, whole: Plan, degraded: Image) -> Plan:
        """The plan that restores: the method around its denoiser or its sampler, and a report of what it leaves unmet."""
        from ldm_pipe.codec import Identity
        from ldm_pipe.image import digest
        from ldm_pipe.restore.latent import Latent
        from ldm_pipe.restore.operator import Measurement

        operator, codec = parse(self.operator), pipe.bundle.codec
        seen = operator if codec == Identity() else Latent(operator, codec)
        factor, (height, width) = codec.factor, whole.shape[1:]
        y = _measured(degraded, operator, (3, height * factor, width * factor)).to(pipe.device)
        measurement = Measurement(seen, y, self.deviation)
        made = {"measurement": measurement, "sampler": whole.sampler, "codec": codec}
        wanted = {n for n, _ in registry.entry("restoration", self.method).fields}
        method = registry.build("restoration", self.method, **self.fields, **{n: v for n, v in made.items() if n in wanted})
        sources = {**whole.recorded.get("sources", {}), "input": digest(degraded)}
        whole = replace(
            whole,
            recorded={**whole.recorded, "sources": sources, "restoration": asdict(self)},
            report=lambda images: _report(images, Measurement(operator, y, self.deviation), codec),
        )
        if hasattr(method, "step"):
            return replace(whole, sampler=method)
        return replace(whole, guides=(*whole.guides, method))


def _measured(picture: Image, operator: Any, shape: tuple[int, int, int]) -> Tensor:
    """The degraded picture as data of the operator on images of this shape, [1,...]."""
    import torch

    from ldm_pipe.image import to_tensor

    wanted = tuple(operator(torch.zeros(1, *shape)).shape[1:])
    y = to_tensor([picture])
    if len(wanted) == 3 and wanted[0] == 1:
        y = y.mean(1, keepdim=True)
    if tuple(y.shape[1:]) != wanted:
        flat = len(wanted) == 3 and wanted[0] in (1, 3)
        size = f"{wanted[2]}x{wanted[1]} pixels" if flat else "no picture (use it from Python)"
        own = f"{picture.width}x{picture.height}"
        raise UsageError(f"--input is {own} pixels; this operator makes {size} of {shape[2]}x{shape[1]}")
    return y


def _report(images: Tensor, measurement: Any, codec: Codec) -> str:
    """How far the results are from the data, and how far the codec alone takes them."""
    import torch

    with torch.no_grad():
        missed = measurement.misfit(images).square().mean().sqrt()
        own = (codec.decode(codec.encode(images)) - images).square().mean().sqrt()
    ceiling = f"the codec's own round trip misses by {float(own):.4f}"
    return f"the data are missed by {float(missed):.4f} rms, where values span 2; {ceiling}"
