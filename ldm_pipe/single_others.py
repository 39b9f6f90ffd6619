"""Single files that are no image model, or one whose layout is not read: what they are, and what to give instead."""

from __future__ import annotations

from collections.abc import Collection

FOLDER = "give --model the folder in diffusers' layout"
# (each of these stands in a name, "^" before its beginning; what the file is, what to give), the first that fits.
OTHERS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("lora",), "an adapter", "give it as --lora beside a model"),
    (("attention_y_norm.weight", "y_embedder.y_proj."), "Sana in its authors' layout", f"{FOLDER}, with its Gemma"),
    (("y_embedder.y_proj.", "blocks.0."), "PixArt in its authors' layout", f"{FOLDER}, with its T5"),
    (("y_embedder.embedding_table.weight", "blocks.0."), "DiT in its authors' layout", FOLDER),
    (("encoder.block.0.layer.0.SelfAttention.",), "T5 alone", "give it as --text-encoder beside a file of SD3 or Flux"),
    (("layers.0.pre_feedforward_layernorm.",), "Gemma alone", f"{FOLDER} of Sana, which holds it as text_encoder"),
    (("layers.0.mlp.gate_proj.",), "a language model alone", f"{FOLDER} of the image model that reads by it"),
    (("^transformer_blocks.0.",), "one part of a model in diffusers' layout", f"{FOLDER} that has all of them"),
    (("^down_blocks.0.", "^up_blocks.0."), "one part of a model in diffusers' layout", f"{FOLDER} that has all of them"),
)


def known(names: Collection[str]) -> str:
    """ "is T5 alone; give it as ...", or "" for a file of which nothing is known."""
    for wanted, what, give in OTHERS:
        if all(any(part in f"^{name}" for name in names) for part in wanted):
            return f"is {what}; {give}"
    return ""
