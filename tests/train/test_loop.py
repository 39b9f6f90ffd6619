"""The training loop: stopping anywhere and resuming is the same run, a broken checkpoint is named and skipped."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm_pipe.errors import EnvironmentFault, LdmError, NumericalError, UsageError
from train.__main__ import main
from train.batches import parts_of
from train.checkpoint import Keeper, check_space, fault_of, tidy
from train.ema import Ema
from train.job import Job, Task, ids_of
from train.loop import run
from train.recipe import faults, read
from train.safety import Stopped, only_run

ROOT = Path(__file__).resolve().parents[2]


class Line(nn.Module):
    """Least squares."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        each = (self.layer(batch["x"]) - batch["y"]).square().mean(1)
        return {"loss": each.mean(), "each": each.detach(), "u": batch["x"][:, 0] * 0 + 0.25}


@dataclass(frozen=True)
class Fit(Task):
    """A task that takes milliseconds. poison: samples whose target is not finite; signal: sent with a sample's batch."""

    poison: tuple[int, ...] = ()
    signal: int = -1
    slope: float = 1.0
    fail: int = -1

    def net(self) -> nn.Module:
        return Line()

    def batch(self, seed: int, ids: Sequence[int]) -> dict[str, Any]:
        if self.signal in ids:
            os.kill(os.getpid(), signal.SIGINT)
        if self.fail in ids:
            raise UsageError("'photos/7.png' cannot be read")
        x = torch.from_numpy(np.stack([np.random.default_rng([seed, i]).standard_normal(3) for i in ids])).float()
        y = x.sum(1, keepdim=True) * self.slope
        for i in set(self.poison) & set(ids):
            y[list(ids).index(i)] = float("inf")
        return {"x": x, "y": y}

    def export(self, net: Any, folder: Path) -> None:
        (folder / "weights.json").write_text(json.dumps(net.layer.weight.tolist()))


def job(folder: Path, **changes: Any) -> Job:
    start = Job(output=str(folder), steps=12, batch=4, lr=0.1, warmup=2, save_every=3, log_every=1, keep=9)
    return replace(start, **changes)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> Any:
    return json.loads((folder / "export" / "weights.json").read_text())


