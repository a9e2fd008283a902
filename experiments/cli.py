"""What every experiment's `main` shares: JAX settings, and errors as one line."""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from unireg_jax.errors import UserError
from unireg_jax.registration.compilation_cache import use_compilation_cache


def setup() -> None:
    """Compilation cache in the user's own folder, quiet libraries."""
    use_compilation_cache()
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
