"""Plant wrong formulas in a copy of the package, one at a time, and see whether its tests fail (docs/results/slips.md).

python scripts/slips.py                                # all of scripts/slips.toml, about ten minutes of a core
python scripts/slips.py --group editing --output /tmp/look
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from measuring import ROOT, kept, write

FOLDERS = {"restoration": "restore", "editing": "editing"}  # of ldm_pipe, by group
PARTS = ("ldm_pipe", "train", "tests", "configs", "scripts", "pyproject.toml")
LONG = 600  # seconds after which tests that hang have failed


def planted(root: Path, file: Path, old: str, new: str, tests: list[str]) -> str:
    """The first test that fails with `new` in the place of `old`; "" where all pass. The file is put back."""
    path = root / file
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise SystemExit(f"error: {file} holds {old!r} {text.count(old)} times; a slip takes a text that stands there once")
    path.write_text(text.replace(old, new), encoding="utf-8")
    try:
        return first_failing(root, tests)
    finally:
        path.write_text(text, encoding="utf-8")


def first_failing(root: Path, tests: list[str]) -> str:
    """The first of the tests that fails in a copy of the project, "" where all pass."""
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", *tests]
    settings = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(words, cwd=root, env=settings, capture_output=True, text=True, timeout=LONG)
    except subprocess.TimeoutExpired:
        return "does not end"
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return "" if done.returncode == 0 else (failed or ["stops"])[0].split("[")[0]


def page(found: dict[str, dict[str, list[str]]]) -> str:
    """The results as Markdown."""
    caught = {group: sum(bool(test) for _, _, test in rows.values()) for group, rows in found.items()}
    count = sum(map(len, found.values()))
    lines = ["# Planted slips", "", f"{count} wrong formulas were planted one at a time (`python scripts/slips.py`); the tests"]
    lines += [f"failed with {sum(caught.values())} of them. The test named is the first that failed."]
    for group, rows in found.items():
        lines += ["", f"## {group}: {caught[group]} of {len(rows)}", "", "| file | slip | caught by |", "|---|---|---|"]
        lines += [f"| {file} | {says} | {test or '**not caught**'} |" for file, says, test in rows.values()]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=FOLDERS, help="of slips.toml; the other stays")
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="N", help="of the group; those before stay")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    args = parser.parse_args()
    groups: dict[str, Any] = tomllib.loads((ROOT / "scripts" / "slips.toml").read_text(encoding="utf-8"))
    found: dict[str, dict[str, list[str]]] = kept(args.output, "slips")
    with tempfile.TemporaryDirectory() as temp:
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, Path(temp) / part)
        for group in (g for g in groups if args.group in (None, g)):
            slips, tests = groups[group]["slips"], groups[group]["tests"]
            if test := first_failing(Path(temp), tests):
                raise SystemExit(f"error: {test} fails before anything is planted; mend it first")
            before = found.get(group, {})
            names = [f"{name}: {old}" for name, old, _, _ in slips]
            rows = found[group] = {name: before[name] for name in names if name in before}
            for name, old, new, says in slips[args.first :]:
                near = sorted(tests, key=lambda test: -(ROOT / test).read_text(encoding="utf-8").count(name))  # its own first
                test = planted(Path(temp), Path("ldm_pipe", FOLDERS[group], f"{name}.py"), old, new, near)
                rows[f"{name}: {old}"] = [f"{FOLDERS[group]}/{name}.py", says, test.removeprefix("tests/")]
                print(f"{name}: {says}: {test or 'NOT CAUGHT'}", flush=True)
                write(args.output, "slips", found, page(found))


if __name__ == "__main__":
    main()
