"""Damaged files against everything that reads them: model folders, single files, adapters, recipes in PNGs.

    python scripts/fuzz_loading.py --mutations 5000 --seeds 1
    python scripts/fuzz_loading.py --mutations 2000 --seeds 0-49 --results fuzz.jsonl

Every case changes one file of a small sound seed (bytes, or the structure of its JSON or safetensors header) and reads it. What
may happen: it is refused in one sentence, or it is read and every tensor is what it was. What counts as a fault: any other
error, a sentence over 300 characters or of two lines, code that is run, a case over 10 s, and tensors that changed although a
header, a size or a configuration was damaged. Bytes of a folder's weights are changed under SHA256SUMS, which must find them.

Each seed is a piece of its own. With --results the pieces that are done stand in a file, a line each; the same words again go
on with the others, and the last line that is printed sums all of them up.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fuzz_damage

LOOKED_FOR = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "pickle.find_class")


class Seed(NamedTuple):
    """root: a sound folder or the folder of one sound file; files: what is damaged, below it; read: gives the tensors."""

    name: str
    root: Path
    files: list[Path]
    read: Callable[[], dict[str, Any]]


def _replace(file: Path, data: bytes) -> None:
    """Another file of the same name: what is mapped of the old one stays what it is."""
    file.unlink()
    file.write_bytes(data)


def run(seeds: list[Seed], mutations: int, seed: int) -> tuple[Counter[str], list[str]]:
    """(counts of what happened, faults)."""
    import hashlib

    from ldm_pipe.errors import LdmError

    draw, counts, faults, ran = random.Random(seed), Counter[str](), list[str](), list[str]()
    watching = [True]
    sys.addaudithook(lambda event, _: ran.append(event) if watching and event.startswith(LOOKED_FOR) else None)
    sound = {s.name: {n: copy.deepcopy(t) for n, t in s.read().items()} for s in seeds}  # not mapped: the files will change
    for number in range(mutations):
        one = draw.choice(seeds)
        file = draw.choice(one.files)
        before, sums = file.read_bytes(), one.root / "SHA256SUMS"
        where, after = fuzz_damage.mutated(before, file.suffix[1:], draw)
        if where == "data" and (one.root / "model_index.json").exists():
            sums.write_text(f"{hashlib.sha256(before).hexdigest()}  {file.relative_to(one.root)}\n")
        _replace(file, after)
        started, what = time.perf_counter(), f"case {number}, {one.name}/{file.name}, {where}"
        try:
            found = one.read()
            same = found.keys() == sound[one.name].keys() and all(v.equal(sound[one.name][n]) for n, v in found.items())
            verdict = "read, unchanged" if same else "read, changed weights" if where == "data" else "read, CHANGED"
            if verdict == "read, CHANGED" or (not same and sums.exists()):
                faults.append(f"{what}: other tensors were read without a word")
        except LdmError as error:
            verdict = "refused"
            if "\n" in str(error) or len(str(error)) > 300:
                faults.append(f"{what}: {str(error)!r:.400}")
        except Exception as error:  # what is looked for
            verdict = "another error"
            faults.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
        counts[f"{file.suffix[1:]}, {where}: {verdict}"] += 1
        if time.perf_counter() - started > 10:
            faults.append(f"{what}: {time.perf_counter() - started:.0f} s")
        _replace(file, before)
        sums.unlink(missing_ok=True)
    watching.clear()
    return counts, faults + [f"ran {event}" for event in ran]


def done(results: Path | None, mutations: int) -> dict[int, dict[str, Any]]:
    """The rows of the pieces of so many mutations that are done, by their seeds; a last line that was cut off is none."""
    rows = {}
    for line in results.read_text().splitlines() if results is not None and results.is_file() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            rows |= {row["seed"]: row} if row["mutations"] == mutations else {}
    return rows


def pieces(sound: Callable[[Path], list[Seed]], seeds: range, mutations: int, results: Path | None) -> list[dict[str, Any]]:
    """The rows of all pieces, those that were not done run now and each written as it is finished."""
    rows = done(results, mutations)
    for seed in seeds:
        if seed not in rows:
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as place:
                counts, faults = run(sound(Path(place)), mutations, seed)
            took = round(time.perf_counter() - began, 1)
            rows[seed] = {"seed": seed, "mutations": mutations, "faults": faults, "counts": dict(counts), "seconds": took}
            if results is not None:
                whole = results.read_text() if results.is_file() else ""
                with results.open("a") as file:
                    file.write("\n" * bool(whole and not whole.endswith("\n")) + json.dumps(rows[seed]) + "\n")
    return [rows[seed] for seed in seeds]


def summary(rows: list[dict[str, Any]]) -> str:
    """One line on all pieces."""
    counts = sum((Counter(row["counts"]) for row in rows), Counter[str]())
    refused = sum(count for name, count in counts.items() if name.endswith(": refused"))
    total, seconds = sum(row["mutations"] for row in rows), sum(row["seconds"] for row in rows)
    faults = sum(len(row["faults"]) for row in rows)
    return (
        f"{total} mutations of {len(rows)} seed(s): {refused} refused, {total - refused} read, {faults} faults, {seconds:.0f} s"
    )


def main() -> None:
    """Damage, read, count; exit 1 where there was a fault."""
    import fuzz_seeds

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--mutations", type=int, default=1000, help="of each seed")
    p.add_argument("--seeds", default="0", metavar="A-B")
    p.add_argument("--results", type=Path, metavar="FILE.jsonl")
    args = p.parse_args()
    first, _, last = args.seeds.partition("-")
    rows = pieces(fuzz_seeds.sound, range(int(first), int(last or first) + 1), args.mutations, args.results)
    for name, count in sorted(sum((Counter(row["counts"]) for row in rows), Counter[str]()).items()):
        print(f"{count:6} {name}")
    print(*(f"seed {row['seed']}, {fault}" for row in rows for fault in row["faults"]), summary(rows), sep="\n")
    sys.exit(any(row["faults"] for row in rows))


if __name__ == "__main__":
    main()
