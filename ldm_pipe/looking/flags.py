"""What `--record`, `--preview` and `--sweep` ask for, checked before torch is imported."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from ldm_pipe import registry, strict
from ldm_pipe.errors import UsageError, unknown
from ldm_pipe.output import FORMATS
from ldm_pipe.settings import Settings

SWEPT = ("sampler", "spacing", "steps", "guidance_scale", "strength")
MOST_RUNS = 256


@dataclass(frozen=True)
class Looking:
    """record: a .safetensors name. preview: "terminal" or a picture's name. sweep: texts of the form "steps=10,20". decoder:
    the folder of the autoencoder that draws the preview, in the place of the linear map.

    Raises UsageError on names that could not be written and on fields that cannot be swept.
    """

    record: str | None = None
    preview: str | None = None
    sweep: tuple[str, ...] = ()
    force: bool = False
    decoder: str | None = None

    def __post_init__(self) -> None:
        if self.record is not None:
            _file(self.record, "--record", (".safetensors",), self.force)
        if self.preview not in (None, "terminal"):
            _file(str(self.preview), "--preview", tuple(FORMATS), True)
        if self.decoder is not None and self.preview is None:
            raise UsageError("--preview-decoder goes with --preview FILE or --preview terminal")
        if self.sweep and (self.record is not None or self.preview is not None):
            raise UsageError("--sweep makes many runs; --record and --preview go with one")
        count = math.prod(len(values) for _, values in self.fields())
        if count > MOST_RUNS:
            raise UsageError(f"--sweep asks for {count} runs; it takes up to {MOST_RUNS}")

    def fields(self) -> list[tuple[str, list[str]]]:
        """(field, values) of every text; a field is one of the settings, or sampler.X or spacing.X."""
        found: list[tuple[str, list[str]]] = []
        for text in self.sweep:
            name, equals, rest = text.partition("=")
            name = name.strip().replace("-", "_")
            values = [v.strip() for v in rest.split(",")]
            if not (equals and all(values)):
                raise UsageError(f"--sweep {text[:60]!r} is not of the form steps=10,20,50")
            if name not in SWEPT and name.partition(".")[0] not in ("sampler", "spacing"):
                raise UsageError("--sweep " + unknown("field to sweep", name[:40], [*SWEPT, "sampler.eta"]))
            if name in dict(found):
                raise UsageError(f"--sweep: {name} stands twice")
            found.append((name, values))
        return found

    def runs(self, base: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(label, settings) of every combination, the last field changing fastest, over the settings of one run. Raises
        UsageError on values that cannot be."""
        fields = self.fields()
        hints = get_type_hints(Settings)
        for values in itertools.product(*(v for _, v in fields)):
            given = {**base, "sampler_set": dict(base["sampler_set"]), "spacing_set": dict(base["spacing_set"])}
            for (name, _), value in zip(fields, values, strict=True):
                kind, dot, field = name.partition(".")
                if dot:
                    given[f"{kind}_set"][field] = value
                else:
                    given[name] = strict.coerce(value, hints[name], f"--sweep {name}")
            Settings(**given)
            _check(given)
            yield ", ".join(f"{name}={v}" for (name, _), v in zip(fields, values, strict=True)), given


def _check(given: Mapping[str, Any]) -> None:
    """Names of methods and of their fields are known."""
    for kind in ("sampler", "spacing"):
        if given[kind] is not None:
            known = [n for n, _ in registry.entry(kind, given[kind]).fields]
            for field in given[f"{kind}_set"]:
                if field not in known:
                    raise UsageError("--sweep " + unknown(f"field of {kind} {given[kind]}", field, known))


def _file(given: str, flag: str, endings: tuple[str, ...], force: bool) -> None:
    """Raises UsageError where a file of this name could not be written, or exists without --force."""
    path = Path(given)
    if "\0" in given or path.suffix.lower() not in endings:
        raise UsageError(f"{flag} {given[:80]!r}: the file's name ends in {', '.join(endings)}")
    try:
        taken, parent = path.exists(), path.parent
        while not parent.exists():
            parent = parent.parent
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag} {given[:80]!r} is not a name this file system can hold") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK) or path.is_dir():
        raise UsageError(f"{flag} {given[:80]!r}: {str(parent)[:80]!r} is no folder that can be written to")
    if taken and not force:
        raise UsageError(f"{flag} {given[:80]!r} exists; --force overwrites it")
