"""The image half of a CLIP, whether its folder holds both halves or that one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_pipe import configs, weights
from ldm_pipe.parts import WEIGHTS, quiet, read_json


def image_half(place: Path, name: str) -> Any:
    """A CLIPVisionModel or CLIPVisionModelWithProjection (`name`) of transformers, frozen, in fp32, from safetensors alone.

    Raises ModelError that names the folder, or the first weight that is missing.
    """
    where = f"{place.parent.name}/{place.name}"
    with weights.named(place), quiet():
        import transformers

        weights.held(place, WEIGHTS["transformers"])
        how: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        config = read_json(place / "config.json")
        half = config.get("vision_config", config)
        configs.plausible(half, f"{where}/config.json")
        if half is not config:  # the width of the projection stands with what both halves share
            both = {"projection_dim": config.get("projection_dim", 512)}
            how["config"] = transformers.CLIPVisionConfig.from_dict({**half, **both})
        found, report = getattr(transformers, name).from_pretrained(place, **how)
    weights.refuse(where, "missing", sorted(map(str, report["missing_keys"])))
    weights.finite(found, where)
    return found.float().eval().requires_grad_(False)
