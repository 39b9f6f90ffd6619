"""Requests: flags win over a file, prompts come from files and standard input, every fault names its place."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldm_pipe import UsageError
from ldm_pipe.cli import main
from ldm_pipe.request import Request

Tiny = Callable[[str], Path]


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('prompt = "a fox"\nsteps = 7\nnum-images = 2\nset = ["sampler.eta=0.5"]\nsampler = "ddim"\n')
    request = Request.of({"config": str(file), "steps": 9})
    assert (request.prompt, request.steps, request.num_images, request.sampler) == (("a fox",), 9, 2, "ddim")
    assert request.settings(None)["sampler_set"] == {"eta": "0.5"}
    assert Request.of({}) == Request()


def test_prompts_come_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffa fox\n\n  two bees \r\n".encode())
    (tmp_path / "p.jsonl").write_text('{"prompt": "a fox", "seed": 3}\n\n{"prompt": "bees", "seed": 5}\n')
    assert Request(prompt=("a cat",), prompts=str(tmp_path / "p.txt")).texts() == (("a cat", "a fox", "two bees"), None)
    assert Request(prompts=str(tmp_path / "p.jsonl")).texts() == (("a fox", "bees"), (3, 5))
    monkeypatch.setattr("sys.stdin", io.StringIO("a fox\n"))
    assert Request(prompt=("-",)).texts() == (("a fox",), None)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.toml", 'stepz = 3', "did you mean 'steps'"),
        ("c.toml", 'steps = "many"', "it takes a whole number"),
        ("c.toml", "steps = nan", "it takes a whole number"),
        ("c.toml", "grid = 1", "it takes true or false"),
        ("c.toml", "prompt = 3", "it takes a list|takes a list"),
        ("c.toml", "steps = ", "is not TOML"),
        ("c.toml", b"\xff\xfe", "is not UTF-8"),
        ("p.jsonl", "{", "p.jsonl:1: not JSON"),
        ("p.jsonl", '{"prompt": "x"}\n[1]', "p.jsonl:2: a line is"),
        ("p.jsonl", '{"prompt": "x", "seeds": 1}', "did you mean 'seed'"),
        ("p.jsonl", '{"prompt": "x", "seed": "y"}', "p.jsonl:1: seed"),
        ("p.jsonl", '{"prompt": "x", "seed": 1}\n{"prompt": "y"}', "every prompt a seed, or none"),
        ("p.jsonl", "", "holds no prompt"),
        ("none.txt", None, "cannot be read"),
    ],
)  # fmt: skip
def test_faults_name_their_place(tmp_path: Path, name: str, content: str | bytes | None, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def read() -> Any:
        flag = "config" if name.endswith("toml") else "prompts"
        return Request.of({flag: str(path)}).texts()

    with pytest.raises(UsageError, match=words):
        read()


def test_a_run_from_a_file_writes_its_images(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a fox", "seed": 3}\n{"prompt": "two bees", "seed": 5}\n')
    (tmp_path / "run.toml").write_text(
        f'model = "{tiny("eps")}"\nprompts = "{tmp_path / "p.jsonl"}"\noutput = "{tmp_path / "made"}"\nbatch-size = 1\n'
    )
    assert main(["--config", str(tmp_path / "run.toml"), "--quiet", "--device", "cpu"]) == 0
    assert [Path(p).name for p in capsys.readouterr().out.split()] == ["a-fox-3.png", "two-bees-5.png"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_what_is_finished(tiny: Tiny, tmp_path: Path, number: int, code: int) -> None:
    """Thousands of one-image batches; the signal comes once the first is written."""
    flags = ["--model", str(tiny("eps")), "-p", "a fox", "--num-images", "5000", "--batch-size", "1", "--device", "cpu"]
    run = subprocess.Popen(
        [sys.executable, "-m", "ldm_pipe.cli", *flags, "-o", str(tmp_path / "made")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in the background
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.readline().endswith(".png\n")
    began = time.monotonic()
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == code
    assert time.monotonic() - began < 10
    assert err.splitlines()[-1].startswith("error: interrupted")
    assert "Traceback" not in err
    files = list((tmp_path / "made").iterdir())
    assert len(files) >= 1 + len(out.splitlines())
    assert all(f.suffix == ".png" and f.read_bytes().endswith(b"IEND\xaeB`\x82") for f in files)
