"""What fits into memory, and what to do when it does not: slices, tiles, a smaller batch, then one line with a size."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ldm_pipe.codec import Codec
from ldm_pipe.errors import EnvironmentFault
from ldm_pipe.offload import modules
from ldm_pipe.patch import changed

# Tensors as large as the largest that are alive at once: the built-in model took 160 MiB more at 512x512 than at 64x64, where
# this forecasts 192.
LIVE = 8
OVERLAP = 4  # latent pixels in which two tiles are blended
SMALLEST = 8  # latent pixels of the smallest tile's side
# Pixels decoded at once from which a forecast is made: 512x512, about 2 GiB for Stable Diffusion's decoder in fp32.
ASKED = 2**18


def exhausted(error: BaseException) -> bool:
    """Does this error say that memory ran out, on a CPU or a GPU?"""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def free(device: torch.device) -> int:
    """Bytes that can still be taken on a device: of the machine, of its control group and of the process's own limit."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return min(_available(), _of_group(), _of_process())


def _available() -> int:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024
    return 2**62


def _of_group() -> int:
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        most, used = ((group / f"memory.{n}").read_text(encoding="ascii") for n in ("max", "current"))
        return int(most) - int(used)
    return 2**62


def _of_process() -> int:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            return most - int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    return 2**62


def peak(module: nn.Module, run: Callable[[], Any]) -> int:
    """About how many bytes `module` needs for its activations in `run`: LIVE times its largest output."""
    largest = 0

    def note(part: nn.Module, given: Any, out: Any) -> None:
        nonlocal largest
        if isinstance(out, Tensor):
            largest = max(largest, out.numel() * out.element_size())

    hooks = [m.register_forward_hook(note) for m in module.modules()]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return LIVE * largest


