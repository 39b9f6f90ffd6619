"""Samplers: one published method per file, each a frozen dataclass with one `step`."""
