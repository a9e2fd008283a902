"""A command that is stopped takes along what it has started."""

import os
import signal
import subprocess
import sys
import time

import pytest

from experiments import processes
from unireg_jax.errors import PREEMPTED

# Says the number of a child, which would outlive it.
CODE = (
    "import subprocess, sys, time; "
    "print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
)


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet, has."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_command_out_of_time_is_ended_with_its_children(tmp_path):
    with open(tmp_path / "log.txt", "w+") as log:
        assert processes.exit_code([sys.executable, "-c", CODE], log, 6) is None
        log.seek(0)
        pid = int(log.read())
    for _ in range(200):
        if gone(pid):
            break
        time.sleep(0.05)
    assert gone(pid)


def test_output_exit_code_and_environment(tmp_path):
    words = [sys.executable, "-c", "import os; print(os.environ['SAID']); exit(3)"]
    with open(tmp_path / "log.txt", "w+") as log:
        assert processes.exit_code(words, log, 60, env=os.environ | {"SAID": "x"}) == 3
        log.seek(0)
        assert log.read() == "x\n"


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_stop_what_was_started_but_not_under_nohup(number, ignored, tmp_path):
    """The child is in a session of its own, which gets none of this one's signals."""
    code = (
        "import sys; from experiments import processes; processes.end_on_signals(); "
        "processes.exit_code([sys.executable, '-c', sys.argv[1]], sys.stdout, 60)"
    )
    # The suite itself may run under nohup.
    action = signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    with open(tmp_path / "log.txt", "w+") as log:
        try:
            parent = subprocess.Popen([sys.executable, "-c", code, CODE], stdout=log)
        finally:
            signal.signal(number, action)
        text = ""
        while not text.endswith("\n") and parent.poll() is None:
            time.sleep(0.05)
            text = (tmp_path / "log.txt").read_text()
        parent.send_signal(number)
        if ignored:
            with pytest.raises(subprocess.TimeoutExpired):
                parent.wait(0.5)
            parent.send_signal(signal.SIGINT)
        assert (parent.wait(60) == PREEMPTED) != ignored
    for _ in range(200):
        if gone(int(text)):
            break
        time.sleep(0.05)
    assert gone(int(text))
