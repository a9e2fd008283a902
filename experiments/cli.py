"""What every experiment's `main` shares: JAX settings, and errors as one line."""

import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from unireg_jax.errors import UserError


def setup() -> None:
    """Compilation cache in the user's own folder, quiet libraries."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(cache) / "unireg_jax/xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    for name in ("absl", "orbax", "jax"):
        logging.getLogger(name).setLevel(logging.ERROR)


def one_line_errors(main: Callable[..., Any]) -> Callable[..., Any]:
    """Turns a UserError into one line on stderr and its exit code."""

    @functools.wraps(main)
    def wrapped(*args: Any) -> Any:
        try:
            return main(*args)
        except UserError as error:
            print(f"error: {error.reason}: {error}", file=sys.stderr)
            sys.exit(error.exit_code)

    return wrapped
