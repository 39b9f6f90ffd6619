"""`generate --prompt "a fox on a blue background"`: prompt to PNG. Help, lists and argument errors import no torch."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ldm_pipe import __version__, files, registry
from ldm_pipe.errors import LdmError, ModelError, UsageError, unknown
from ldm_pipe.settings import Settings

if TYPE_CHECKING:
    from ldm_pipe.pipeline import Output, Pipeline
    from ldm_pipe.walk import Step

PLURALS = {f"{kind}s": kind for kind in registry.KINDS}
SETTINGS = ("seed", "steps", "guidance_scale", "sampler", "spacing", "num_images", "height", "width", "batch_size")


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
    add("--grid", action="store_true", help="also write all images as one contact sheet")
    add("--force", action="store_true", help="overwrite existing files")
    add("--list", nargs="?", const="all", metavar="KIND", help=f"show {', '.join(PLURALS)} or words, and exit")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--version", action="version", version=f"ldm_pipe {__version__}")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 done, 2 wrong use or model, 3 the machine, 4 not finite."""
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    try:
        args = parser().parse_args(argv)
        return _list(args.list) if args.list else _generate(args)
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
    target = _target(args, len(args.prompt) * settings["num_images"])
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
    paths = _write(out, pipe, args, target)
    if not args.quiet:
        for path in paths:
            print(path)
    say(f"{len(out.images)} image(s), seed {out.settings.seed}, {time.perf_counter() - started:.1f} s")
    return 0


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
    for kind in ("sampler", "spacing"):
        if found[kind]:
            fields = [n for n, _ in registry.entry(kind, found[kind]).fields]
            for field in found[f"{kind}_set"]:
                if field not in fields:
                    raise UsageError("--set " + unknown(f"field of {kind} {found[kind]}", field, fields))
    return found


def _target(args: argparse.Namespace, count: int) -> Path:
    """Where the images go, checked before anything is computed: a .png file for one image, else a folder."""
    if args.output is None:
        return Path("outputs")
    path = Path(args.output)
    single = path.suffix.lower() == ".png" and not path.is_dir()
    if path.suffix and not single and not path.is_dir():
        raise UsageError(f"--output {args.output!r}: only .png files are written; give a .png name or a folder")
    if single and count + args.grid > 1:
        raise UsageError(f"--output {args.output!r} is one file, but {count + args.grid} are made; give a folder")
    if single and path.exists() and not args.force:
        raise UsageError(f"--output {args.output!r} exists; --force overwrites it")
    if not single and path.exists() and not path.is_dir():
        raise UsageError(f"--output {args.output!r} is a file; give a .png name or a folder")
    folder = path.parent if single else path
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        from ldm_pipe.errors import EnvironmentFault

        raise EnvironmentFault(f"--output {args.output!r}: the folder {str(folder)!r} cannot be written to")
    return path


def _write(out: Output, pipe: Pipeline, args: argparse.Namespace, target: Path) -> list[Path]:
    """Write the images, each with its recipe; names that are taken get a number, unless --force."""
    from ldm_pipe import image

    single = target.suffix.lower() == ".png" and not target.is_dir()
    paths = []
    for picture, prompt, seed in zip(out.images, out.prompts, out.seeds, strict=True):
        data = image.png(picture, {"ldm_pipe": json.dumps(_recipe(out, pipe, prompt, seed), ensure_ascii=True)})
        paths.append(_place(data, target if single else target / f"{_slug(prompt)}-{seed}.png", args.force, not single))
    if args.grid:
        sheet = image.png(image.grid(out.images), {})
        paths.append(_place(sheet, target / f"{_slug(out.prompts[0])}-{out.seeds[0]}-grid.png", args.force, True))
    return paths


def _place(data: bytes, path: Path, force: bool, number: bool) -> Path:
    for k in range(1, 10_000):
        name = path if k == 1 else path.with_name(f"{path.stem}-{k}{path.suffix}")
        try:
            return files.write(name, data, replace=force)
        except UsageError:
            if not number:
                raise
    raise UsageError(f"{str(path)!r} and 9,998 numbered names are taken; choose another --output")


def _recipe(out: Output, pipe: Pipeline, prompt: str, seed: int) -> dict[str, Any]:
    import torch

    given = {n: getattr(out.settings, n) for n in (*SETTINGS, "negative_prompt", "sampler_set", "spacing_set")}
    model = pipe.bundle.name if pipe.bundle.name == "builtin" else Path(pipe.bundle.name).name
    return {
        **given,
        "prompt": prompt,
        "seed": seed,
        "model": model,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe.device.type,
        "ldm_pipe": __version__,
        "torch": torch.__version__,
    }


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"


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
