"""Foreign networks, each wrapped once: (x, time, cond) -> raw output."""
