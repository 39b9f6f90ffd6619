"""Names are templates, checked first; files of several processes never overwrite each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ldm_pipe.errors import UsageError
from ldm_pipe.output import FIELDS, Target, slug

VALUES = {
    "prompt": "A fox, on blue", "seed": 7, "index": 3, "sampler": "ddim", "spacing": "leading", "steps": 25, "scale": 3.0,
    "width": 64, "height": 32, "model": "builtin",
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("made", "made/a-fox-on-blue-7.png"),
        ("fox.png", "fox.png"),
        ("made/{seed}.PNG", "made/7.PNG"),
        ("{index:04}_{prompt}_{scale}.jpg", "0003_a-fox-on-blue_3.jpg"),
        ("{width}x{height}-{sampler}-{spacing}-{steps}-{model}.webp", "64x32-ddim-leading-25-builtin.webp"),
    ],
)
def test_fields_are_filled_in(tmp_path: Path, given: str, name: str) -> None:
    path = Target.of(str(tmp_path / given), 1).write(b"x", VALUES)
    assert str(path.relative_to(tmp_path)) == name
    assert set(VALUES) == set(FIELDS)


def test_a_prompt_stays_a_name(tmp_path: Path) -> None:
    """No prompt leaves the folder or makes a name too long for a file system."""
    for prompt in ("../../etc/passwd", "/", "", "..", "x" * 5000, "\ud800\0", "a\nb"):
        path = Target.of(str(tmp_path / "made" / ("{prompt}" * 6 + ".png")), 1).write(b"x", VALUES | {"prompt": prompt})
        assert path.parent == tmp_path / "made"
        assert len(path.name) <= 255
        assert slug(prompt)


def test_a_folder_that_looks_like_a_file_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "fox.png").mkdir()
    assert Target.of(str(tmp_path / "fox.png"), 4).folder == tmp_path / "fox.png"


def test_taken_names(tmp_path: Path) -> None:
    target = Target.of(str(tmp_path), 1)
    assert [target.write(b"1", VALUES).name for _ in range(3)] == [f"a-fox-on-blue-7{k}.png" for k in ("", "-2", "-3")]
    over = Target.of(str(tmp_path), 1, force=True)
    assert over.write(b"2", VALUES).read_bytes() == b"2"
    assert len(list(tmp_path.iterdir())) == 3
    Target.of(str(tmp_path / "one.png"), 1).write(b"1", VALUES)
    with pytest.raises(UsageError, match="--force"):
        Target.of(str(tmp_path / "one.png"), 1)


def test_processes_never_overwrite_each_other(tmp_path: Path) -> None:
    """Six at once, 25 files each, all of one name: 150 files, each with the bytes its writer gave it."""
    script = (
        "import sys; from ldm_pipe.output import Target\n"
        f"for k in range(25): Target.of({str(tmp_path)!r}, 1).write(f'{{sys.argv[1]}} {{k}}'.encode(), {VALUES!r})"
    )
    runs = [subprocess.Popen([sys.executable, "-c", script, str(n)]) for n in range(6)]
    assert [run.wait(60) for run in runs] == [0] * 6
    found = sorted(p.read_text() for p in tmp_path.iterdir())
    assert found == sorted(f"{n} {k}" for n in range(6) for k in range(25))
