"""Configurations and weight files from anywhere: understood whole or not at all, and nothing allocated on their word."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm_pipe.errors import ModelError

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)

LARGEST = 10**6  # of any number in a configuration: vocabularies and sizes of images lie well below it
LONGEST_HEADER, MOST_TENSORS, LONGEST_NAME = 16 * 2**20, 20_000, 512  # of a safetensors file: far above any real one
FLOATS = ("F64", "F32", "F16", "BF16")  # as the header of a safetensors file names them
KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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


def plausible(config: Mapping[str, Any], where: str) -> None:
    """Raise ModelError where a configuration holds a number that no model has, however deep: too large, or not finite."""
    for name, value in config.items():
        rest = [value]
        while rest:
            item = rest.pop()
            if isinstance(item, list | dict):
                rest += item.values() if isinstance(item, dict) else item
            elif isinstance(item, int | float) and not -LARGEST <= item <= LARGEST:
                raise ModelError(f"{where}: {name} holds {item!r:.40}, which no model has")


def known(cls: type[C], config: Mapping[str, Any]) -> C | None:
    """The dataclass `cls` of a configuration, or None where it asks for anything that `cls` does not know.

    Every name must be a field of the right type or one of `cls.neutral` with a value listed there; names that begin with an
    underscore say who wrote the file. A ValueError of `cls` means None too: fields that do not fit each other.
    """
    hints = typing.get_type_hints(cls)
    neutral: Mapping[str, tuple[Any, ...]] = cls.neutral  # type: ignore[attr-defined]
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for name, value in config.items():
        value = tuple(value) if isinstance(value, list) else value
        if name in fields and _fits(value, hints[name]):
            values[name] = value
        elif not name.startswith("_") and not any(_same(value, v) for v in neutral.get(name, ())):
            return None
    try:
        return cls(**values)
    except (ValueError, ArithmeticError):
        return None


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is typing.Literal:
        return any(_same(value, a) for a in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, args[0]) for v in value)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is int:
        return isinstance(value, int) and value >= 0
    return isinstance(value, int | float if hint is float else hint)


def _same(value: Any, one: Any) -> bool:
    return value == one and isinstance(value, bool) == isinstance(one, bool)


def read(file: Path, parts: int, build: Callable[[], M], renamed: Callable[[str], str | None] = str) -> M:
    """The module that `build` makes, in fp32 and eval mode, its every tensor from a safetensors file and none left over.

    Built on the meta device, so that only tensors which the file really holds take memory. parts: how many tensors the module
    has at least; renamed: name in the file -> name in the module, None for one to leave out. Raises ModelError that names the
    first tensor which is missing, unexpected, of another shape, not floating point, or not finite.
    """
    from safetensors import safe_open

    where = f"{file.parent.parent.name}/{file.parent.name}"
    with named(file.parent):
        header(file)
    with named(file.parent), safe_open(file, framework="pt") as found:
        names = {name: renamed(name) for name in found.keys()}  # noqa: SIM118  (it is no mapping)
        if parts > len(names):
            raise ModelError(f"{where}: config.json asks for {parts} parts or more, the file has {len(names)} tensors")
        held = {new: old for old, new in names.items() if new is not None}
        _refuse(where, "unexpected", [old for old, new in names.items() if new is not None and held[new] != old])
        return filled(where, build, {new: found.get_tensor(old) for new, old in held.items()}, held)


def filled(where: str, build: Callable[[], M], tensors: Mapping[str, Tensor], called: Mapping[str, str]) -> M:
    """The module that `build` makes on the meta device, in fp32 and eval mode, of exactly these tensors (by name; the memory of
    a file serves as it is where it holds fp32). called: how a name is to be called in an error, where not by itself."""
    with torch.device("meta"):
        module = build()
    wanted = {n: tuple(t.shape) for n, t in module.state_dict().items()}
    both = {n: t for n, t in tensors.items() if n in wanted}
    _refuse(where, "missing", wanted.keys() - tensors.keys())
    _refuse(where, "unexpected", [called.get(n, n) for n in tensors if n not in wanted])
    _refuse(where, "mismatched", [n for n, t in both.items() if tuple(t.shape) != wanted[n]])
    _refuse(where, "not floating point:", [n for n, t in both.items() if t.dtype not in KINDS])
    for name, tensor in both.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor.to(torch.float32), requires_grad=False))
    finite(module, where)
    return module.eval()


def _refuse(where: str, fault: str, tensors: typing.Iterable[str]) -> None:
    faulty = sorted(tensors)
    if faulty:
        raise ModelError(f"{where}: {fault} tensor {faulty[0]!r:.100} and {len(faulty) - 1} more")


def finite(module: Any, where: str) -> None:
    """Raise ModelError that names the first weight which holds NaN or Inf."""
    _refuse(where, "NaN or Inf in", [n for n, t in module.state_dict().items() if not _is_finite(t)])


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
        files = set(json.loads(listing.read_text(encoding="utf-8"))["weight_map"].values())
    for file in files:
        if file != Path(file).name or not file.endswith(".safetensors") or not (place / file).is_file():
            raise ModelError(
                f"{place.parent.name}/{place.name}: {file!r:.80} is no file of this folder; only safetensors is read"
            )
    found = {n: entry for file in sorted(files) for n, entry in header(place / file).items()}
    wrong = (n for n, (dtype, _) in found.items() if dtype not in FLOATS and not n.endswith("position_ids"))
    _refuse(f"{place.parent.name}/{place.name}", "not floating point:", wrong)
    return {n: math.prod(shape) for n, (_, shape) in found.items()}


def inside(file: Path) -> None:
    """Raise ModelError where a file of a model is a link that leads out of it (the store of a hub's downloads is its own)."""
    model = file.absolute().parent.parent
    home = model.parent.parent if model.parent.name == "snapshots" else model
    if home.resolve() not in file.resolve().parents:
        raise ModelError(f"{file.parent.name}/{file.name} is a link that leads out of the model's folder")
