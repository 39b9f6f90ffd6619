"""Prompts to ids: CLIP's byte-pair encoding by the `tokenizers` library alone, or whatever transformers makes of a folder.

Neural Machine Translation of Rare Words with Subword Units (Sennrich et al. 2016, arXiv 1508.07909, algorithm 1), on bytes and
lower case as in Radford et al. 2021, arXiv 2103.00020, section 2.4.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from ldm_pipe.configs import LONGEST_TOKENIZER, read_json
from ldm_pipe.errors import ModelError
from ldm_pipe.prompt import WORD, Run

END = "<|endoftext|>"
SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": END, "unk_token": END, "pad_token": END}
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# What tokenizer_config.json may say besides its special tokens: values that change no id (None: any value).
CONFIG: Mapping[str, tuple[Any, ...] | None] = {
    "add_prefix_space": (False,), "do_lower_case": (True,), "errors": ("replace",), "backend": ("tokenizers",),
    "tokenizer_class": ("CLIPTokenizer", "CLIPTokenizerFast"), "padding_side": ("right",), "truncation_side": ("right",),
    "split_special_tokens": (False,), "extra_special_tokens": ([], {}), "additional_special_tokens": ([],),
    "model_max_length": None, "max_length": None, "name_or_path": None, "special_tokens_map_file": None, "is_local": None,
    "clean_up_tokenization_spaces": None, "processor_class": None,
}  # fmt: skip


class Tokenizer(Protocol):
    """Prompts to ids, the two ends included."""

    def __call__(self, prompts: Sequence[str], window: int) -> list[list[int]]:
        """Rows of exactly `window` ids: the rest cut off before the end token, or filled up behind it."""

    def length(self, prompt: str) -> int:
        """How many ids the whole prompt has."""

    def starts(self, prompt: str) -> list[int]:
        """The character at which each id of the whole prompt begins, spaces left out; -1 for the two ends."""


def weighed(tokenizer: Tokenizer, text: str, runs: Sequence[Run]) -> list[tuple[int, float, int]]:
    """(id, weight, first character) of every token of the text that runs make, the ends with weight 1 and character -1.

    The text is cut into tokens as a whole: a weight changes no token, and places are those of the words alone.
    """
    starts = tokenizer.starts(text)
    ids, borders = tokenizer([text], len(starts))[0], list(accumulate(len(run.text) for run in runs))
    weights = [runs[bisect_right(borders, start)].weight if start >= 0 else 1.0 for start in starts]
    return list(zip(ids, weights, starts, strict=True))


def begun(text: str, spans: Sequence[tuple[int, int]], ends: Sequence[int]) -> list[int]:
    """`Tokenizer.starts` of what a library says: the characters (first, past the last) of each id, and 1 where it is an end."""
    blank = [len(text[a:b]) - len(text[a:b].lstrip()) for a, b in spans]
    return [-1 if end else min(a + n, max(a, b - 1)) for (a, b), n, end in zip(spans, blank, ends, strict=True)]


def words(text: str) -> list[str]:
    """The words of a prompt in lower case, signs between them alone."""
    return re.findall(WORD, text.lower())


def places(tokenizer: Tokenizer, window: int, text: str) -> list[tuple[str, range]]:
    """The words of a prompt, each with its places among the tokens; what the window cuts off is left out."""
    return [(word, span) for word, span in spans(tokenizer, window, text) if len(span)]


def spans(tokenizer: Tokenizer, window: int, text: str) -> list[tuple[str, range]]:
    """The same, those among them that have no place."""
    ends = tokenizer.length("")  # CLIP's two, or only the one behind
    found, place = [], ends - 1
    for word in re.finditer(WORD, text):
        end = tokenizer.length(text[: word.end()]) - 1  # a sign alone is not what it is behind a word, to T5
        found.append((word[0].lower(), range(min(place, window - 1), min(end, window - 1))))
        place = end
    return found


_LOCK = Lock()  # transformers' tokenizers fill up and cut by settings that all threads share


@dataclass(frozen=True, eq=False)
class FromTransformers:
    """A tokenizer of transformers."""

    tokenizer: Any

    def __call__(self, prompts: Sequence[str], window: int) -> list[list[int]]:
        """Rows of `window` ids."""
        with _LOCK:
            return self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=window).input_ids

    def length(self, prompt: str) -> int:
        """Ids of the whole prompt."""
        with _LOCK:
            return len(self.tokenizer(prompt).input_ids)

    def starts(self, prompt: str) -> list[int]:
        """Where the ids begin. Raises ModelError of a tokenizer that cannot tell."""
        if not self.tokenizer.is_fast:
            raise ModelError(f"{type(self.tokenizer).__name__} cannot tell where words begin; --plain-prompt does without")
        with _LOCK:
            found = self.tokenizer(prompt, return_offsets_mapping=True, return_special_tokens_mask=True)
        return begun(prompt, found.offset_mapping, found.special_tokens_mask)


@dataclass(frozen=True, eq=False)
class ClipTokenizer:
    """Gives the ids of transformers' CLIPTokenizer. `encoder`: a tokenizers.Tokenizer; `pad`: the id that fills rows up."""

    encoder: Any
    pad: int

    def __call__(self, prompts: Sequence[str], window: int) -> list[list[int]]:
        """Rows of `window` ids."""
        return [self._row(self.encoder.encode(p).ids, window) for p in prompts]

    def _row(self, ids: list[int], window: int) -> list[int]:
        kept = ids if len(ids) <= window else [*ids[: window - 1], ids[-1]]
        return kept + [self.pad] * (window - len(kept))

    def length(self, prompt: str) -> int:
        """Ids of the whole prompt."""
        return len(self.encoder.encode(prompt).ids)

    def starts(self, prompt: str) -> list[int]:
        """Where the ids begin."""
        found = self.encoder.encode(prompt)
        return begun(prompt, found.offsets, found.special_tokens_mask)


