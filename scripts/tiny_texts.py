"""Tiny random encoders of the real classes, of text with their tokenizers (CLIP, T5, Gemma 2) and of pictures (CLIP)."""

from __future__ import annotations

import string
from typing import Any

import torch

WORDS = ("a", "fox", "on", "blue", "red", "cat", "background", "the", "low", "quality")


def clip(projected: bool, **changes: Any) -> tuple[Any, Any]:
    """(tokenizer, text model) of CLIP, 8 tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from train.world.words import make_tokenizer

    tokenizer = make_tokenizer(8)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "projection_dim": 12}
    ends = {n: getattr(tokenizer, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=8, **(size | changes), **ends)
    return tokenizer, lively((CLIPTextModelWithProjection if projected else CLIPTextModel)(config))


def eye() -> Any:
    """CLIP's image encoder: 28 pixels a side, states of 16 channels, vectors of 12."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return lively(CLIPVisionModelWithProjection(CLIPVisionConfig(**size, image_size=28, patch_size=14, projection_dim=12)))


def siglip() -> Any:
    """SigLIP's image encoder: 28 pixels a side, states of 16 channels."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return lively(SiglipVisionModel(SiglipVisionConfig(**size, image_size=28, patch_size=14)))


def t5() -> tuple[Any, Any]:
    """(tokenizer, encoder) of T5, a unigram model of letters and a few words."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [*(f"\N{LOWER ONE EIGHTH BLOCK}{w}" for w in WORDS), "\N{LOWER ONE EIGHTH BLOCK}", *string.ascii_lowercase]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((p, -2.0 - len(p) / 9) for p in dict.fromkeys(pieces))]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer) + 8, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, dropout_rate=0.0)
    return tokenizer, lively(T5EncoderModel(config))


def gemma() -> tuple[Any, Any]:
    """(tokenizer, model) of Gemma 2, one token a letter."""
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    letters = [c for c in string.printable if c.strip()] + ["\N{LOWER ONE EIGHTH BLOCK}", "\n"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters]
    tokenizer = GemmaTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[])
    config = Gemma2Config(
        vocab_size=len(tokenizer) + 3, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, query_pre_attn_scalar=4,
    )  # fmt: skip
    return tokenizer, lively(Gemma2Model(config))


def lively(module: Any, gain: float = 1.3) -> Any:
    """The module with weights large enough that every one of them shows in the result."""
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, 0.0, gain * (weight[0].numel() ** -0.5 if "embed" not in name else 0.3))
        elif "norm" not in name:
            torch.nn.init.normal_(weight, 0.0, 0.1)
    return module.eval()
