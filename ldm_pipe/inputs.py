"""Files of text that a user names: a configuration, a list of prompts. They are untrusted, and read strictly."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

from ldm_pipe import hub, strict
from ldm_pipe.configs import read_json
from ldm_pipe.errors import ModelError, UsageError, unknown

MOST_TEXT = 64_000_000


def text(path: str, flag: str) -> str:
    """A small UTF-8 file. Raises UsageError naming the flag."""
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_TEXT + 1)
        if len(data) > MOST_TEXT:
            raise UsageError(f"{flag} {path!r} is larger than {MOST_TEXT // 10**6} MB")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{flag} {path!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{flag} {path!r} is not UTF-8 text (byte {error.start})") from error
    except ValueError as error:  # NUL or half a character
        raise UsageError(f"{flag} {path!r} is not the name of a file") from error


def config(path: str) -> dict[str, Any]:
    """The flags that a TOML file gives, by their names with _. Raises UsageError."""
    try:
        found = tomllib.loads(text(path, "--config"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"--config {path!r} is not TOML: {error}") from error
    names = [k.replace("-", "_") for k in found]
    twice = [n for n in names if names.count(n) > 1]
    if twice:
        raise UsageError(f"--config {path!r}: {twice[0]} stands twice, with - and with _")
    found = dict(zip(names, found.values(), strict=True))
    if isinstance(found.get("prompt"), str):
        found["prompt"] = [found["prompt"]]
    return found


def rows(path: str) -> list[tuple[str, int | None]]:
    """One prompt a line, or a .jsonl file of {"prompt": ..., "seed": ...}; empty lines are skipped."""
    lines = [(k, line) for k, line in enumerate(text(path, "--prompts").splitlines(), 1) if line.strip()]
    if not path.endswith(".jsonl"):
        return [(line.strip(), None) for _, line in lines]
    return [_row(f"{path}:{k}", line) for k, line in lines]


def _row(where: str, line: str) -> tuple[str, int | None]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--prompts {where}: not JSON") from error
    for key in row if isinstance(row, dict) else ():
        if key not in ("prompt", "seed"):
            raise UsageError(f"--prompts {where}: " + unknown("key", key, ("prompt", "seed")))
    if not (isinstance(row, dict) and isinstance(row.get("prompt"), str)):
        raise UsageError(f'--prompts {where}: a line is {{"prompt": text, "seed": whole number}}, the seed may be left out')
    seed = row.get("seed")
    return row["prompt"], None if seed is None else strict.coerce(seed, int, f"--prompts {where}: seed")


def factor(model: str) -> int:
    """Pixels per latent pixel of a model folder's codec, 1 where that cannot be told yet. Raises ModelError on no folder."""
    folder = Path(__file__).parent / "builtin" if model == "builtin" else Path(model)
    if model.endswith(".safetensors") and os.path.isfile(model):
        return 8  # of every model that comes in one file
    if hub.names(model):
        return 1
    if not os.path.isdir(folder if model else model):  # Path("") would be the working folder
        wanted = "give 'builtin', a folder in diffusers' layout or a .safetensors file"
        raise ModelError(f"--model {model!r:.120} is not a folder; {wanted}")
    try:
        found = read_json(folder / "vae" / "config.json")
        return int(2 ** (len(found["block_out_channels"]) - 1))
    except (ModelError, OSError, ValueError, LookupError, TypeError):
        return 1  # the loader will say what is wrong
