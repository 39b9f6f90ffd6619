"""The light text tower and the light tokenizer equal those of transformers."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_pipe import ModelError, configs, load, tokens, weights
from ldm_pipe.loading import BUILTIN
from ldm_pipe.networks.light_clip import ClipTextModel, Config, renamed
from ldm_pipe.text import ClipText, clean

SHAPES: dict[str, dict[str, Any]] = {
    "SD 1.5": {"hidden_act": "quick_gelu", "eos_token_id": 2},
    "SD 2.1": {"hidden_act": "gelu", "num_hidden_layers": 1},
    "SDXL": {"num_hidden_layers": 3, "eos_token_id": 9, "layer_norm_eps": 1e-6},
}


def made(shape: str, folder: Path) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2,
            "max_position_embeddings": 9}  # fmt: skip
    theirs = CLIPTextModel(CLIPTextConfig(**(size | SHAPES[shape]))).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, 0.02, 0.3)
    theirs.save_pretrained(folder)
    return theirs


def ours_of(folder: Path) -> ClipTextModel:
    config = configs.known(Config, json.loads((folder / "config.json").read_text()))
    assert config is not None
    return weights.read(folder / "model.safetensors", config.parts, lambda: ClipTextModel(config), renamed)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_transformers(shape: str, tmp_path: Path) -> None:
    """The last states, the pooled one and those of every layer, in float64 to 1e-10."""
    theirs, ours = made(shape, tmp_path).double(), ours_of(tmp_path).double()
    for length in (9, 4):
        ids = torch.randint(0, 40, (3, length))
        ids[:, 2] = 9
        expected, found = theirs(ids, output_hidden_states=True), ours(ids)
        pairs = zip(found.hidden_states, expected.hidden_states, strict=True)
        for a, b in [(found[0], expected.last_hidden_state), (found[1], expected.pooler_output), *pairs]:
            assert (a - b).abs().max() < 1e-10 * b.abs().max()


def test_early_files_are_read(tmp_path: Path) -> None:
    """They put a prefix before every name and hold the positions as whole numbers."""
    made("SD 1.5", tmp_path)
    file, expected = tmp_path / "model.safetensors", ours_of(tmp_path).state_dict()
    tensors = {f"text_model.{n}": t for n, t in load_file(file).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(9)[None]}, file)
    assert all(torch.equal(t, expected[n]) for n, t in ours_of(tmp_path).state_dict().items())
    save_file(tensors | {"final_layer_norm.bias": torch.zeros(16)}, file)
    with pytest.raises(ModelError, match=r"unexpected tensor '(text_model\.)?final_layer_norm.bias'"):
        ours_of(tmp_path)


@torch.no_grad()
def test_the_shipped_encoder_equals_transformers() -> None:
    from transformers import CLIPTextModel

    theirs, text = CLIPTextModel.from_pretrained(BUILTIN / "text_encoder", dtype=torch.float32), load("builtin").text
    assert isinstance(text, ClipText)
    assert isinstance(text.encoder, ClipTextModel)
    ids = torch.randint(0, 1051, (3, 24))
    expected = theirs(ids).last_hidden_state
    assert (text.encoder(ids).last_hidden_state - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("values", [{"hidden_act": "relu"}, {"attention_dropout": 0.1}, {"num_attention_heads": 7},
                                    {"model_type": "siglip"}, {"new": 1}, {"eos_token_id": [1, 2]}])  # fmt: skip
def test_a_configuration_that_asks_for_more_is_not_known(values: dict[str, Any]) -> None:
    assert configs.known(Config, {"dropout": 0.0, "architectures": ["CLIPTextModel"], "torch_dtype": "float16"}) is not None
    assert configs.known(Config, values) is None


def prompts() -> list[str]:
    """Two hundred odd ones: the known traps, then mixtures of pieces that are hard alone."""
    traps = [
        "", " ", "a fox", "A FOX on a Blue background", "don't we've I'm they'll he'd it's 'tis", "fox " * 200, "x" * 500,
        "3.14159 1,000", "\0", "\ud800", "tab\tnew\nline\r\n", "  two  spaces  ", "🦊 on 🟦", "👩‍👩‍👧 family", "ﬁ ligature",
        "Ångström Å", "e\u0301 é", "İstanbul ß ẞ", "日本語のテキスト", "العربية", "हिन्दी", "\u200bzero\u200dwidth",
        "<|startoftext|>", "a <|endoftext|> b", "<|ENDOFTEXT|>", "<|end", "!!!", "! a! !b", "...---...", "a_b_c", "(fox:1.3)",
        "C++ & C#", "50% of $5", "½ ² Ⅳ ٣", "\u3000wide\u00a0hard", "'s's's", "naïve café", "</w>", "a</w> fox", "# comment",
        "ᾳ ǅ ŉ", "\ufeffbom", "\U0001d523\U0001d52c\U0001d535", "fox," * 30,
    ]  # fmt: skip
    draw = random.Random(0)
    pieces = [*traps[2:5], *(t for t in traps[7:] if len(t) < 25), "fox", "bees", "'", "\n", "é", "<|endoftext|>"]
    glue = ["", " ", "  ", ", "]
    while len(traps) < 210:
        traps.append("".join(draw.choice(pieces) + draw.choice(glue) for _ in range(draw.randint(1, 9))))
    return [clean(p) for p in traps]


def same_ids(folder: Path, window: int) -> None:
    from transformers import CLIPTokenizer

    ours, theirs = tokens.read(folder, 10**6), tokens.FromTransformers(CLIPTokenizer.from_pretrained(folder))
    assert ours is not None
    for prompt in prompts():
        assert ours([prompt], window) == theirs([prompt], window), prompt
        assert ours.length(prompt) == theirs.length(prompt), prompt


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The built-in tokenizer in the layout of Stable Diffusion 1.5: vocab.json, merges.txt and how it wrote its tokens."""
    folder = Path(shutil.copytree(BUILTIN / "tokenizer", tmp_path / "old"))
    (folder / "tokenizer.json").unlink()
    special = {
        k: {"content": c, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for k, c in tokens.SPECIAL.items()
    } | {"pad_token": tokens.END}
    typed = {k: v | {"__type": "AddedToken"} if isinstance(v, dict) else v for k, v in special.items()}
    plain = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 24}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(typed | plain | {"tokenizer_class": "CLIPTokenizer"}))
    return folder


