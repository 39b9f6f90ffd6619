"""What is said of a picture at one visit: a choice among its captions, tags in a fresh order, or nothing at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def caption_of(
    captions: Sequence[str], rng: np.random.Generator, dropout: float = 0.0, shuffle: bool = False, keep: int = 0
) -> str:
    """One of the captions; with `shuffle` its parts between commas in random order behind the first `keep`; empty in a share
    `dropout` of visits, for classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, algorithm 1)."""
    which, dropped, order = rng.random(), rng.random(), rng.integers(2**63)
    if dropped < dropout or not captions:
        return ""
    text = captions[int(which * len(captions))]
    if not shuffle:
        return text
    tags = [t.strip() for t in text.split(",")]
    rest = tags[keep:]
    mixed = [rest[i] for i in np.random.Generator(np.random.Philox(key=int(order))).permutation(len(rest))]
    return ", ".join(tags[:keep] + mixed)
