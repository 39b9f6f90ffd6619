"""Which sample comes when, and the random stream of each visit: pure functions of a seed, so that nothing needs saving."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Visit(NamedTuple):
    """One look at a sample: its row, how often it was seen before, and the bucket that it lies in."""

    row: int
    visit: int
    bucket: int


def stream(seed: int, tag: str, sample: int, visit: int = 0) -> np.random.Generator:
    """The random stream of one visit to one sample; tags keep several apart."""
    key = np.array([(seed + (zlib.crc32(tag.encode()) << 32)) % 2**64, sample], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, visit]))


@lru_cache(maxsize=64)
def _shuffled(seed: int, bucket: int, visit: int, count: int) -> np.ndarray:
    return stream(seed, "order", bucket, visit).permutation(count)


class Order:
    """The endless order of the samples of some buckets, `group` consecutive numbers always from one bucket.

    A bucket is a stream of its own in which every pass visits each of its samples once, in a fresh order; the buckets take
    turns by their sizes. So nothing is ever dropped, and no sample is ahead of another of its bucket by more than one visit.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], group: int = 1) -> None:
        self.buckets = [list(b) for b in buckets if b]
        self.group = group
        sizes = np.array([len(b) for b in self.buckets], dtype=np.float64)
        self._shares = sizes / sizes.sum()
        self._turns: list[tuple[int, int]] = []
        self._used = np.zeros(len(self.buckets), dtype=np.int64)

    def at(self, seed: int, number: int) -> Visit:
        """Sample number `number` of the run."""
        turn, place = divmod(number, self.group)
        bucket, earlier = self._turn(turn)
        rows = self.buckets[bucket]
        visit, position = divmod(earlier * self.group + place, len(rows))
        return Visit(rows[int(_shuffled(seed, bucket, visit, len(rows))[position])], visit, bucket)

    def _turn(self, turn: int) -> tuple[int, int]:
        """(bucket, its earlier turns): always the bucket that is furthest behind its share."""
        while len(self._turns) <= turn:
            behind = self._shares * (len(self._turns) + 1) - self._used
            bucket = int(behind.argmax())
            self._turns.append((bucket, int(self._used[bucket])))
            self._used[bucket] += 1
        return self._turns[turn]
