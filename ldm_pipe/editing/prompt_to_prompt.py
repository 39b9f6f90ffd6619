"""Prompt-to-Prompt Image Editing with Cross Attention Control, Hertz et al. 2022, arXiv 2208.01626, section 3.2.

A source and a target picture are drawn side by side from one noise; while the noise is above a level, the target attends where
the source does. Replacing words maps the source's attention onto the new tokens (eq. 6), refining keeps it where words agree
(eq. 7), re-weighting scales what a token gives (eq. 8). Where a replaced word has another number of tokens its attention is
spread over them, so that none is lost: the official code's map then has rows of 0 or 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_pipe.attention import Site
from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.tokens import Tokenizer


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
        before, after = (_spans(tokenizer, window, text) for text in (source, target))
        take, own, weight = torch.zeros(window, window), torch.zeros(window), torch.ones(window)
        take[0, 0] = 1  # the start
        pairs = list(enumerate(range(len(after)))) if len(before) == len(after) else _aligned(before, after)
        for i, j in pairs:
            a, b = before[i][1], after[j][1]
            same = before[i][0] == after[j][0] and len(a) == len(b)
            take[a.start : a.stop, b.start : b.stop] = torch.eye(len(a)) if same else 1 / max(1, len(b))
        matched = {j for _, j in pairs}
        for j, (_, span) in enumerate(after):
            own[span.start : span.stop] = float(j not in matched)
        first = [words[-1][1].stop if words else 1 for words in (before, after)]
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
        rows, u = site.rows.of(self.branch), float(site.rows.level.u)
        if rows is None:
            return out
        if max((max(pair) for pair in self.pairs), default=0) >= site.rows.size:
            raise UsageError(f"an edit needs its pictures in one batch, and this one holds {site.rows.size}")
        s, t = ([rows.start + pair[k] for pair in self.pairs] for k in (0, 1))
        if site.cross:
            edited = u > self.cross
            if not edited and bool((self.tokens.weight == 1).all()):
                return out
            maps = self._crossed(q[s], k[s], q[t], k[t]) if edited else _maps(q[t], k[t])
            maps = maps * self.tokens.weight.to(maps)
        elif u > self.own and q.shape[2] <= self.largest:
            maps = _maps(q[s], k[s])
        else:
            return out
        out = out.clone()
        out[t] = maps.to(v) @ v[t]
        return out

    def _crossed(self, q: Tensor, k: Tensor, target_q: Tensor, target_k: Tensor) -> Tensor:
        taken, own = _maps(q, k) @ self.tokens.take.to(q.device, torch.float32), self.tokens.own.to(q.device)
        return torch.where(own.bool(), _maps(target_q, target_k), taken)


def until(levels: Sequence[Level], share: float) -> float:
    """The noise u above which the first `share` (0..1) of a walk's steps lie."""
    return float(levels[round(share * (len(levels) - 1))].u)


def _maps(q: Tensor, k: Tensor) -> Tensor:
    """Attention maps in fp32, [N,heads,L,M]."""
    return torch.softmax(q.float() @ k.float().mT * q.shape[-1] ** -0.5, dim=-1)


def _spans(tokenizer: Tokenizer, window: int, text: str) -> list[tuple[str, range]]:
    """The words of a prompt, each with its places among the tokens; what the window cuts off is left out."""
    found, place = [], 1
    for word in text.lower().split():
        end = place + tokenizer.length(word) - 2
        found.append((word, range(min(place, window - 1), min(end, window - 1))))
        place = end
    return [(word, span) for word, span in found if len(span)]


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
