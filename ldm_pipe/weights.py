"""Weight files from anywhere: understood whole or not at all, and nothing allocated on their word."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import typing
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm_pipe import float8
from ldm_pipe.configs import read_json
from ldm_pipe.errors import ModelError

M = TypeVar("M", bound=nn.Module)

LONGEST_HEADER, MOST_TENSORS, LONGEST_NAME = 16 * 2**20, 20_000, 512  # of a safetensors file: far above any real one
FLOATS = ("F64", "F32", "F16", "BF16")  # as the header of a safetensors file names them
WIDE = 256  # channels from which bf16 gains on a CPU (x1.3; x2.1 at 1280): scripts/bench/dtype.py
KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OWN = {**dict(zip(FLOATS, KINDS, strict=True)), **{n: getattr(torch, kind) for n, kind in float8.NAMES.items()}}
FIRST = 3  # names of faulty tensors that a recipe holds


@contextlib.contextmanager
def named(folder: Path) -> Iterator[None]:
    """Whatever goes wrong inside becomes a ModelError that names the folder of the part."""
    try:
        if not folder.exists():
            raise FileNotFoundError("there is no such folder")
        yield
    except ModelError:
        raise
    except Exception as error:  # the libraries raise a dozen kinds; the user needs the folder and the reason
        reason = " ".join(str(error).split())[:160]
        raise ModelError(f"{folder.parent.name}/{folder.name} cannot be loaded: {reason}") from error


@dataclasses.dataclass(frozen=True)
class Fault:
    """What does not fit in a part (`where`): tensors that are missing, unexpected, mismatched, ..., by name, in order."""

    where: str
    kind: str
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where}: {self.kind} tensor {self.tensors[0]!r:.100} and {len(self.tensors) - 1} more"

    @property
    def row(self) -> dict[str, Any]:
        """As a recipe has it: how many, and the first ones."""
        first = [name[:100] for name in self.tensors[:FIRST]]
        return {"part": self.where, "fault": self.kind, "count": len(self.tensors), "first": first}


@dataclasses.dataclass(frozen=True)
class How:
    """How weights are read. dtype: what they become, tensor by tensor. faults: where it is a list, tensors that are missing, of
    another shape or not the module's are no errors: they are added to it, and what is missing is drawn, always alike."""

    dtype: torch.dtype = torch.float32
    faults: list[Fault] | None = None


STRICT = How()


def read(file: Path, parts: int, build: Callable[[], M], renamed: Callable[[str], str | None] = str, how: How = STRICT) -> M:
    """The module that `build` makes, in eval mode, its every tensor from a safetensors file and none left over.

    Built on the meta device, so that only tensors which the file really holds take memory. parts: how many tensors the module
    has at least; renamed: name in the file -> name in the module, None for one to leave out. Raises ModelError that names the
    first tensor which is missing, unexpected, of another shape, not floating point, or not finite.
    """
    from safetensors import safe_open

    where = f"{file.parent.parent.name}/{file.parent.name}"
    with named(file.parent):
        refuse(where, "not floating point:", [n for n, (kind, _) in header(file).items() if kind in float8.NAMES])
    with named(file.parent), safe_open(file, framework="pt") as found:
        names = {name: renamed(name) for name in found.keys()}  # noqa: SIM118  (it is no mapping)
        if parts > len(names) and how.faults is None:
            raise ModelError(f"{where}: config.json asks for {parts} parts or more, the file has {len(names)} tensors")
        held = {new: old for old, new in names.items() if new is not None}
        refuse(where, "unexpected", [old for old, new in names.items() if new is not None and held[new] != old])
        converted = tensors_as(file, found, how.dtype)
        return filled(where, build, {new: converted(old) for new, old in held.items()}, held, how)


def tensors_as(file: Path, found: Any, dtype: torch.dtype) -> Callable[[str], Tensor]:
    """The tensors of an open safetensors file by name: mapped where they are of this dtype or no floats at all, else read into
    memory one at a time and converted, so that the file's own size is never held."""
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        entries = json.loads(data.read(length))
    ends = (e["data_offsets"] for n, e in entries.items() if n != "__metadata__")
    scratch = torch.empty(max((end - begin for begin, end in ends), default=0), dtype=torch.uint8)  # fresh pages cost a second

    def tensor(name: str) -> Tensor:
        kind, (begin, end) = entries[name]["dtype"], entries[name]["data_offsets"]
        own = OWN.get(kind)
        if own is None or own == dtype or begin == end:
            mapped: Tensor = found.get_tensor(name)
            return mapped if own is None else mapped.to(dtype)
        raw = scratch[: end - begin]
        with file.open("rb") as data:
            data.seek(8 + length + begin)
            if data.readinto(raw.numpy().data) != end - begin:
                raise ModelError(f"{file.name}: the file ends within {name!r:.100}")
        return raw.view(own).reshape(entries[name]["shape"]).to(torch.float32).to(dtype)

    return tensor


def filled(
    where: str, build: Callable[[], M], tensors: Mapping[str, Tensor], called: Mapping[str, str], how: How = STRICT
) -> M:
    """The module that `build` makes on the meta device, in eval mode, of exactly these tensors (by name; the memory of a file
    serves as it is where it holds the dtype). called: how a name is to be called in an error, where not by itself."""
    with torch.device("meta"):
        module = build()
    wanted = {n: tuple(t.shape) for n, t in module.state_dict().items()}
    both = {n: t for n, t in tensors.items() if n in wanted}
    missing = wanted.keys() - tensors.keys()
    others = [n for n, t in both.items() if tuple(t.shape) != wanted[n]]
    refuse(where, "missing", missing, how.faults)
    refuse(where, "unexpected", [called.get(n, n) for n in tensors if n not in wanted], how.faults)
    refuse(where, "mismatched", others, how.faults)
    refuse(where, "not floating point:", [n for n, t in both.items() if t.dtype not in KINDS])
    both |= {n: drawn(n, wanted[n]) for n in (*missing, *others)}
    for name, tensor in both.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor.to(how.dtype), requires_grad=False))
    finite(module, where)
    return module.eval()


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor that a file lacks, as torch's layers draw theirs: ones and zeros of norms and biases, else uniform within one
    over the root of the inputs. The same for every call."""
    if len(shape) < 2:
        return torch.full(shape, float(name.endswith("weight")))
    bound = math.prod(shape[1:]) ** -0.5 if math.prod(shape[1:]) else 0.0
    return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def wide(files: typing.Iterable[Path]) -> bool:
    """Has a network in these files a layer over images that is wide enough to gain from bf16 on a CPU?"""
    shapes = (shape for file in files for _, shape in header(file, alone=True).values())
    return any(len(shape) == 4 and shape[0] >= WIDE for shape in shapes)


def refuse(where: str, kind: str, tensors: typing.Iterable[str], faults: list[Fault] | None = None) -> None:
    """Raise ModelError that names the first of faulty tensors and counts the others; with `faults`, add them there instead."""
    faulty = tuple(sorted(tensors))
    if not faulty:
        return
    fault = Fault(where, kind, faulty)
    if faults is None:
        raise ModelError(str(fault))
    faults.append(fault)


def finite(module: Any, where: str) -> None:
    """Raise ModelError that names the first weight which holds NaN or Inf."""
    refuse(where, "NaN or Inf in", [n for n, t in module.state_dict().items() if not _is_finite(t)])


def _is_finite(tensor: Tensor) -> bool:
    """A sum is not finite where a summand is not; where only the sum overflows, every value is looked at."""
    return math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())


def header(file: Path, alone: bool = False) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The names, types and shapes that a safetensors file declares, read before anything else is done with it.

    Raises ModelError where its header is longer, has more entries or longer names than any real file, names a tensor twice or
    is not of the format. alone: the file belongs to no folder, out of which it might lead.
    """
    if not alone:
        inside(file)
    where = "/".join(file.parts[-2:])
    if not file.is_file():
        raise ModelError(f"{where} is missing, or no file; only safetensors is read")
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        if not 2 <= length <= min(LONGEST_HEADER, file.stat().st_size - 8):
            raise ModelError(f"{where} is damaged or no safetensors file: its header is said to be {length} bytes long")
        text = data.read(length)
    try:
        pairs = json.loads(text, object_pairs_hook=_once)
        entries = {n: (str(e["dtype"]), tuple(e["shape"])) for n, e in pairs.items() if n != "__metadata__"}
        sound = all(type(side) is int and side >= 0 for _, shape in entries.values() for side in shape)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{where}: its header cannot be read: {str(error)[:80]}") from error
    if not sound or len(entries) > MOST_TENSORS or any(len(n) > LONGEST_NAME for n in entries):
        raise ModelError(f"{where}: its header names {len(entries)} tensors, or shapes or names that no model has")
    return entries


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def held(place: Path, name: str) -> dict[str, int]:
    """How many numbers every tensor of a part has: of the file `name`, or of the several that `name`.index.json lists.

    Raises ModelError where a listed file lies elsewhere, is no safetensors file or is missing.
    """
    listing = place / f"{name}.index.json"
    files = {name}
    if listing.is_file():
        files = set(read_json(listing)["weight_map"].values())
    for file in files:
        if file != Path(file).name or not file.endswith(".safetensors") or not (place / file).is_file():
            raise ModelError(
                f"{place.parent.name}/{place.name}: {file!r:.80} is no file of this folder; only safetensors is read"
            )
    found = {n: entry for file in sorted(files) for n, entry in header(place / file).items()}
    wrong = (n for n, (dtype, _) in found.items() if dtype not in FLOATS and not n.endswith("position_ids"))
    refuse(f"{place.parent.name}/{place.name}", "not floating point:", wrong)
    return {n: math.prod(shape) for n, (_, shape) in found.items()}


def inside(file: Path) -> None:
    """Raise ModelError where a file of a model is a link that leads out of it (the store of a hub's downloads is its own)."""
    model = file.absolute().parent.parent
    home = model.parent.parent if model.parent.name == "snapshots" else model
    if home.resolve() not in file.resolve().parents:
        raise ModelError(f"{file.parent.name}/{file.name} is a link that leads out of the model's folder")
