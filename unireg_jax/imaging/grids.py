"""Grids, fields of displacements, and points sent through them, slab by slab.

Points are components first, [3, N] float64, LPS mm or voxels.
"""

import concurrent.futures
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

SLAB_POINTS = 2**17  # some 10 MiB of float64 per worker, which a cache holds
_SAME_MM = 1e-4  # grids whose corners agree so well are one grid


class Grid(NamedTuple):
    """Where the voxels of an array lie.

    Attributes:
        shape: (X, Y, Z) voxels.
        vox2world: [4, 4] float64, voxel index -> LPS mm.
    """

    shape: tuple[int, int, int]
    vox2world: np.ndarray


class Field(NamedTuple):
    """Displacements on a grid: x -> x + disp_mm(x), linear between voxels.

    Attributes:
        disp_mm: [X, Y, Z, 3] float32, LPS mm.
        vox2world: [4, 4] float64, voxel index -> LPS mm.
    """

    disp_mm: np.ndarray
    vox2world: np.ndarray

    @property
    def grid(self) -> Grid:
        """Its grid."""
        return Grid(self.disp_mm.shape[:3], self.vox2world)


def same(a: Grid, b: Grid) -> bool:
    """Says whether the voxels of two grids lie at the same places.

    Args:
        a: Grid.
        b: Grid.

    Returns:
        Whether shapes are equal and no voxel is off by more than 1e-4 mm.
    """
    if tuple(a.shape) != tuple(b.shape):
        return False
    gap = np.abs(a.vox2world - b.vox2world)
    return bool((gap[:3] @ np.array([*a.shape, 1])).max() < _SAME_MM)


def finer(grid: Grid, factor: int) -> Grid:
    """Divides the voxels of a grid; its outer faces stay.

    Args:
        grid: Grid.
        factor: new voxels per voxel, along each axis.

    Returns:
        Grid of factor * shape voxels.
    """
    vox2world = grid.vox2world.copy()
    # The centre of voxel 0 moves towards its corner.
    vox2world[:3, 3] += vox2world[:3, :3] @ np.full(3, (1 / factor - 1) / 2)
    vox2world[:3, :3] /= factor
    return Grid(tuple(factor * n for n in grid.shape), vox2world)


