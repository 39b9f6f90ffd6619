"""Put an exported model into the package: half precision, the model's defaults, SHA-256 sums.

python scripts/ship_builtin.py runs/builtin/latent/export
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from safetensors.torch import load_file, save_file

from ldm_pipe import files
from ldm_pipe.loading import BUILTIN, SUMS, Defaults
from train.world.scenes import SIZE
from train.world.words import vocabulary

LIMIT = 64_000_000


def halve(file: Path) -> None:
    """Rewrite a weight file in fp16; refuse what fp16 cannot hold."""
    tensors = {}
    for name, tensor in load_file(file).items():
        half = tensor.half() if tensor.is_floating_point() else tensor
        if not half.isfinite().all():
            sys.exit(f"error: {file.name}: {name} does not fit fp16")
        tensors[name] = half.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("--output", type=Path, default=BUILTIN)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--sampler", default="dpm2m")
    parser.add_argument("--spacing", default="trailing")
    args = parser.parse_args()
    run = {"steps": args.steps, "guidance_scale": args.guidance_scale, "sampler": args.sampler, "spacing": args.spacing}
    Defaults(size=(SIZE, SIZE), words=vocabulary(), **run)
    with files.new_folder(args.output, replace=True) as folder:
        shutil.copytree(args.export, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md"))  # the run's card
        for file in sorted(folder.rglob("*.safetensors")):
            halve(file)
        defaults = {"size": [SIZE, SIZE], **run, "words": list(vocabulary())}
        (folder / "ldm_pipe.json").write_text(json.dumps(defaults, indent=1) + "\n")
        parts = [f for f in sorted(folder.rglob("*")) if f.is_file()]
        sums = [f"{files.sha256(f)}  {f.relative_to(folder).as_posix()}\n" for f in parts]
        (folder / SUMS).write_text("".join(sums))
        total = sum(f.stat().st_size for f in parts)
        if total > LIMIT:
            sys.exit(f"error: {total / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}")
    print(f"{args.output}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
