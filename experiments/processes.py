"""A command in a process of its own, which ends with all that it started."""

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]


def exit_code(
    words: list[str], file: Any, limit_s: float, env: Mapping[str, str] | None = None
) -> int | None:
    """Runs a command in the checkout.

    Args:
        words: the command.
        file: open for writing; takes both of its outputs.
        limit_s: how long it may take.
        env: its environment; None for this one's.

    Returns:
        Its exit code, or None if it had to be stopped.
    """
    process = subprocess.Popen(
        words,
        cwd=_ROOT,
        env=env,
        stdout=file,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(limit_s)
    except BaseException as error:  # an interrupt must not leave it running, either
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise
