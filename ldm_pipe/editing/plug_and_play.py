"""Plug-and-Play Diffusion Features for Text-Driven Image-to-Image Translation, Tumanyan et al. 2022, arXiv 2211.12572.

Algorithm 1. While the source is drawn again beside the target, the target is given its features of one block of the decoder
(before the skip is added) and the queries and keys of its self-attention from there on: the layout stays, the prompt says what
is seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from ldm_pipe.attention import Site
from ldm_pipe.cond import Rows
from ldm_pipe.editing.pairs import Pairs, sides
from ldm_pipe.errors import UsageError
from ldm_pipe.patch import Attending


@dataclass(frozen=True)
class PlugAndPlay:
    """Plug-and-Play: the target has the source's layout, by its features and its self-attention.

    features, attention: the share of the steps, 0..1, in which they are the source's. block: the module whose output is taken,
    such as "up_blocks.1.resnets.1.conv2"; none is the middle of a U-Net's decoder, which in Stable Diffusion is that one.
    """

    features: float = 0.8
    attention: float = 0.5
    block: str | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.features <= 1 and 0 <= self.attention <= 1):
            raise UsageError(f"edit: features and attention take 0 to 1, got {self.features} and {self.attention}")

    def __call__(self, pairs: Pairs) -> Pairs:
        """The run with the source's features in its targets."""
        until = pairs.until(self.features), pairs.until(self.attention)
        inject = Inject(self.block or middle(pairs.network), pairs.rows, *until)
        return replace(pairs, guides=(*pairs.guides, Attending(pairs.network, inject, {inject.block: inject.tap})))


@dataclass(frozen=True)
class Inject:
    """An InputRule, and a tap for its block: `Attending(network, inject, {inject.block: inject.tap})`.

    Rows (source, target) of `branch` are `pairs`; the targets of every branch of the call are given what those sources have.
    block: module for the features. features, attention: the noise u above which they, and queries and keys, are injected.
    """

    block: str
    pairs: tuple[tuple[int, int], ...] = ((0, 1),)
    features: float = 0.0
    attention: float = 0.5
    branch: str = "cond"

    def tap(self, rows: Rows, out: Tensor) -> Tensor:
        """The block's output [B,...]."""
        return self.moved(rows, out) if float(rows.level.u) > self.features else out

    def inputs(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of self-attention from the block on; the values stay."""
        if site.cross or float(site.rows.level.u) <= self.attention or not _follows(site.name, self.block):
            return q, k, v
        return self.moved(site.rows, q), self.moved(site.rows, k), v

    def moved(self, rows: Rows, t: Tensor) -> Tensor:
        """t [B,...] with the sources' rows in the place of their targets', in every branch."""
        found = sides(rows, self.branch, self.pairs)
        if found is None:
            return t
        moved = t.clone()
        for branch in rows.branches:
            both = sides(rows, branch, self.pairs)
            assert both is not None
            moved[both[1]] = t[found[0]]
        return moved


def middle(network: nn.Module) -> str:
    """The second convolution of the residual block two fifths down a decoder: the paper's block 4 of Stable Diffusion's 12.

    Raises UsageError where the network has no such decoder.
    """
    found = [n for n, _ in network.named_modules() if "up_blocks" in n.split(".") and n.split(".")[-2:-1] == ["resnets"]]
    if not found:
        raise UsageError("plug_and_play finds no decoder of residual blocks in this network; name a module of it as its block")
    return f"{found[2 * len(found) // 5]}.conv2"


def _follows(name: str, block: str) -> bool:
    """Does a module stand in the same list of blocks as another, at its place or behind?"""
    (stem, place), (other, least) = _place(name), _place(block)
    return stem == other and place[: len(least)] >= least


def _place(name: str) -> tuple[str, list[int]]:
    """ "a.up_blocks.1.resnets.2.conv2" -> ("up_blocks", [1, 2])."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return parts[first - 1], [int(part) for part in parts if part.isdigit()]
