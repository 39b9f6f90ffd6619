"""Loading a U-Net of Stable Diffusion 1.5's size (859.5M parameters, 3.4 GB in fp32) by us and by diffusers: time and memory.

    python scripts/bench/loading.py                # the U-Net, in fp32 and converted to bf16; writes 3.4 GB into --scratch
    python scripts/bench/loading.py --pipeline     # a whole model with random weights: load, 256 px, 2 steps
    python scripts/bench/loading.py --tiny         # the same at small widths, to try the script

Every measurement is a process of its own, which imports first and is then timed; the peak is its ru_maxrss, mapped pages that
were touched included. Rounds alternate between the two. Weights are drawn as torch's layers draw theirs; they are removed at
the end.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
SMALL = {
    "unet": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 16},
    "vae": {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4},
    "text_encoder": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
}  # fmt: skip


def write(folder: Path, tiny: bool, parts: tuple[str, ...]) -> None:
    """A model folder with random weights (in a process of its own, for its memory)."""
    import torch
    from safetensors.torch import save_file

    from ldm_pipe import single, tokens, weights
    from ldm_pipe.networks import light_clip, light_unet, light_vae

    published = json.loads((single.PUBLISHED / "sd1.json").read_text(encoding="utf-8"))
    made = {"unet": light_unet.UNet, "vae": light_vae.VAE, "text_encoder": light_clip.ClipTextModel}
    configs = {"unet": light_unet.Config, "vae": light_vae.Config, "text_encoder": light_clip.Config}
    for part in parts:
        config = published[part] | (SMALL[part] if tiny else {})
        plain = {n: tuple(v) if isinstance(v, list) else v for n, v in config.items() if not n.startswith("_")}
        with torch.device("meta"):
            module: Any = made[part](configs[part](**plain))  # type: ignore[operator]
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config), encoding="utf-8")
        shapes = {n: tuple(t.shape) for n, t in module.state_dict().items()}
        save_file({n: weights.drawn(n, s) for n, s in shapes.items()}, folder / part / f"{FILES[part]}.safetensors")
        print(f"{part}: {sum(torch.Size(s).numel() for s in shapes.values()) / 1e6:.1f}M parameters", flush=True)
    index = {"_class_name": "StableDiffusionPipeline", **published["index"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(published["scheduler"]), encoding="utf-8")
    merges = gzip.decompress((single.PUBLISHED / "clip_merges.txt.gz").read_bytes()).decode("utf-8")
    (folder / "tokenizer").mkdir()
    encoder = tokens.published(merges, "<|endoftext|>").encoder
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(encoder.get_vocab()), encoding="utf-8")
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **tokens.SPECIAL}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def measure(who: str, what: str, folder: Path, dtype: str) -> dict[str, float]:
    """In a process of its own: seconds to load, to use, and the peak in MiB after either."""
    import torch

    torch.set_grad_enabled(False)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    if who == "ours":
        from ldm_pipe.loading import load
        from ldm_pipe.networks import light_unet  # noqa: F401
        from ldm_pipe.parts import Parts, read_json
        from ldm_pipe.pipeline import Pipeline
        from ldm_pipe.weights import How
    else:
        import transformers  # noqa: F401
        from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    idle, started = _peak(), time.perf_counter()
    if what == "unet":
        module = (
            Parts(folder, read_json(folder / "model_index.json"), how=How(kind)).network("unet") if who == "ours"
            else UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=kind, local_files_only=True)
        )  # fmt: skip
        loaded, peak = time.perf_counter() - started, _peak()
        largest = max(float(p.abs().max()) for p in module.parameters())  # every page is used once
        return {"load": loaded, "peak": peak, "use": time.perf_counter() - started - loaded, "all": _peak(), "idle": idle,
                "value": largest}  # fmt: skip
    if who == "ours":
        ours = Pipeline(load(folder, kind=lambda wide: kind)).to("cpu", dtype)
    else:
        theirs = StableDiffusionPipeline.from_pretrained(
            folder, torch_dtype=kind, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            local_files_only=True,
        )  # fmt: skip
        theirs.set_progress_bar_config(disable=True)
    loaded, peak = time.perf_counter() - started, _peak()
    from ldm_pipe.noise import Noise

    start = Noise((1,), (4, 32, 32)).start()
    if who == "ours":
        from dataclasses import replace

        whole = ours.plan("a fox", steps=2, height=256, width=256, sampler="ddim", seed=1)
        latents = next(ours.run(replace(whole, start=start))).latents
    else:
        out = theirs("a fox", num_inference_steps=2, height=256, width=256, latents=start.to(kind), output_type="latent").images
        theirs.vae.decode(out / theirs.vae.config.scaling_factor)
        latents = out
    return {"load": loaded, "peak": peak, "use": time.perf_counter() - started - loaded, "all": _peak(), "idle": idle,
            "value": float(latents.float().std())}  # fmt: skip


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Write the weights, measure in alternating processes, print a table, remove the weights."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pipeline", action="store_true", help="a whole model, 256 px, 2 steps")
    p.add_argument("--tiny", action="store_true", help="small widths, to try the script")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--scratch", default=None, help="where the weights are written (default: the system's temporary folder)")
    p.add_argument("--child", nargs=4, metavar=("WHO", "WHAT", "FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    p.add_argument("--write", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.write:
        write(Path(args.write), args.tiny, tuple(FILES) if args.pipeline else ("unet",))
        return
    if args.child:
        who, what, folder, dtype = args.child
        print(json.dumps(measure(who, what, Path(folder), dtype)))
        return
    what = "pipeline" if args.pipeline else "unet"
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        line = [sys.executable, __file__, "--write", str(Path(scratch) / "m"), *(["--tiny"] if args.tiny else ())]
        subprocess.run([*line, *(["--pipeline"] if args.pipeline else ())], check=True)
        for dtype in ("fp32", "bf16"):
            rows: dict[str, list[dict[str, float]]] = {"ours": [], "diffusers": []}
            for _ in range(args.rounds):
                for who, found in rows.items():
                    line = [sys.executable, __file__, "--child", who, what, str(Path(scratch) / "m"), dtype]
                    done = subprocess.run(line, capture_output=True, text=True, check=True)
                    found.append(json.loads(done.stdout.splitlines()[-1]))
            for who, found in rows.items():
                m = {key: median(row[key] for row in found) for key in found[0]}
                print(f"{what} {dtype} {who:<9} load {m['load']:.3f} s, use {m['use']:.2f} s; peak {m['peak']:.0f} MiB loaded, "
                      f"{m['all']:.0f} used, {m['idle']:.0f} before; value {m['value']:.6g}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
