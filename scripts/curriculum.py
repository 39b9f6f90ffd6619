"""What `finetune_builtin.py` teaches: the recipe and the pictures of each lesson, and which rows its table has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lessons
import marks
import restorers
from measuring import ROOT

from ldm_pipe import Pipeline, adapted

NEW, TOY = lessons.WORDS
PRIOR = {"prior": lessons.old(40), "prior_images": 80}
Rows = dict[str, Callable[[int], marks.Result]]  # what is compared: count of prompts -> result


@dataclass(frozen=True)
class Lesson:
    """What is taught (a recipe of configs/, its tables changed, on pictures that `data` puts into a folder), and what the
    results compare: `rows` of (the export, the plain model)."""

    recipe: str
    data: Callable[[Path], None]
    rows: Callable[[Path, Pipeline], Rows]
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    prompts: int = 50


def before_after(measure: Callable[[Pipeline, int], marks.Result], lora: str = "", word: str = "") -> Any:
    """The model as it was, and with the files that the lesson made."""

    def rows(export: Path, plain: Pipeline) -> Rows:
        taught = adapted(plain, [f"{export / lora}:1"] if lora else [], [str(export / word)] if word else [])
        return {"before": partial(measure, plain), "after": partial(measure, taught)}

    return rows


def style(export: Path, plain: Pipeline) -> Rows:
    """Beside the pictures of the style themselves."""
    return {"the style itself": partial(marks.style_itself, plain), **before_after(marks.of_style, LOW)(export, plain)}


def steered(export: Path, plain: Pipeline) -> Rows:
    """Without and with the network that reads edges."""
    named = {"without": "", "with its edges": str(export)}
    return {name: partial(marks.of_layout(folder), plain) for name, folder in named.items()}


def restored(operator: str, methods: tuple[str, ...], masked: bool) -> Any:
    """The trained model beside methods that take the built-in one as it is."""

    def rows(export: Path, plain: Pipeline) -> Rows:
        base = restorers.mean_fill if masked else restorers.bicubic
        found = {base.__name__.replace("_", " "): partial(restorers.of_restored(operator, base), plain)}
        for method in methods:
            found[f"{method}, not trained for it"] = partial(
                restorers.of_restored(operator, restorers.zero_shot(operator, method)), plain
            )
        taught = Pipeline.from_pretrained(str(export), "cpu", "fp32")
        by = restorers.concatenated(masked)
        return found | {"trained": partial(restorers.of_restored(operator, by), taught)}

    return rows


def both(export: Path, plain: Pipeline) -> Rows:
    """The second subject's export and the first's as one."""
    from train.concepts import concepts

    first, merged = ROOT / "runs" / "builtin_custom_diffusion" / "run" / "export", export.parent / "both.safetensors"
    told = export.parent / "captions.txt"
    told.write_text("\n".join(lessons.scene_at(6060, k)[1] for k in range(300)) + "\n")
    merged.unlink(missing_ok=True)
    given = [f"{folder}={said}" for folder, word in ((first, NEW), (export, TOY)) for said in lessons.told_in_places(word)]
    concepts("builtin", given, str(told), merged, ridge=1e-3)
    words = [str(f / "learned_embeds.safetensors") for f in (first, export)]
    return {
        "before": partial(marks.of_pair(lessons.WORDS), adapted(plain, [], words)),
        "merged": partial(marks.of_pair(lessons.WORDS), adapted(plain, [f"{merged}:1"], words)),
    }


def shown(export: Path, plain: Pipeline) -> Rows:
    """Without a word, before and after it can be shown a picture."""
    taught = Pipeline.from_pretrained(str(export), "cpu", "fp32")
    return {"before": partial(marks.of_variation(False), plain), "shown a picture": partial(marks.of_variation(True), taught)}


def together(export: Path, plain: Pipeline) -> Rows:
    """Both words, trained at once."""
    words, measure = [str(export / WORD), str(export / "learned_embeds_2.safetensors")], marks.of_pair(lessons.WORDS)
    taught = adapted(plain, [f"{export / KEYS}:1"], words)
    return {"before": partial(measure, adapted(plain, [], words)), "together": partial(measure, taught)}


def subject(name: str, word: str, lora: str, learned: str, recipe: str, tables: dict[str, dict[str, Any]]) -> Lesson:
    """A lesson of one object under a word: alone where only the word learns, else in several places."""
    data = lessons.in_places(name, word, 32 if learned else 24) if lora else lessons.subject(name, word)
    return Lesson(recipe, data, before_after(marks.of_subject(name, word), lora, learned), tables)


(FIRST, SECOND), RARE = lessons.NAMES, lessons.RARE
KEYS = "custom_diffusion.safetensors"
LOW, WORD = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"
FOUND = {"task": {"word": NEW, "begin": "duck"}, "job": {"steps": 600, "lr": 2e-3, "lr_end": 2e-4, "batch": 8, "ema": 0.95}}
BRANCHES = {"rank": 16, "layers": ["*attn*.to_?", "*attn*.to_out.0", "*conv?"], "text_layers": ["*self_attn.*_proj"]}
LESSONS = {
    "lora_style": Lesson("lora", lessons.styled, style, {
        "lora": {"rank": 16, "layers": ["*"]},
        "objective": {"levels": {"name": "logit_normal", "mean": 0.0, "deviation": 1.2}},  # a line is drawn late
        "job": {"steps": 800, "lr": 5e-4, "lr_end": 5e-5, "batch": 8, "warmup": 20, "ema": 0.98}}),
    "dreambooth": subject(FIRST, RARE[0], LOW, "", "dreambooth", {
        "task": {"instance": f"a {RARE[0]}", **PRIOR, "train_text": True},
        "lora": BRANCHES,
        "job": {"steps": 2000, "lr": 1e-3, "lr_end": 5e-5, "batch": 4, "warmup": 20, "ema": 0.98}}),
    "dreambooth_two": Lesson("dreambooth", lessons.two_in_places(RARE), before_after(marks.of_pair(RARE), LOW), {
        "task": {"instance": "", **PRIOR, "train_text": True}, "lora": BRANCHES,
        "job": {"steps": 2400, "lr": 1e-3, "lr_end": 5e-5, "batch": 4, "warmup": 20, "ema": 0.98}}),
    "textual_inversion_known": subject(lessons.KNOWN, NEW, "", WORD, "textual_inversion", FOUND),
    "textual_inversion": subject(FIRST, NEW, "", WORD, "textual_inversion", FOUND),
    "custom_diffusion": subject(FIRST, NEW, KEYS, WORD, "custom_diffusion", {
        "task": {"word": NEW, "begin": "duck", "instance": f"a {NEW}", **PRIOR},
        "job": {"steps": 2000, "lr": 2e-3, "lr_end": 1e-4, "batch": 4, "ema": 0.97}}),
    "custom_diffusion_two": Lesson("custom_diffusion", lessons.in_places(SECOND, TOY), both, {
        "task": {"word": TOY, "begin": "bread", "instance": f"a {TOY}", **PRIOR},
        "job": {"steps": 2000, "lr": 2e-3, "lr_end": 1e-4, "batch": 4, "ema": 0.97}}),
    "custom_diffusion_together": Lesson("custom_diffusion", lessons.two_in_places(lessons.WORDS), together, {
        "task": {"word": [NEW, TOY], "begin": ["duck", "bread"], **PRIOR},
        "job": {"steps": 3000, "lr": 2e-3, "lr_end": 1e-4, "batch": 4, "ema": 0.97}}),
    "controlnet": Lesson("controlnet", lessons.layouts(2000), steered, {
        "task": {"hint": "edges"},
        "job": {"steps": 600, "lr": 2e-3, "lr_end": 1e-4, "batch": 16, "warmup": 20, "ema": 0.98}}, 120),
    "t2i_adapter": Lesson("t2i_adapter", lessons.layouts(2000), steered, {
        "task": {"hint": "edges"},
        "job": {"steps": 800, "lr": 1e-3, "lr_end": 1e-4, "batch": 16, "warmup": 20, "ema": 0.98}}, 120),
    "super_resolution": Lesson("concat", lessons.small(2000), restored("pool(4)", ("dps",), False), {
        "job": {"steps": 1600, "lr": 5e-4, "lr_end": 2e-5, "batch": 16, "ema": 0.98}}, 100),
    "inpainting": Lesson("concat", lessons.layouts(2000), restored("mask(half)", ("repaint", "ddrm"), True), {
        "task": {"kind": "masked"},
        "job": {"steps": 1600, "lr": 5e-4, "lr_end": 2e-5, "batch": 16, "ema": 0.98}}, 100),
    "unclip": Lesson("unclip", lessons.layouts(2000), shown, {
        "task": {"encoder": "builtin"}, "data": {"dropout": 0.5},
        "job": {"steps": 1000, "lr": 5e-4, "lr_end": 2e-5, "batch": 16, "warmup": 20, "ema": 0.98}}),
}  # fmt: skip
