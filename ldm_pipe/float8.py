"""Weights of 8 bits in single files: plain ones are cast up, with a note; scaled ones are refused.

FP8 Formats for Deep Learning, Micikevicius et al. 2022, arXiv 2209.05433, table 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ldm_pipe.errors import ModelError

NAMES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # as the header of a file has them, and as torch
SCALES = ("scaled_fp8", ".scale_weight", ".scale_input", ".weight_scale", ".input_scale")


def note(name: str, entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """A sentence on the 8-bit tensors of a file, "" where it has none. Raises ModelError where others are to be multiplied with
    them, which is not done here."""
    found = Counter(NAMES[kind] for kind, _ in entries.values() if kind in NAMES)
    if not found:
        return ""
    scales = sorted(n for n in entries if n.endswith(SCALES))
    if scales:
        plain = "give the file in plain 8 bits, or in 16"
        raise ModelError(f"{name}: its 8-bit tensors are scaled ({scales[0]!r:.100}), a layout that is not read; {plain}")
    kinds = " and ".join(f"{count} tensors in {kind}" for kind, count in found.items())
    return f"{name} holds {kinds}, which are cast up; a file in 16 bits is more exact"
