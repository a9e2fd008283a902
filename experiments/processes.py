"""A command in a process of its own, which is stopped with all that it started."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unireg_jax.errors import PREEMPTED


def end_on_signals() -> None:
    """SIGTERM and SIGHUP act as an interrupt does: what was started is stopped."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as of SIGHUP under nohup
            signal.signal(number, lambda *_: sys.exit(PREEMPTED))


def exit_code(
    words: list[str],
    file: Any,
    limit_s: float,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> int | None:
    """Runs a command, which gets no signal of this process's group.

    Args:
        words: the command.
        file: open for writing; takes both of its outputs.
        limit_s: how long it may take.
        cwd: its working folder; None for this process's.
        env: its environment; None for this process's.

    Returns:
        Its exit code, or None if it had to be stopped.
    """
    process = subprocess.Popen(
        words,
        cwd=cwd,
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
