"""The flags of `generate` for argparse, with a sentence of help each."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable
from typing import Any, NoReturn

from ldm_pipe import __version__, listing
from ldm_pipe.doors.patches import SPEED
from ldm_pipe.errors import UsageError
from ldm_pipe.output import FIELDS, NAME

Add = Callable[..., Any]  # `ArgumentParser.add_argument`


class Parser(argparse.ArgumentParser):
    """argparse with our one-line errors."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError; `main` prints it."""
        message = re.sub(r"^argument ", "", message)
        flag = re.match(r"unrecognized arguments: (-\S+)", message)
        lacks = re.match(r"(?:-\w/)?(--[\w-]+): expected one argument", message)
        if flag:
            given = flag[1].split("=")[0]
            near = difflib.get_close_matches(given, [o for a in self._actions for o in a.option_strings], n=1, cutoff=0.5)
            message = f"{given!r} is not a flag;" + (f" did you mean {near[0]!r}?" if near else "") + " --help shows them all"
        elif message.startswith("unrecognized arguments: "):
            message = f"{message[24:64]!r} stands without a flag; give the prompt with --prompt, in quotes: -p 'a red fox'"
        elif lacks:
            name = next(a.metavar or "VALUE" for a in self._actions if lacks[1] in a.option_strings)
            message = f"{lacks[1]} needs a value: {lacks[1]} {name}"
        raise UsageError(message)


