"""Several processes: shards give the run of one process, checkpoints hold whole tensors, what cannot be done is one line."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm_pipe.errors import UsageError
from scripts.train_kills import ToyTask, job
from train import scale
from train.loop import run

ROOT = Path(__file__).resolve().parents[2]


def sharded(**given: Any) -> Any:
    """Accelerate under FSDP2, which it offers on accelerators only; the sharding itself runs on gloo too."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    found = Accelerator(**given)
    policy = {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 100}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, **policy)
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    return found


def in_two(folder: Path, work: Callable[[], None]) -> None:
    """Run `work` in two processes that know of each other. Raises where one of them fails."""
    from accelerate.state import AcceleratorState

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            with open(folder / f"said-{rank}.txt", "w", encoding="utf-8") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
                os.environ |= {k: str(v) for k, v in place.items()} | {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
                torch.set_num_threads(1)
                AcceleratorState._reset_state(reset_partial_state=True)
                scale.Accelerator = sharded  # type: ignore[misc,assignment]
                work()
            code = 0
        except BaseException as error:
            (folder / f"failed-{rank}.txt").write_text(repr(error))
        os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0], [f.read_text() for f in sorted(folder.glob("*.txt"))]


@pytest.mark.parametrize("optimiser", ["adamw", "schedulefree"])
def test_shards_are_the_run_of_one_process_and_resume_exactly(tmp_path: Path, optimiser: Any) -> None:
    if optimiser == "schedulefree":
        pytest.importorskip("schedulefree")

    class Judged(ToyTask):
        def validate(self, net: Any, folder: Path) -> dict[str, float]:
            return {"sum": float(sum(p.double().sum() for p in net.parameters()))}

    def plan(folder: str, batch: int, stop: int = 0) -> Any:
        return replace(job(tmp_path / folder, 6), batch=batch, stop=stop, keep=9, optimiser=optimiser, validate_every=3)

    def work() -> None:
        run(Judged(), plan("straight", 2))
        for stop in (3, 0):
            run(Judged(), plan("stopped", 2, stop))

    in_two(tmp_path, work)
    run(Judged(), plan("one", 4))
    shutil.copytree(tmp_path / "stopped", tmp_path / "gathered", ignore=shutil.ignore_patterns("step-00000[46]", "export"))
    run(Judged(), plan("gathered", 4))
    files = ("weights", "ema", "optimiser")
    held = {
        n: [load_file(tmp_path / n / "step-000006" / f"{f}.safetensors") for f in files]
        for n in ("straight", "stopped", "one", "gathered")
    }
    for name, tensors in held.items():
        for mine, plain in zip(tensors, held["one"], strict=True):
            assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in plain.items()}
            assert all(torch.allclose(mine[n], t, rtol=1e-4, atol=1e-6) for n, t in plain.items()), name
    for a, b in zip(held["straight"], held["stopped"], strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)
    validated = [[r["validation"]["sum"] for r in lines(tmp_path / n) if "validation" in r] for n in held]
    assert all(v == pytest.approx(validated[2], abs=1e-4) and len(v) == 2 for v in validated)
    weights = [json.loads((tmp_path / n / "export" / "weights.json").read_text()) for n in ("one", "straight")]
    for x, y in zip(*weights, strict=True):
        assert torch.allclose(torch.tensor(x), torch.tensor(y), rtol=1e-4, atol=1e-6)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_deepspeed_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match=r"DeepSpeed.*configs/accelerate/fsdp2\.yaml") as error:
        run(ToyTask(), job(tmp_path / "run", 3))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "words"), [({"optimiser": "adafactor"}, "adamw or schedulefree"), ({"post_hoc": (0.1,)}, "post_hoc")]
)
def test_what_shards_cannot_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, words: str) -> None:
    class Fake:
        is_fsdp2 = True
        distributed_type = type("Kind", (), {"value": "FSDP"})

    monkeypatch.setattr(scale, "Accelerator", lambda **given: Fake())
    plan = replace(job(tmp_path, 3), **change)
    with pytest.raises(UsageError, match=words):
        scale.accelerator(plan)
    monkeypatch.setattr(Fake, "is_fsdp2", False)
    with pytest.raises(UsageError, match="fsdp_version: 2"):
        scale.accelerator(job(tmp_path, 3))


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_the_configurations_are_what_accelerate_reads(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert found.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[name]
    if name == "fsdp2":
        from accelerate.commands.launch import launch_command_parser

        known = vars(launch_command_parser().parse_args(["-m", "train"]))
        assert set(found.fsdp_config) <= set(known)
        assert found.fsdp_config["fsdp_version"] == 2