def read(folder: Path, vocabulary: int) -> ClipTokenizer | None:
    """The tokenizer of a folder (tokenizer.json, or vocab.json and merges.txt); None where it asks for what is not known here.

    vocabulary: how many ids the text encoder has. Raises ModelError on a larger id; on a damaged file, whatever the reader
    of its format raises.
    """
    from tokenizers.models import BPE

    unknown = [folder / name for name in ("added_tokens.json", "chat_template.jinja") if (folder / name).exists()]
    if unknown or not (folder / "tokenizer_config.json").exists():
        return None
    config, whole = _object(folder / "tokenizer_config.json"), _object(folder / "tokenizer.json")
    if "added_tokens_decoder" in config:
        added = config.pop("added_tokens_decoder")
    else:
        config |= _object(folder / "special_tokens_map.json")
        added = {t["id"]: {k: v for k, v in t.items() if k != "id"} for t in whole.get("added_tokens", ())}
    special = {key: config.pop(key, value) for key, value in SPECIAL.items()}
    sides = [whole[k]["direction"] for k in ("padding", "truncation") if whole.get(k)]
    if set(sides) - {"Right"} or not all(_is_neutral(k, v) for k, v in config.items()):
        return None
    if whole:
        model = whole["model"]
        vocab, merges = model["vocab"], [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    else:
        plain = [folder / "vocab.json", folder / "merges.txt"]
        if any(file.is_file() and file.stat().st_size > LONGEST_TOKENIZER for file in plain):
            raise ModelError(f"{folder.parent.name}/{folder.name}: a vocabulary is longer than {LONGEST_TOKENIZER} bytes")
        vocab, merges = BPE.read_file(*map(str, plain))
    names = {key: t["content"] if isinstance(t, dict) else t for key, t in special.items()}
    if any(vocab.get(t["content"]) != int(i) for i, t in added.items()) or not set(names.values()) <= vocab.keys():
        return None
    if min(vocab.values()) < 0 or max(vocab.values()) >= vocabulary:
        raise ModelError(f"{folder.parent.name}/{folder.name}: an id is beyond the {vocabulary} tokens of the text encoder")
    encoder = _encoder(vocab, merges, names)
    encoder.add_tokens(_added([added[i] for i in sorted(added, key=int)], special))
    return ClipTokenizer(encoder, vocab[names["pad_token"]])


def published(merges: str, pad: str) -> ClipTokenizer:
    """The tokenizer of all published CLIP models. merges: their 48894 merges, one a line, two parts each; pad: the token that
    fills rows up."""
    pairs = [tuple(line.split(" ")) for line in merges.splitlines()]
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves; the others follow
    letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    listed = [*letters, *(c + "</w>" for c in letters), *("".join(p) for p in pairs), "<|startoftext|>", END]
    vocab = {token: i for i, token in enumerate(listed)}
    special = {**SPECIAL, "pad_token": pad}
    encoder = _encoder(vocab, pairs, special)
    encoder.add_tokens(_added([], special))
    return ClipTokenizer(encoder, vocab[pad])


def _is_neutral(name: str, value: Any) -> bool:
    allowed = CONFIG.get(name, ())
    return allowed is None or value in allowed


def _object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds, {} where there is no file."""
    return read_json(file, LONGEST_TOKENIZER) if file.exists() else {}


def _encoder(vocab: dict[str, int], merges: Sequence[tuple[str, ...]], names: Mapping[str, str]) -> Any:
    """The whole encoding of CLIP, without the tokens that are found before the text is split."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    bpe = models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>", unk_token=names["unk_token"])
    encoder = Tokenizer(bpe)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    encoder.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bos, eos = names["bos_token"], names["eos_token"]
    encoder.post_processor = processors.RobertaProcessing((eos, vocab[eos]), (bos, vocab[bos]), False, False)
    return encoder


def _added(added: Sequence[Mapping[str, Any]], special: Mapping[str, Any]) -> list[Any]:
    """The tokens that are found before the text is split: those of the files, then the named ones that are not among them.

    One content may come twice, with other properties; which of them counts is the library's affair, so both are handed on.
    """
    from tokenizers import AddedToken

    tokens: list[Any] = [AddedToken(**token) for token in added]
    listed, names = {token.content for token in tokens}, set()
    for value in special.values():
        if isinstance(value, dict):
            value = AddedToken(**{k: v for k, v in value.items() if k not in ("__type", "special")})
        names.add(str(value))
        if str(value) not in listed and value not in tokens:
            tokens.append(value)
    found = [AddedToken(token, special=True) if isinstance(token, str) else token for token in tokens]
    for token in found:
        token.special |= token.content in names
    return found
