"""UniReg in JAX: one network that registers CT of any body region, led by a task."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """`__version__`, looked up when it is asked for."""
    if name == "__version__":
        return importlib.import_module("unireg_jax.verbs.versions").version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
