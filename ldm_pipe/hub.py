"""Models by their name on a hub: fetched only where the user writes one, pinned with `@`, kept in the hub's own cache.

`owner/name`, `owner/name@revision` (a full commit id pins it for good) or a short name from ALIASES. HF_ENDPOINT, HF_HOME and
HF_HUB_OFFLINE mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from ldm_pipe.errors import EnvironmentFault, ModelError
from ldm_pipe.files import sha256

ALIASES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sdxl-refiner": "stabilityai/stable-diffusion-xl-refiner-1.0",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
    "flux-dev": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
    "pixart-sigma": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "sana": "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    "dit-xl-2-256": "facebook/DiT-XL-2-256",
}
WANTED = [
    "model_index.json", "*/*.json", "*/*.txt", "*/diffusion_pytorch_model.safetensors", "*/model.safetensors",
    "*/diffusion_pytorch_model-?????-of-?????.safetensors", "*/model-?????-of-?????.safetensors",
]  # fmt: skip
UNWANTED = ["safety_checker/*", "feature_extractor/*", "image_encoder/*"]
OFFLINE = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")  # as the user has it: we set it later
NAME = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([A-Za-z0-9][\w./-]{0,127}))?")


def names(source: str) -> bool:
    """Is this the name of a model on a hub, and no folder or file of that name here?"""
    known = source.partition("@")[0] in ALIASES or NAME.fullmatch(source) is not None
    return known and not source.endswith(".safetensors") and not os.path.exists(source)


def fetch(source: str) -> Path:
    """The folder of a model, fetched where the cache lacks it. Raises ModelError where the hub has no such model or a file is
    damaged, EnvironmentFault where the hub cannot be reached and the cache lacks it."""
    short, _, pinned = source.partition("@")
    name = ALIASES.get(short, short)
    revision = pinned or None
    import huggingface_hub
    from huggingface_hub import constants, errors

    started, before = time.time(), constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = OFFLINE
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED, local_files_only=OFFLINE,
            endpoint=os.environ.get("HF_ENDPOINT"),
        )  # fmt: skip
    except errors.GatedRepoError as error:
        raise ModelError(f"the hub gives {name!r} only to those who accepted its terms; do so there and log in") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"the hub's {name!r} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"the hub has no model {name!r}, or not for you; nor is a folder of that name here") from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if OFFLINE else "the hub cannot be reached"
        raise EnvironmentFault(f"{name!r} is not in the cache and {why}; fetch it once, or give a folder") from error
    except Exception as error:  # the library and its transport raise a dozen kinds
        reason = " ".join(str(error).split())[:100]
        why = f"{type(error).__name__}: {reason}"
        raise EnvironmentFault(f"{name!r} could not be fetched ({why}); what is whole is kept") from error
    finally:
        constants.HF_HUB_OFFLINE = before
    _compare(Path(found), started)
    return Path(found)


def _compare(folder: Path, started: float) -> None:
    """Raise ModelError where a weight file that has just come does not have the SHA-256 which the hub names; remove it."""
    for file in folder.glob("*/*.safetensors"):
        blob = file.resolve()
        named = re.fullmatch(r"[0-9a-f]{64}", blob.name)
        if named and blob.stat().st_mtime >= started - 1 and sha256(blob) != blob.name:
            blob.unlink()
            file.unlink(missing_ok=True)
            raise ModelError(f"{file.parent.name}/{file.name} came damaged: its SHA-256 is not the hub's; removed, try again")
