"""The house rules, read from the source: imports, sizes, types, documentation. New files join by themselves."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm_pipe import registry

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for package in ("ldm_pipe", "train") for p in (ROOT / package).rglob("*.py"))
OURS = [p for p in SOURCES if p.relative_to(ROOT).parts[0] == "ldm_pipe"]
CORE = ("level", "path", "prediction", "cond", "model", "noise", "walk", "levels")
# A file imports only files of a lower rank; a file that is not named here is a method, rank 5.
METHOD = 5
LAYERS = {
    0: "errors",
    1: "configs emphasis files flags float8 image level level_file lora_delta prompt samplewise settings single_others strict",
    2: "backends cond expansion families first_names flow_names grammar hub levels noise path prediction "
    "registry residuals result runge_kutta tokens windows",
    3: "ahead attention calls codec inputs listing model offload restore.spectrum reuse schedule text vision weights",
    4: "blocks one_step parts patch perturb prepare restore.operator walk",
    6: "analysis.efficiency channels loading lora_fused lora_names memory wording",
    7: "lora plan",
    8: "doors.picture_prompts doors.steering embedding looking.preview looking.record pipeline",
    9: "doors.adapters doors.controls doors.edit doors.hallucinations doors.hires doors.image_prompt doors.patches "
    "doors.restoration looking.attention_maps looking.doctor looking.flags looking.sweep",
    10: "batch looking.watch replay request",
    11: "check looking.compare",
    12: "arguments commands",
    13: "cli",
}
RANKS = {name: rank for rank, names in LAYERS.items() for name in names.split()}
# What others of the package wrap or are made of.
SIBLINGS = {
    "ldm_pipe.guidance.cfg", "ldm_pipe.networks.stages", "ldm_pipe.networks.unet", "ldm_pipe.editing.pairs",
    "ldm_pipe.editing.invert", "ldm_pipe.restore.latent", "ldm_pipe.networks.image_prompt",
    "ldm_pipe.editing.local_blend",  # which prompt-to-prompt may put around the sampler
}  # fmt: skip
HEAVY = {"torch", "numpy", "PIL", "diffusers", "transformers", "accelerate", "safetensors", "scipy"}
LONGEST_FILE, LONGEST_FUNCTION, MOST_ARGUMENTS = 250, 60, 8
OVER = {"train/world/grader.py": 279}  # may only shrink; leave this table when it is within the limit
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(p): p for p in SOURCES}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: no bodies of functions, nothing under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        checking = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        if not (checking or isinstance(child, Function | ast.Lambda)):
            yield child
            yield from at_import(child)


def imports(nodes: Iterator[ast.AST]) -> set[str]:
    """Full names of the modules that import statements name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {w if w in MODULES else str(node.module) for w in whole}
    return found


def rank(module: str) -> int:
    return RANKS.get(module.removeprefix("ldm_pipe."), METHOD)


def functions(path: Path) -> Iterator[tuple[Function, bool]]:
    """(function, is it a method) of a file, nested ones too."""
    methods = {id(f) for c in ast.walk(tree(path)) if isinstance(c, ast.ClassDef) for f in c.body}
    for node in ast.walk(tree(path)):
        if isinstance(node, Function):
            yield node, id(node) in methods


def arguments(function: Function, method: bool) -> list[ast.arg]:
    a = function.args
    found = [*a.posonlyargs, *a.args, *a.kwonlyargs, *(x for x in (a.vararg, a.kwarg) if x)]
    static = any(ast.unparse(d) == "staticmethod" for d in function.decorator_list)
    return found[1:] if method and not static else found


every = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
ours = pytest.mark.parametrize("path", OURS, ids=lambda p: str(p.relative_to(ROOT)))


@ours
def test_imports_point_one_way(path: Path) -> None:
    me = name_of(path)
    for other in imports(ast.walk(tree(path))):
        assert other.split(".")[0] != "train", f"{me} imports {other}"
        if other.startswith("ldm_pipe.") and other not in SIBLINGS:
            assert rank(other) < rank(me), f"{me} (rank {rank(me)}) imports {other} (rank {rank(other)})"
        if other in SIBLINGS and rank(me) == METHOD:
            assert me.rpartition(".")[0] == other.rpartition(".")[0], f"{me} imports {other}"


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_torch_numpy_and_itself(name: str) -> None:
    import sys

    for other in imports(ast.walk(tree(ROOT / "ldm_pipe" / f"{name}.py"))):
        top, _, rest = other.partition(".")
        assert top in {"torch", "numpy"} | set(sys.stdlib_module_names) or rest in {*CORE, "errors"}, other


@every
def test_heavy_libraries_are_imported_inside_functions(path: Path) -> None:
    found = {name.split(".")[0] for name in imports(at_import(tree(path)))}
    assert not found & {"diffusers", "transformers"}


