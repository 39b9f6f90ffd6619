"""`generate --prompt "a fox on a blue background"`: prompt to PNG. Help, lists and argument errors import no torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ldm_pipe import __version__, guide, recipe, registry
from ldm_pipe.errors import LdmError, ModelError, UsageError, unknown
from ldm_pipe.output import Target, slug
from ldm_pipe.settings import Settings

if TYPE_CHECKING:
    from ldm_pipe.pipeline import Output, Pipeline
    from ldm_pipe.walk import Step

PLURALS = {f"{kind}s": kind for kind in registry.KINDS}
SETTINGS = ("seed", "steps", "guidance_scale", "guide", "sampler", "spacing", "num_images", "height", "width", "batch_size")


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
    """The flags of `generate`."""
    p = Parser(
        prog="generate",
        description="Make images from prompts with a latent diffusion model.",
        epilog='example: generate --prompt "a fox on a blue background" --num-images 4 --grid --seed 7',
        allow_abbrev=False,
    )
    add = p.add_argument
    add("-p", "--prompt", action="append", metavar="TEXT", help="what to draw; may be given several times")
    add("-n", "--negative-prompt", default="", metavar="TEXT", help="what to move away from")
    add("-m", "--model", default="builtin", metavar="SOURCE", help="builtin, or a folder in diffusers' layout")
    add("-o", "--output", metavar="PATH", help="a .png file, or a folder for several (default: outputs/)")
    add("--num-images", type=int, default=1, metavar="N", help="images per prompt; image k has seed + k (default: 1)")
    add("--seed", type=int, metavar="N", help="seed of the first image, 0 to 2^64 - 1 (default: drawn and printed)")
    add("--steps", type=int, metavar="N", help="steps of the sampler (default: the model's)")
    add("--guidance-scale", type=float, metavar="X", help="classifier-free guidance, 1 = none (default: the model's)")
    add("--sampler", metavar="NAME", help="see --list samplers (default: the model's)")
    add("--spacing", metavar="NAME", help="see --list spacings (default: the model's)")
    add("--set", action="append", default=[], metavar="K=V", help="a field of a method: sampler.eta=0.5, spacing.shift=3")
    add("--height", type=int, metavar="PX", help="of an image (default: the model's)")
    add("--width", type=int, metavar="PX", help="of an image (default: the model's)")
    add("--batch-size", type=int, default=16, metavar="N", help="images computed together (default: 16)")
    add("--dtype", default="auto", help="auto, fp32, bf16 or fp16 (default: auto)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--guide", metavar="RULES", help='instead of --guidance-scale: "cfg(5) | rescale(0.7) | between(0.2, 0.9)"')
    add("--grid", action="store_true", help="also write all images as one contact sheet")
    add("--force", action="store_true", help="overwrite existing files")
    add("--list", nargs="?", const="all", metavar="KIND", help=f"show {', '.join(PLURALS)} or words, and exit")
    add("--show", metavar="IMAGE", help="print the recipe in an image, and exit")
    add("--replay", metavar="IMAGE", help="make an image again from the recipe in it")
    add("--verify", action="store_true", help="with --replay: compare with the image instead of writing")
    add("--json", action="store_true", help="print one JSON object on stdout instead of paths")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--version", action="version", version=f"ldm_pipe {__version__}")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 done, 2 wrong use or model, 3 the machine, 4 not finite."""
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    try:
        args = parser().parse_args(argv)
        if args.list:
            return _list(args.list)
        if args.show:
            return _show(args.show)
        return _replay(args) if args.replay else _generate(args)
    except LdmError as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nerror: interrupted", file=sys.stderr)
        return 130


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


