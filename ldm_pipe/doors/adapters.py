"""`--lora FILE[:scale]` and `--embedding FILE[:word]`: adapters from files, merged into a copy of the model and recorded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipe import strict
from ldm_pipe.errors import UsageError

if TYPE_CHECKING:
    from ldm_pipe.pipeline import Pipeline

KINDS = ("lora", "embedding")


@dataclass(frozen=True)
class Adapters:
    """loras: (file, scale), each added to what the ones before it made. embeddings: (file, word; "" is the file's own).

    recorded: what the recipe says of each, on a replay. partial: tensors of a LoRA that find no layer are left out.
    """

    loras: tuple[tuple[str, float], ...] = ()
    embeddings: tuple[tuple[str, str], ...] = ()
    recorded: tuple[Mapping[str, Any], ...] = ()
    partial: bool = False

    @classmethod
    def of(cls, loras: Sequence[str], embeddings: Sequence[str]) -> Adapters:
        """From the flags. Raises UsageError where a file is missing or a scale is no number."""
        return cls(tuple(_scaled(text) for text in loras), tuple(_worded(text) for text in embeddings))

    def again(self, recorded: Sequence[Mapping[str, Any]]) -> Adapters:
        """The same files as a recipe had them, with its scales and words. Raises UsageError on another number of them."""
        rows = {kind: [row for row in recorded if row.get("kind") == kind] for kind in KINDS}
        for kind, given in (("lora", self.loras), ("embedding", self.embeddings)):
            if len(rows[kind]) != len(given):
                names = ", ".join(str(row.get("name")) for row in rows[kind])[:80]
                which = f" ({names})" if names else ""
                raise UsageError(f"--{kind}: the image was made with {len(rows[kind])}{which}, got {len(given)}")
        scales = [strict.coerce(row.get("scale"), float, "recipe: scale") for row in rows["lora"]]
        words = [strict.coerce(row.get("word"), str, "recipe: word") for row in rows["embedding"]]
        return Adapters(
            tuple((file, scale) for (file, _), scale in zip(self.loras, scales, strict=True)),
            tuple((file, word) for (file, _), word in zip(self.embeddings, words, strict=True)),
            (*rows["lora"], *rows["embedding"]),
            self.partial,
        )

    def applied(self, pipe: Pipeline, say: Callable[[str], None] = lambda text: None) -> Pipeline:
        """A pipeline around a copy of the model with the adapters in it; the given one keeps every bit.

        say: is told what was found. Raises ModelError on a file that does not fit, UsageError on one that is not the recorded
        one.
        """
        if not (self.loras or self.embeddings):
            return pipe
        from ldm_pipe import embedding, files, lora

        if pipe.offload is not None:
            with pipe.offload.lifted():
                return self.applied(replace(pipe, offload=None), say).visiting(pipe.offload.how)
        bundle, rows = pipe.bundle, list[dict[str, Any]]()
        for file, scale in self.loras:
            bundle, said = lora.merge(bundle, Path(file), scale, self.partial)
            rows.append({"kind": "lora", "name": Path(file).name, "sha256": files.sha256(Path(file)), "scale": scale})
            say(said)
        for file, word in self.embeddings:
            bundle, said = embedding.learn(bundle, Path(file), word)
            rows.append({"kind": "embedding", "name": Path(file).name, "sha256": files.sha256(Path(file)), "word": word})
            say(said)
        for row, was in zip(rows, self.recorded, strict=False):
            if row["sha256"] != was.get("sha256"):
                raise UsageError(f"--{row['kind']} {row['name']!r} is not the file that the image was made with")
        return replace(pipe, bundle=replace(bundle, adapters=(*bundle.adapters, *rows)))


def adapted(pipe: Pipeline, loras: Sequence[str] = (), embeddings: Sequence[str] = ()) -> Pipeline:
    """`adapted(pipe, loras=["style.safetensors:0.8"], embeddings=["cat.safetensors"])`: the pipeline with adapters in it."""
    return Adapters.of(loras, embeddings).applied(pipe)


def _scaled(text: str) -> tuple[str, float]:
    file, scale = _split(text, "lora")
    return file, strict.coerce(scale, float, f"--lora {text!r}: the scale") if scale else 1.0


def _worded(text: str) -> tuple[str, str]:
    return _split(text, "embedding")


def _split(text: str, kind: str) -> tuple[str, str]:
    """FILE or FILE:VALUE."""
    wanted = f"--{kind} takes FILE{':scale' if kind == 'lora' else ':word'}, the last part may be left out"
    match = re.fullmatch(r"(.+?\.\w+)(?::([^/\\]*))?", text)
    file, value = (match[1], match[2] or "") if match and not os.path.isfile(text) else (text, "")
    if not os.path.isfile(file):
        raise UsageError(f"{wanted}; {file!r:.120} is not a file")
    return file, value
