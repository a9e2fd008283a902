"""A command that is stopped takes along what it has started."""

import os
import sys
import time

from experiments import processes

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
        assert processes.exit_code([sys.executable, "-c", CODE], log, 2) is None
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
