"""CLIP's text tower in torch alone, with the configuration and the weight names of transformers' CLIPTextModel.

Learning Transferable Visual Models From Natural Language Supervision (Radford et al. 2021, arXiv 2103.00020, section 2.4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.blocks import Embedding, Linear, attend


@dataclass(frozen=True)
class Config:
    """What config.json may ask for, with the defaults of its class; `neutral`: what may be said but not changed.

    The last fields describe the file or the training and change nothing here.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    bos_token_id: int | None = 49406
    pad_token_id: int | None = 1
    projection_dim: int | None = 512
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    architectures: tuple[str, ...] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    transformers_version: str | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "attention_dropout": (0,),
        "dropout": (0,),
        "model_type": ("clip_text_model",),
        "tie_word_embeddings": (False, True),
    }

    def __post_init__(self) -> None:
        """Raise ValueError where the heads do not divide the width."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("the heads do not divide the width")

    @property
    def parts(self) -> int:
        """A lower bound of the number of tensors, to compare with the file before anything is built."""
        return self.num_hidden_layers


def renamed(name: str) -> str | None:
    """The present name of a tensor: early files put `text_model.` before it and hold the positions 0, 1, 2, ..."""
    return None if name.endswith("position_ids") else name.removeprefix("text_model.")


class _Attention(nn.Module):
    """x [B,L,C], each position attending to those before it and to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class _Mlp(nn.Module):
    """[B,L,C] -> [B,L,C], by sigmoid's approximation of GELU or by GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""

    def __init__(self, width: int, inner: int, quick: bool) -> None:
        super().__init__()
        self.quick = quick
        self.fc1, self.fc2 = Linear(width, inner), Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))


class _Layer(nn.Module):
    """x [B,L,C] -> [B,L,C]: attention, then the small network, each behind a norm and added to its input."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.self_attn = _Attention(width, config.num_attention_heads)
        self.mlp = _Mlp(width, config.intermediate_size, config.hidden_act == "quick_gelu")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Embeddings(nn.Module):
    """ids [B,L] -> [B,L,C]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class Encoded(NamedTuple):
    """What a prompt gives. last_hidden_state: [B,L,C], normalised. pooler_output: [B,C], its row at the end of the prompt.
    hidden_states: [B,L,C] each, the embeddings and what every layer makes of them, not normalised. text_embeds: [B,P], the
    pooled output projected, of a tower that does that."""

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...]
    text_embeds: Tensor | None = None


class ClipTextModel(nn.Module):
    """ids [B,L] -> Encoded; L at most `config.max_position_embeddings`. projected: the pooled output is projected, too."""

    def __init__(self, config: Config, projected: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))})
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.text_projection = Linear(config.hidden_size, config.projection_dim or 512, bias=False) if projected else None

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.final_layer_norm.weight.device

    def forward(self, ids: Tensor, output_hidden_states: bool = True) -> Encoded:
        """Encode; the states of all layers are given in any case.

        A prompt ends at the first end token; a file that says 2, as early ones wrongly do, means the largest id.
        """
        states = [self.embeddings(ids)]
        layers: Any = self.encoder["layers"]
        for layer in layers:
            states.append(layer(states[-1]))
        last, end = self.final_layer_norm(states[-1]), self.config.eos_token_id
        own = ids.where(ids < self.config.vocab_size, 0)  # words that were learned later lie above
        ends = (own if end == 2 else (ids == end).int()).argmax(dim=1)
        pooled = last[torch.arange(len(ids), device=ids.device), ends]
        return Encoded(last, pooled, tuple(states), self.text_projection(pooled) if self.text_projection is not None else None)


def with_projection(config: Config) -> ClipTextModel:
    """transformers' CLIPTextModelWithProjection."""
    return ClipTextModel(config, projected=True)
