"""What every experiment's `main` shares: JAX settings, and errors as one line."""

import ctypes
import errno
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags

from unireg_jax.errors import STORAGE, USAGE, UserError, tell
from unireg_jax.registration.compilation_cache import use_compilation_cache

# What a disk refuses, and not a mistake in a path.
_STORAGE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.ESTALE,
)
# Of malloc.h: no block from the system for itself, none of the heap back to it, 64 MiB
# more than asked for each time. Not one heap for all threads (arena_max): they then
# wait for each other, and a step takes up to twice as long (docs/performance.md).
_MALLOC = {
    "mmap_max": (-4, 0),
    "trim_threshold": (-1, -1),
    "top_pad": (-2, 2**26),
}


def setup() -> None:
    """Compilation cache in the user's own folder, quiet libraries."""
    use_compilation_cache()
    logging.getLogger("jax").setLevel(logging.ERROR)
    # Orbax prints traces of errors that it then raises, and asyncio those of the arrays
    # that fail along with the first: they get one line from us.
    for name in ("absl", "orbax", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def keep_freed_memory() -> None:
    """Keeps freed memory for the next step of a process that takes the same again.

    XLA's CPU backend takes the buffers of every call from malloc. glibc gives large
    ones back to the system when they are freed, which clears each of their pages before
    the next call may have them: half the time of the local NCC at 192x192x160
    (docs/performance.md). Only the heap of the main thread can be kept, so programs run
    in the thread that calls them. What was the peak then stays with the process, so
    this is for training and timing, and is asked for before the first computation.
    Nothing where there is no glibc, or where the environment says how malloc is to
    work.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for option, value in _MALLOC.values():
            mallopt(option, value)
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def run(main: Callable[[list[str]], Any]) -> None:
    """`app.run`, with a mistake in flags or config as one line and exit code 2.

    Anything else that `main` raises is a fault of ours: its trace, exit code 1.
    """
    app.run(one_line_errors(main), flags_parser=one_line_errors(_parse_flags))


def one_line_errors(main: Callable[..., Any]) -> Callable[..., Any]:
    """Turns a UserError into one line on stderr and its exit code.

    So too what a disk refuses (6) and Ctrl-C (130): nothing that it would lose.
    """

    @functools.wraps(main)
    def wrapped(*args: Any) -> Any:
        try:
            return main(*args)
        except UserError as error:
            tell(f"error: {error.reason}: {error}")
            sys.exit(error.exit_code)
        except OSError as error:
            if error.errno not in _STORAGE:
                raise
            tell(
                f"error: storage: {error.filename or 'a file'}: {error.strerror}; free "
                "space or mend the disk, then run the same command again"
            )
            sys.exit(STORAGE)
        except KeyboardInterrupt:
            tell("stopped; run again to start again")
            sys.exit(128 + signal.SIGINT)

    return wrapped


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        program, *unknown = flags.FLAGS(argv)
        if "config" in flags.FLAGS:
            flags.FLAGS.config.keys()  # a file that is not there is told at first use
    # Not flags.Error alone: of an unknown config field comes ConfigDict's own error, of
    # a file that is not there an OSError.
    except (
        flags.Error,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OSError,
    ) as error:
        raise UserError(
            "schema", f"flags: {_brief(error)}; see --help", USAGE
        ) from error
    if unknown:
        raise UserError(
            "schema",
            f"flags: --name=value expected, got {' '.join(unknown)}; see --help",
            USAGE,
        )
    return [program]


def _brief(error: Exception) -> str:
    """What is wrong and with what: a message's ends, without the trace between them."""
    inner: Any = error
    while isinstance(inner, Exception) and inner.args:
        inner = inner.args[-1]  # an OSError's first is its number
    lines = [x.strip() for x in str(inner).splitlines() if x.strip()]
    return " ".join(dict.fromkeys([lines[0], lines[-1]])) if lines else repr(error)
