"""Training-Free Structured Diffusion Guidance for Compositional Text-to-Image Synthesis, Feng et al. 2022, arXiv 2212.05032.

Each phrase of a prompt is encoded alone and put in its place in the encoding of the whole prompt; cross-attention takes its
keys from the prompt and, as its result, the mean over all these values (section 3.2). As attention is linear in the values,
that is one attention with their mean, and as the values are linear in the tokens, with the values of the mean of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_pipe.attention import Site
from ldm_pipe.editing.pairs import Pairs, spliced
from ldm_pipe.errors import UsageError
from ldm_pipe.tokens import places, words

# Words between phrases: what a grammar would find, for prompts of the form "a red car on a road and a white sheep".
BETWEEN = {
    "and", "or", "with", "without", "on", "in", "at", "of", "by", "to", "from", "for", "over", "under", "above", "below",
    "behind", "beside", "near", "next", "between", "is", "are", ",", ".", ";", ":", "!", "?",
}  # fmt: skip


@dataclass(frozen=True)
class Structured:
    """Structured guidance: every phrase of the target keeps its own adjectives; the source is the same without it.

    phrases: of the target prompt, such as "a red car, a white sheep"; none are those between words like and, with, on.
    """

    phrases: str = ""

    def __call__(self, pairs: Pairs) -> Pairs:
        """The run with the targets' values edited."""
        given = [phrase.strip() for phrase in self.phrases.split(",") if phrase.strip()]
        return pairs.attending(values_of(pairs.text, pairs.target, given or None, tuple(t for _, t in pairs.rows)))


@dataclass(frozen=True, eq=False)
class Values:
    """An InputRule: cross-attention of some rows of `branch` (all, where None are named) takes the values of other tokens.

    prompt, tokens: [1,L,C], what the rows have, and the mean that takes its place; None changes nothing.
    """

    prompt: Tensor
    tokens: Tensor | None
    rows: tuple[int, ...] | None = None
    branch: str = "cond"

    def inputs(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The values of the rows edited. Raises UsageError where the network attends to something other than the tokens."""
        own = site.rows.of(self.branch)
        if own is None or not site.cross or self.tokens is None:
            return q, k, v
        rows = list(range(own.start, own.stop)) if self.rows is None else [own.start + r for r in self.rows]
        if self.prompt.shape[-1] != self.tokens.shape[-1] or not self._meets(site, v[rows].detach()):
            raise UsageError("structured: the network attends to other tokens than those of the prompt")
        v = v.clone()
        v[rows] = site.values(self.tokens.to(v))
        return q, k, v

    @torch.no_grad()
    def _meets(self, site: Site, v: Tensor) -> bool:
        usual = site.values(self.prompt.to(v))
        return torch.allclose(usual.expand_as(v), v, rtol=0.1, atol=0.1 * float(usual.abs().max()))


def values_of(
    text: Any,
    prompt: str,
    phrases: Sequence[str] | None = None,
    rows: tuple[int, ...] | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
) -> Values:
    """The rule for a prompt. text: an encoder with `tokenizer` and `window`; phrases: as they stand in the prompt, those of one
    word are dropped; project: what the network does to tokens [B,L,C] before it attends to them, where it does anything.

    Raises UsageError where a phrase does not stand in the prompt.
    """
    with torch.no_grad():
        whole = text([prompt]).tokens
        variants = [whole]
        for phrase in phrases_of(prompt) if phrases is None else phrases:
            if len(phrase.split()) > 1:
                variants.append(spliced(whole, text([phrase]).tokens, spans(text, prompt, phrase)))
        variants = [project(t) for t in variants] if project else variants
        return Values(variants[0], torch.stack(variants).mean(0) if len(variants) > 1 else None, rows)


def spans(text: Any, prompt: str, phrase: str) -> list[tuple[int, range]]:
    """Where a phrase stands in a prompt, every time: (its first token alone, places in the prompt), cut off with the window."""
    found, wanted = (places(text.tokenizer, text.window, t) for t in (prompt, phrase))
    names, count = [w for w, _ in wanted], len(wanted)
    starts = [i for i in range(len(found)) if [w for w, _ in found[i : i + count]] == names]
    if not starts or not names:
        raise UsageError(f"structured: {phrase!r} does not stand in {prompt!r}")
    return [(wanted[0][1].start, range(found[i][1].start, found[i + count - 1][1].stop)) for i in starts]


def phrases_of(prompt: str) -> list[str]:
    """The phrases of more than one word between connecting words: "a red car on a road" -> "a red car", "a road"."""
    found: list[list[str]] = [[]]
    for word in words(prompt):
        if word in BETWEEN:
            found.append([])
        else:
            found[-1].append(word)
    return [" ".join(phrase) for phrase in found if len(phrase) > 1]