def parser() -> argparse.ArgumentParser:
    """The flags of `generate`. What is not given is not in the namespace: `Request` knows the defaults."""
    p = Parser(
        prog="generate",
        description="Make images from prompts with a latent diffusion model.",
        epilog='example: generate --prompt "a fox on a blue background" --num-images 4 --grid --seed 7. ' + listing.defaults(),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add = p.add_argument
    _of_the_words(add)
    _of_the_walk(add)
    _of_the_pictures(add)
    _of_the_network(add)
    _of_the_run(add)
    return p


def _of_the_words(add: Add) -> None:
    """What to draw, by which model, into which files."""
    fields = " ".join(f"{{{field}}}" for field in FIELDS)
    add("-p", "--prompt", action="append", metavar="TEXT", help="what to draw; may be given several times; - reads stdin")
    add("--prompts", metavar="FILE", help='one prompt a line, or .jsonl with {"prompt": ..., "seed": ...}')
    add("-n", "--negative-prompt", metavar="TEXT", help="what to move away from")
    add("--plain-prompt", action="store_true", help="read (word:1.3), [a:b:0.5], AND and BREAK in prompts as text")
    add(
        "-m",
        "--model",
        metavar="SOURCE",
        help="builtin (default), a folder in diffusers' layout, or a .safetensors file "
        "of Stable Diffusion 1, 2, XL or 3 or of Flux",
    )
    add(
        "-o",
        "--output",
        metavar="PATH",
        help="a folder, or a .png, .jpg or .webp name in which fields are filled in: "
        f"{fields}, or {{index:03}}; a filled-in name that is taken gets a number (default: outputs/{NAME})",
    )


def _of_the_walk(add: Add) -> None:
    """How it is drawn."""
    add("--num-images", metavar="N", help="images per prompt; image k has seed + k (default: 1)")
    add("--seed", metavar="N", help="seed of the first image, 0 to 2^64 - 1 (default: drawn and printed)")
    add("--steps", metavar="N", help="steps of the sampler (default: the model's)")
    add("--guidance-scale", metavar="X", help="classifier-free guidance, 1 = none (default: the model's)")
    add(
        "--guide",
        metavar="RULES",
        help='instead of --guidance-scale: "cfg(5) | rescale(0.7) | between(0.2, 0.9)", '
        "each around the one before; between: only while the noise u, which falls from 1 to 0, is there (--list rules)",
    )
    add("--sampler", metavar="NAME", help="see --list samplers (default: the model's)")
    add("--spacing", metavar="NAME", help="see --list spacings (default: the model's)")
    add("--set", action="append", metavar="K=V", help="a field of a method: sampler.eta=0.5, spacing.shift=3")
    add("--height", metavar="PX", help="of an image (default: the model's)")
    add("--width", metavar="PX", help="of an image (default: the model's)")


def _of_the_pictures(add: Add) -> None:
    """What it starts from, edits or restores."""
    add("--init-image", metavar="FILE", help="start from a picture instead of noise")
    add("--strength", metavar="X", help="with --init-image: the share of the steps run, 0 to 1 (default: 0.6; of --edit: 1)")
    add("--mask", metavar="FILE", help="with --init-image or --edit: white is drawn anew, black kept to the bit (strength: 1)")
    add("--outpaint", metavar="PX", help="with --init-image: draw so many pixels more around it, such as 16 or left=16,top=8")
    add(
        "--edit",
        metavar="TEXT",
        help='"a fox on blue -> a cat on blue": both pictures, the second keeping what it can of the '
        "first, which is drawn, or --input inverted (--set edit.cross=0.8, edit.inversion=dpm_encoder; --list inversions)",
    )
    add("--restore", metavar="OPERATOR", help='what degraded --input, such as "pool(4)" or "mask(half)" (--list operators)')
    add("--input", metavar="FILE", help="with --restore: the degraded picture; with --edit: the picture to edit")
    add(
        "--method",
        metavar="NAME",
        help="of --restore (default: dps) and --mask (default: keep): "
        "see --list restorations (--set restore.scale=1); of "
        "--edit: see --list editings (default: prompt_to_prompt)",
    )


def _of_the_network(add: Add) -> None:
    """What acts on the network."""
    add("--image-prompt", metavar="FILE", help="a picture beside the words, for a model that was trained with both (unCLIP)")
    add("--noise-level", metavar="N", help="with --image-prompt: how freely it is taken, 0 (closely, the default) to 999")
    add(
        "--control",
        action="append",
        metavar="FOLDER",
        help="a ControlNet or T2I-Adapter in diffusers' layout, or "
        '"ip_adapter(FILE, image_encoder=FOLDER, mask=FILE, face=FILE)"; may be given several times (--set control.lo=0.3: '
        "while the noise u is above; control.guess=true; control.prepare=canny; control.mode=depth for a union network)",
    )
    add("--control-image", action="append", metavar="FILE", help="with --control: the picture that it reads, one for each")
    add("--control-scale", action="append", metavar="X", help="with --control: how strongly it acts, one for each (default: 1)")
    add(
        "--lora",
        action="append",
        metavar="FILE[:X]",
        help="a LoRA (or LoCon, LoHa, LoKr, DoRA), added X times (default: 1); several add up",
    )
    add("--embedding", action="append", metavar="FILE[:WORD]", help="a learned word (textual inversion) for the prompts")
    add("--hires", metavar="2x", help="draw at the model's own size, then enlarge and draw over (--set hires.strength=0.5)")
    add(
        "--filter-hallucinations",
        metavar="X",
        help="keep this share of the images, those whose estimate wavers least at "
        "the end: 0.5 draws twice as many as are written",
    )
    add("--attention-maps", metavar="DIR", help="also write where each image looks at each word, one sheet an image")
    add(
        "--patch",
        action="append",
        metavar="PATCH",
        help='what changes the network for a run, such as "deepcache(2)"; may be given several times (--list patches)',
    )
    add("--speed", metavar="NAME", help=f"patches by name: {', '.join(SPEED)} (exact changes no bit)")


def _of_the_run(add: Add) -> None:
    """Where and how it is computed, what is written beside the images, and the doors that only answer."""
    add("--batch-size", metavar="N", help="images computed together (default: 16)")
    add("--dtype", help="auto (default), fp32, bf16 or fp16")
    add("--attention", metavar="NAME", help="auto (default), sdpa, math, xformers, or fast (for a CPU)")
    add("--device", help="auto (default), cpu, cuda or cuda:N")
    add(
        "--offload",
        metavar="HOW",
        help="none (default); model: a part at a time is on the device, the others on the CPU; sequential: a block at a time",
    )
    add("--allow-partial", action="store_true", help="load a model whose files lack tensors, or hold others, and say which")
    add("--tokenizer", metavar="FOLDER", help="of T5, for a single file of SD3 or Flux, which cannot bring it")
    lacks = "T5 (its folder or file), or a model folder that has whatever a single file of SD3 or Flux lacks"
    add("--text-encoder", metavar="FOLDER", help=lacks)
    add("--config", metavar="FILE", help="a TOML file whose keys are these flags; flags win")
    add("--grid", action="store_true", help="also write all images as one contact sheet")
    add("--force", action="store_true", help="overwrite existing files")
    add("--record", metavar="FILE", help="write levels, estimates, guidance and evaluations of every step as .safetensors")
    add("--preview", metavar="FILE", help="show the estimate after every step, in a picture file or in the terminal (terminal)")
    add("--preview-decoder", metavar="FOLDER", help="with --preview: draw it by an AutoencoderTiny for this model's latents")
    add(
        "--sweep",
        nargs="+",
        metavar="K=V,V",
        help="all combinations from one noise as one labelled sheet and a JSON file, "
        "such as sampler=ddim,euler steps=10,20 sampler.eta=0,1",
    )
    add("--check", action="store_true", help="load --model, say what it is, what an image will take and how --prompt is read")
    add("--doctor", action="store_true", help="compare dtypes and attention backends on this machine, and exit")
    add("--list", nargs="?", const="all", metavar="KIND", help=f"show {', '.join(listing.PLURALS)} or words, and exit")
    add("--show", metavar="IMAGE", help="print what an image was made with, and exit (--json: everything)")
    add("--replay", metavar="IMAGE", help="make an image again, from the recipe in it alone")
    add("--verify", action="store_true", help="with --replay: compare with the image instead of writing")
    add("--json", action="store_true", help="print one JSON object on stdout instead of paths")
    add("--quiet", action="store_true", help="print nothing but errors and paths")
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--version", action="version", version=f"ldm_pipe {__version__}")
