"""Regularity of a map: determinants of its Jacobian, folds, non-diffeomorphic volume.

Only voxels count whose neighbours all lie on the field's grid, and within every field
of a chain: beyond there is nothing to differentiate.

Central differences leap over the voxel itself: a voxel thrown anywhere can have a
determinant of 1. The digital criteria of Liu et al., "On finite difference Jacobian
computation in deformable image registration" (IJCV 2024) look at the ten tetrahedra at
each voxel instead: in each of the eight cubes around it the one that spans the three
edges at the voxel, and the ones between face diagonals of the cubes above and below it.
Together the tetrahedra of all voxels fill each cube twice.
"""

import concurrent.futures
import itertools
import math
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from unireg_jax.imaging import grids, mapping
from unireg_jax.imaging.grids import Grid

LEAST_VOXELS = 3  # along each axis, for a determinant
LEAST_VOXELS_L2R = 5
_SLAB_VOXELS = 2**19  # of one slab: its arrays stay near the cache
_FLOOR = 1e-9  # of a determinant, before the logarithm


def field_scores(
    disp_mm: np.ndarray,
    vox2world: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    l2r_mask: np.ndarray | None = None,
    known: np.ndarray | None = None,
) -> dict[str, float]:
    """Measures the regularity of a map.

    Args:
        disp_mm: [X, Y, Z, 3] float32, LPS mm.
        vox2world: [4, 4], voxel -> LPS mm, of its grid.
        mask: [X, Y, Z] bool, the foreground; None leaves out its four metrics.
        l2r_mask: [X, Y, Z] bool, where sdlogj_l2r is taken; None: on the whole grid.
        known: [X, Y, Z] bool, of `measurable`: nothing else counts; None: all.

    Returns:
        max_mm, and sdlogj, fold_percent, nd_percent and ndv_percent of the foreground,
        the same with `_whole` of the whole grid, sdlogj_l2r; see metrics.DEFINITIONS.
        NaN where undefined; `field_reason` says why.

    Raises:
        ValueError: shapes disagree.
    """
    if disp_mm.ndim != 4 or disp_mm.shape[3] != 3 or not disp_mm.size:
        raise ValueError(
            f"disp_mm must be (X, Y, Z, 3) in mm, got {disp_mm.shape}; channels last"
        )
    masks = {"mask": mask, "l2r_mask": l2r_mask, "known": known}
    for name, given in masks.items():
        if given is not None and given.shape != disp_mm.shape[:3]:
            raise ValueError(
                f"{name} must be {disp_mm.shape[:3]} on the field's grid, got "
                f"{given.shape}; resample it"
            )
    if known is not None:
        mask = None if mask is None else mask & known
        l2r_mask = known if l2r_mask is None else l2r_mask & known
    longest = max(float(np.square(plane).sum(axis=-1).max()) for plane in disp_mm)
    scores = {"max_mm": math.sqrt(longest)}
    detj = jacobian_determinant(disp_mm, vox2world)
    folded, volume = digital_folds(disp_mm, vox2world)
    inner = (slice(1, -1),) * 3
    whole = None if known is None else known[inner]
    places = {"_whole": whole} | ({} if mask is None else {"": mask[inner]})
    for ending, place in places.items():
        values = [a if place is None else a[place] for a in (detj, folded, volume)]
        scores |= _statistics(*values, ending)
    rim = detj[inner]
    rim = rim if l2r_mask is None else rim[l2r_mask[2:-2, 2:-2, 2:-2]]
    scores["sdlogj_l2r"] = _std_log(np.clip(rim + 3, _FLOOR, 1e9))
    return scores


def measurable(transform: mapping.Mapping, grid: Grid) -> np.ndarray:
    """Says where a map can be differentiated: where a field ends it jumps.

    Args:
        transform: fixed -> moving.
        grid: where to measure.

    Returns:
        [X, Y, Z] bool, whether a voxel and its neighbours lie within all fields.
    """
    within = mapping.coverage(transform, grid)
    return ndimage.binary_erosion(within, np.ones((3, 3, 3)), border_value=1)


def field_reason(name: str, shape: tuple[int, int, int]) -> str:
    """Says why a metric of `field_scores` is undefined.

    Args:
        name: of the metric.
        shape: (X, Y, Z) of the field's grid.

    Returns:
        One line.
    """
    least = LEAST_VOXELS_L2R if name == "sdlogj_l2r" else LEAST_VOXELS
    if min(shape) < least:
        return f"fewer than {least} voxels along an axis"
    return "no voxel inside the mask and off the border"


def jacobian_determinant(disp_mm: np.ndarray, vox2world: np.ndarray) -> np.ndarray:
    """Determinant of the Jacobian of x + disp_mm(x), central differences.

    Args:
        disp_mm: [X, Y, Z, 3] float32, LPS mm.
        vox2world: [4, 4], voxel -> LPS mm.

    Returns:
        [X-2, Y-2, Z-2] float32, no unit; entry i belongs to voxel i + 1. Empty for a
        grid of fewer than 3 voxels along an axis.
    """
    out = np.empty(_interior(disp_mm.shape), np.float32)

    def work(slab: slice, disp: np.ndarray) -> None:
        rows = [_central(disp, axis) for axis in range(3)]
        out[slab] = _dot(rows[0], _cross(rows[1], rows[2]))

    _slabs(work, disp_mm, vox2world)
    return out