def test_the_tokens_of_the_shipped_folder_equal_transformers() -> None:
    same_ids(BUILTIN / "tokenizer", 24)


def test_the_tokens_of_the_old_layout_equal_transformers(old: Path) -> None:
    same_ids(old, 77)


def test_another_padding_token_equals_transformers(old: Path) -> None:
    """Stable Diffusion 2 fills up with "!", which then is a token wherever it stands."""
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        rewrite(old / file, pad_token="!")
    same_ids(old, 12)


def test_added_tokens_equal_transformers(old: Path) -> None:
    """As newer files list them, by id."""
    flags = {"lstrip": False, "rstrip": True, "single_word": False, "special": True}
    contents = {"1050": (tokens.END, False), "1049": ("<|startoftext|>", True)}
    added = {i: {"content": content, "normalized": normalized} | flags for i, (content, normalized) in contents.items()}
    rewrite(old / "tokenizer_config.json", added_tokens_decoder=added, **tokens.SPECIAL)
    same_ids(old, 24)


def rewrite(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("values", [{"padding_side": "left"}, {"add_prefix_space": True}, {"new": 1}, {"unk_token": "[UNK]"},
                                    {"tokenizer_class": "GPT2Tokenizer"}, {"extra_special_tokens": ["<x>"]}])  # fmt: skip
def test_a_tokenizer_that_asks_for_more_is_not_known(old: Path, values: dict[str, Any]) -> None:
    (old / "special_tokens_map.json").unlink()
    assert tokens.read(old, 1051) is not None
    rewrite(old / "tokenizer_config.json", **values)
    assert tokens.read(old, 1051) is None


def test_a_tokenizer_that_is_not_known_falls_back(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("eps"), tmp_path / "model"))
    rewrite(folder / "tokenizer" / "tokenizer_config.json", verbose=False)
    text, ours = load(folder).text, load(tiny("eps")).text
    assert isinstance(text, ClipText)
    assert isinstance(text.tokenizer, tokens.FromTransformers)
    assert torch.equal(text(["two bees", ""]).tokens, ours(["two bees", ""]).tokens)  # type: ignore[arg-type]
    assert text.notices("fox " * 9) == ours.notices("fox " * 9)


def test_ids_beyond_the_encoder_are_refused(old: Path) -> None:
    with pytest.raises(ModelError, match="beyond the 1050 tokens"):
        tokens.read(old, 1050)
