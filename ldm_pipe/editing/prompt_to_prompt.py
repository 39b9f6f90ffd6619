"""Prompt-to-Prompt Image Editing with Cross Attention Control, Hertz et al. 2022, arXiv 2208.01626, section 3.2.

A source and a target picture are drawn side by side from one noise; while the noise is above a level, the target attends where
the source does. Replacing words maps the source's attention onto the new tokens (eq. 6), refining keeps it where words agree
(eq. 7), re-weighting scales what a token gives (eq. 8). Where a replaced word has another number of tokens its attention is
spread over them, so that none is lost: the official code's map then has rows of 0 or 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm_pipe.attention import Site
from ldm_pipe.editing.local_blend import LocalBlend, chosen
from ldm_pipe.editing.pairs import Pairs, sides
from ldm_pipe.errors import UsageError
from ldm_pipe.tokens import Tokenizer, places


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Where the target's tokens take their attention from. take: [L,L], take[i, j] of source token i goes to target token j;
    own: [L], 1 where a token keeps the target's own attention; weight: [L], what each target token's attention is scaled by."""

    take: Tensor
    own: Tensor
    weight: Tensor

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, window: int, source: str, target: str, weights: Mapping[str, float] | None = None
    ) -> TokenMap:
        """From two prompts: of as many words, the words replace each other in order; else equal words are aligned and new ones
        keep their own attention. weights: by word of the target. Raises UsageError where a weighted word is not in it."""
        before, after = (places(tokenizer, window, text) for text in (source, target))
        take, own, weight = torch.zeros(window, window), torch.zeros(window), torch.ones(window)
        start = tokenizer.length("") - 1
        take[:start, :start] = torch.eye(start)
        pairs = list(enumerate(range(len(after)))) if len(before) == len(after) else _aligned(before, after)
        for i, j in pairs:
            a, b = before[i][1], after[j][1]
            same = before[i][0] == after[j][0] and len(a) == len(b)
            take[a.start : a.stop, b.start : b.stop] = torch.eye(len(a)) if same else 1 / max(1, len(b))
        matched = {j for _, j in pairs}
        for j, (_, span) in enumerate(after):
            own[span.start : span.stop] = float(j not in matched)
        first = [words[-1][1].stop if words else start for words in (before, after)]
        for k in range(window - max(first)):
            take[first[0] + k, first[1] + k] = 1  # the end and what fills up, in order
        own[take.sum(0) == 0] = 1  # a longer target has nothing to take its last places from
        for word, value in (weights or {}).items():
            spans = [span for text, span in after if text == word]
            if not spans:
                raise UsageError(f"{word!r} is not a word of {target!r}")
            for span in spans:
                weight[span.start : span.stop] = value
        return cls(take, own, weight)


@dataclass(frozen=True, eq=False)
class PromptToPrompt:
    """An AttentionRule for pairs of rows (source, target) of the `branch`; the other branch attends as it does.

    cross, own: levels of noise u above which the target's cross- and self-attention are the source's (`until` gives them for a
    share of the steps; the paper's are .8 and .4). largest: positions of the largest map whose self-attention is replaced.
    """

    tokens: TokenMap
    pairs: tuple[tuple[int, int], ...] = ((0, 1),)
    cross: float = 0.0
    own: float = 0.5
    largest: int = 256
    branch: str = "cond"

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        """The usual result with the rows of the targets replaced; the others are untouched to the bit."""
        both, u = sides(site.rows, self.branch, self.pairs), float(site.rows.level.u)
        if both is None:
            return out
        s, t = both
        if site.cross:
            edited = u > self.cross
            if not edited and bool((self.tokens.weight == 1).all()):
                return out
            maps = self._crossed(site.maps(q, k, s), site.maps(q, k, t)) if edited else site.maps(q, k, t)
            maps = maps * self.tokens.weight.to(maps)
        elif u > self.own and q.shape[2] <= self.largest:
            maps = site.maps(q, k, s)
        else:
            return out
        out = out.clone()
        out[t] = maps.to(v) @ v[t]
        return out

    def _crossed(self, source: Tensor, target: Tensor) -> Tensor:
        """Maps [N,heads,L,M] of the source, brought to the target's tokens."""
        return torch.where(self.tokens.own.to(source.device) > 0, target, source @ self.tokens.take.to(source))


@dataclass(frozen=True)
class Replacing:
    """Prompt-to-Prompt: where words of the source are replaced, the target attends where the source did.

    cross, own: the share of the steps, 0..1, in which the target's cross- and self-attention are the source's. weights: what
    words of the target are scaled by, such as "small=2, red=-1". blend: true keeps the source outside of what the words that
    differ attend to, "fox, cat" outside of those words; from 20% of the steps on. threshold: how much of its largest value a
    word's attention must be to count, 0..1.
    """

    cross: float = 0.8
    own: float = 0.4
    weights: str = ""
    blend: bool | str = False
    threshold: float = 0.3

    def __post_init__(self) -> None:
        if not (0 <= self.cross <= 1 and 0 <= self.own <= 1):
            raise UsageError(f"edit: cross and own take 0 to 1, got {self.cross} and {self.own}")
        _weights(self.weights)

    def __call__(self, pairs: Pairs) -> Pairs:
        """The run with the rule in the network's attention."""
        text = pairs.text
        tokens = TokenMap.of(text.tokenizer, text.window, pairs.source, pairs.target, _weights(self.weights))
        rule = PromptToPrompt(tokens, pairs.rows, pairs.until(self.cross), pairs.until(self.own))
        if self.blend:
            listed = "" if self.blend is True else self.blend
            source, target = chosen(text.tokenizer, text.window, (pairs.source, pairs.target), listed)
            blend = LocalBlend(pairs.sampler, pairs.network, (source, target), pairs.rows, pairs.until(0.2), self.threshold)
            pairs = replace(pairs, sampler=blend)
        return pairs.attending(rule)


def _weights(text: str) -> dict[str, float]:
    try:
        parts = [part.split("=") for part in text.lower().split(",") if part.strip()]
        return {word.strip(): float(value) for word, value in parts}
    except ValueError as error:
        raise UsageError(f'edit: weights is {text!r:.60}; it takes words and numbers, such as "small=2, red=-1"') from error


def _aligned(before: list[tuple[str, range]], after: list[tuple[str, range]]) -> list[tuple[int, int]]:
    """Pairs of equal words in order, as many as can be: Needleman and Wunsch 1970, J. Mol. Biol. 48, gaps free, match 1."""
    n, m = len(before), len(after)
    score = [[0] * (m + 1) for _ in range(n + 1)]
    for i in range(n - 1, -1, -1):
        for j in range(m - 1, -1, -1):
            match = score[i + 1][j + 1] + 1 if before[i][0] == after[j][0] else -1
            score[i][j] = max(match, score[i + 1][j], score[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < n and j < m:
        if before[i][0] == after[j][0] and score[i][j] == score[i + 1][j + 1] + 1:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif score[i + 1][j] >= score[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs
