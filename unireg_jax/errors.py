"""Faults that a user can mend, each with one line, a reason code and an exit code.

The line says what, where, expected, got, remedy. Anything else that escapes is a fault
of ours: exit code 1.
"""

import os
import sys

INTERNAL = 1  # a fault of ours
USAGE = 2  # usage, configuration, manifest: found before any work
NOTHING = 3  # nothing to do, no valid input
FAILED = 4  # every item failed
PARTLY = 5  # some items done, some failed
STORAGE = 6  # full, read-only, I/O error
LIMIT = 7  # memory, time or size limit
NUMERICAL = 8  # non-finite loss, parameters or field
CHECKPOINT = 9  # checkpoint or weights unusable
DATA_CHANGED = 10  # data changed since the run began
PREEMPTED = 75  # state saved; run the same command again


def on_terminal() -> bool:
    """Whether someone may be watching stderr, which is None where it was closed."""
    return sys.stderr is not None and sys.stderr.isatty()


def shown(path: str | os.PathLike) -> str:
    """Gives a path as one printable line, whatever bytes its name holds.

    Args:
        path: any path.

    Returns:
        The path itself, or its ASCII spelling with escapes.
    """
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)


def spelled_out(text: str) -> str:
    """Gives text without characters that a terminal would act on.

    Args:
        text: any text, such as a message that holds names of others' choosing.

    Returns:
        The text, control characters but line feeds as escapes.
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class UserError(Exception):
    """A fault the user can mend.

    Args:
        reason: code from the closed list in docs/errors.md, such as `truncated`.
        message: one line: what, where, expected, got, remedy.
        exit_code: one of the constants above; FAILED for a bad input file.
    """

    def __init__(self, reason: str, message: str, exit_code: int = FAILED):
        super().__init__(message)
        self.reason = reason
        self.exit_code = exit_code

    def __reduce__(self):
        # An exception is rebuilt from its args; a worker process needs all three.
        return type(self), (self.reason, str(self), self.exit_code)


class Note(str):
    """A note on an exception (PEP 678) for the user; those of others are not."""


def bad_file(
    path: object,
    reason: str,
    expected: str,
    got: str,
    remedy: str,
    exit_code: int = FAILED,
) -> UserError:
    """Makes the UserError of a file that is not as expected.

    Args:
        path: of the file, or what names it.
        reason, exit_code: see UserError.
        expected: what should be there.
        got: what is.
        remedy: what to do.

    Returns:
        UserError, `path: reason: expected ..., got ...; remedy`.
    """
    line = f"{shown(path)}: {reason}: expected {expected}, got {got}; {remedy}"
    return UserError(reason, line, exit_code)


def of_item(error: Exception) -> UserError:
    """Makes the UserError of whatever ended one item of a list: it stops no other.

    Args:
        error: any.

    Returns:
        A UserError itself; of others `out_of_memory` or `internal`, without their text,
        which may be a file's.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, MemoryError):
        line = "more is needed than there is; crop the scans or use a larger machine"
        return UserError("out_of_memory", f"out_of_memory: {line}", LIMIT)
    line = "a fault of this program; run it alone for a trace, and please report it"
    return UserError("internal", f"internal: {type(error).__name__}, {line}", INTERNAL)


def tell(line: str) -> None:
    """Prints on stderr, as `spelled_out`: what warns of a fault, or ends a run.

    If that is a file of a full disk, nothing more is told.

    The exit code stays what it is: Python's own would be 1, or 120 for what is still to
    be written when it ends.
    """
    if sys.stderr is None:  # print would take stdout, which is for data
        return
    try:
        print(spelled_out(line), file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
