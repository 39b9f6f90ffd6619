"""`accelerate launch -m ldm_pipe.batch prompts.jsonl -o folder`: a picture for every row of a long list, on any number of
processes.

The list is cut into shards of consecutive rows, whatever the number of processes; process r makes shards r, r + n, r + 2n, ...
A shard is a folder that appears whole or not at all, so a killed job goes on with the shards that are missing. A row has its
own seed, and a shard is always computed together: the pictures are the same bit for bit on one process or on many. When no
shard is missing, `manifest.jsonl` lists all pictures.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_pipe import files, inputs, strict
from ldm_pipe.errors import LdmError, UsageError
from ldm_pipe.settings import Settings


@dataclass(frozen=True)
class Batch:
    """A job. rows: (prompt, seed) in order; settings: of all rows; shard: rows of one shard; model: a folder or "builtin"."""

    rows: tuple[tuple[str, int], ...]
    output: Path
    settings: Settings
    shard: int = 64
    model: str = "builtin"

    @property
    def count(self) -> int:
        """How many shards there are."""
        return -(-len(self.rows) // self.shard)

    def folder(self, shard: int) -> Path:
        """Where a shard goes."""
        return self.output / f"shard-{shard:05d}"

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """The shards that one of `world` processes has yet to make."""
        return [i for i in range(rank, self.count, world) if not self.folder(i).is_dir()]

    def claim(self) -> None:
        """Write down what this folder is for. Raises UsageError where it is for another job."""
        facts = {"model": self.model, "settings": repr(self.settings), "shard": self.shard, "rows": _digest(self.rows)}
        path = self.output / "job.json"
        try:
            files.write(path, json.dumps(facts, indent=1).encode())
        except UsageError:  # it is there, perhaps from a process beside this one
            before = json.loads(path.read_text(encoding="utf-8"))
            for key, value in facts.items():
                if before.get(key) != value:
                    raise UsageError(f"{str(self.output)!r} was begun with other {key}; give another -o") from None

    def make(self, pipe: Any, shard: int) -> None:
        """Make one shard: its pictures and its `rows.jsonl`."""
        first = shard * self.shard
        rows = self.rows[first : first + self.shard]
        settings = {n: v for n, v in vars(self.settings).items() if n not in ("seed", "seeds")}
        output = pipe([p for p, _ in rows], seeds=tuple(s for _, s in rows), **settings)
        lines = []
        with files.new_folder(self.folder(shard), replace=False) as temp:
            for i, (picture, (prompt, seed)) in enumerate(zip(output.images, rows, strict=True), first):
                data = io.BytesIO()
                picture.save(data, "PNG")
                files.write(temp / f"{i:08d}.png", data.getvalue())
                digest = hashlib.sha256(data.getvalue()).hexdigest()
                file = f"{self.folder(shard).name}/{i:08d}.png"
                lines.append({"row": i, "file_name": file, "text": prompt, "seed": seed, "sha256": digest})
            files.write(temp / "rows.jsonl", _lines(lines))

    def merge(self) -> Path | None:
        """Write `manifest.jsonl`, all rows in order, where no shard is missing."""
        if self.missing():
            return None
        parts = [(self.folder(i) / "rows.jsonl").read_bytes() for i in range(self.count)]
        return files.write(self.output / "manifest.jsonl", b"".join(parts), replace=True)


def run(job: Batch, pipe: Any, rank: int = 0, world: int = 1) -> Path | None:
    """Make the shards of one process. Returns the manifest where this process was the last."""
    job.claim()
    for shard in job.missing(rank, world):
        job.make(pipe, shard)
        print(f"shard {shard + 1} of {job.count}", flush=True)
    return job.merge()


def main(argv: Sequence[str] | None = None) -> int:
    """Make a list of pictures. Returns the exit code."""
    args = _parser().parse_args(argv)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        job = read(args)
        job.claim()
        if job.missing(rank, world):
            from ldm_pipe.pipeline import Pipeline

            device = f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" and world > 1 else args.device
            run(job, Pipeline.from_pretrained(args.model, device, args.dtype), rank, world)
        manifest = job.merge()
        print(f"{len(job.rows)} pictures, listed in {manifest}" if manifest else "other processes have shards to make")
        return 0
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def read(args: argparse.Namespace) -> Batch:
    """The job that a command line asks for. Raises UsageError."""
    given: dict[str, Any] = {}
    for setting in args.set:
        name, equals, value = setting.partition("=")
        if not equals or name in ("seed", "seeds", "num_images"):
            raise UsageError(f"--set {setting!r} is not of the form name=value, of settings other than seeds and num_images")
        given[name] = value
    settings = strict.build(Settings, given, "--set")
    if not args.shard >= 1:
        raise UsageError(f"--shard is {args.shard}; it takes 1 or more")
    rows = [(p, args.seed + i if s is None else s) for i, (p, s) in enumerate(inputs.rows(args.prompts))]
    if not rows:
        raise UsageError(f"{args.prompts!r} holds no prompts")
    return Batch(tuple(rows), Path(args.output), settings, args.shard, args.model)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ldm_pipe.batch", description="Make a picture for every row of a list.")
    parser.add_argument("prompts", help='one prompt a line, or .jsonl of {"prompt": ..., "seed": ...}')
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER")
    parser.add_argument("--model", default="builtin", help='"builtin" or a model folder')
    parser.add_argument("--seed", type=int, default=0, help="row k without a seed of its own has seed + k")
    parser.add_argument("--shard", type=int, default=64, help="rows of one shard")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="name=value", help="a setting, such as steps=30")
    return parser


def _digest(rows: tuple[tuple[str, int], ...]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


if __name__ == "__main__":
    sys.exit(main())
