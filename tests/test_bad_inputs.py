"""Every mistake in tests/bad_inputs.jsonl is one line, has its exit code, and leaves every file as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm_pipe.arguments import parser
from ldm_pipe.cli import main

CASES = [json.loads(line) for line in Path(__file__).with_name("bad_inputs.jsonl").read_text(encoding="utf-8").splitlines()]
RECIPES = {
    "wrong": '{"format": 1, "sead": 1}', "newer": '{"format": 2}', "list": "[1]", "nojson": "{nothing",
    "huge": '{"format": 1, "prompt": "x", "seed": 1, "batch": 1000000000}',
    "nanseed": '{"format": 1, "prompt": "x", "seed": NaN}',
    "badseed": '{"format": 1, "prompt": "x", "seed": -5, "model": "builtin", "steps": 2, "height": 64, "width": 64}',
    "badsteps": '{"format": 1, "prompt": "x", "seed": 5, "model": "tiny", "steps": 0, "height": 32, "width": 32}',
    "foreign": '{"format": 1, "prompt": "x", "seed": 5, "model": "elsewhere"}',
    "good": '{"format": 1, "prompt": "x", "seed": 5, "model": "tiny", "steps": 2}',
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with files to trip over."""
    for name, text in RECIPES.items():
        info = PngInfo()
        info.add_itxt("ldm_pipe", text)
        Image.new("RGB", (2, 2)).save(tmp_path / f"{name}.png", pnginfo=info)
    Image.new("RGB", (2, 2)).save(tmp_path / "old.png")
    Image.new("L", (4, 4)).save(tmp_path / "big.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def test_the_table_is_as_long_as_it_says() -> None:
    assert len({case["name"] for case in CASES}) == len(CASES) >= 120


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_mistake_is_one_line(
    case: dict[str, Any], place: Path, tiny: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in case.get("files", {}).items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(text.encode("utf-8", "surrogateescape")[:1_000_000])
    before, model = contents(place), str(tiny("eps"))
    capsys.readouterr()  # of making the model
    code = main(["--model", model, "--device", "cpu", "--dtype", "fp32", *case["flags"]])
    out, err = capsys.readouterr()
    assert (code, out) == (case["code"], "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert len(err) <= 400
    assert any(words in err for words in case["words"].split("|")), err
    assert contents(place) == before


def texts() -> st.SearchStrategy[str]:
    odd = ["", "0", "-1", "2.5", "nan", "inf", "1e9", "2", "none", "builtin", "\0", "\ud800", "\uff11", "a.png", "{seed}.png"]
    return st.one_of(st.sampled_from(odd), st.text(max_size=8), st.integers().map(str), st.floats().map(str))


def flags() -> st.SearchStrategy[list[str]]:
    """Any flags, with any values, those excepted that only answer (--help, --version) or read standard input."""
    actions = [a for a in parser()._actions if a.option_strings[-1] not in ("--help", "--version")]
    one = st.sampled_from(actions).flatmap(
        lambda a: st.just([a.option_strings[-1]]) if a.nargs == 0 else texts().map(lambda v: [f"{a.option_strings[-1]}={v}"])
    )
    return st.lists(one, max_size=5).map(lambda parts: [word for part in parts for word in part])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(flags())
def test_no_flags_reach_a_traceback(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given_flags: list[str]
) -> None:
    """Requests that would make images stop before a model is loaded; whatever else happens has an exit code and one line."""

    def stop(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ldm_pipe.pipeline.Pipeline.from_pretrained", stop)
    code = main([f for f in given_flags if f != "--debug" and not f.startswith("--prompt=-")])
    _, err = capsys.readouterr()
    assert code in (0, 2, 3, 130)
    assert "Traceback" not in err
    if code in (2, 3):
        assert err.startswith("error: ")
        assert err.count("\n") == 1
