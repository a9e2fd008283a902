"""Settings that every experiment shares."""

import ctypes
import os
import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys
import jax
from experiments import cli
if "keep" in sys.argv:
    cli.keep_freed_memory()
def steps(n):
    zeros = jax.numpy.zeros(2**24)
    return jax.lax.fori_loop(0, n, lambda i, x: x + i, zeros).sum()
program = jax.jit(steps)
for n in range(12):
    if n == 2:  # the first rounds bring in what stays
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(2).block_until_ready()  # 64 MiB of scratch, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)
def test_freed_memory_is_kept_unless_the_environment_says_how():
    def faults(*words, **more):
        environment = {
            k: v
            for k, v in os.environ.items()
            if "MALLOC" not in k and k != "GLIBC_TUNABLES"
        }
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, *words],
            env=environment | more,
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)

    plain, kept = faults(), faults("keep")
    told = faults("keep", GLIBC_TUNABLES="glibc.malloc.tcache_count=7")
    assert kept < 0.3 * plain < 0.6 * told
