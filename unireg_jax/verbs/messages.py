"""What the person at the terminal reads, on stderr."""

import sys
from collections.abc import Callable

from unireg_jax.errors import UserError, spelled_out


def progress(quiet: bool) -> Callable[[str], None]:
    """Prints one line per stage on stderr."""

    def say(line: str) -> None:
        if not quiet:
            print(f"unireg: {one_line(line)}", file=sys.stderr, flush=True)

    return say


def complain(message: str, code: int) -> int:
    print(f"unireg: error: {one_line(message)}", file=sys.stderr, flush=True)
    return code


def with_reason(error: UserError) -> str:
    """The message, its reason code first unless it is already in it."""
    message = str(error)
    named = f"{error.reason}:" in message
    return message if named else f"{error.reason}: {message}"


def one_line(text: str) -> str:
    """White space as single blanks, control characters spelled out."""
    return spelled_out(" ".join(str(text).split()))


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
