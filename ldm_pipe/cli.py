"""`generate --prompt "a fox on a blue background"`: prompt to PNG. Help, lists and argument errors import no torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ldm_pipe import __version__, recipe, registry
from ldm_pipe.errors import LdmError, ModelError, UsageError, unknown
from ldm_pipe.output import Target, slug
from ldm_pipe.request import Request
from ldm_pipe.settings import Settings

if TYPE_CHECKING:
    from ldm_pipe.pipeline import Output, Pipeline
    from ldm_pipe.walk import Step

PLURALS = {f"{kind}s": kind for kind in registry.KINDS}


class Parser(argparse.ArgumentParser):
    """argparse with our one-line errors."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError; `main` prints it."""
        flag = re.match(r"unrecognized arguments: (-\S+)", message)
        if flag:
            known = [o for a in self._actions for o in a.option_strings]
            message = unknown("flag", flag[1].split("=")[0], known)
        raise UsageError(re.sub(r"^argument ", "", message))


def parser() -> argparse.ArgumentParser:
    """The flags of `generate`. What is not given is not in the namespace: `Request` knows the defaults."""
    p = Parser(
        prog="generate",
        description="Make images from prompts with a latent diffusion model.",
        epilog='example: generate --prompt "a fox on a blue background" --num-images 4 --grid --seed 7',
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add = p.add_argument
    add("-p", "--prompt", action="append", metavar="TEXT", help="what to draw; may be given several times; - reads stdin")
    add("--prompts", metavar="FILE", help='one prompt a line, or .jsonl with {"prompt": ..., "seed": ...}')
    add("-n", "--negative-prompt", metavar="TEXT", help="what to move away from")
    add("-m", "--model", metavar="SOURCE", help="builtin (default), or a folder in diffusers' layout")
    add("-o", "--output", metavar="PATH", help="a .png file, or a folder for several (default: outputs/)")
    add("--num-images", type=int, metavar="N", help="images per prompt; image k has seed + k (default: 1)")
    add("--seed", type=int, metavar="N", help="seed of the first image, 0 to 2^64 - 1 (default: drawn and printed)")
    add("--steps", type=int, metavar="N", help="steps of the sampler (default: the model's)")
    add("--guidance-scale", type=float, metavar="X", help="classifier-free guidance, 1 = none (default: the model's)")
    add("--guide", metavar="RULES", help='instead of --guidance-scale: "cfg(5) | rescale(0.7) | between(0.2, 0.9)"')
    add("--sampler", metavar="NAME", help="see --list samplers (default: the model's)")
    add("--spacing", metavar="NAME", help="see --list spacings (default: the model's)")
    add("--set", action="append", metavar="K=V", help="a field of a method: sampler.eta=0.5, spacing.shift=3")
    add("--height", type=int, metavar="PX", help="of an image (default: the model's)")
    add("--width", type=int, metavar="PX", help="of an image (default: the model's)")
    add("--batch-size", type=int, metavar="N", help="images computed together (default: 16)")
    add("--dtype", help="auto (default), fp32, bf16 or fp16")
    add("--device", help="auto (default), cpu, cuda or cuda:N")
    add("--config", metavar="FILE", help="a TOML file whose keys are these flags; flags win")
    add("--grid", action="store_true", help="also write all images as one contact sheet")
    add("--force", action="store_true", help="overwrite existing files")
    add("--list", nargs="?", const="all", metavar="KIND", help=f"show {', '.join(PLURALS)} or words, and exit")
    add("--show", metavar="IMAGE", help="print the recipe in an image, and exit")
    add("--replay", metavar="IMAGE", help="make an image again from the recipe in it")
    add("--verify", action="store_true", help="with --replay: compare with the image instead of writing")
    add("--json", action="store_true", help="print one JSON object on stdout instead of paths")
    add("--quiet", action="store_true", help="print nothing but errors and paths")
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--version", action="version", version=f"ldm_pipe {__version__}")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 done, 2 wrong use or model, 3 the machine, 4 not finite, 130 and 143
    interrupted; what was finished before stays."""
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    previous = _on_terminate()
    try:
        request = Request.of(vars(parser().parse_args(argv)))
        if request.list:
            return _list(request.list)
        if request.show:
            return _show(request.show)
        return _replay(request) if request.replay else _generate(request)
    except LdmError as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        print("\nerror: interrupted; images that were finished are kept", file=sys.stderr)
        return stop.args[0] if stop.args else 130
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _on_terminate() -> Any:
    """SIGTERM ends a run as Ctrl-C does, with exit code 143 (only the main thread may say so)."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def stop(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt(128 + number)

    return signal.signal(signal.SIGTERM, stop)


def _list(kind: str) -> int:
    if kind == "words":
        print("\n".join(_words()))
        return 0
    if kind not in ("all", *PLURALS):
        raise UsageError("--list " + unknown("kind", kind, ["all", "words", *PLURALS]))
    for plural in PLURALS if kind == "all" else (kind,):
        print(f"{plural}:")
        for entry in registry.entries(PLURALS[plural]):
            fields = ", ".join(f"{n}={d}" for n, d in entry.fields)
            print(f"  {entry.name:<10} {entry.summary}" + (f"\n{'':13}{fields}" if fields else ""))
    return 0


def _words() -> list[str]:
    path = Path(__file__).resolve().parent / "builtin" / "ldm_pipe.json"
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["words"])
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"builtin/ldm_pipe.json cannot be read: {type(error).__name__}") from error