def through(
    parts: Iterable[Field | np.ndarray],
    xyz: np.ndarray,
    *,
    edge: bool = False,
    on: Grid | None = None,
    part: slice | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sends points through affines and fields, one after the other.

    Args:
        parts: affines [4, 4], LPS mm -> LPS mm, and Fields, in the order they act.
        xyz: [3, N] float64, LPS mm.
        edge: whether a field's edge goes on beyond it, instead of zero.
        on: grid whose voxels, of its slices `part`, the points are; None for any.
        part: slices of the first axis of `on`.

    Returns:
        [3, N] float64, LPS mm; and [N] bool, whether each lay within every field.
    """
    known = np.ones(xyz.shape[1], bool)
    for step in parts:
        if not isinstance(step, Field):
            xyz = apply(step, xyz)
        elif on is not None and same(step.grid, on):
            xyz = xyz + np.moveaxis(step.disp_mm[part], -1, 0).reshape(3, -1)
        else:
            coords = apply(np.linalg.inv(step.vox2world), xyz)
            within = inside(coords, step.grid.shape)
            shift = [linear(step.disp_mm[..., i], coords) for i in range(3)]
            xyz = xyz + (np.stack(shift) if edge else np.where(within, shift, 0))
            known &= within
        on = None  # only the first part acts on the grid itself
    return xyz, known


def apply(matrix: np.ndarray, xyz: np.ndarray) -> np.ndarray:
    """Sends points through a matrix.

    Args:
        matrix: [4, 4] float64.
        xyz: [3, N] float64.

    Returns:
        [3, N] float64.
    """
    return matrix[:3, :3] @ xyz + matrix[:3, 3:]


def inside(coords: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Says which positions lie within the outer faces of a grid, as ITK has it.

    Args:
        coords: [3, N] float64, voxels.
        shape: (X, Y, Z) of the grid.

    Returns:
        [N] bool: from half a voxel before the first voxel centre up to, but not at,
        half a voxel beyond the last.
    """
    limits = np.array(shape)[:, None] - 0.5
    return ((coords >= -0.5) & (coords < limits)).all(axis=0)


def linear(data: np.ndarray, coords: np.ndarray) -> np.ndarray:
    """Reads an array between voxels, linearly; beyond the grid its edge.

    Args:
        data: [X, Y, Z] numbers.
        coords: [3, N] float64, voxels.

    Returns:
        [N] float32; rounded where data holds whole numbers.
    """
    values = ndimage.map_coordinates(
        data, coords, output=np.float32, order=1, mode="nearest"
    )
    return np.rint(values) if data.dtype.kind in "iu" else values


def nearest(data: np.ndarray, coords: np.ndarray) -> np.ndarray:
    """Reads an array at the nearest voxels, halves up; beyond the grid its edge.

    Args:
        data: [X, Y, Z] of any type.
        coords: [3, N] float64, voxels.

    Returns:
        [N], dtype of data.
    """
    last = np.array(data.shape)[:, None] - 1
    x, y, z = np.clip(np.floor(coords + 0.5), 0, last).astype(np.intp)
    return data[x, y, z]


def vote(data: np.ndarray, coords: np.ndarray) -> np.ndarray:
    """Reads the id with the largest trilinear weight among the eight neighbours.

    Args:
        data: [X, Y, Z] whole numbers.
        coords: [3, N] float64, voxels.

    Returns:
        [N], dtype of data; of equal weights the smallest id.
    """
    last = np.array(data.shape)[:, None] - 1
    coords = np.clip(coords, 0, last)
    low = np.minimum(np.floor(coords), np.maximum(last - 1, 0)).astype(np.intp)
    share = coords - low
    high = np.minimum(low + 1, last)
    ids, weights = [], []
    for corner in np.ndindex(2, 2, 2):
        x, y, z = (high[a] if c else low[a] for a, c in enumerate(corner))
        ids.append(data[x, y, z])
        factors = (share[a] if c else 1 - share[a] for a, c in enumerate(corner))
        weights.append(np.prod(list(factors), axis=0))
    ids, weights = np.stack(ids), np.stack(weights)
    out = ids[0].copy()
    mixed = np.flatnonzero((ids != ids[0]).any(axis=0))
    ids, weights = ids[:, mixed], weights[:, mixed]
    order = np.argsort(ids, axis=0, kind="stable")
    ids = np.take_along_axis(ids, order, axis=0)
    weights = np.take_along_axis(weights, order, axis=0)
    # Of equal sums the first wins, which is the smallest id.
    sums = np.stack([np.where(ids == one, weights, 0).sum(axis=0) for one in ids])
    best = np.round(sums, 12).argmax(axis=0)
    out[mixed] = np.take_along_axis(ids, best[None], axis=0)[0]
    return out


def slabs(
    work: Callable[[slice], None],
    shape: tuple[int, int, int],
    threads: int | None,
    points: int | None = None,
) -> None:
    """Calls `work` for slabs of a grid, several at a time.

    Args:
        work: called with the slices of the first axis that it is to do.
        shape: (X, Y, Z) of the grid.
        threads: workers; None for one per core, 8 at most.
        points: voxels of one slab; None for SLAB_POINTS.
    """
    # Of the first axis, so that a slab lies in one piece.
    depth = max(1, (points or SLAB_POINTS) // (shape[1] * shape[2]))
    parts = [slice(k, min(k + depth, shape[0])) for k in range(0, shape[0], depth)]
    with concurrent.futures.ThreadPoolExecutor(threads or cores()) as pool:
        for _ in pool.map(work, parts):
            pass


def cores() -> int:
    """Those of this process, 8 at most: each worker holds a slab."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        count = os.cpu_count() or 1
    return min(8, count)


def positions(grid: Grid, part: slice) -> np.ndarray:
    """Gives the places of the voxels of some slices.

    Args:
        grid: Grid.
        part: slices of its first axis.

    Returns:
        [3, N] float64, LPS mm; the third axis fastest.
    """
    x, y, z = (np.arange(n) for n in grid.shape)
    x = x[part]
    out = np.empty((3, x.size, y.size, z.size))
    for row, values in zip(grid.vox2world[:3], out, strict=True):
        plane = row[0] * x[:, None] + row[1] * y[None, :] + row[3]
        np.add(plane[:, :, None], row[2] * z, out=values)
    return out.reshape(3, -1)
