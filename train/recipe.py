"""Recipes: TOML tables into a task and a job, strictly, with the file and line of whatever is wrong."""

from __future__ import annotations

import dataclasses
import importlib
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm_pipe import strict
from ldm_pipe.errors import LdmError, UsageError, unknown
from train.data.source import Fault

TASKS = {
    "codec": "train.tasks.codec:Codec",
    "clip": "train.tasks.clip:Clip",
    "parse": "train.tasks.parse:Parse",
    "latent": "train.tasks.latent:Latent",
    "vae": "train.tasks.vae:Vae",
    "finetune": "train.tasks.finetune:Finetune",
    "scratch": "train.tasks.scratch:Scratch",
    "lora": "train.tasks.lora:Lora",
    "textual_inversion": "train.tasks.textual_inversion:TextualInversion",
    "dreambooth": "train.tasks.dreambooth:Dreambooth",
    "custom_diffusion": "train.tasks.custom_diffusion:CustomDiffusion",
    "controlnet": "train.tasks.controlnet:ControlNet",
    "concat": "train.tasks.concat:Concat",
    "unclip": "train.tasks.unclip:Unclip",
}


def read(path: str, settings: Sequence[str] = ()) -> dict[str, Any]:
    """The tables of a recipe, with `table.key=value` settings written over them. Raises UsageError."""
    try:
        recipe = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path!r} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path!r} is not TOML: {error}") from error
    for setting in settings:
        key, equals, value = setting.partition("=")
        *tables, field = key.split(".")
        inner: Any = recipe
        for name in tables:
            inner = inner.get(name) if isinstance(inner, dict) else None
        if not (equals and tables and field and isinstance(inner, dict)):
            raise UsageError(f"--set {setting!r} is not of the form table.key=value with table in {', '.join(recipe)}")
        inner[field] = _list(value)
    return recipe


def _list(value: str) -> Any:
    """The list that a setting writes as TOML does, ["a", "b"]; anything else as it is."""
    try:
        return tomllib.loads(f"list = {value}")["list"] if value[:1] == "[" and value[-1:] == "]" else value
    except tomllib.TOMLDecodeError:
        return value  # a prompt may begin with a bracket


def task_class(recipe: dict[str, Any], where: str) -> type:
    """The class of the task that a recipe names. Raises UsageError with the nearest name."""
    name = recipe.get("task", {}).get("name") if isinstance(recipe.get("task"), dict) else None
    if name not in TASKS:
        raise UsageError(f"{where}: " + unknown("task", str(name), TASKS))
    module, _, cls = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def fields_of(cls: type, recipe: dict[str, Any], where: str) -> dict[str, Any]:
    """What the recipe gives the task: its [task] table, and the other tables as the fields of their names."""
    fields = {k: v for k, v in recipe["task"].items() if k != "name"}
    tables = {f.name for f in dataclasses.fields(cls) if typing.get_origin(_hint(cls, f.name)) is dict}
    for table, values in recipe.items():
        if table not in ("task", "job"):
            if table not in tables:
                raise UsageError(f"{where}: " + unknown("table of this recipe", table, {"task", "job", *tables}))
            fields[table] = values
    return fields


def build(recipe: dict[str, Any], where: str) -> tuple[Any, Any]:
    """(task, job) of a recipe. Raises UsageError."""
    from train.job import Job

    cls = task_class(recipe, where)
    job = strict.build(Job, recipe.get("job", {}), f"{where} [job]")
    return strict.build(cls, fields_of(cls, recipe, where), f"{where} [task]"), job


def faults(recipe: dict[str, Any], where: str) -> list[Fault]:
    """Every unknown key, missing one and wrong value of a recipe, each with its line."""
    from train.job import Job

    try:
        cls = task_class(recipe, where)
        given = fields_of(cls, recipe, where)
    except UsageError as error:
        return [Fault(line_of(where, "task", "name"), str(error).removeprefix(f"{where}: "))]
    found = _of_table(cls, {k: v for k, v in given.items() if k in recipe["task"]}, "task", where, {*recipe} - {"task"})
    found += _of_table(Job, recipe.get("job", {}), "job", where)
    for table, inner in cls.TABLES.items():  # type: ignore[attr-defined]
        if table in given:
            found += _of_table(inner, given[table], table, where)
    if not found:
        try:
            build(recipe, where)
        except LdmError as error:
            found.append(Fault(where, str(error)))
    return found


def _of_table(cls: type, values: dict[str, Any], table: str, where: str, given: set[str] | None = None) -> list[Fault]:
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    found = []
    for name, value in values.items():
        try:
            if name not in fields:
                raise UsageError(unknown(f"field of [{table}]", name, fields))
            strict.coerce(value, hints[name], name)
        except UsageError as error:
            found.append(Fault(line_of(where, table, name), str(error)))
    required = (n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)
    missing = [n for n in required if n not in values and n not in (given or set())]
    return found + [Fault(line_of(where, table, ""), f"[{table}] needs {name}") for name in missing]


def line_of(config: str, table: str, key: str) -> str:
    """ "file.toml:12", the line where a table's key (or, without one, the table) stands; the file alone if it does not."""
    inside, found = "", 0
    try:
        lines = Path(config).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return config
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text.startswith("["):
            inside = text.strip("[").split("]")[0].strip()
            found = number if inside == table and not key else found
        elif inside == table and key and text.partition("=")[0].strip() == key:
            found = number
    return f"{config}:{found}" if found else config


def _hint(cls: type, name: str) -> Any:
    return typing.get_type_hints(cls)[name]
