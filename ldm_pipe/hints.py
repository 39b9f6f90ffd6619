"""`--set control.prepare=canny`: the picture that a control network reads, made of an ordinary one.

A Computational Approach to Edge Detection, Canny 1986, as scikit-image has it (the extra `control`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ldm_pipe.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

BLUR, LOW, HIGH = 1.4, 0.1, 0.2  # pixels, and the slopes, of 1 = black to white, that go on and that begin an edge


def canny(picture: Image) -> Image:
    """White edges on black. Raises UsageError where scikit-image is not installed."""
    import numpy as np
    from PIL import Image as Pictures

    try:
        from skimage.feature import canny as edges
    except ImportError as error:
        raise UsageError("control.prepare=canny needs scikit-image: pip install ldm_pipe[control]") from error
    found = edges(np.asarray(picture.convert("L")) / 255, BLUR, LOW, HIGH)
    return Pictures.fromarray(found.astype(np.uint8) * 255).convert("RGB")


def grey(picture: Image) -> Image:
    """Without its colours, for networks that give them."""
    return picture.convert("L").convert("RGB")


PREPARE: dict[str, Callable[[Image], Image]] = {"canny": canny, "grey": grey}
