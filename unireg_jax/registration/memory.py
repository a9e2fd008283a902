"""Whether a pair fits into the memory of the host, said before it is taken."""

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePath

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
# While the map back is made: field, residual and warped scan; of the moving scan's
# voxels the inverse, what it is off by, and both as one field.
_INVERSE_BYTES = (12 + 12 + 2, 12 + 4 + 14)
_LEAST_BYTES = 2**30  # less is not worth a refusal: the system finds it
_CGROUP = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
# Files of a group: its limit, what it takes, and of memory.stat the pages of files,
# which are given back when asked for. Version 2, and 1.
_V2 = ("memory.max", "memory.current", "inactive_file ")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")


def check_memory(
    fixed_shape: tuple[int, ...],
    moving_shape: tuple[int, ...],
    *,
    inverse: bool = False,
) -> None:
    """Refuses a pair whose native grids are larger than what is free.

    Args:
        fixed_shape: (X, Y, Z) voxels of the fixed scan.
        moving_shape: of the moving scan.
        inverse: whether the map back is to be written, too.

    Raises:
        UserError: `too_large`, exit code 7, with the need in MiB.
    """
    fixed, moving = (
        float(np.prod(s, dtype=float)) for s in (fixed_shape, moving_shape)
    )
    making = fixed * _FIXED_BYTES + moving * _MOVING_BYTES
    need = max(making, fixed * _WRITING_BYTES)
    if inverse:
        need = max(need, fixed * _INVERSE_BYTES[0] + moving * _INVERSE_BYTES[1])
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
        The least of what the machine, the process's control group and those above it
        have left; None where the system does not say.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 2**10)
    for folder, (limit, current, cache) in _groups():
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            left = int((folder / limit).read_text())
            left -= int((folder / current).read_text())
            for line in (folder / "memory.stat").read_text().splitlines():
                if line.startswith(cache):
                    left += int(line.split()[1])
            found.append(max(0, left))
    return min(found) if found else None


def _groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders of the process's own control groups and those above, with their files."""
    with contextlib.suppress(OSError):
        for line in _OWN_GROUPS.read_text().splitlines():
            number, kinds, path = line.split(":", 2)
            if number == "0":
                root, names = _CGROUP, _V2
            elif "memory" in kinds.split(","):
                root, names = _CGROUP / "memory", _V1
            else:
                continue
            # In a container the path may be that of the host: only the root is there.
            own = PurePath(path.lstrip("/"))
            yield from ((root / group, names) for group in (own, *own.parents))
