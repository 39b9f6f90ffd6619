"""`--edit`: a picture and its edit, and both again from their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm_pipe import UsageError
from ldm_pipe.cli import main
from ldm_pipe.edit import Edit

TEXT = "a fox on a blue background -> a cat on a blue background"


def test_an_edit_is_drawn_beside_its_source_and_both_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--seed", "7", "--steps", "4", "--num-images", "2", "--dtype", "fp32", "--quiet"]
    assert main(["--edit", TEXT, "--set", "edit.own=0.5", *flags, "-o", "edited"]) == 0
    names = [f"edited/a-{what}-on-a-blue-background-{seed}.png" for what in ("fox", "cat") for seed in (7, 8)]
    assert capsys.readouterr().out.splitlines() == names
    assert main(["-p", "a fox on a blue background", *flags, "-o", "plain"]) == 0
    capsys.readouterr()
    assert Path(names[0]).read_bytes()[-2000:] == Path(names[0].replace("edited", "plain")).read_bytes()[-2000:]
    for name in names[1:3]:
        assert main(["--replay", name, "--verify"]) == 0
        assert capsys.readouterr().out == f"{name}: bit-equal\n"
    assert main(["--show", names[2]]) == 0
    assert "edit:            a fox on a blue background -> a cat on a blue background" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "fields", "words"),
    [
        ("a fox", {}, "not of the form"), ("-> a fox", {}, "not of the form"), ("a ->", {}, "not of the form"),
        (TEXT, {"cross": "2"}, "take 0 to 1"), (TEXT, {"crosss": "1"}, "did you mean 'cross'"),
        (TEXT, {"source": "x"}, "stand in --edit"),
    ],
)  # fmt: skip
def test_a_wrong_edit_is_one_sentence(text: str, fields: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Edit.of(text, fields)
