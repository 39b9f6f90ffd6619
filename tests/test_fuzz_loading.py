"""Two hundred damaged files of every kind: refused in one sentence or read as they were (the script runs thousands)."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
fuzz_loading = importlib.import_module("fuzz_loading")
fuzz_seeds = importlib.import_module("fuzz_seeds")


def test_no_damage_is_read_in_silence_or_ends_in_a_traceback(tmp_path: Path) -> None:
    counts, faults = fuzz_loading.run(fuzz_seeds.sound(tmp_path), 200, 7)
    assert not faults
    assert counts.total() == 200
    assert sum(n for what, n in counts.items() if what.endswith("refused")) > 100
    assert sum(n for what, n in counts.items() if what.endswith("unchanged")) > 10


def test_a_fault_is_seen(tmp_path: Path) -> None:
    """A reader that trusts what it reads is found out."""
    file = tmp_path / "x.json"
    file.write_text('{"a": {"b": 1, "c": [1, 2]}, "d": "text"}')
    import json

    seed = fuzz_loading.Seed("naive", tmp_path, [file], lambda: dict.fromkeys(json.loads(file.read_text())["a"], Same()))
    _, faults = fuzz_loading.run([seed], 60, 0)
    assert any("KeyError" in fault or "JSONDecodeError" in fault for fault in faults)
    assert any("other tensors were read" in fault for fault in faults)
    assert file.read_text() == '{"a": {"b": 1, "c": [1, 2]}, "d": "text"}'


class Same:
    """A tensor that is always what it was."""

    def equal(self, other: object) -> bool:
        return True
