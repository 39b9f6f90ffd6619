"""Local blend: Prompt-to-Prompt Image Editing with Cross Attention Control, Hertz et al. 2022, arXiv 2208.01626, section 4.

Outside of what the edited words attend to, the target is the source. The maps of the words are averaged over heads, layers and
all steps so far, widened by a maximum over 3 x 3 places and compared with a share of their largest value; the two masks are
united. The maps are the target's own, before an edit puts others in their place, and the decoder's where there is one: those of
a small network's encoder point nowhere (the official code takes two layers of the encoder and three of the decoder).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.attention import Site, grid
from ldm_pipe.editing.pairs import sides
from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.patch import Attending
from ldm_pipe.tokens import Tokenizer, places
from ldm_pipe.walk import Sampler, Step, Wrapping

# (0 source or 1 target, of the decoder?, places) -> what its words attended to, [pairs, places]
Seen = dict[tuple[int, bool, int], Tensor]


@dataclass(frozen=True)
class LocalBlend(Wrapping):
    """After a step of another sampler, targets become their sources outside of the words' attention.

    words: the places of the chosen words among the tokens, of the source and of the target. pairs: rows (source, target).
    begin: blending starts below this u (the paper: after 20% of the steps). threshold: of the largest value, 0..1. largest: the
    finest maps with at most so many places are looked at (16 x 16 in the paper). branch: whose attention is looked at.
    """

    sampler: Sampler
    network: nn.Module
    words: tuple[tuple[int, ...], tuple[int, ...]]
    pairs: tuple[tuple[int, int], ...] = ((0, 1),)
    begin: float = 1.0
    threshold: float = 0.3
    largest: int = 256
    branch: str = "cond"

    def down(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """One step of the sampler, and the blend. The memory holds the maps so far."""
        inner, before = memory or (None, {})
        watch = _Watch(self, dict(before))
        done = self.sampler.step(Attending(self.network, watch)(denoise), x, here, there, inner, noise)
        done = done._replace(memory=(done.memory, watch.seen))
        if float(there.u) >= self.begin or not self.pairs:
            return done
        s, t = ([pair[k] for pair in self.pairs] for k in (0, 1))
        x = done.x.clone()
        x[t] = torch.where(self.mask(watch.seen, x.shape[2], x.shape[3]), x[t], x[s])
        return done._replace(x=x)

    def mask(self, seen: Seen, height: int, width: int) -> Tensor:
        """[pairs,1,H,W], True where the target may differ from its source."""
        if not seen:
            raise UsageError(f"local blend finds no cross-attention to the words in maps of at most {self.largest} places")
        best, found = max((decoder, count) for _, decoder, count in seen), []
        for side in (0, 1):
            if (side, *best) in seen:
                m = seen[side, *best].reshape(-1, 1, *grid(best[1], height, width))
                m = F.interpolate(F.max_pool2d(m, 3, 1, 1), (height, width))
                found.append(m / m.amax((2, 3), keepdim=True) > self.threshold)
        return found[0] | found[-1]


@dataclass(frozen=True, eq=False)
class _Watch:
    """An AttentionRule that changes nothing and adds up what the words attend to."""

    blend: LocalBlend
    seen: Seen = field(default_factory=dict)

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        both, count = sides(site.rows, self.blend.branch, self.blend.pairs), q.shape[2]
        if both is None or not site.cross or count > self.blend.largest:
            return out
        for side in (0, 1):
            words, key = list(self.blend.words[side]), (side, ".up_blocks." in site.name, count)
            if words:
                self.seen[key] = self.seen.get(key, 0) + site.maps(q, k, both[side])[..., words].sum(-1).mean(1)
        return out


def chosen(tokenizer: Tokenizer, window: int, prompts: Sequence[str], words: str = "") -> tuple[tuple[int, ...], ...]:
    """The places of words among the tokens of two prompts, for `LocalBlend.words`: of those listed in `words`, or of those that
    the other prompt does not have. Raises UsageError where a listed word is in none of them, or none is left."""
    found = [places(tokenizer, window, prompt) for prompt in prompts]
    listed = words.lower().replace(",", " ").split()
    for word in listed:
        if not any(word == text for spans in found for text, _ in spans):
            raise UsageError(f"blend: {word!r} is a word of none of {', '.join(map(repr, prompts))}")
    source, target = ({text for text, _ in spans} for spans in found)
    wanted = set(listed) or source ^ target
    result = tuple(tuple(i for text, span in spans if text in wanted for i in span) for spans in found)
    if not any(result):
        raise UsageError("blend: the prompts have the same words; list those whose surroundings may change")
    return result