def _generate(request: Request) -> int:
    prompts, seeds = request.texts()
    settings = request.settings(seeds)
    target = Target.of(request.output, len(prompts) * request.num_images + request.grid, request.force)
    started = time.perf_counter()
    say: Callable[[str], None] = (lambda text: None) if request.quiet else (lambda text: print(text, file=sys.stderr))
    from ldm_pipe import image
    from ldm_pipe.device import pick_device, pick_dtype
    from ldm_pipe.pipeline import Pipeline

    note = pick_dtype(request.dtype, pick_device(request.device))[1]
    pipe = Pipeline.from_pretrained(request.model, request.device, request.dtype)
    for text in dict.fromkeys([note, *(n for p in prompts for n in pipe.bundle.text.notices(p))]):
        if text:
            say(f"note: {text}")
    bar = _progress(pipe, prompts, settings) if sys.stderr.isatty() and not request.quiet else None
    done: list[Output] = []
    paths: list[Path] = []
    for out in pipe.batches(prompts, on_step=bar, **settings):
        done.append(out)
        paths += _write(out, pipe, target)
        if not request.json:
            print(*paths[-len(out.images) :], sep="\n", flush=True)
    if request.grid:
        sheet = recipe.png(image.grid([i for out in done for i in out.images]), None)
        paths.append(target.write(sheet, f"{slug(prompts[0])}-{done[0].seeds[0]}-grid"))
        if not request.json:
            print(paths[-1])
    if request.json:
        print(json.dumps(_report(done, paths)))
    say(f"{sum(len(o.images) for o in done)} image(s), seed {done[0].seeds[0]}, {time.perf_counter() - started:.1f} s")
    return 0


def _report(done: list[Output], paths: list[Path]) -> dict[str, Any]:
    rows = [(prompt, seed) for out in done for prompt, seed in zip(out.prompts, out.seeds, strict=True)]
    images = [{"path": str(path), "prompt": p, "seed": s} for path, (p, s) in zip(paths, rows, strict=False)]
    evaluations = dict(sum((out.evaluations for out in done), Counter[str]()))
    return {"images": images, "settings": dataclasses.asdict(done[0].settings), "evaluations": evaluations}


def _write(out: Output, pipe: Pipeline, target: Target) -> list[Path]:
    """Write the images of a batch, each with its recipe."""
    from ldm_pipe.replay import recipe_of

    stems = [f"{slug(prompt)}-{seed}" for prompt, seed in zip(out.prompts, out.seeds, strict=True)]
    return [target.write(recipe.png(out.images[k], recipe_of(out, pipe, k)), stem) for k, stem in enumerate(stems)]


def _show(path: str) -> int:
    print(json.dumps(dataclasses.asdict(recipe.read(path)), indent=1))
    return 0


def _replay(request: Request) -> int:
    """Make an image again from its file; exit 1 where --verify finds a difference."""
    found = recipe.read(str(request.replay))
    if request.model == "builtin" != found.model:  # a file may not choose which folder is loaded
        raise UsageError(f"{request.replay!r} was made by the model {found.model!r:.60}; give its folder with --model")
    target = Target.of(request.output, 1, request.force)
    from PIL import Image

    from ldm_pipe import replay
    from ldm_pipe.pipeline import Pipeline

    dtypes = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    dtype = dtypes.get(found.dtype, "auto") if request.dtype == "auto" else request.dtype
    pipe = Pipeline.from_pretrained(request.model, request.device, dtype)
    out = replay.again(found, pipe)
    if not request.verify:
        print(*_write(out, pipe, target), sep="\n")
        return 0
    with Image.open(str(request.replay), formats=["PNG"]) as original:
        verdict = replay.verify(original, found, out, pipe)
    print(f"{request.replay}: {verdict}")
    return 0 if verdict.largest == 0 else 1


def _progress(pipe: Pipeline, prompts: Sequence[str], settings: dict[str, Any]) -> Callable[[Step], None]:
    """A bar on the terminal over all steps of all batches."""
    given = pipe.resolve(Settings(**settings))
    batches = -(-len(prompts) * given.num_images // given.batch_size)
    total, done = batches * int(given.steps or 1), 0

    def show(step: Step) -> None:
        nonlocal done
        done += 1
        filled = 30 * done // total
        print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {done}/{total}", end="", file=sys.stderr, flush=True)
        if done >= total:
            print(file=sys.stderr)

    return show


if __name__ == "__main__":
    sys.exit(main())