@pytest.mark.parametrize("start", ["cli", "registry", "errors", "strict", "files", "settings", "guide", "recipe", "level_file"])
def test_what_answers_without_a_model_imports_no_torch(start: str) -> None:
    """Everything that its import reaches, the package itself included."""
    reached, todo = set(), {"ldm_pipe", f"ldm_pipe.{start}"}
    while todo:
        module = todo.pop()
        reached.add(module)
        found = imports(at_import(tree(MODULES[module])))
        assert not {f.split(".")[0] for f in found} & HEAVY, module
        todo |= {f for f in found if f in MODULES} - reached


@every
def test_nothing_runs_what_it_reads(path: Path) -> None:
    """No pickle, no eval, no shell, no code from a model's folder."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not imports(iter([node])) & {
                "pickle",
                "cPickle",
                "dill",
                "cloudpickle",
                "joblib",
                "marshal",
                "shelve",
            }
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {
                "eval",
                "exec",
                "compile",
                "__import__",
                "torch.load",
                "torch.save",
                "os.system",
                "os.popen",
            }
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert given.get("shell", "False") == "False"
            assert given.get("allow_pickle", "False") == "False"
            assert "trust_remote_code" not in given
        if isinstance(node, ast.Constant):
            assert node.value != "trust_remote_code"


@ours
def test_only_files_writes_files(path: Path) -> None:
    if path.name == "files.py":
        return
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).split(".")[-1]
            assert called not in {"write_text", "write_bytes", "mkdir", "makedirs", "save_file", "save_pretrained"}
            if ast.unparse(node.func) == "os.open":
                assert "O_CREAT" not in ast.unparse(node)
            elif called == "open":
                assert not {"w", "a", "x", "+"} & set("".join(ast.literal_eval(a) for a in node.args[1:2]))


@every
def test_everything_public_is_documented(path: Path) -> None:
    assert ast.get_docstring(tree(path)), "the module"
    for owner in [tree(path), *(c for c in tree(path).body if isinstance(c, ast.ClassDef))]:
        for node in owner.body:
            if isinstance(node, Function | ast.ClassDef) and (not node.name.startswith("_") or node.name == "__call__"):
                inside_private = isinstance(owner, ast.ClassDef) and owner.name.startswith("_")
                assert inside_private or ast.get_docstring(node), node.name


@every
def test_everything_is_typed(path: Path) -> None:
    for function, method in functions(path):
        assert function.returns is not None, function.name
        for argument in arguments(function, method):
            assert argument.annotation is not None, f"{function.name}: {argument.arg}"


@every
def test_sizes(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    allowed = OVER.get(str(path.relative_to(ROOT)), LONGEST_FILE)
    assert lines <= allowed
    assert allowed == LONGEST_FILE or lines > LONGEST_FILE, "within the limit now: take it out of OVER"
    for function, method in functions(path):
        assert function.end_lineno is not None
        assert function.end_lineno - function.lineno < LONGEST_FUNCTION, function.name
        assert len(arguments(function, method)) <= MOST_ARGUMENTS, function.name


@ours
def test_dataclasses_are_frozen_and_only_modules_write_an_init(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.ClassDef):
            continue
        marks = [ast.unparse(d) for d in node.decorator_list if "dataclass" in ast.unparse(d)]
        assert all("frozen=True" in m for m in marks), node.name
        if any(isinstance(f, Function) and f.name == "__init__" for f in node.body):
            bases = {ast.unparse(b).split(".")[-1] for b in node.bases}
            assert bases & {"Module"} or any(b.endswith(("Error", "Fault")) for b in bases), node.name


@pytest.mark.parametrize(("folder", "kinds"), [("samplers", ["sampler"]), ("guidance", ["rule", "guide"])])
def test_every_method_is_registered(folder: str, kinds: list[str]) -> None:
    files = {f"ldm_pipe.{folder}.{p.stem}" for p in (ROOT / "ldm_pipe" / folder).glob("*.py")} - {f"ldm_pipe.{folder}.__init__"}
    assert files == {target.partition(":")[0] for kind in kinds for target in registry.KINDS[kind].values()}


def texts() -> Iterator[Path]:
    installed = {config.parent for config in ROOT.glob("*/pyvenv.cfg")}  # a virtual environment, whatever its name
    for path in sorted(ROOT.rglob("*")):
        inside = path.relative_to(ROOT).parts
        hidden = any(p.startswith(".") or p in {"runs", "outputs", "build", "dist", "__pycache__"} for p in inside)
        if not (hidden or installed & {*path.parents}) and path.suffix in {".py", ".toml", ".md", ".txt", ".yml"}:
            yield path


def test_nothing_is_left_to_do() -> None:
    """No notes to oneself and no folders of one machine."""
    words = ["TO" + "DO", "FIX" + "ME", "XX" + "X", "/ro" + "ot/", "/wo" + "rk/"]
    for path in texts():
        text = path.read_text(encoding="utf-8")
        assert not [w for w in words if w in text], path
