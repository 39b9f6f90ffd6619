"""Ways to damage a file: its bytes, its length, or the structure of its JSON or safetensors header."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

WEIRD = (None, True, -1, 0, 1.5, 10**9, 10**400, 1e308, float("nan"), "", "../x", "\0", "é" * 300, [], [[]], {}, {"a": [1]})


def mutated(data: bytes, kind: str, draw: random.Random) -> tuple[str, bytes]:
    """(what was damaged: "data" of weights or "form", the damaged bytes)."""
    if kind == "safetensors" and len(data) > 9:
        start = 8 + struct.unpack("<Q", data[:8])[0]
        how = draw.choice(("data", "header", "entry", "length", "cut", "tail"))
        if how == "entry":
            return "form", _entry(data, start, draw)
        if how == "length":
            return "form", struct.pack("<Q", draw.choice((0, 1, start, start - 9, 2**63, draw.getrandbits(64)))) + data[8:]
        if how in ("data", "header"):
            return how.replace("header", "form"), _flipped(data, *((start, len(data)) if how == "data" else (8, start)), draw)
    elif kind == "json" and draw.random() < 0.6:
        return "form", _restructured(data, draw)
    else:
        how = draw.choice(("header", "header", "cut", "tail"))
    if how == "cut":
        return "form", data[: draw.randrange(len(data))]
    if how == "tail":
        return "form", data + draw.randbytes(draw.randrange(1, 64))
    return "form", _flipped(data, 0, len(data), draw)


def _flipped(data: bytes, first: int, end: int, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(first, end)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _entry(data: bytes, start: int, draw: random.Random) -> bytes:
    """One entry of the header says something else, is gone, or has another name."""
    header = json.loads(data[8:start])
    name = draw.choice([n for n in header if n != "__metadata__"])
    entry, what = header[name], draw.choice(("dtype", "shape", "data_offsets", "gone", "name", "weird"))
    if what == "dtype":
        entry["dtype"] = draw.choice(("F16", "BF16", "I32", "U8", "F64", "F8_E4M3", "BOOL", "X"))
    elif what == "shape":
        entry["shape"] = draw.choice(([*entry["shape"][::-1], 1], [-1], [2**62, 2**62], [0], entry["shape"] * 2))
    elif what == "data_offsets":
        entry["data_offsets"] = [max(0, v + draw.choice((-4, 4, 0, 2**40))) for v in entry["data_offsets"]]
    elif what == "weird":
        entry[draw.choice(("dtype", "shape", "data_offsets", "more"))] = draw.choice(WEIRD)
    else:
        header.pop(name)
        header |= {} if what == "gone" else {name[::-1]: entry}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[start:]


def _restructured(data: bytes, draw: random.Random) -> bytes:
    """One value of a JSON object, however deep, is another, gone, or has another name."""
    whole = json.loads(data)
    node: Any = whole
    while isinstance(node, dict) and node:
        key = draw.choice(list(node))
        if isinstance(node[key], dict) and node[key] and draw.random() < 0.7:
            node = node[key]
            continue
        what = draw.choice(("weird", "gone", "name"))
        value = node.pop(key)
        node |= {"weird": {key: draw.choice(WEIRD)}, "gone": {}, "name": {draw.choice(("auto_map", key + "x")): value}}[what]
        break
    return json.dumps(whole).encode()