def _generate(args: argparse.Namespace) -> int:
    if not args.prompt:
        raise UsageError('--prompt is needed, such as --prompt "a fox on a blue background"')
    settings = _settings(args)
    target = Target.of(args.output, len(args.prompt) * settings["num_images"] + args.grid, args.force)
    started = time.perf_counter()
    say: Callable[[str], None] = (lambda text: None) if args.quiet else (lambda text: print(text, file=sys.stderr))
    from ldm_pipe.device import pick_device, pick_dtype
    from ldm_pipe.pipeline import Pipeline

    device = pick_device(args.device)
    note = pick_dtype(args.dtype, device)[1]
    pipe = Pipeline.from_pretrained(args.model, args.device, args.dtype)
    if note:
        say(f"note: {note}")
    for text in dict.fromkeys(n for p in args.prompt for n in pipe.bundle.text.notices(p)):
        say(f"note: {text}")
    bar = _progress(pipe, args.prompt, settings) if sys.stderr.isatty() and not args.quiet else None
    out = pipe(args.prompt, on_step=bar, **settings)
    paths = _write(out, pipe, target, args.grid)
    if args.json:
        print(json.dumps(_report(out, paths)))
    elif not args.quiet:
        print(*paths, sep="\n")
    say(f"{len(out.images)} image(s), seed {out.settings.seed}, {time.perf_counter() - started:.1f} s")
    return 0


def _report(out: Output, paths: list[Path]) -> dict[str, Any]:
    rows = zip(paths, out.prompts, out.seeds, strict=False)
    images = [{"path": str(path), "prompt": prompt, "seed": seed} for path, prompt, seed in rows]
    settings = dataclasses.asdict(out.settings)
    return {"images": images, "settings": settings, "evaluations": dict(out.evaluations), "notices": list(out.notices)}


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of the pipeline, checked here, before torch is imported."""
    found: dict[str, Any] = {name: getattr(args, name) for name in SETTINGS}
    found |= {"negative_prompt": args.negative_prompt, "sampler_set": {}, "spacing_set": {}}
    for item in args.set:
        key, equals, value = item.partition("=")
        kind, dot, field = key.partition(".")
        if not (equals and dot and kind in ("sampler", "spacing")):
            raise UsageError(f"--set {item!r} is not of the form sampler.field=value or spacing.field=value")
        found[f"{kind}_set"][field] = value
    Settings(**found)
    if args.guide is not None:
        if args.guidance_scale is not None:
            raise UsageError("--guide and --guidance-scale exclude each other; write the scale as cfg(5) in --guide")
        guide.calls(args.guide)
    for kind in ("sampler", "spacing"):
        if found[kind]:
            fields = [n for n, _ in registry.entry(kind, found[kind]).fields]
            for field in found[f"{kind}_set"]:
                if field not in fields:
                    raise UsageError("--set " + unknown(f"field of {kind} {found[kind]}", field, fields))
    return found


def _write(out: Output, pipe: Pipeline, target: Target, sheet: bool) -> list[Path]:
    """Write the images, each with its recipe, and the contact sheet."""
    from ldm_pipe import image
    from ldm_pipe.replay import recipe_of

    paths = []
    for k, picture in enumerate(out.images):
        data = recipe.png(picture, recipe_of(out, pipe, k))
        paths.append(target.write(data, f"{slug(out.prompts[k])}-{out.seeds[k]}"))
    if sheet:
        data = recipe.png(image.grid(out.images), None)
        paths.append(target.write(data, f"{slug(out.prompts[0])}-{out.seeds[0]}-grid"))
    return paths


def _show(path: str) -> int:
    print(json.dumps(dataclasses.asdict(recipe.read(path)), indent=1))
    return 0


def _replay(args: argparse.Namespace) -> int:
    """Make an image again from its file; exit 1 where --verify finds a difference."""
    found = recipe.read(args.replay)
    target = Target.of(args.output, 1, args.force)
    from PIL import Image

    from ldm_pipe import replay
    from ldm_pipe.pipeline import Pipeline

    source = args.model if args.model != "builtin" else found.model
    dtypes = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    dtype = dtypes.get(found.dtype, "auto") if args.dtype == "auto" else args.dtype
    pipe = Pipeline.from_pretrained(source, args.device, dtype)
    out = replay.again(found, pipe)
    if not args.verify:
        print(*_write(out, pipe, target, False), sep="\n")
        return 0
    with Image.open(args.replay, formats=["PNG"]) as original:
        verdict = replay.verify(original, found, out, pipe)
    print(f"{args.replay}: {verdict}")
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
