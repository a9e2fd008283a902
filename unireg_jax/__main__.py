"""`python -m unireg_jax <verb>`: the command line.

Data goes to stdout, everything else to stderr. A user's mistake is one line and an exit
code of unireg_jax/errors.py; anything else is our fault and exit code 1.
"""

import argparse
import contextlib
import difflib
import errno
import importlib
import os
import re
import signal
import sys
import tempfile
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path

from unireg_jax.errors import LIMIT, STORAGE, USAGE, UserError, shown
from unireg_jax.verbs import versions
from unireg_jax.verbs.messages import complain, one_line, with_notes, with_reason

# Verb -> its line in --help: the module of that name is imported only when called. A
# test compares the lines with the modules'.
VERBS = {
    "register": "one pair of scans -> transform and warped image",
    "batch": "a list of pairs -> transforms and warped images",
    "report": "a page to look at, for a case or for a batch",
    "sweep": "one pair under every task and pair type: similarity against folding",
    "evaluate": "metrics of any transform",
    "warp": "a scan or labels through a transform",
    "warp-points": "points through a transform",
    "invert": "the transform back, and how well it leads back",
    "compose": "several transforms as one",
    "convert": "a transform in the spelling of another tool",
    "check-transform": "what a transform file holds and what is wrong with it",
    "jacobian": "map and statistics of local volume change",
    "export": "the network as a StableHLO file",
    "weights": "convert, list and verify weights",
    "doctor": "checks versions, devices and weights, and registers a test pair",
    "info": "version, tasks and weights",
}
_INTERNAL = 1
# Files that we write say `storage` by themselves: these are of stdout.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def main(argv: list[str] | None = None) -> int:
    """Runs one verb.

    Args:
        argv: arguments without the program's name; None for the process's own.

    Returns:
        Exit code of unireg_jax/errors.py, 0 when all was done.

    Raises:
        SystemExit: 0 after --help and --version, 2 for a wrong command line.
    """
    # Before JAX is imported: with a warm compilation cache XLA reports as an error, for
    # every program, that `prefer-no-gather` is no feature of this CPU.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    argv = sys.argv[1:] if argv is None else argv
    args = _parse([_dashes(word) for word in argv])
    try:
        with _terminable():
            code = args.run(args)
            # Now, not at exit, where Python would say what nobody can read.
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
    except UserError as error:
        return complain(with_notes(with_reason(error), error), error.exit_code)
    except KeyboardInterrupt as error:
        line = with_notes("interrupted: no file is half written", error)
        return complain(line, 128 + signal.SIGINT)
    except BrokenPipeError:
        # Who read stdout has left: nothing more to say to them.
        _drop_stdout()
        return STORAGE
    except Exception as error:  # the one place where all else ends
        if isinstance(error, OSError) and error.errno in _FULL:
            _drop_stdout()
            return complain(with_notes(f"storage: {error.strerror}", error), STORAGE)
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            line = (
                "out_of_memory: more is needed than this machine has; crop the scans "
                "or use a larger machine"
            )
            return complain(with_notes(line, error), LIMIT)
        return _internal(error, args)


# --- command line -------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Takes options by their whole names alone; complains in one line."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        line = f"unireg: error: {one_line(message)}; see `{self.prog} --help`\n"
        self.exit(USAGE, line)


def _parse(words: list[str]) -> argparse.Namespace:
    """Arguments, of the one verb that is called."""
    parser = _Parser(
        prog="unireg", description="Registers CT scans of any body region."
    )
    parser.add_argument(
        "--version", action="version", version=f"unireg {versions.version()}"
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    called = next((word for word in words if not word.startswith("-")), None)
    speaker: argparse.ArgumentParser = parser
    for name, line in VERBS.items():
        verb = verbs.add_parser(name, help=line)
        if name == called:
            module = importlib.import_module(
                f"unireg_jax.verbs.{name.replace('-', '_')}"
            )
            module.add_arguments(verb)
            verb.set_defaults(run=module.run)
            speaker = verb
    args, unknown = parser.parse_known_args(words)
    if unknown:
        what = f"unrecognized arguments: {' '.join(unknown)}"
        speaker.error(what + _hint(speaker, unknown[0]))
    return args


def _hint(parser: argparse.ArgumentParser, word: str) -> str:
    """The option that was probably meant."""
    name = word.partition("=")[0]
    if name == "--inverse":  # the beginning of --inverse-consistency, another thing
        return "; the map back: --write-inverse of register and batch, or unireg invert"
    known = re.findall("--[a-z][a-z0-9-]+", parser.format_help())
    close = [option for option in known if option.startswith(name)]
    # Below 0.82 the nearest option means another thing.
    close = close or difflib.get_close_matches(name, known, 1, 0.82)
    return f"; did you mean {close[0]}?" if close else ""


def _dashes(word: str) -> str:
    """--fixed_label is --fixed-label."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


# --- ends ---------------------------------------------------------------------------


def _drop_stdout() -> None:
    """What still waits for it goes nowhere, also at exit."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _internal(error: Exception, args: argparse.Namespace) -> int:
    """A fault of ours: one line for the user, the trace in a file."""
    trace = "".join(traceback.format_exception(error))
    if args.debug:
        sys.stderr.write(trace)
    name = f"unireg-error-{uuid.uuid4().hex[:8]}.log"
    where = "no log could be written"
    # --out of a verb that writes into a folder; one that writes a file calls it `file`.
    for place in (lambda: getattr(args, "out", None), tempfile.gettempdir):
        with contextlib.suppress(OSError):  # there may be no folder for such files
            if (folder := place()) is None:
                continue
            Path(folder).mkdir(parents=True, exist_ok=True)
            # "x": a new file, never one that waits under the name, link or not.
            with open(Path(folder) / name, "x", encoding="utf-8") as file:
                file.write(trace)
            where = f"trace in {shown(Path(folder) / name)}"
            break
    line = (
        f"internal: {type(error).__name__}, a fault of this program; {where}; please "
        "report it"
    )
    return complain(with_notes(line, error), _INTERNAL)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds like an exception, so that temporary files are removed."""

    def leave(number, frame):
        raise SystemExit(128 + number)

    try:
        previous = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread: its owner handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