def digital_folds(
    disp_mm: np.ndarray, vox2world: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Finds where the map is no digital diffeomorphism, and how much it turns over.

    volume = 1/12 sum over the ten tetrahedra of max(0, -d),     Liu et al. 2024, NDV

    where d is six times the tetrahedron's signed volume: 1 for those at the cube's
    corners, 2 for those between face diagonals, of the identity.

    Args:
        disp_mm: [X, Y, Z, 3] float32, LPS mm.
        vox2world: [4, 4], voxel -> LPS mm.

    Returns:
        Each [X-2, Y-2, Z-2], entry i belongs to voxel i + 1: folded, bool, whether any
        d <= 0; volume, float32, in voxels: 1 if all is turned over at unit size.
    """
    shape = _interior(disp_mm.shape)
    folded, volume = np.empty(shape, bool), np.empty(shape, np.float32)

    def work(slab: slice, disp: np.ndarray) -> None:
        lowest, negative = _tetrahedra(disp)
        folded[slab] = lowest <= 0
        volume[slab] = negative / np.float32(-12)

    _slabs(work, disp_mm, vox2world)
    return folded, volume


def _statistics(
    detj: np.ndarray, folded: np.ndarray, volume: np.ndarray, ending: str
) -> dict[str, float]:
    """The four metrics of one region."""
    some = detj.size > 0
    values = {
        "sdlogj": _std_log(np.maximum(detj, _FLOOR)),
        "fold_percent": 100 * np.count_nonzero(detj <= 0) / detj.size if some else None,
        "nd_percent": 100 * np.count_nonzero(folded) / folded.size if some else None,
        "ndv_percent": 100 * volume.mean(dtype=np.float64) if some else None,
    }
    return {
        f"{name}{ending}": math.nan if value is None else float(value)
        for name, value in values.items()
    }


def _std_log(values: np.ndarray) -> float:
    """Population standard deviation of the logarithm, summed in float64."""
    if not values.size:
        return math.nan
    return float(np.std(np.log(values), dtype=np.float64))


def _interior(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(0, n - 2) for n in shape[:3])


def _slabs(
    work: Callable[[slice, np.ndarray], None],
    disp_mm: np.ndarray,
    vox2world: np.ndarray,
) -> None:
    """Calls `work` for slices of the interior along X, several at a time.

    With their displacement in voxels, one voxel more on either side, components first:
    [3, depth + 2, Y, Z].
    """
    x, y, z = disp_mm.shape[:3]
    if min(x, y, z) < LEAST_VOXELS:
        return
    to_voxel = np.linalg.inv(vox2world[:3, :3]).astype(np.float32)
    depth = max(1, _SLAB_VOXELS // (y * z))

    def convert(i: int) -> None:
        mm = disp_mm[i : min(i + depth, x - 2) + 2]
        disp = to_voxel @ np.moveaxis(mm, -1, 0).reshape(3, -1)
        work(slice(i, i + depth), disp.reshape(3, *mm.shape[:3]))

    with concurrent.futures.ThreadPoolExecutor(grids.cores()) as pool:
        for _ in pool.map(convert, range(0, x - 2, depth)):
            pass  # raises what a worker raised


def _central(disp: np.ndarray, axis: int) -> list[np.ndarray]:
    """Derivative of x + disp(x) along an axis, of each component."""
    after = _shifted(disp, _step(axis, 1))
    before = _shifted(disp, _step(axis, -1))
    out = [(a - b) * np.float32(0.5) for a, b in zip(after, before, strict=True)]
    out[axis] += 1
    return out


def _tetrahedra(disp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least d of the ten tetrahedra, and the sum of all negative ones."""
    here = _shifted(disp, (0, 0, 0))

    def edge(offset: tuple[int, int, int]) -> list[np.ndarray]:
        there = _shifted(disp, offset)
        out = [b - a for a, b in zip(here, there, strict=True)]
        for axis in range(3):
            if offset[axis]:
                out[axis] += offset[axis]
        return out

    edges = {(axis, s): edge(_step(axis, s)) for axis in range(3) for s in (1, -1)}
    lowest = negative = None

    def take(d: np.ndarray) -> None:
        nonlocal lowest, negative
        if lowest is None:
            lowest, negative = d, np.minimum(d, 0)
        else:
            negative += np.minimum(d, 0)
            np.minimum(lowest, d, out=lowest)

    for sy, sz in itertools.product((1, -1), repeat=2):
        normal = _cross(edges[1, sy], edges[2, sz])
        for sx in (1, -1):
            # As seen from the voxel an edge to the left counts the other way.
            take(_dot(edges[0, sx], normal) * np.float32(sx * sy * sz))
    for s in (1, -1):
        xy, yz, xz = edge((s, s, 0)), edge((0, s, s)), edge((s, 0, s))
        take(_dot(xy, _cross(yz, xz)) * np.float32(s))
    return lowest, negative


def _shifted(disp: np.ndarray, offset: tuple[int, int, int]) -> np.ndarray:
    """[3, X-2, Y-2, Z-2], the interior, moved by `offset` voxels."""
    size = disp.shape[1:]
    window = (slice(1 + o, n - 1 + o) for o, n in zip(offset, size, strict=True))
    return disp[(slice(None), *window)]


def _step(axis: int, length: int) -> tuple[int, int, int]:
    return tuple(length if i == axis else 0 for i in range(3))


def _cross(a: list[np.ndarray], b: list[np.ndarray]) -> list[np.ndarray]:
    return [
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    ]


def _dot(a: list[np.ndarray], b: list[np.ndarray]) -> np.ndarray:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
