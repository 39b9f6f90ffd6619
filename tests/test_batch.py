"""Long lists of prompts: the same pictures on any number of processes, and after any number of stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm_pipe import Pipeline
from ldm_pipe.batch import Batch, main, run
from ldm_pipe.errors import UsageError
from ldm_pipe.settings import Settings

ROWS = tuple((f"a fox {i}" if i % 2 else "an owl", 10 + i) for i in range(7))


@pytest.fixture(scope="module")
def pipe(tiny: Callable[[str], Path]) -> Pipeline:
    return Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")


def job(folder: Path, **changes: Any) -> Batch:
    return replace(Batch(ROWS, folder, Settings(steps=2), shard=3), **changes)


def digests(folder: Path) -> list[str]:
    return [json.loads(line)["sha256"] for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_one_process_or_three_make_the_same_pictures(pipe: Pipeline, tmp_path: Path) -> None:
    assert run(job(tmp_path / "one"), pipe)
    merged = [run(job(tmp_path / "three"), pipe, rank, 3) for rank in (1, 0, 2)]
    assert [m is not None for m in merged] == [False, False, True]
    assert digests(tmp_path / "one") == digests(tmp_path / "three")
    rows = [json.loads(x) for x in (tmp_path / "one" / "manifest.jsonl").read_text().splitlines()]
    assert [(r["text"], r["seed"]) for r in rows] == list(ROWS)
    assert all((tmp_path / "one" / r["file_name"]).is_file() for r in rows)
    assert len(set(digests(tmp_path / "one"))) == 7


def test_a_row_has_its_own_seed(pipe: Pipeline, tmp_path: Path) -> None:
    run(job(tmp_path / "all"), pipe)
    alone = pipe(ROWS[4][0], seed=ROWS[4][1], steps=2).images[0]
    from PIL import Image, ImageChops

    with Image.open(tmp_path / "all" / "shard-00001" / "00000004.png") as found:
        assert max(high for _, high in ImageChops.difference(found, alone).getextrema()) <= 1


def test_a_stopped_job_makes_only_what_is_missing(pipe: Pipeline, tmp_path: Path) -> None:
    whole = job(tmp_path / "whole")
    run(whole, pipe)
    stopped = job(tmp_path / "stopped")

    def fails(*args: Any, **more: Any) -> Any:
        fails.calls += 1  # type: ignore[attr-defined]
        if fails.calls == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return pipe(*args, **more)

    fails.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        run(stopped, fails)
    assert stopped.missing() == [1, 2]
    assert not (tmp_path / "stopped" / "manifest.jsonl").exists()
    assert run(stopped, fails)
    assert fails.calls == 4  # type: ignore[attr-defined]
    assert digests(tmp_path / "whole") == digests(tmp_path / "stopped")


def test_another_job_is_kept_out_of_the_folder(pipe: Pipeline, tmp_path: Path) -> None:
    run(job(tmp_path), pipe)
    for change, word in [({"rows": ROWS[:6]}, "rows"), ({"shard": 4}, "shard"), ({"settings": Settings(steps=3)}, "settings")]:
        with pytest.raises(UsageError, match=f"begun with other {word}"):
            run(job(tmp_path, **change), pipe)


def test_the_command_line(tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a fox"}\n{"prompt": "an owl", "seed": 99}\n')
    words = [str(prompts), "-o", str(tmp_path / "out"), "--model", str(tiny("eps")), "--set", "steps=2", "--device", "cpu"]
    assert main([*words, "--seed", "5"]) == 0
    assert "2 pictures, listed in" in capsys.readouterr().out
    rows = [json.loads(x) for x in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [r["seed"] for r in rows] == [5, 99]
    assert main([*words, "--seed", "6"]) == 2
    assert main([*words, "--set", "stepz=2"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
    assert main([*words, "--set", "seed=2"]) == 2
    prompts.write_text("\n")
    assert main(words) == 2
