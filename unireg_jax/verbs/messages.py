"""What the person at the terminal reads, on stderr."""

import re
from collections.abc import Callable, Iterable

from unireg_jax.errors import Note, UserError, spelled_out, tell

_OF_FILE = re.compile(r"^(fixed|moving|(fixed|moving)_label|fixed_mask): ")


def progress(quiet: bool) -> Callable[[str], None]:
    """Prints one line per stage on stderr."""

    def say(line: str) -> None:
        if not quiet:
            tell(f"unireg: {one_line(line)}")

    return say


def warn(line: str) -> None:
    """Prints one line on stderr, --quiet or not: it is no progress."""
    tell(f"unireg: warning: {one_line(line)}")


def complain(message: str, code: int) -> int:
    tell(f"unireg: error: {one_line(message)}")
    return code


def with_reason(error: UserError) -> str:
    """The message, its reason code first unless it is already in it."""
    message = str(error)
    named = f"{error.reason}:" in message
    return message if named else f"{error.reason}: {message}"


def with_notes(message: str, error: BaseException) -> str:
    """The message, then each Note that its error has got."""
    notes = getattr(error, "__notes__", ())
    return "; ".join([message, *(n for n in notes if isinstance(n, Note))])


def one_line(text: str) -> str:
    """White space as single blanks, control characters spelled out."""
    return spelled_out(" ".join(str(text).split()))


def kinds(warnings: Iterable[str]) -> list[str]:
    """First words of warnings, once each: `fixed: hu_range: not ...` is hu_range."""
    lines = (_OF_FILE.sub("", line) for line in warnings)
    return list(dict.fromkeys(line.partition(":")[0] for line in lines))


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
