"""`--control "ip_adapter(FILE, image_encoder=FOLDER, mask=FILE)"`: the files of a picture, or a face, as a prompt, read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipe.errors import ModelError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ldm_pipe.patch import Patch

FORM = "ip_adapter(FILE, image_encoder=FOLDER, mask=FILE, face=FILE)"
NAMED = re.compile(r"(?:(image_encoder|mask|face)\s*=\s*)?([^=]+)")
FACES = 16  # at most, in one file


@dataclass(frozen=True)
class Call:
    """file: the adapter's. image_encoder: the folder of the CLIP, of SD3 the SigLIP, that it reads pictures with, the one
    beside it where none is given. mask: a picture, white where it acts. face: a file of vectors that it reads instead."""

    file: Path
    image_encoder: Path | None = None
    mask: Path | None = None
    face: Path | None = None

    @classmethod
    def of(cls, text: str) -> Call | None:
        """From what --control is given; None where that is no such call. Raises UsageError on one that is not of the form."""
        found = re.fullmatch(r"\s*ip_adapter\s*(\(\s*([^()]+?)\s*\)\s*)?(.*)", text, re.DOTALL)
        if found is None or not re.match(r"\s*ip_adapter\s*\(", text):
            return None
        first, *rest = [part.strip() for part in (found[2] or "").split(",")]
        given: dict[str, str] = {}
        for place, part in enumerate(rest):
            named = NAMED.fullmatch(part)
            name = (named[1] or ("image_encoder" if place == 0 else "")) if named else ""
            if not name or name in given:
                first = ""
            given[name] = named[2] if named else ""
        if not first or found[3]:
            raise UsageError(f"--control {text!r:.120} is not of the form {FORM}")
        return cls(Path(first.strip("'\"")), **{name: Path(value.strip("'\" ")) for name, value in given.items()})

    def read(self) -> tuple[dict[str, str], Callable[[Any], Patch]]:
        """(SHA-256 of the files, what makes the patch of a `steering.Asked`). Raises ModelError on what does not fit."""
        from ldm_pipe import files, lora
        from ldm_pipe.networks.image_prompt import ImageAdapter
        from ldm_pipe.networks.timed_prompt import TimedAdapter

        tensors, sums = lora.read(self.file)[0], {"sha256": files.sha256(self.file)}
        if TimedAdapter.knows(tensors):
            return self._timed(TimedAdapter.of(tensors, self.file.name), sums)
        adapter = ImageAdapter.of(tensors, self.file.name)
        if adapter.face != (self.face is not None):
            kind = "it reads a picture, and face= goes with FaceID"
            kind = "face=FILE names the vector that it reads" if adapter.face else kind
            raise ModelError(f"{self.file.name}: {kind}, in {FORM}")
        if self.mask is not None:
            if not self.mask.is_file():
                raise UsageError(f"{FORM}: the mask {str(self.mask)!r:.120} is not a file")
            sums["mask"] = files.sha256(self.mask)
        if self.face is not None:
            sums["face"] = files.sha256(self.face) if self.face.is_file() else ""
            return sums, self._of_faces(adapter, _vectors(self.face))
        return self._of_pictures(adapter, sums)

    def _of_faces(self, adapter: Any, vectors: Tensor) -> Callable[[Any], Patch]:
        from ldm_pipe.control.ip_adapter import IPAdapter

        return lambda asked: IPAdapter.of_faces(adapter, vectors, mask=self._mask(asked), **asked.acts)

    def _timed(self, adapter: Any, sums: dict[str, str]) -> tuple[dict[str, str], Callable[[Any], Patch]]:
        from ldm_pipe.control.sd3_ip_adapter import SD3IPAdapter

        if self.mask is not None or self.face is not None:
            raise UsageError(f"{self.file.name}: mask= and face= go with an adapter of Stable Diffusion 1 or XL")
        tower, more = self._eyes()
        return {**sums, **more}, lambda asked: SD3IPAdapter.of(adapter, tower, [asked.picture], **asked.acts)

    def _eyes(self) -> tuple[Any, dict[str, str]]:
        """The image encoder, and the SHA-256 of its file."""
        from ldm_pipe import files, parts

        folder = self.image_encoder or self.file.parent / "image_encoder"
        if not folder.is_dir():
            wanted = "image_encoder=FOLDER is the CLIP that it reads with"
            raise ModelError(f"{self.file.name}: {str(folder)!r:.120} is no folder; {wanted}")
        encoder = folder / parts.WEIGHTS["transformers"]
        return parts.vision(folder), {"image_encoder": files.sha256(encoder) if encoder.is_file() else ""}

    def _of_pictures(self, adapter: Any, sums: dict[str, str]) -> tuple[dict[str, str], Callable[[Any], Patch]]:
        from ldm_pipe.control.flux_ip_adapter import FluxIPAdapter
        from ldm_pipe.control.ip_adapter import IPAdapter

        tower, more = self._eyes()
        sums = {**sums, **more}
        if len(adapter.weights[0]) == 2:
            return sums, lambda asked: IPAdapter.of(adapter, tower, [asked.picture], mask=self._mask(asked), **asked.acts)
        if self.mask is not None:
            raise UsageError(f"{self.file.name}: mask= goes with an adapter of Stable Diffusion 1 or XL")
        return sums, lambda asked: FluxIPAdapter.of(adapter, tower, [asked.picture], **asked.acts)

    def _mask(self, asked: Any) -> Tensor | None:
        """[1,1,H,W] of 0 and 1, of the size of the image: 1 where the grey is at least a half."""
        if self.mask is None:
            return None
        from PIL.Image import Resampling

        from ldm_pipe import image

        grey = image.read(self.mask, "mask").resize(asked.size, Resampling.LANCZOS).convert("L").convert("RGB")
        return (image.to_tensor([grey])[:, :1] >= 0).to(asked.device, asked.dtype)


def _vectors(file: Path) -> Tensor:
    """[N,E] of the one tensor of a file: a face recogniser's normalised vectors of one face, or of several."""
    from ldm_pipe import lora

    tensors, _ = lora.read(file)
    found = next(iter(tensors.values()))
    if len(tensors) != 1 or found.ndim not in (1, 2) or not 1 <= found.numel() // max(1, found.shape[-1]) <= FACES:
        shapes = ", ".join(str(list(t.shape)) for t in list(tensors.values())[:3])
        raise ModelError(f"{file.name}: a file of faces holds one tensor [E] or [N,E], N up to {FACES}; it holds {shapes}")
    return found.float().reshape(-1, found.shape[-1])
