"""Several processes as one run: who takes part, what they must agree on, when to stop.

Each process is the same command; JAX finds the others (docs/launch.md). One process is
the common case: then nothing here costs anything.
"""

import contextlib
import hashlib
import importlib.metadata
import math
import os
import platform
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unireg_jax.errors import DATA_CHANGED, USAGE, UserError, tell
from unireg_jax.registration import memory
from unireg_jax.training import checkpoint

# Number of processes, as launchers state it.
_COUNTS = ("JAX_NUM_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_ROOMS = ("unireg_jax", "data_pipeline", "experiments")


def begin(*, watchdog_s: int) -> None:
    """Joins the other processes, if there are any; before anything is computed.

    SLURM and Open MPI are detected by JAX. Elsewhere JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say who is who.

    Args:
        watchdog_s: a process that was not heard of for so long counts as dead, which
            ends the others.

    Raises:
        UserError: `schema`, exit code 2: the environment does not say who is who, or
            not all came.
    """
    given = [name for name in _COUNTS if name in os.environ]
    if not given or os.environ[given[0]] == "1":
        return
    numbers = {}
    try:
        if given[0] == "JAX_NUM_PROCESSES":
            numbers = {
                "num_processes": int(os.environ["JAX_NUM_PROCESSES"]),
                "process_id": int(os.environ["JAX_PROCESS_ID"]),
                "coordinator_address": os.environ["JAX_COORDINATOR_ADDRESS"],
            }
        jax.distributed.initialize(**numbers, heartbeat_timeout_seconds=watchdog_s)
        # While none is busy: on CPUs the first to come gives up after 30 s.
        wait("begin")
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            "schema",
            f"processes: {os.environ[given[0]]} expected by {given[0]}, but they did "
            f"not meet ({str(error).splitlines()[0]}); see docs/launch.md",
            USAGE,
        ) from error


def is_first() -> bool:
    """The process that writes logs, config and weights."""
    return jax.process_index() == 0


def wait(what: str) -> None:
    """Goes on when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """All processes go on past it, or all leave with the exit code of one that failed.

    Nothing in it may wait for the others, who would wait for ever for one that failed.

    Args:
        what: is to be ready, for the message.

    Raises:
        UserError: in those that did not fail themselves.
    """
    code = 1  # of whatever is no UserError
    try:
        yield
        code = 0
    except UserError as error:
        code = error.exit_code
        raise
    finally:
        codes = multihost_utils.process_allgather(np.int32(code))  # [processes]
        if code == 0 and codes.any():
            failed = int(np.flatnonzero(codes)[0])
            raise UserError(
                "worker_died",
                f"processes: {what} ready in all expected, process {failed} failed; "
                "mend what it said",
                int(codes[failed]),
            )


@contextlib.contextmanager
def first_alone(what: str) -> Iterator[None]:
    """The first process goes through, then the others; see `together`."""
    with together(what):
        if is_first():
            with together(what):
                yield
        else:
            with together(what):
                pass  # the first is through
            yield


def compare(config: Any, data_digest: str) -> None:
    """Refuses processes that do not run the same.

    Args:
        config: ConfigDict of the run.
        data_digest: of the prepared data.

    Raises:
        UserError: in every process; exit code 2 when config or code differ (`schema`),
            10 when the data do (`checksum`).
    """
    if jax.process_count() == 1:
        return
    drawn = checkpoint.flat(config.to_dict())
    drawn.pop("data.root")  # a path; its content is compared
    mine = {
        "config": hashlib.sha256(repr(sorted(drawn.items())).encode()).hexdigest(),
        "code": code_digest(),
        "data": hashlib.sha256(data_digest.encode()).hexdigest(),
    }
    rows = np.array([list(bytes.fromhex(x)) for x in mine.values()], np.int32)
    every = multihost_utils.process_allgather(rows)  # [processes, 3, 32]
    for i, what in enumerate(mine):
        other = [p for p, rows in enumerate(every) if (rows[i] != every[0, i]).any()]
        if other:
            shown = bytes(every[other[0], i].astype(np.uint8)).hex()[:16]
            expected = bytes(every[0, i].astype(np.uint8)).hex()[:16]
            raise UserError(
                "checksum" if what == "data" else "schema",
                f"processes: one {what} expected, digest {expected} in process 0, "
                f"{shown} in process {', '.join(map(str, other))}; start all with the "
                f"same {what}",
                DATA_CHANGED if what == "data" else USAGE,
            )


def volumes_gib() -> float:
    """Memory for prepared volumes: half of what is free, over this machine's processes.

    All processes ask together.
    """
    free = memory.available_bytes()
    mine = np.frombuffer(hashlib.sha256(platform.node().encode()).digest(), np.int32)
    rows = mine[None]
    if jax.process_count() > 1:
        rows = multihost_utils.process_allgather(mine)  # [processes, 8]
    here = int((rows == mine).all(axis=1).sum())
    return math.inf if free is None else free / here / 2**31


def code_digest() -> str:
    """Of the sources of all rooms, as hexadecimal digits."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    # Bytes, not their meaning: a file that Python cannot read must not end a run.
    for path in sorted(p for room in _ROOMS for p in (root / room).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def facts(config: Any, *, data: str, features: str = "") -> dict[str, Any]:
    """What a saved step says of the run: digests of data, features and code; config.

    Args:
        config: ConfigDict of the run.
        data: digest of the prepared data.
        features: digest of the weights of frozen features, or "".
    """
    try:
        version = importlib.metadata.version("unireg-jax")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    return {
        "config": config.to_dict(),
        "data": data,
        "features": features,
        "code": f"{version} {code_digest()[:16]}",
    }


class Stop:
    """Whether to stop, agreed on by all processes, which call `agreed` in one order.

    At every step, and between the pairs of a validation. Several processes sum up their
    flags on the devices and read the sum of the call before, so that none waits for it
    and all stop at the same place, one later than asked for.
    """

    def __init__(self, flag: threading.Event):
        self._flag = flag
        self._sum = None
        if jax.process_count() > 1:
            mesh = Mesh(np.array(jax.devices()), ("all",))
            self._split = NamedSharding(mesh, PartitionSpec("all"))
            whole = NamedSharding(mesh, PartitionSpec())
            self._add = jax.jit(jnp.sum, out_shardings=whole)

    def agreed(self) -> bool:
        """True in all processes, or in none."""
        if jax.process_count() == 1:
            return self._flag.is_set()
        before = self._sum
        mine = np.full(jax.local_device_count(), self._flag.is_set(), np.int32)
        flags = jax.make_array_from_process_local_data(self._split, mine)
        self._sum = self._add(flags)
        return before is not None and int(before) > 0


@contextlib.contextmanager
def watched(watchdog_s: int) -> Iterator[None]:
    """Says which process is missing when the work with the others breaks off."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if jax.process_count() == 1 or not _of_runtime(error):
            raise
        tell(
            f"error: process {jax.process_index()} of {jax.process_count()} lost "
            f"another one ({str(error).splitlines()[0][:200]}); waiting up to "
            f"{watchdog_s} s for the watchdog to name it"
        )
        # JAX's own watchdog ends this process with the name of the one that is gone.
        threading.Event().wait(2 * watchdog_s)
        raise


def _of_runtime(error: Exception) -> bool:
    """Whether JAX's runtime failed: a status such as "UNKNOWN: Gloo all-reduce failed".

    A ValueError where programs run in the calling thread, see `cli.keep_freed_memory`.
    """
    if isinstance(error, jax.errors.JaxRuntimeError):
        return True
    return re.match("[A-Z_]{5,}: ", str(error)) is not None