def side_that_fits(bytes_per_pixel: float, room: int, factor: int) -> int:
    """The side of the largest square image whose forecast fits into `room` bytes, a multiple of `factor`, at least one."""
    return max(1, int(math.sqrt(max(0.0, room / bytes_per_pixel)) // factor)) * factor


class Rung(NamedTuple):
    """A way to decode. how: in words; size: latent pixels that are decoded at once; tile: the side of a tile in them, or 0."""

    how: str
    size: int
    tile: int
    run: Callable[[], Tensor]


def decode(codec: Codec, latents: Tensor, say: Callable[[str], None], tile: int = 0) -> tuple[Tensor, int]:
    """(images of latents [B,C,h,w], the side of their tiles in latent pixels, 0 for none): together, else one by one, else in
    tiles, as large as the forecast says will fit; where memory runs out all the same, in the next smaller way.

    tile: tiles of this side to begin with, as an image was made. Raises EnvironmentFault where the smallest tile does not fit.
    `say` is told what was done.
    """
    rungs = _rungs(codec, latents, tile)
    first, why = (0, "as the image was made") if tile else fitting(codec, latents, rungs)
    for number, rung in enumerate(rungs[first:]):
        with forgiven():
            images = rung.run()
            if number or rung.tile or first:
                say(f"the images are decoded {rung.how}: {'memory ran out in the decoder' if number else why}")
            return images, rung.tile
    raise EnvironmentFault("memory ran out in the decoder, even in its smallest tiles; make room, or use --device cpu")


def fitting(codec: Codec, latents: Tensor, rungs: Sequence[Rung]) -> tuple[int, str]:
    """(the number of the first way that fits into what is free, by the forecast; why it is not the first). Decoding little is
    not asked."""
    if rungs[0].size * codec.factor**2 <= ASKED:
        return 0, ""
    need, room = of_decoding(codec, latents), free(latents.device)
    first = next((k for k, rung in enumerate(rungs) if need * rung.size <= room), len(rungs) - 1)
    return first, f"at once they need about {need * rungs[0].size / 2**30:.1f} GiB of memory and {room / 2**30:.1f} are free"


def forecast_decoding(codec: Codec, latents: Tensor) -> dict[str, Any]:
    """About how many bytes decoding these latents needs, and how `decode` will do it."""
    rungs = _rungs(codec, latents)
    return {"bytes": int(of_decoding(codec, latents) * rungs[0].size), "how": rungs[fitting(codec, latents, rungs)[0]].how}


def of_decoding(codec: Codec, latents: Tensor) -> float:
    """About how many bytes a latent pixel takes in the decoder (measured on a small square)."""
    small = latents.new_zeros(1, latents.shape[1], SMALLEST, SMALLEST)
    return max((peak(m, lambda: codec.decode(small)) for m in modules(codec)), default=0) / SMALLEST**2


def _rungs(codec: Codec, latents: Tensor, tile: int = 0) -> list[Rung]:
    """The ways to decode, each of less memory than the one before; from tiles of `tile` on where that is not 0."""
    area, longest = latents.shape[-2] * latents.shape[-1], max(latents.shape[-2:])
    rungs = [Rung("at once", len(latents) * area, 0, lambda: codec.decode(latents))]
    if len(latents) > 1:
        rungs.append(Rung("image by image", area, 0, lambda: torch.cat([codec.decode(x[None]) for x in latents])))
    begin = min(max(tile, SMALLEST), longest)
    for side in [begin, *_sides(begin)] if tile else _sides(longest):
        name = f"in tiles of {side * codec.factor} pixels"
        rungs.append(Rung(name, side**2, side, functools.partial(_each_tiled, codec, latents, side)))
    return [rung for rung in rungs if rung.tile] if tile else rungs


@contextlib.contextmanager
def forgiven() -> Iterator[None]:
    """Swallows an error that says memory ran out, and gives the caches back."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not exhausted(error):
            raise
        error.__traceback__ = None  # its frames hold the tensors that did not fit
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _sides(longest: int) -> Iterator[int]:
    side = longest
    while side > SMALLEST:
        side = max(SMALLEST, -(-side // 2))
        yield side


def _each_tiled(codec: Codec, latents: Tensor, side: int) -> Tensor:
    return torch.cat([tiled(codec, x[None], side) for x in latents])


def tiled(codec: Codec, latents: Tensor, side: int) -> Tensor:
    """Images of latents [B,C,h,w] from tiles of `side` latent pixels, blended linearly where they overlap.

    A group norm would see one tile instead of the whole; it takes its mean and variance from the latents made as small as a
    tile instead (on the built-in model 41 dB from the whole picture, not 30). So the picture is near the whole one, not equal.
    """
    if max(latents.shape[-2:]) <= side:
        return codec.decode(latents)
    with contextlib.ExitStack() as norms:
        for module in modules(codec):
            norms.enter_context(_normed_as(module, codec, latents, side))
        return _tiled(codec, latents, side)


@contextlib.contextmanager
def _normed_as(module: nn.Module, codec: Codec, latents: Tensor, side: int) -> Iterator[None]:
    """The group norms of a codec's network with the mean and variance that they have on the latents at the size of a tile."""
    names = [name for name, part in module.named_modules() if isinstance(part, nn.GroupNorm)]
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def groups(name: str, x: Tensor) -> Tensor:
        return x.float().reshape(len(x), cast(nn.GroupNorm, module.get_submodule(name)).num_groups, -1)

    def note(name: str, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        found[name] = (groups(name, x).mean(-1, keepdim=True), groups(name, x).var(-1, unbiased=False, keepdim=True))
        return call(x)

    def normed(name: str, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        norm = cast(nn.GroupNorm, module.get_submodule(name))
        mean, variance = found[name]
        inside = ((groups(name, x) - mean) * torch.rsqrt(variance + norm.eps)).reshape(x.shape).to(x.dtype)
        shape = (1, -1, *[1] * (x.ndim - 2))
        return inside * norm.weight.view(shape) + norm.bias.view(shape)

    with changed(module, {name: [functools.partial(note, name)] for name in names}):
        small = tuple(min(side, length) for length in latents.shape[-2:])
        codec.decode(nn.functional.interpolate(latents, size=small, mode="nearest-exact"))
    with changed(module, {name: [functools.partial(normed, name)] for name in found}):
        yield


def _tiled(codec: Codec, latents: Tensor, side: int) -> Tensor:
    """The tiles themselves, blended."""
    f, (h, w) = codec.factor, latents.shape[-2:]
    out = latents.new_zeros(len(latents), 3, h * f, w * f)
    weight = latents.new_zeros(1, 1, h * f, w * f)
    for top in _starts(h, side):
        for left in _starts(w, side):
            part = codec.decode(latents[..., top : top + side, left : left + side])
            window = _ramp(part.shape[-2], f, part)[:, None] * _ramp(part.shape[-1], f, part)
            place = (..., slice(top * f, top * f + part.shape[-2]), slice(left * f, left * f + part.shape[-1]))
            out[place] += part * window
            weight[place] += window
    return out / weight


def _starts(length: int, side: int) -> list[int]:
    """Where tiles begin so that they cover `length`, each two sharing at least OVERLAP (half a tile at most)."""
    stride = max(side - OVERLAP, side // 2)
    return [min(s, max(0, length - side)) for s in range(0, max(1, length - side + stride), stride)]


def _ramp(length: int, factor: int, like: Tensor) -> Tensor:
    """[length], rising from the edges over the overlap to 1."""
    near = torch.arange(length, device=like.device, dtype=like.dtype) + 1
    return torch.minimum(near, near.flip(0)).clamp(max=OVERLAP * factor) / (OVERLAP * factor)
