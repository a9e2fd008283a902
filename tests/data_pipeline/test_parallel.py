"""Workers live no longer than their parent."""

import contextlib
import os
import signal
import subprocess
import sys

PARENT = """
from data_pipeline import parallel

code = "import time; print('up', flush=True); time.sleep(600)"
list(parallel.run(exec, [code, code], 2, died=print))
"""


def test_workers_end_with_a_parent_that_is_killed():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert [parent.stdout.readline() for _ in range(2)] == 2 * [b"up\n"]
        parent.kill()
        # The pipe ends when no process holds it any more.
        parent.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
