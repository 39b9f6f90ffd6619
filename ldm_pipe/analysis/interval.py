"""How sure a measured share is."""

from __future__ import annotations

from ldm_pipe.errors import UsageError


def wilson(right: int, tried: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share, as (low, high) in 0..1; z = 1.96 is 95%. Raises UsageError for tried < 1.

    Probable Inference, the Law of Succession, and Statistical Inference, Wilson 1927, JASA 22(158).
    """
    if not 0 <= right <= tried or tried < 1:
        raise UsageError(f"wilson takes 0 <= right <= tried and tried >= 1, got {right} of {tried}")
    p = right / tried
    middle, half = p + z * z / (2 * tried), z * (p * (1 - p) / tried + z * z / (4 * tried * tried)) ** 0.5
    return max(0.0, (middle - half) / (1 + z * z / tried)), min(1.0, (middle + half) / (1 + z * z / tried))
