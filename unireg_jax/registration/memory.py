"""Whether a pair fits into the memory of the host, said before it is taken."""

import contextlib
from pathlib import Path

import jax
import numpy as np

from unireg_jax.errors import LIMIT, UserError
from unireg_jax.registration.devices import default_device

# Bytes per voxel besides the scans themselves. While the field is made: field (12),
# warped scan and one clipped copy with its float32 part; the moving scan padded, and as
# float32. While it is written: field, the same in the order of the file, the warped
# scan, and the HDF5 file in memory, twice. Measured: docs/control.md.
_FIXED_BYTES = 12 + 2 + 2 + 4
_MOVING_BYTES = 2 + 4 + 2 + 4
_WRITING_BYTES = 12 + 12 + 2 + 2 * 8.5
_LEAST_BYTES = 2**30  # less is not worth a refusal: the system finds it
_CGROUP = Path("/sys/fs/cgroup")


def check_memory(fixed_shape: tuple[int, ...], moving_shape: tuple[int, ...]) -> None:
    """Refuses a pair whose native grids are larger than what is free.

    Args:
        fixed_shape: (X, Y, Z) voxels of the fixed scan.
        moving_shape: of the moving scan.

    Raises:
        UserError: `too_large`, exit code 7, with the need in MiB.
    """
    fixed, moving = (
        float(np.prod(s, dtype=float)) for s in (fixed_shape, moving_shape)
    )
    making = fixed * _FIXED_BYTES + moving * _MOVING_BYTES
    need = max(making, fixed * _WRITING_BYTES)
    shapes = ["x".join(map(str, shape)) for shape in (fixed_shape, moving_shape)]
    _check(
        need,
        f"fixed {shapes[0]} and moving {shapes[1]} voxels",
        "crop or resample the scans, or use a larger machine",
    )


def check_program(program: jax.stages.Compiled, what: str, remedy: str) -> None:
    """Refuses a compiled program that takes more than what is free.

    Args:
        program: for the CPU; those of other devices have a memory of their own, and
            are not looked at.
        what: it does, on which grid.
        remedy: what else to do.

    Raises:
        UserError: `too_large`, exit code 7, with the need in MiB.
    """
    sizes = program.memory_analysis()
    if default_device().platform != "cpu" or sizes is None:
        return
    parts = ("temp", "argument", "output")
    need = sum(getattr(sizes, f"{part}_size_in_bytes") for part in parts)
    _check(need, what, remedy)


def _check(need: float, what: str, remedy: str) -> None:
    free = available_bytes()
    if free is None or need < _LEAST_BYTES or need <= free:
        return
    raise UserError(
        "too_large",
        f"{what}: {free / 2**20:.0f} MiB are free, about {need / 2**20:.0f} MiB are "
        f"needed; {remedy}",
        LIMIT,
    )


def available_bytes() -> int | None:
    """Memory that a process may still take.

    Returns:
        The least of what the machine and the process's control group have left; None
        where the system does not say.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 2**10)
    with contextlib.suppress(OSError, ValueError):  # "max" is no limit
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        # Pages of files are given back when asked for.
        for line in (_CGROUP / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                used -= int(line.split()[1])
        found.append(max(0, limit - used))
    return min(found) if found else None
