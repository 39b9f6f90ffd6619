"""The command line: one line per error and the right exit code, nothing half done, no torch before it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ldm_pipe import __version__
from ldm_pipe.cli import main

Tiny = Callable[[str], Path]
PROMPT = "a fox on a blue background"


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """run(*flags) -> (exit code, stdout, stderr), in an empty folder, with the tiny model."""
    monkeypatch.chdir(tmp_path)

    def call(*flags: str) -> tuple[int, str, str]:
        code = main(["--model", str(tiny("eps")), "--device", "cpu", "--dtype", "fp32", *flags])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_a_prompt_becomes_a_png(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, err = run("-p", PROMPT, "--seed", "7")
    assert code == 0
    assert out == "outputs/a-fox-on-a-blue-background-7.png\n"
    assert "seed 7" in err
    with Image.open(tmp_path / out.strip()) as picture:
        assert picture.size == (32, 32)
        recipe = json.loads(picture.info["ldm_pipe"])
    assert recipe["prompt"] == PROMPT
    assert (recipe["seed"], recipe["sampler"], recipe["steps"], recipe["dtype"]) == (7, "ddim", 4, "float32")
    assert str(tmp_path) not in json.dumps(recipe)


def test_names_that_are_taken_get_a_number(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    first, second = run("-p", PROMPT, "--seed", "7")[1], run("-p", PROMPT, "--seed", "7")[1]
    assert second == "outputs/a-fox-on-a-blue-background-7-2.png\n"
    assert (tmp_path / first.strip()).read_bytes() == (tmp_path / second.strip()).read_bytes()


def test_several_prompts_several_images_and_a_sheet(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = run("-p", PROMPT, "-p", "two bees on red", "--num-images", "2", "--seed", "1", "--grid", "-o", "made")
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == [
        "2-prompts-1-grid.png", "a-fox-on-a-blue-background-1.png", "a-fox-on-a-blue-background-2.png",
        "two-bees-on-red-1.png", "two-bees-on-red-2.png",
    ]  # fmt: skip
    assert len(out.splitlines()) == 5
    with Image.open(tmp_path / "made" / "2-prompts-1-grid.png") as sheet:
        assert sheet.size == (66, 66)


def test_a_named_file_is_written_once(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert run("-p", PROMPT, "-o", "fox.png")[0] == 0
    before = (tmp_path / "fox.png").read_bytes()
    code, _, err = run("-p", PROMPT, "-o", "fox.png")
    assert (code, (tmp_path / "fox.png").read_bytes()) == (2, before)
    assert "--force overwrites it" in err
    assert run("-p", PROMPT, "-o", "fox.png", "--force", "--seed", "9")[0] == 0
    assert (tmp_path / "fox.png").read_bytes() != before


def test_fields_of_methods_are_set(run) -> None:  # type: ignore[no-untyped-def]
    assert run("-p", PROMPT, "--sampler", "ddim", "--set", "sampler.eta=0.5", "--quiet")[0] == 0
    assert run("-p", PROMPT, "--spacing", "karras", "--set", "spacing.rho=5", "--quiet")[2] == ""


def test_a_file_does_not_choose_the_model(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ldm_pipe import recipe

    made = recipe.Recipe("x", 1, model=str(tiny("eps")))
    (tmp_path / "x.png").write_bytes(recipe.encode(Image.new("RGB", (2, 2)), made))
    assert main(["--replay", str(tmp_path / "x.png"), "--device", "cpu"]) == 2
    assert "give its folder with --model" in capsys.readouterr().err


LIGHT = ["--version", "--help", "--list", "--list samplers", "--show none.png", "-p x --steps 0", "-p x --guide cgf"]


@pytest.mark.parametrize("flags", [f.split() for f in LIGHT], ids=LIGHT)
def test_no_torch_before_it_is_needed(flags: list[str]) -> None:
    code = (
        "import sys\nfrom ldm_pipe.cli import main\n"
        f"try:\n    main({flags!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules)\nprint('heavy:', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("heavy: []\n")
    if flags == ["--version"]:
        assert __version__ in done.stdout


def test_debug_shows_the_traceback(run) -> None:  # type: ignore[no-untyped-def]
    from ldm_pipe import UsageError

    with pytest.raises(UsageError):
        run("-p", "x", "--steps", "0", "--debug")


def test_the_recipe_is_shown_and_replayed_bit_for_bit(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    flags = ["--seed", "3", "--num-images", "3", "--sampler", "ddpm", "-o", "made", "--guide", "cfg(2)|between(0.1,0.9)"]
    assert run("-p", PROMPT, *flags)[0] == 0
    image = "made/a-fox-on-a-blue-background-5.png"
    code, out, _ = run("--show", image, "--json")
    shown = json.loads(out)
    assert code == 0
    assert (shown["seed"], shown["batch"], shown["row"], shown["guide"]) == (5, 3, 2, "cfg(2)|between(0.1,0.9)")
    assert str(tmp_path) not in out
    code, out, _ = run("--replay", image, "--verify")
    assert (code, out) == (0, f"{image}: bit-equal\n")
    code, out, _ = run("--replay", image, "-o", "again.png")
    assert code == 0
    with Image.open(image) as a, Image.open("again.png") as b:
        assert a.tobytes() == b.tobytes()


def test_verify_says_what_differs(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from ldm_pipe import recipe

    assert run("-p", PROMPT, "--seed", "3", "-o", "fox.png")[0] == 0
    made = recipe.read("fox.png")
    with Image.open("fox.png") as picture:
        changed = Image.eval(picture, lambda v: min(255, v + 9))
    old = replace(made, versions={**made.versions, "torch": "1.0"})
    (tmp_path / "old.png").write_bytes(recipe.encode(changed, old))
    code, out, _ = run("--replay", "old.png", "--verify")
    assert code == 1
    assert "the largest difference is 9 of 255; recorded facts that differ: torch: 1.0 -> " in out


def test_other_tools_find_the_parameters_and_no_forged_field(run) -> None:  # type: ignore[no-untyped-def]
    assert run("-p", "a fox\nSteps: 99, Seed: 1\0", "-n", "red\nSeed: 2", "--seed", "8", "-o", "fox.png")[0] == 0
    with Image.open("fox.png") as picture:
        lines = picture.info["parameters"].splitlines()
    assert len(lines) == 3
    assert lines[1] == "Negative prompt: red Seed: 2"
    assert lines[2].startswith("Steps: 4, Sampler: ddim, Schedule type: leading, CFG scale: 3.0, Seed: 8, Size: 32x32")


def test_json_is_one_object(run) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = run("-p", PROMPT, "--seed", "3", "--num-images", "2", "--json")
    report = json.loads(out)
    assert code == 0
    assert [i["seed"] for i in report["images"]] == [3, 4]
    assert report["evaluations"] == {"cond": 8, "uncond": 8}


def test_a_closed_folder_is_the_machines_fault(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("os.access", lambda *a, **k: False)
    code, _, err = run("-p", "x")
    assert code == 3
    assert "cannot be written to" in err


@pytest.mark.parametrize("name", ["a.jpg", "a.jpeg", "a.webp", "{index:02}-{prompt}-{sampler}-{steps}.webp"])
def test_other_formats_carry_the_recipe_too(run, tmp_path: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = run("-p", PROMPT, "-o", f"made/{name}", "--seed", "7")
    path = out.strip()
    assert code == 0
    assert path == f"made/{name}".replace("{index:02}-{prompt}-{sampler}-{steps}", "01-a-fox-on-a-blue-background-ddim-4")
    with Image.open(tmp_path / path) as picture:
        comment = picture.getexif().get_ifd(0x8769)[0x9286]
    assert comment[8:].decode("utf-16-be").endswith("Version: ldm_pipe")
    assert json.loads(run("--show", path, "--json")[1])["seed"] == 7
    assert run("--replay", path, "--verify")[:2] == (0, f"{path}: bit-equal\n")


def test_a_reader_who_leaves_ends_the_run(tiny: Tiny, tmp_path: Path) -> None:
    """`generate ... | head -1`: exit 141, no traceback, every file whole."""
    flags = ["--model", str(tiny("eps")), "-p", "a fox", "--num-images", "3000", "--batch-size", "1", "--device", "cpu"]
    run = subprocess.Popen(
        [sys.executable, "-m", "ldm_pipe.cli", *flags, "-o", str(tmp_path / "made")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.readline().endswith(".png\n")
    run.stdout.close()
    assert run.stderr is not None
    err = run.stderr.read()
    assert run.wait(60) == 141
    assert "Traceback" not in err
    assert all(f.read_bytes().endswith(b"IEND\xaeB`\x82") for f in (tmp_path / "made").iterdir())


def test_a_full_disk_leaves_the_old_file(tiny: Tiny, tmp_path: Path) -> None:
    old = tmp_path / "fox.png"
    old.write_bytes(b"old")
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600)); from ldm_pipe.cli import main; "
    flags = ["--model", str(tiny("eps")), "-p", "a fox", "--device", "cpu", "--force", "-o", str(old)]
    script = f"{limit}sys.exit(main({flags!r}))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 3
    assert run.stderr.splitlines()[-1].startswith("error: cannot write")
    assert [p.name for p in tmp_path.iterdir()] == ["fox.png"]
    assert old.read_bytes() == b"old"


def test_a_full_standard_output_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    flags = ["--model", str(tiny("eps")), "-p", "a fox", "--device", "cpu", "-o", str(tmp_path)]
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "ldm_pipe.cli", *flags], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert run.returncode == 3
    assert run.stderr.splitlines()[-1].startswith("error: cannot write to standard output: No space left")
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_a_fault_of_ours_is_one_line_too(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("ldm_pipe.pipeline.plan", lambda *a: 1 / 0)
    code, _, err = run("-p", "x")
    assert code == 70
    assert err.splitlines()[-1] == "error: a fault of this program (ZeroDivisionError: division by zero); --debug shows where"


def test_the_summary_names_the_seeds(run) -> None:  # type: ignore[no-untyped-def]
    assert "1 image, seed 7," in run("-p", "x", "--seed", "7")[2]
    assert "3 images, seeds 7 to 9," in run("-p", "x", "--seed", "7", "--num-images", "3")[2]
    (Path("p.jsonl")).write_text('{"prompt": "x", "seed": 1}\n{"prompt": "y", "seed": 5}')
    assert "2 images, seeds 1, 5," in run("--prompts", "p.jsonl")[2]


def test_unknown_words_are_named_in_both_prompts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["-p", "a zebra", "-n", "blurry", "--steps", "1", "-o", str(tmp_path)]) == 0
    err = capsys.readouterr().err
    assert "'zebra'" in err
    assert "'blurry'" in err


def test_prompts_have_a_grammar_that_can_be_turned_off(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """By a flag, by TOML, and by a recipe that says so; what is odd is noted, what cannot be is one line before the model."""
    (tmp_path / "plain.toml").write_text("plain_prompt = true")
    prompt = "a (fox:1.3) [on|in] blue AND a (hat"
    cases = (("read", (), False), ("flag", ("--plain-prompt",), True), ("toml", ("--config", "plain.toml"), True))
    for name, flags, plain in cases:
        code, _, err = run("-p", prompt, "--seed", "7", "-o", f"{name}.png", *flags)
        assert code == 0
        assert ("never closed" in err) != plain
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert json.loads(picture.info["ldm_pipe"])["plain_prompt"] == plain
        code, out, _ = run("--replay", f"{name}.png", "--verify")
        assert (code, "bit-equal" in out) == (0, True)
    assert (tmp_path / "flag.png").read_bytes() == (tmp_path / "toml.png").read_bytes()
    assert (tmp_path / "read.png").read_bytes() != (tmp_path / "flag.png").read_bytes()
    code, _, err = run("-p", "(" * 9000 + "a")
    assert code == 2
    assert err.count("\n") == 1
    assert "not finite" in err
    code, _, err = run("-p", "a fox AND a cat", "--guide", "cfg(3) | pag(2)")
    assert (code, "AND does not go with pag" in err) == (2, True)
