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


def test_pieces_go_on_where_they_were_left(tmp_path: Path) -> None:
    """What is done is not done again, a line that was cut off is, and the last line sums all of them up."""
    made, results = list[Path](), tmp_path / "fuzz.jsonl"

    def sound(place: Path) -> list[object]:
        made.append(place)
        file = place / "x.json"
        file.write_text("{}")
        return [fuzz_loading.Seed("any", place, [file], dict)]

    rows = fuzz_loading.pieces(sound, range(3, 5), 20, results)
    assert [row["seed"] for row in rows] == [3, 4]
    assert fuzz_loading.summary(rows).startswith("40 mutations of 2 seed(s): 0 refused, 40 read, 0 faults, ")
    results.write_text(results.read_text()[:-9])  # killed while it was written
    assert fuzz_loading.pieces(sound, range(3, 6), 20, results)[0] == rows[0]
    assert len(made) == 4, "3 and 4, then 4 again and 5"
    assert fuzz_loading.done(results, 20).keys() == {3, 4, 5}
    assert fuzz_loading.pieces(sound, range(3, 6), 20, results)[0] == rows[0]
    assert len(made) == 4
    fuzz_loading.pieces(sound, range(3, 4), 10, results)
    assert len(made) == 5, "of another length"
    faulty = {"seed": 1, "mutations": 2, "faults": ["one"], "counts": {"json, form: refused": 2}, "seconds": 1.0}
    assert fuzz_loading.summary([faulty]) == "2 mutations of 1 seed(s): 2 refused, 0 read, 1 faults, 1 s"


class Same:
    """A tensor that is always what it was."""

    def equal(self, other: object) -> bool:
        return True
