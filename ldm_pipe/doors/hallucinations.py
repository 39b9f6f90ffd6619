"""`--filter-hallucinations 0.5`: more images are drawn than are wanted, and of each prompt those are kept that waver least.

The score is that of Aithal et al. 2024, arXiv 2406.09358 (`ldm_pipe/analysis/hallucination.py`). It needs steps of little
noise, so that a filtered walk ends in ten fine steps more; an image is the same whether or not its neighbours are kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from ldm_pipe.errors import UsageError

if TYPE_CHECKING:
    from ldm_pipe.model import Model
    from ldm_pipe.pipeline import Output, Pipeline
    from ldm_pipe.plan import Plan
    from ldm_pipe.walk import Step


@dataclass(frozen=True)
class Filter:
    """share: of the images drawn that are kept, those with the lowest scores; 1 = no filter."""

    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"--filter-hallucinations is {self.share:g}; it takes the share that is kept, above 0, at most 1")

    def drawn(self, wanted: int) -> int:
        """How many images of a prompt are drawn so that `wanted` are the share that is kept."""
        return math.ceil(wanted / self.share - 1e-9)

    def applied(self, model: Model, whole: Plan) -> Plan:
        """The plan whose walk ends in fine steps. Raises UsageError where it takes steps up in noise."""
        if self.share == 1:
            return whole
        from ldm_pipe.analysis.hallucination import dense_tail, fine_end

        if whole.sampler.travels:
            raise UsageError(
                f"--filter-hallucinations does not go with {type(whole.sampler).__name__}, which goes back and forth"
            )
        levels = tuple(dense_tail(whole.levels, fine_end(model.path)))
        return replace(whole, levels=levels, recorded={**whole.recorded, "filtered": dataclasses.asdict(self)})

    def run(self, pipe: Pipeline, whole: Plan, on_step: Callable[[Step], None] | None = None) -> Iterator[Output]:
        """Run an applied plan, whose images stand prompt by prompt, as many of each as are drawn; an Output for each prompt as
        it is done, with those that are kept in the order of their seeds, and a note of the others."""
        if self.share == 1:
            yield from pipe.run(whole, on_step)
            return
        from ldm_pipe.analysis.hallucination import FINE, scores

        below, steps, rows = float(whole.levels[-FINE - 1].u), list["Step"](), list[Row]()

        def note(step: Step) -> None:
            if step.number == 0:
                steps.clear()  # the batch is begun again, smaller, where memory ran out
            if float(step.here.u) <= below:
                steps.append(step)
            if on_step is not None:
                on_step(step)

        for out in pipe.run(whole, note):
            rows += [Row(out, k, score) for k, score in enumerate(scores(steps, below).tolist())]
            while len(rows) >= whole.given.num_images:
                yield self._kept(rows[: whole.given.num_images])
                del rows[: whole.given.num_images]

    def _kept(self, drawn: list[Row]) -> Output:
        """The images of one prompt that waver least."""
        count = math.floor(len(drawn) * self.share + 1e-9)
        places = sorted(sorted(range(len(drawn)), key=lambda k: (drawn[k].score, k))[:count])
        left = ", ".join(str(row.one.seeds[0]) for k, row in enumerate(drawn) if k not in places)
        note = (
            f"{count} of {len(drawn)} images of {drawn[0].one.prompts[0]!r:.60} are kept; those of the seeds {left} waver more"
        )
        found = drawn[0].one.joined([drawn[k].one for k in places])
        spent = (row.out.evaluations for row in drawn if row.place == len(row.out.seeds) - 1)  # a batch's are said once
        return replace(found, evaluations=sum(spent, Counter()), notices=(*found.notices, note))


class Row(NamedTuple):
    """An image: its batch, its place there, its score."""

    out: Output
    place: int
    score: float

    @property
    def one(self) -> Output:
        """The image alone."""
        here = slice(self.place, self.place + 1)
        names = ("images", "latents", "seeds", "prompts", "places", "tiles")
        return replace(self.out, **{n: getattr(self.out, n)[here] for n in names})
