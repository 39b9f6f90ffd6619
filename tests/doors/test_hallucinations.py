"""`--filter-hallucinations`: of the images drawn those are kept that waver least, each of them the one it would be alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm_pipe import Pipeline, UsageError, recipe
from ldm_pipe.analysis.hallucination import scores
from ldm_pipe.cli import main
from ldm_pipe.doors.hallucinations import Filter
from ldm_pipe.level import Level
from ldm_pipe.walk import Step

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def pipe(tiny: Tiny) -> Pipeline:
    return Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")


@pytest.mark.parametrize("batch", [2, 4, 16])
def test_the_lowest_scores_are_kept(pipe: Pipeline, batch: int) -> None:
    """Of two prompts of four, whatever the batches; by scores of runs of one; in the order of the seeds."""
    keep, model = Filter(0.5), pipe.bundle.model
    whole = keep.applied(model, pipe.plan(["a fox", "two bees"], seed=3, num_images=4, steps=4, batch_size=batch))
    assert [float(level.u) for level in whole.levels] == sorted((float(level.u) for level in whole.levels), reverse=True)
    below, found = float(model.path.level(9).u), list(keep.run(pipe, whole))
    assert sum(float(level.u) <= below for level in whole.levels[:-1]) == 10
    for k, out in enumerate(found):
        alone = []
        for row in range(4 * k, 4 * k + 4):
            steps: list[Step] = []
            last = next(pipe.run(whole.batch(row, 1), steps.append))
            alone.append((float(scores(steps, below)), last))
        best = sorted(sorted(range(4), key=lambda j: alone[j][0])[:2])
        assert list(out.seeds) == [3 + j for j in best]
        assert out.prompts == (("a fox", "two bees")[k],) * 2
        assert len(out.images) == 2
        expected = torch.cat([alone[j][1].latents for j in best])
        torch.testing.assert_close(out.latents, expected, rtol=1e-3, atol=1e-3)
        dropped = ", ".join(str(3 + j) for j in range(4) if j not in best)
        assert any(f"the seeds {dropped} waver" in note for note in out.notices)
    assert sum(out.evaluations["cond"] for out in found) == 8 * (len(whole.levels) - 1)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 0.96, 1.0])
def test_as_many_are_written_as_are_wanted(share: float) -> None:
    for wanted in range(1, 40):
        drawn = Filter(share).drawn(wanted)
        assert int(drawn * share + 1e-9) == wanted
        assert int((drawn - 1) * share + 1e-9) < wanted


def test_no_filter_is_the_run_itself(pipe: Pipeline) -> None:
    whole = pipe.plan("a fox", seed=3, num_images=2, steps=3)
    assert Filter().applied(pipe.bundle.model, whole) is whole
    out = next(Filter().run(pipe, whole))
    assert torch.equal(out.latents, next(pipe.run(whole)).latents)


def test_what_it_cannot_do_is_told(pipe: Pipeline) -> None:
    whole = pipe.plan("a fox", seed=3, steps=4)
    travelling = replace(whole, sampler=type("Restless", (), {"travels": True})())
    with pytest.raises(UsageError, match="Restless, which goes back and forth"):
        Filter(0.5).applied(pipe.bundle.model, travelling)
    for share in (0.0, 1.5):
        with pytest.raises(UsageError, match="above 0, at most 1"):
            Filter(share)
    assert Level(1.0, 0.0) == whole.levels[-1]


def test_from_the_command_line_and_back(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two images are written of four drawn, with a note; the recipe says so, and makes each of them again."""
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(tiny("eps")), "--dtype", "fp32"]
    ask = ["-p", "a fox", "-p", "two bees", "--seed", "3", "--num-images", "2", "--filter-hallucinations", "0.5", "-o", "out"]
    assert main([*ask, "--json", *model]) == 0
    told = capsys.readouterr()
    paths = [row["path"] for row in json.loads(told.out)["images"]]
    assert len(paths) == 4
    assert "2 of 4 images of 'a fox' are kept; those of the seeds" in told.err
    assert recipe.read(paths[3]).filtered == {"share": 0.5}
    for path in paths[1:3]:
        assert main(["--replay", path, "--verify", *model]) == 0
        assert capsys.readouterr().out == f"{path}: bit-equal\n"
    assert main([*ask, "--hires", "2x", *model]) == 2
    assert "goes with a prompt alone" in capsys.readouterr().err
    assert main(["-p", "a fox", "--filter-hallucinations", "2", *model]) == 2
    assert "at most 1" in capsys.readouterr().err
