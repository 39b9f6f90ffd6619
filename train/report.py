"""What a run leaves to be read: `report.html` with curves and pictures in one file, and a model card for the export."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_pipe import files

WIDE, HIGH = 720, 220  # of a curve, in pixels
STYLE = "body{font:15px/1.5 sans-serif;max-width:760px;margin:2em auto}svg{background:#f6f6f6}img{margin:2px}"


def write(output: Path, facts: Mapping[str, Any]) -> Path:
    """`report.html` of a run from its log.jsonl, its validation pictures and its facts. Nothing in it is fetched."""
    rows = _rows(output / "log.jsonl")
    names = sorted({n for r in rows for n, v in r.items() if isinstance(v, float)} - {"step", "samples_per_second"})
    curves = [_curve(n, [(r["step"], r[n]) for r in rows if n in r]) for n in names]
    judged = [(r["step"], r["validation"]) for r in rows if "validation" in r]
    bands = sorted({n for _, v in judged for n in v})
    curves += [_curve(n, [(step, v[n]) for step, v in judged if n in v]) for n in bands]
    table = "".join(f"<tr><td>{html.escape(k)}<td>{html.escape(_short(v))}" for k, v in facts.items())
    body = f"<h1>{html.escape(output.name)}</h1><table>{table}</table>{''.join(curves)}{_pictures(output / 'validation')}"
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(output.name)}</title><style>{STYLE}</style>{body}\n"
    return files.write(output / "report.html", page.encode(), replace=True)


def card(folder: Path, name: str, facts: Mapping[str, Any], steps: int) -> None:
    """README.md of an export: what it was trained from, on and how, in the form that model hubs read."""
    began = facts.get("task.model", "nothing")
    lines = ["---", "library_name: diffusers", "tags: [text-to-image, ldm_pipe]", "---", "", f"# {name}", ""]
    lines += [f"Trained by ldm_pipe, task {facts.get('task', '')}, begun with {began}, {steps} steps."]
    lines += ["", "| setting | value |", "|---|---|"]
    lines += [f"| {k} | {_short(v).replace('|', ' ')} |" for k, v in facts.items()]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _rows(log: Path) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _curve(name: str, points: Sequence[tuple[float, float]]) -> str:
    """A line through the points, its ends in words."""
    (first, last), values = (points[0][0], points[-1][0]), [v for _, v in points]
    low, high = min(values), max(values)
    places = [
        ((x - first) / max(last - first, 1e-12) * WIDE, HIGH - 10 - (y - low) / max(high - low, 1e-12) * (HIGH - 20))
        for x, y in points
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    line = f'<polyline points="{path}" fill="none" stroke="#246" stroke-width="1.5"/>'
    title = f"{html.escape(name)}: {values[0]:.4g} at step {first:g}, {values[-1]:.4g} at step {last:g}"
    return f'<h3>{title}</h3><svg width="{WIDE}" height="{HIGH}">{line}</svg>'


def _pictures(folder: Path) -> str:
    """A row of pictures for every validation."""
    found = ""
    for step in sorted(folder.glob("*")):
        shown = "".join(
            f'<img src="data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}" width="128">'
            for p in sorted(step.glob("*.png"))
        )
        found += f"<h3>step {int(step.name)}</h3>{shown}" if shown else ""
    return found