def tensors(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run without a stop, for each accumulation."""
    folders = {n: tmp_path_factory.mktemp(f"straight{n}") for n in (1, 4)}
    for n, folder in folders.items():
        run(Fit(), job(folder, accumulate=n))
    return folders


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("stops", [(1,), (4,), (6,), (11,), (2, 5, 9)])
def test_resuming_is_bit_identical(
    tmp_path: Path, straight: dict[int, Path], stops: tuple[int, ...], accumulate: int, workers: int
) -> None:
    for stop in (*stops, 0):
        run(Fit(), job(tmp_path, stop=stop, accumulate=accumulate, workers=workers))
    assert weights(straight[accumulate]) == weights(tmp_path)
    assert losses(straight[accumulate]) == losses(tmp_path)
    last = "step-000012"
    assert tensors(straight[accumulate] / last) == tensors(tmp_path / last)  # weights, average and moments


def test_lines_of_the_log_are_those_of_a_straight_run(tmp_path: Path) -> None:
    run(Fit(), job(tmp_path / "a", log_every=5))
    for stop in (3, 7, 0):
        run(Fit(), job(tmp_path / "b", log_every=5, stop=stop))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert len(losses(tmp_path / "a")) == 2


def test_lines_of_steps_that_are_trained_again_go(tmp_path: Path) -> None:
    run(Fit(), job(tmp_path, stop=4))
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as file:  # a kill after step 5, amid a line
        file.write('{"step": 5, "loss": 9.0}\n{"step": 6, "lo')
    run(Fit(), job(tmp_path))
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))
    assert 9.0 not in losses(tmp_path)


def test_parts_of_a_batch_are_the_same_step_to_rounding(straight: dict[int, Path]) -> None:
    ids, whole = range(8), Fit().batch(0, range(8))
    parts = parts_of({**whole, "names": [str(i) for i in ids], "scale": 2.0}, 4)
    assert [p["names"] for p in parts] == [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"]]
    assert torch.equal(torch.cat([p["x"] for p in parts]), whole["x"])
    assert {p["scale"] for p in parts} == {2.0}
    assert np.allclose(weights(straight[1]), weights(straight[4]), rtol=1e-5)


def test_it_learns(tmp_path: Path) -> None:
    run(Fit(), job(tmp_path, steps=200, ema=0.9))
    assert np.allclose(weights(tmp_path), 1, atol=0.02)


@pytest.mark.parametrize("damage", ["truncate", "manifest", "empty", "missing", "newer"])
def test_a_broken_checkpoint_is_named_skipped_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], straight: dict[int, Path], damage: str
) -> None:
    run(Fit(), job(tmp_path, stop=6))
    newest = tmp_path / "step-000006"
    if damage == "truncate":
        (newest / "weights.safetensors").write_bytes((newest / "weights.safetensors").read_bytes()[:-1])
    elif damage == "manifest":
        (newest / "manifest.json").unlink()
    elif damage == "missing":
        (newest / "ema.safetensors").unlink()
    else:
        (newest / "manifest.json").write_text("" if damage == "empty" else '{"format": 99}')
    run(Fit(), job(tmp_path))
    said = capsys.readouterr().out
    assert "skipping step-000006" in said
    assert damage != "newer" or "format 99, this version reads 1 and 2" in said
    assert "resuming after step 3" in said
    assert (tmp_path / "step-000006.broken1").exists()
    assert weights(tmp_path) == weights(straight[1])


def test_old_checkpoints_go_only_after_the_new_one_is_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(Fit(), job(tmp_path, stop=3, keep=1))
    monkeypatch.setattr("train.checkpoint.fault_of", lambda folder: "bad" if folder.name == "step-000006" else "")
    with pytest.raises(EnvironmentFault, match="cannot be read back: bad"):
        run(Fit(), job(tmp_path, keep=1))
    assert (tmp_path / "step-000003" / "manifest.json").exists()
    monkeypatch.undo()
    run(Fit(), job(tmp_path, keep=1))
    assert [f.name for f in sorted(tmp_path.glob("step-*"))] == ["step-000012"]


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path: Path) -> None:
    child = (
        "import resource, sys; sys.path.insert(0, '.'); from pathlib import Path\n"
        "import torch, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from scripts.train_kills import ToyTask, job; from train.loop import run; from dataclasses import replace\n"
        "folder = Path(sys.argv[1]); run(ToyTask(), replace(job(folder, 9), stop=2))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: run(ToyTask(), job(folder, 9))\n"
        "except Exception as error: print(type(error).__name__, str(error))\n"
    )
    out = subprocess.run([sys.executable, "-c", child, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "EnvironmentFault cannot write" in out.stdout, out.stderr
    assert not fault_of(tmp_path / "step-000002")
    assert not list(tmp_path.glob(".ldm*"))


def test_the_disk_is_looked_at_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Line()
    check_space(tmp_path, net, 2)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 4 * 4 * 4 * 3 - 1}))
    with pytest.raises(EnvironmentFault, match="3 checkpoints take"):
        check_space(tmp_path, net, 2)


# --- what is not finite


def test_one_step_that_is_not_finite_is_skipped_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(Fit(poison=(30,)), job(tmp_path))
    said = capsys.readouterr().out
    assert "step 8 is skipped: y of sample 30 is not finite" in said
    assert np.isfinite(weights(tmp_path)).all()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [n for n, line in enumerate(lines, 1) if "loss" not in line] == [8]  # JSON has no infinity


def test_a_skipped_step_moves_nothing(tmp_path: Path) -> None:
    run(Fit(poison=(30,)), job(tmp_path, save_every=1))
    seventh, eighth = (tensors(tmp_path / f"step-00000{n}") for n in (7, 8))
    assert seventh == eighth


def test_three_in_a_row_stop_and_keep_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match=r"3 steps in a row .* y of sample 38"):
        run(Fit(poison=(30, 33, 38)), job(tmp_path))
    assert not fault_of(tmp_path / "step-000009")
    assert not (tmp_path / "export").exists()
    run(Fit(poison=(22, 26, 34, 38)), job(tmp_path / "two"))  # never three in a row


def test_the_count_of_skipped_steps_survives_a_resume(tmp_path: Path) -> None:
    bad = Fit(poison=(30, 33, 38))
    run(bad, job(tmp_path, stop=9))
    with pytest.raises(NumericalError, match="3 steps in a row"):
        run(bad, job(tmp_path))


def test_a_loss_is_named_by_its_samples_and_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Overflow(Fit):
        def batch(self, seed: int, ids: Sequence[int]) -> dict[str, Any]:
            found = super().batch(seed, ids)
            found["y"][1] *= 1e30 if 5 in ids else 1
            return found

    run(Overflow(), job(tmp_path))
    assert "step 2 is skipped: the loss of sample 5 at u = 0.250 is not finite" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    net = Line()
    keeper = Keeper(tmp_path, net, Ema(net, 0.9), torch.optim.AdamW(net.parameters()))
    with torch.no_grad():
        net.layer.weight[0, 1] = float("nan")
    with pytest.raises(NumericalError, match=r"layer\.weight is not finite after step 5"):
        keeper.save(5, {})
    assert not list(tmp_path.iterdir())


# --- ends and locks


def test_the_first_interrupt_saves_and_ends(tmp_path: Path, straight: dict[int, Path]) -> None:
    with pytest.raises(Stopped, match="after step 5") as stopped:
        run(Fit(signal=17), job(tmp_path))
    assert stopped.value.exit_code == 130
    assert not fault_of(tmp_path / "step-000005")
    with pytest.raises(Stopped):  # asked again while it goes on: the signal is the task's, so allowed
        run(Fit(signal=21), job(tmp_path), allow_changed=True)
    run(Fit(), job(tmp_path), allow_changed=True)
    assert weights(tmp_path) == weights(straight[1])


def test_the_second_interrupt_quits(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Impatient(Fit):
        def batch(self, seed: int, ids: Sequence[int]) -> dict[str, Any]:
            if 17 in ids:
                os.kill(os.getpid(), signal.SIGTERM)  # a launcher's, which counts as one
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            return super().batch(seed, ids)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(Impatient(), job(tmp_path))
    assert signal.getsignal(signal.SIGINT) is before
    assert not fault_of(tmp_path / "step-000003")


def test_one_run_per_folder(tmp_path: Path) -> None:
    with only_run(tmp_path), pytest.raises(EnvironmentFault, match=rf"in use by process {os.getpid()} on") as error:
        run(Fit(), job(tmp_path))
    assert error.value.exit_code == 3
    run(Fit(), job(tmp_path))  # the lock went with its holder


def test_what_a_kill_left_is_tidied(tmp_path: Path) -> None:
    (tmp_path / ".ldm-abc").mkdir()
    (tmp_path / ".ldm-half").write_text("x")
    (tmp_path / ".ldm-old-1" / "export").mkdir(parents=True)
    (tmp_path / ".ldm-old-1" / "export" / "a").write_text("kept")
    tidy(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    assert (tmp_path / "export" / "a").read_text() == "kept"


@pytest.mark.parametrize(
    ("change", "key"), [({"lr": 0.2}, "job.lr was 0.1"), ({"batch": 8}, "job.batch was 4"), ({"steps": 13}, "job.steps was 12")]
)
def test_a_changed_recipe_is_refused_naming_the_key(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    run(Fit(), job(tmp_path, stop=3))
    with pytest.raises(UsageError, match=key):
        run(Fit(), job(tmp_path, **change))
    run(Fit(), job(tmp_path, **change), allow_changed=True)


def test_a_changed_task_is_refused_and_what_changes_no_weight_is_not(tmp_path: Path) -> None:
    run(Fit(), job(tmp_path, stop=3))
    with pytest.raises(UsageError, match=r"task\.slope was 1\.0"):
        run(Fit(slope=2.0), job(tmp_path))
    run(Fit(), job(tmp_path, save_every=5, log_every=2, keep=1, workers=1))


def test_facts_of_the_task_count(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class WithData(Fit):
        def facts(self) -> dict[str, str]:
            return {"data": DIGEST[0]}

    DIGEST = ["one"]
    run(WithData(), job(tmp_path, stop=3))
    DIGEST[0] = "two"
    with pytest.raises(UsageError, match="data was 'one'"):
        run(WithData(), job(tmp_path))


# --- workers


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_of_a_batch_is_one_line(tmp_path: Path, workers: int) -> None:
    with pytest.raises(LdmError) as error:
        run(Fit(fail=14), job(tmp_path, workers=workers))
    assert str(error.value) == "'photos/7.png' cannot be read"
    assert error.value.exit_code == 2


def test_a_worker_that_dies_or_hangs_is_one_line(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Dies(Fit):
        how: str = "kill"

        def batch(self, seed: int, ids: Sequence[int]) -> dict[str, Any]:
            if 14 in ids:
                os.kill(os.getpid(), signal.SIGKILL) if self.how == "kill" else time.sleep(20)
            return super().batch(seed, ids)

    for how, patience, said in (("kill", 60, "(killed by signal|exited unexpectedly)"), ("hang", 2, "timed out")):
        with pytest.raises(EnvironmentFault, match=f"a worker that makes batches failed: .*{said}") as error:
            run(Dies(how=how), job(tmp_path / how, workers=1, patience=patience))
        assert "\n" not in str(error.value)
        assert not multiprocessing.active_children(), "the workers are gone with the run, and so is what watched them"


# --- processes


def test_two_processes_give_the_trajectory_of_one(tmp_path: Path) -> None:
    child = (
        "import sys; sys.path.insert(0, '.'); from pathlib import Path; from dataclasses import replace\n"
        "from scripts.train_kills import ToyTask, job; from train.loop import run\n"
        "folder, batch = Path(sys.argv[1]), int(sys.argv[2]); run(ToyTask(), replace(job(folder, 6), batch=batch))\n"
    )

    def start(folder: str, batch: int, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", child, str(tmp_path / folder), str(batch)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **env}
        return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)

    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 9000),
    }
    both = [start("two", 4, RANK=str(r), LOCAL_RANK=str(r), **shared) for r in range(2)]
    for process in (*both, start("one", 8)):
        _, said = process.communicate(timeout=180)
        assert process.returncode == 0, said
    one, two = (np.concatenate([np.ravel(w) for w in weights(tmp_path / n)]) for n in ("one", "two"))
    assert np.allclose(one, two, rtol=1e-4, atol=1e-6)
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-4)


def test_kills_at_random_moments_are_survived() -> None:
    script = [sys.executable, "scripts/train_kills.py", "--kills", "6"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    out = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "weights identical, losses identical, 0 leftovers" in out.stdout


def test_a_run_leaves_a_report_and_a_card(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Judged(Fit):
        def validate(self, net: Any, folder: Path) -> dict[str, float]:
            assert not net.training
            folder.mkdir(parents=True)
            (folder / "00.png").write_bytes(b"picture")
            return {"held_out": 0.5 / (1 + len(list(folder.parent.iterdir())))}

    run(Judged(), job(tmp_path, validate_every=6))
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3  # loss, lr, held_out
    assert "held_out: 0.25 at step 6, 0.1667 at step 12" in page
    assert page.count("data:image/png;base64,cGljdHVyZQ==") == 2
    assert "src=http" not in page.replace('"', "")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "| job.lr | 0.1 |" in card
    assert "12 steps" in card


# --- small laws


def test_no_two_processes_or_steps_share_a_sample() -> None:
    seen = [i for step in range(5) for rank in range(3) for i in ids_of(step, 4, rank, 3)]
    assert seen == list(range(60))
    one = [i for step in range(5) for i in ids_of(step, 12, 0, 1)]
    assert one == seen


def test_the_rate_warms_up_and_falls_to_its_end() -> None:
    plan = Job(output="", steps=100, lr=1.0, lr_end=0.1, warmup=10)
    assert plan.rate(0) == pytest.approx(0.1)
    assert plan.rate(9) == plan.rate(10) == 1
    assert plan.rate(55) == pytest.approx(0.55)
    assert plan.rate(100) == pytest.approx(0.1)


def test_the_average_comes_and_goes_without_a_trace() -> None:
    net = Line()
    ema = Ema(net, 0.5)
    with torch.no_grad():
        net.layer.weight += 1
    before = net.layer.weight.detach().clone()
    for _ in range(3):
        ema.update(net, 1000)
    with ema.swapped(net):
        assert torch.allclose(net.layer.weight, before - 0.125)
    assert torch.equal(net.layer.weight, before)


def test_a_recipe_is_read_strictly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "job.toml"
    recipe.write_text('[task]\nname = "codec"\n[job]\noutput = "x"\nsteps = 1\n')
    assert read(str(recipe), ["job.steps=5"])["job"]["steps"] == "5"
    with pytest.raises(UsageError, match="form table"):
        read(str(recipe), ["steps=5"])
    for text, words in [
        ('[task]\nname = "codek"', "did you mean 'codec'"),
        ('[task]\nname = "codec"\n[job]\noutput = "x"\nstepz = 1', "did you mean 'steps'"),
        ('[task]\nname = "codec"\nlayers = "many"\n[job]\noutput = "x"\nsteps = 1', "a whole number"),
        ("[task", "is not TOML"),
    ]:
        recipe.write_text(text)
        assert main(["--config", str(recipe)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert words in err
        assert err.count("\n") == 1
    assert main(["--config", str(tmp_path / "none.toml")]) == 2


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.toml")), ids=lambda p: p.name)
def test_every_recipe_is_without_a_fault(path: Path) -> None:
    assert faults(read(str(path)), str(path)) == []
