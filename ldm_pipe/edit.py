"""`--edit "a fox on blue -> a cat on blue"`: a picture and its edit, drawn side by side by Prompt-to-Prompt."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ldm_pipe import strict
from ldm_pipe.errors import UsageError

if TYPE_CHECKING:
    from ldm_pipe.pipeline import Pipeline
    from ldm_pipe.plan import Guide, Plan


@dataclass(frozen=True)
class Edit:
    """source, target: prompts. cross, own: the share of the steps in which the target's cross- and self-attention are the
    source's, 0..1. Raises UsageError on other values."""

    source: str
    target: str
    cross: float = 0.8
    own: float = 0.4

    def __post_init__(self) -> None:
        if not (0 <= self.cross <= 1 and 0 <= self.own <= 1):
            raise UsageError(f"edit: cross and own take 0 to 1, got {self.cross} and {self.own}")

    @classmethod
    def of(cls, text: str, fields: dict[str, Any]) -> Edit:
        """From "SOURCE -> TARGET" and the fields that --set gives."""
        source, arrow, target = (part.strip() for part in text.partition("->"))
        if not (arrow and source and target):
            raise UsageError(f'--edit {text[:80]!r} is not of the form "a fox on blue -> a cat on blue"')
        for name in ("source", "target"):
            if name in fields:
                raise UsageError(f"--set edit.{name}: the prompts stand in --edit")
        return strict.build(cls, {**fields, "source": source, "target": target}, "edit")

    def applied(self, pipe: Pipeline, whole: Plan) -> Plan:
        """The plan of `count` sources followed by their `count` targets, under the rule and in one batch."""
        from ldm_pipe.attention import Attending
        from ldm_pipe.editing.prompt_to_prompt import PromptToPrompt, TokenMap, until

        text: Any = pipe.bundle.text
        tokens, count = TokenMap.of(text.tokenizer, text.window, self.source, self.target), len(whole.rows) // 2
        pairs = tuple((k, count + k) for k in range(count))
        rule = PromptToPrompt(tokens, pairs, until(whole.levels, self.cross), until(whole.levels, self.own))
        guides: tuple[Guide, ...] = (*whole.guides, Attending(pipe.bundle.model, rule))
        given = replace(whole.given, batch_size=2 * count)
        return replace(whole, given=given, guides=guides, recorded={**whole.recorded, "edit": asdict(self)})
