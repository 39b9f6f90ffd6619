"""Where to compute and in what: the meaning of `--device auto` and `--dtype auto`."""

from __future__ import annotations

import functools

import torch

from ldm_pipe.errors import EnvironmentFault
from ldm_pipe.settings import check_device, check_dtype

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str = "auto") -> torch.device:
    """A torch device: "auto" (cuda where there is one, else cpu), "cpu", "cuda", "cuda:1"."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device(name)
    kind, _, index = name.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise EnvironmentFault(f"--device {name!r}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device, wide: bool = True) -> tuple[torch.dtype, str]:
    """(dtype, a note for the user or ""). "auto": fp16 on CUDA; bf16 on a CPU that computes in it, for networks wide enough
    to gain (`wide`); else fp32. fp16 on a CPU becomes bf16: fp16 arithmetic is some hundred times slower there."""
    if name == "auto":
        if device.type == "cuda":
            return torch.float16, ""
        return (torch.bfloat16 if wide and cpu_has_bf16() else torch.float32), ""
    check_dtype(name)
    if name == "fp16" and device.type == "cpu":
        return torch.bfloat16, "fp16 arithmetic is far slower than bf16 on a CPU; using bf16"
    return DTYPES[name], ""


@functools.cache
def cpu_has_bf16() -> bool:
    """Does this CPU multiply bf16 natively (AVX512-BF16, AMX)?"""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and torch.cpu._is_avx512_bf16_supported()
    except (AttributeError, RuntimeError):
        return False
