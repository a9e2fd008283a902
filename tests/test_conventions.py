"""The import direction between the rooms, read from every file."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from unireg_jax.__main__ import VERBS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "unireg_jax"
# What each room may import of the project, besides itself. `tasks` and `errors` are the
# vocabulary below all of them.
ALLOWED = {
    "unireg_jax.tasks": set(),
    "unireg_jax.errors": set(),
    "unireg_jax.locks": set(),
    "unireg_jax.manifest": set(),
    "unireg_jax.png": set(),
    "unireg_jax.ops": set(),
    "unireg_jax.imaging": set(),
    "unireg_jax.evaluation": {"unireg_jax.imaging"},
    "unireg_jax.models": {"unireg_jax.ops"},
    "unireg_jax.registration": {
        "unireg_jax.ops",
        "unireg_jax.models",
        "unireg_jax.imaging",
        "unireg_jax.evaluation",
    },
    "unireg_jax.training": {
        "unireg_jax.ops",
        "unireg_jax.models",
        "unireg_jax.registration",
        "unireg_jax.png",
    },
    "unireg_jax.verbs": {
        "unireg_jax.locks",
        "unireg_jax.manifest",
        "unireg_jax.imaging",
        "unireg_jax.evaluation",
        "unireg_jax.registration",
        "unireg_jax.reports",
    },
    "unireg_jax.reports": {
        "unireg_jax.imaging",
        "unireg_jax.evaluation",
        "unireg_jax.png",
    },
    "unireg_jax.__main__": {"unireg_jax.verbs"},
    "unireg_jax.__init__": set(),
    "unireg_jax.weights": set(),
    "data_pipeline": {
        "unireg_jax.locks",
        "unireg_jax.manifest",
        "unireg_jax.imaging",
    },
    "experiments": {
        "unireg_jax.manifest",
        "unireg_jax.ops",
        "unireg_jax.imaging",
        "unireg_jax.models",
        "unireg_jax.evaluation",
        "unireg_jax.registration",
        "unireg_jax.training",
        "data_pipeline",
    },
}
VOCABULARY = {"unireg_jax.tasks", "unireg_jax.errors", "unireg_jax"}
# Host rooms: importing them must not pull in JAX.
HOST = {
    "unireg_jax.imaging",
    "unireg_jax.evaluation",
    "unireg_jax.reports",
    "unireg_jax.verbs",
    "unireg_jax.locks",
    "unireg_jax.manifest",
    "unireg_jax.png",
    "unireg_jax.tasks",
    "unireg_jax.errors",
    "data_pipeline",
}


def _files():
    folders = (PACKAGE, "data_pipeline", "experiments")
    return [p for f in folders for p in sorted((ROOT / f).rglob("*.py"))]


def _room(module: str) -> str:
    """`unireg_jax.ops.warp` -> `unireg_jax.ops`; `data_pipeline.loader` -> its top."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == PACKAGE else parts[0]


def _imports(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                # `from unireg_jax.ops import warp` imports a module, not a name.
                joined = f"{node.module}.{alias.name}"
                path = ROOT / joined.replace(".", "/")
                module = path.with_suffix(".py").is_file() or path.is_dir()
                modules.add(joined if module else node.module)
    return modules


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    room = _room(module)
    assert room in ALLOWED, f"{room} is not a room: add it to the map"
    for imported in _imports(path):
        top = imported.split(".")[0]
        if top in ("jax", "flax", "optax", "orbax"):
            assert room not in HOST, f"{module} is host side and imports {imported}"
        if top not in (PACKAGE, "data_pipeline", "experiments", "tests"):
            continue
        target = _room(imported)
        allowed = ALLOWED[room] | VOCABULARY | {room}
        assert target in allowed, f"{module} imports {imported}"


def test_rooms_have_no_import_cycles():
    graph = {}
    for path in _files():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[module.removesuffix(".__init__")] = _imports(path)
    state = {}

    def visit(module, trail):
        if state.get(module) == "done":
            return
        assert state.get(module) != "open", f"cycle: {' -> '.join([*trail, module])}"
        state[module] = "open"
        for target in graph[module] & graph.keys():
            visit(target, [*trail, module])
        state[module] = "done"

    for module in graph:
        visit(module, [])


def test_faults_are_told_in_one_way():
    """By `errors.tell`: `print` would end a run whose stderr is on a full disk."""
    found = []
    for path in _files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                said = " ".join(ast.unparse(arg) for arg in node.args)
                said = re.sub(r"^f?['\"]", "", said)
                words = ("warning", "error", "failed", "interrupted", "stopped")
                if said.startswith(words):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found


def test_every_verb_has_a_module_and_its_line():
    modules = {p.stem for p in (ROOT / PACKAGE / "verbs").glob("*.py")}
    shared = {"__init__", "journal", "messages", "options", "outputs", "results"}
    shared |= {"files", "judging", "ray_job", "versions", "worker"}
    assert modules - shared == {name.replace("-", "_") for name in VERBS}
    for name, line in VERBS.items():
        module = importlib.import_module(f"unireg_jax.verbs.{name.replace('-', '_')}")
        assert line == module.HELP
