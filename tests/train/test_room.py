"""Memory that runs out in a step: one line that says what fits, found by trying."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_pipe.errors import EnvironmentFault
from train.job import Batch
from train.loop import run


class Greedy(nn.Module):
    """A network that has room for so many samples, and counts what it was given."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.weight, self.most, self.given = nn.Parameter(torch.ones(1)), most, list[int]()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.given.append(len(batch["x"]))
        if len(batch["x"]) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"loss": (self.weight * batch["x"]).square().mean()}


class Task:
    def __init__(self, most: int) -> None:
        self.made = Greedy(most)

    def grouped(self, size: int) -> Task:
        return self

    def facts(self) -> dict[str, str]:
        return {}

    def net(self) -> nn.Module:
        return self.made

    def batch(self, seed: int, ids: Any) -> Batch:
        return {"x": torch.ones(len(ids), 1), "names": [str(i) for i in ids]}

    def validate(self, net: Any, folder: Path) -> dict[str, float]:
        return {}

    def export(self, net: Any, folder: Path) -> None:
        (folder / "done").write_text("")


@pytest.mark.parametrize(
    ("most", "changes", "given", "said"),
    [
        (3, {}, [12, 6, 4, 3], "12 sample(s) at a time; job.accumulate = 4 fits"),
        (2, {}, [12, 6, 4, 3, 2], "12 sample(s) at a time; job.accumulate = 6 fits"),  # five would not divide twelve
        (3, {"accumulate": 2}, [6, 4, 3], "6 sample(s) at a time; job.accumulate = 4 fits"),
        (0, {}, [12, 6, 4, 3, 2, 1], "and of one sample too; task.gradient_checkpointing = true"),
        (0, {"accumulate": 12}, [1], "1 sample(s) at a time; task.gradient_checkpointing = true"),
    ],
)
def test_what_fits_is_tried_and_said(
    tmp_path: Path, job: Any, most: int, changes: dict[str, Any], given: list[int], said: str
) -> None:
    task = Task(most)
    with pytest.raises(EnvironmentFault) as fault:
        run(task, job(tmp_path / "run", batch=12, **changes))
    assert said in str(fault.value)
    assert str(fault.value).startswith("memory ran out in step 1")
    tried = [n for k, n in enumerate(task.made.given) if k == 0 or n != task.made.given[k - 1]]
    assert tried == given
    if most:
        fits = int(said.split("accumulate = ")[1].split()[0])
        run(task, job(tmp_path / "run", batch=12, accumulate=fits), allow_changed=True)
        assert (tmp_path / "run" / "export" / "done").exists()


def test_another_error_stays_what_it_is(tmp_path: Path, job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(batch: Any) -> Any:
        raise RuntimeError("something else")

    task = Task(9)
    monkeypatch.setattr(task.made, "forward", broken)
    with pytest.raises(RuntimeError, match="something else"):
        run(task, job(tmp_path / "run"))
