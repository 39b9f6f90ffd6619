"""What is computed once and kept: latents and text features, each under a key of everything that it follows from.

A key is the SHA-256 of the weights' digest, the preprocessing, the content (a picture's own digest and geometry, or a
caption) and the dtype. Whatever changes has another key, so a stale entry cannot be met.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ldm_pipe import files
from ldm_pipe.errors import NumericalError


def key_of(**parts: Any) -> str:
    """The key of some facts, 64 hexadecimal digits; JSON keeps neighbours apart ("ab", "c" is not "a", "bc")."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Cache:
    """Tensors under keys, one safetensors file each, in a folder that may be shared by any number of runs."""

    folder: Path
    kind: str

    def path(self, key: str) -> Path:
        """Where an entry is."""
        return self.folder / self.kind / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """An entry's tensors by name, None where there is none or it is damaged."""
        try:
            return load(self.path(key).read_bytes())
        except (OSError, SafetensorError):
            return None

    def fill(self, wanted: Mapping[str, Any], make: Callable[[Sequence[Any]], dict[str, Tensor]], batch: int = 8) -> int:
        """Make what is missing of `wanted` (key -> what `make` takes, a batch at a time) and return how much that was. `make`
        gives named tensors, batch first.

        Raises NumericalError where a value is not finite; it is not kept.
        """
        missing = [k for k in wanted if self.get(k) is None]
        for first in range(0, len(missing), batch):
            keys = missing[first : first + batch]
            values = make([wanted[k] for k in keys])
            for i, key in enumerate(keys):
                row = {name: value[i].contiguous() for name, value in values.items()}
                if not all(torch.isfinite(t).all() for t in row.values()):
                    raise NumericalError(f"the {self.kind} of {str(wanted[key])[:80]!r} are not finite")
                files.write(self.path(key), save(row), replace=True)
        return len(missing)
