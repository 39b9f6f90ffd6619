"""--record, --preview, --sweep and --doctor from the command line: paired noise, exact facts, one line for a mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_pipe import UsageError
from ldm_pipe.cli import main
from ldm_pipe.errors import EnvironmentFault
from ldm_pipe.looking import doctor
from ldm_pipe.looking.doctor import Finding, verdict
from ldm_pipe.looking.flags import Looking
from ldm_pipe.looking.record import read
from ldm_pipe.pipeline import Pipeline

Tiny = Callable[[str], Path]
PROMPT = "a fox on a blue background"


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """run(*flags) -> (exit code, stdout, stderr), in an empty folder, with the tiny model."""
    monkeypatch.chdir(tmp_path)

    def call(*flags: str) -> tuple[int, str, str]:
        code = main(["--model", str(tiny("eps")), "--device", "cpu", "--dtype", "fp32", *flags])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_a_record_and_a_preview_change_no_image(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run("-p", PROMPT, "--seed", "5", "-o", "plain.png")[0] == 0
    code, out, _ = run("-p", PROMPT, "--seed", "5", "-o", "seen.png", "--record", "r.safetensors", "--preview", "p.png")
    assert (code, out) == (0, "seen.png\nr.safetensors\n")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "seen.png").read_bytes()
    tensors, facts = read(tmp_path / "r.safetensors")
    assert tensors["evaluations"].tolist() == [2] * 4
    assert facts["prompts"] == [PROMPT]
    with Image.open(tmp_path / "p.png") as shown:
        assert shown.size == (256, 256)
    assert run("-p", PROMPT, "-o", "more.png", "--record", "r.safetensors")[0] == 2
    assert run("-p", PROMPT, "-o", "more.png", "--record", "r.safetensors", "--force")[0] == 0


def test_a_preview_in_the_terminal_goes_to_standard_error(run: Callable[..., Any]) -> None:
    code, out, err = run("-p", PROMPT, "--preview", "terminal", "--steps", "3")
    assert code == 0
    assert err.count("\u2580") == 3 * 8 // 2 * 9
    assert "\u2580" not in out


def test_a_sweep_makes_one_sheet_of_paired_images(run: Callable[..., Any], tmp_path: Path) -> None:
    flags = ["-p", PROMPT, "--num-images", "2", "--seed", "3"]
    code, out, err = run(*flags, "--sweep", "sampler=ddim,euler", "steps=3,5", "-o", "s.png", "--json")
    assert code == 0
    found = json.loads(out)
    report = json.loads((tmp_path / found["report"]).read_text())
    assert (found["sheet"], found["report"]) == ("s-sweep.png", "s-sweep.json")
    labels = ["sampler=ddim, steps=3", "sampler=ddim, steps=5", "sampler=euler, steps=3", "sampler=euler, steps=5"]
    assert [row["label"] for row in report["rows"]] == labels
    assert [(r["sampler"], r["steps"], r["evaluations"]) for r in report["rows"]] == [
        ("ddim", 3, 12), ("ddim", 5, 20), ("euler", 3, 12), ("euler", 5, 20),
    ]  # fmt: skip
    assert (report["prompts"], report["seeds"]) == ([PROMPT] * 2, [3, 4])
    assert all(label in err for label in labels)
    run(*flags, "--sampler", "euler", "--steps", "3", "-o", "alone-{seed}.png")
    with Image.open(tmp_path / "s-sweep.png") as sheet:
        assert sheet.height == 4 * 34 - 2
        left = sheet.width - 2 * 34
        for k in range(2):
            with Image.open(tmp_path / f"alone-{3 + k}.png") as alone:
                cut = sheet.crop((left + 34 * k, 68, left + 34 * k + 32, 100))
                assert np.array_equal(np.asarray(cut), np.asarray(alone))
        assert np.asarray(sheet.convert("L"))[:, :left].min() < 100  # letters


def test_an_unknown_seed_is_the_same_for_all_rows(run: Callable[..., Any], tmp_path: Path) -> None:
    code, out, _ = run("-p", PROMPT, "--sweep", "sampler.eta=0,0.0", "--sampler", "ddim", "-o", "s.png", "--quiet")
    assert (code, out) == (0, "s-sweep.png\ns-sweep.json\n")
    with Image.open(tmp_path / "s-sweep.png") as sheet:
        a, b = (np.asarray(sheet.crop((sheet.width - 34, y, sheet.width - 2, y + 32))) for y in (0, 34))
    assert np.array_equal(a, b)
    assert a.std() > 0


def base(**more: Any) -> dict[str, Any]:
    return {"sampler": "ddim", "spacing": None, "sampler_set": {}, "spacing_set": {}, **more}


def test_combinations_change_the_last_field_fastest_and_leave_the_rest() -> None:
    given = base(steps=9, seed=4)
    runs = list(Looking(sweep=("guidance_scale=1,3", "sampler.eta=0,1")).runs(given))
    assert [label for label, _ in runs][:2] == ["guidance_scale=1, sampler.eta=0", "guidance_scale=1, sampler.eta=1"]
    assert [(r["guidance_scale"], r["sampler_set"], r["steps"]) for _, r in runs] == [
        (1.0, {"eta": "0"}, 9), (1.0, {"eta": "1"}, 9), (3.0, {"eta": "0"}, 9), (3.0, {"eta": "1"}, 9),
    ]  # fmt: skip
    assert given == base(steps=9, seed=4)


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        (("steps=",), "not of the form"),
        (("steps=1,,2",), "not of the form"),
        (("prompt=a,b",), "is not a field to sweep"),
        (("steps=1", "steps=2"), "steps stands twice"),
        (("steps=" + ",".join(map(str, range(1, 300))),), "asks for 299 runs"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(sweep: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Looking(sweep=sweep)


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        (("sampler=ddim,eular",), "did you mean 'euler'"),
        (("sampler.etta=1",), "did you mean 'eta'"),
        (("guidance_scale=nan",), "guidance_scale"),
        (("sampler=euler,ddim", "sampler.eta=1"), "is not a field of sampler euler"),
    ],
)
def test_values_are_checked_before_anything_runs(sweep: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        list(Looking(sweep=sweep).runs(base()))


@pytest.mark.parametrize(
    "fields", [{"record": "r.bin"}, {"preview": "p.bmp"}, {"record": "a\0.safetensors"}, {"record": "no/../r"}]
)
def test_names_that_cannot_be_written_are_refused(fields: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"--(record|preview)"):
        Looking(**fields)  # type: ignore[arg-type]


def test_the_doctor_compares_with_fp32(tiny: Tiny) -> None:
    asked: list[tuple[str, str]] = []

    def open_in(dtype: str, attention: str) -> Pipeline:
        asked.append((dtype, attention))
        if dtype == "fp16":
            raise EnvironmentFault("no fp16 here")
        if attention == "xformers":
            raise RuntimeError("no\nkernel")
        return Pipeline.from_pretrained(str(tiny("eps")), "cpu", dtype, attention)

    found = list(doctor.examine(open_in, True, steps=3))
    assert asked == [*doctor.WAYS, *doctor.ON_CUDA] == [(f.dtype, f.attention) for f in found]
    assert (found[0].dtype, found[0].attention, found[0].mean, found[0].most) == ("fp32", "sdpa", 0.0, 0)
    assert max(found[1].most, found[2].most) <= 1  # the same in other sums
    assert 0 < found[3].mean < 60
    assert found[3].seconds > 0
    assert [f.fault for f in found if f.fault] == ["no fp16 here"] * 3 + ["no kernel"]
    assert verdict(found).startswith("verdict: ")


def test_the_verdict_is_the_fastest_that_looks_the_same() -> None:
    slow, fast = Finding("fp32", "sdpa", 1.0), Finding("bf16", "sdpa", 0.25, 0.8, 9)
    assert "--dtype bf16 is 4.0 times as fast as fp32; the mean difference is 0.80" in verdict([slow, fast])
    assert "is as fast as anything" in verdict([slow, Finding("bf16", "sdpa", 0.25, 30.0, 200)])
    assert "--dtype fp32 --attention math is 2.0 times" in verdict([slow, Finding("fp32", "math", 0.5)])
    assert "is as fast as anything" in verdict([slow, Finding("bf16", "sdpa", 0.97, 0.1)])
    assert verdict([Finding("fp32", "sdpa", fault="broken")]) == "fp32 cannot be run here: broken"
    assert "cannot be run: broken" in str(Finding("fp32", "sdpa", fault="broken"))


def test_the_doctor_speaks_json(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "WAYS", (("fp32", "sdpa"), ("bf16", "sdpa")))
    code, out, _ = run("--doctor", "--json")
    assert code == 0
    assert [f["dtype"] for f in json.loads(out)["findings"]] == ["fp32", "bf16"]
    assert run("--doctor")[1].count("\n") == 3
