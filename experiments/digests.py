"""Digests of sources: whether a figure that was measured once is still of this code."""

import ast
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

LIBRARY = Path(__file__).resolve().parents[1] / "unireg_jax"


def of(files: Sequence[Path]) -> str:
    """SHA-256 of files, as hexadecimal digits; of Python files without comments.

    Args:
        files: in the order given; their names do not count.
    """
    whole = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        whole.update(_meaning(content) if path.suffix == ".py" else content)
    return whole.hexdigest()


def sources(*rooms: Path) -> list[Path]:
    """All sources in folders, such as that of the package."""
    return sorted(path for room in rooms for path in room.rglob("*.py"))


def imported(modules: Sequence[ModuleType]) -> list[Path]:
    """Sources of modules of the package, and of what these import of it.

    Args:
        modules: of the package.
    """
    found: set[Path] = set()
    todo = [module.__name__ for module in modules]
    while todo:
        path = LIBRARY.joinpath(*todo.pop().split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path in found or not path.is_file():  # or a name within a module
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.level:
                raise ValueError(f"{path} must import by whole names alone")
            if node.module.split(".")[0] == LIBRARY.name:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                todo += [node.module, *names]
    return sorted(found)


def _form(node: Any) -> Any:
    """A tree without what only some versions of Python put into it."""
    if isinstance(node, list):
        return [_form(each) for each in node]
    if not isinstance(node, ast.AST):
        return node
    fields = ((name, _form(value)) for name, value in ast.iter_fields(node))
    return type(node).__name__, [(n, v) for n, v in fields if v not in (None, [])]


@functools.cache  # several digests are of the same library
def _meaning(content: bytes) -> bytes:
    tree = ast.parse(content)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant):
                del body[0]
    return repr(_form(tree)).encode()
