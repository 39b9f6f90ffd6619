"""What the measuring scripts share: scenes with their grades, tables as files, plots without a screen."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ldm_pipe import files  # noqa: E402
from ldm_pipe.analysis.interval import wilson  # noqa: E402
from train.world import draw_scene  # noqa: E402
from train.world.grader import grade  # noqa: E402
from train.world.scenes import Scene  # noqa: E402


def scenes(kind: str, split: str, count: int, seed: int) -> list[Scene]:
    """Fresh scenes: their random stream is not the training's."""
    rng = np.random.default_rng([seed, count])
    return [draw_scene(rng, kind, split) for _ in range(count)]


def graded(images: Iterable[Any], wanted: Iterable[Scene]) -> int:
    """How many pictures show their scenes, by the grader."""
    return sum(grade(np.asarray(i), s) for i, s in zip(images, wanted, strict=True))


def share(right: int, tried: int) -> dict[str, float]:
    """A row of the results, in percent, with its 95% Wilson interval."""
    low, high = wilson(right, tried)
    return {"right": 100 * right / tried, "low": 100 * low, "high": 100 * high, "prompts": tried}


def kept(folder: Path, name: str) -> dict[str, Any]:
    """The results that stand in `name`.json already, {} where there are none."""
    path = folder / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def write(folder: Path, name: str, found: Any, text: str | None = None) -> None:
    """Results as `name`.json and, where there is a text, `name`.md; what stood there before is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / f"{name}.json", (json.dumps(found, indent=1) + "\n").encode(), replace=True)
    if text is not None:
        files.write(folder / f"{name}.md", text.encode(), replace=True)


def pyplot() -> Any:
    """Matplotlib's, for files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def columns(ax: Any, shown: dict[str, list[Any]], side: int = 64) -> None:
    """Pictures on an axis, one under the other in columns, each with its name below."""
    from PIL import Image

    tiles = [[np.asarray(i.resize((side, side), Image.Resampling.NEAREST)) for i in column] for column in shown.values()]
    ax.imshow(np.hstack([np.vstack(column) for column in tiles]))
    ax.set_xticks([side * i + side // 2 for i in range(len(tiles))], list(shown), rotation=60, ha="right", fontsize=7)
    ax.set_yticks([])
