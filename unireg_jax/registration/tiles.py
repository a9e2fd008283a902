"""Which windows a network looks through, where a scan is larger than one.

A window is the network's grid, in shape and spacing. One is centred on the body
("crop"); several that overlap cover it ("tiles"); or one larger window of the same
voxels holds it ("whole"). Fields of tiles are blended: the weight of a window falls off
as half a cosine in the middle of what it shares with its neighbour, and the weights of
all windows sum to 1 everywhere.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unireg_jax.imaging import grids, preprocess
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.preprocess import Grid, PreprocessSpec

FOVS = ("auto", "crop", "tiles", "whole")
# Of the body: less calls for tiles. Wide shoulders alone do not: see docs/control.md.
_COVERED = 0.7
_LOOK_MM = 5.0  # distance of the voxels that the body is looked for on
_SHARED = 0.25  # of a window, at least, with each neighbour
_STEP = 16  # voxels: multiples that grids grow by
_RAMP = 1 / 3  # of a window, at most: ramps on both sides then never meet
_MARGIN = 1 / 8  # of what two windows share, on each side, without weight


class Layout(NamedTuple):
    """Windows over one scan.

    Attributes:
        grid: that holds them all; with one window, the window itself.
        window: (X, Y, Z) voxels of each.
        starts: first voxel of each window on `grid`.
        fov: "crop", "tiles" or "whole", as used.
        covered: share of the body that lies on `grid`.
    """

    grid: Grid
    window: tuple[int, int, int]
    starts: tuple[tuple[int, int, int], ...]
    fov: str
    covered: float

    def part(self, start: Sequence[int]) -> tuple[slice, ...]:
        """Slices of the window that begins at `start`."""
        return tuple(slice(a, a + n) for a, n in zip(start, self.window, strict=True))

    def finer(self, factor: int) -> "Layout":
        """The same windows on `factor` times as many voxels along each axis."""
        return self._replace(
            grid=grids.finer(self.grid, factor),
            window=tuple(factor * n for n in self.window),
            starts=tuple(tuple(factor * a for a in start) for start in self.starts),
        )


def lay_out(volume: Volume, spec: PreprocessSpec, fov: str = "auto") -> Layout:
    """Lays windows over a scan.

    Args:
        volume: CT in HU on LPS+ axes.
        spec: shape and spacing of a window.
        fov: "crop", one window centred on the body; "tiles", as many as cover it, each
            sharing a quarter or more with its neighbour; "whole", one window as large
            as it takes; "auto", tiles where the crop would hold less than 70 % of the
            body.

    Returns:
        Layout. A body that fits gives the same grid whatever `fov`.

    Raises:
        ValueError: unknown fov.
    """
    if fov not in FOVS:
        raise ValueError(f"fov must be one of {FOVS}, got {fov!r}")
    grid = preprocess.network_grid(volume, spec)
    if _covered(_corners(volume, grid), grid.shape) == 1.0:  # whatever the body
        used = "crop" if fov == "auto" else fov
        return Layout(grid, grid.shape, ((0, 0, 0),), used, 1.0)
    points = _body_points(volume, grid)
    covered = _covered(points, grid.shape)
    used = fov
    if fov == "auto":
        used = "crop" if covered >= _COVERED else "tiles"
    if used == "crop":
        return Layout(grid, grid.shape, ((0, 0, 0),), used, covered)
    # On the lattice of the crop, whose middle is that of the body.
    reach = np.abs(points - (np.array(grid.shape) - 1) / 2).max(axis=0, initial=0)
    shape = tuple(_grown(n, 2 * r + 1) for n, r in zip(grid.shape, reach, strict=True))
    vox2world = grid.vox2world.copy()
    more = (np.array(shape) - grid.shape) / 2
    vox2world[:3, 3] -= vox2world[:3, :3] @ more
    whole = Grid(shape, vox2world)
    covered = _covered(points + more, shape)
    if used == "whole":
        return Layout(whole, shape, ((0, 0, 0),), used, covered)
    places = (
        window_starts(total, n) for total, n in zip(shape, grid.shape, strict=True)
    )
    return Layout(whole, grid.shape, tuple(itertools.product(*places)), used, covered)


def _corners(volume: Volume, grid: Grid) -> np.ndarray:
    """Outermost voxels of a scan, [8, 3] in voxels of `grid`."""
    ends = np.array(list(itertools.product(*((0, n - 1) for n in volume.data.shape))))
    to_grid = np.linalg.inv(grid.vox2world) @ volume.vox2world
    return ends @ to_grid[:3, :3].T + to_grid[:3, 3]


def _body_points(volume: Volume, grid: Grid) -> np.ndarray:
    """Body voxels some millimetres apart, [n, 3] in voxels of `grid`."""
    steps = [max(1, round(_LOOK_MM / s)) for s in volume.spacing_mm]
    vox2world = volume.vox2world @ np.diag([*steps, 1.0])
    data = volume.data[tuple(slice(None, None, n) for n in steps)]
    body = preprocess.body_mask(Volume(data, vox2world), coarse_mm=_LOOK_MM)
    to_grid = np.linalg.inv(grid.vox2world) @ vox2world
    return np.argwhere(body) @ to_grid[:3, :3].T + to_grid[:3, 3]


def _covered(points: np.ndarray, shape: Sequence[int]) -> float:
    inside = ((points >= -0.5) & (points <= np.array(shape) - 0.5)).all(axis=1)
    return float(inside.mean()) if len(inside) else 1.0


def _grown(count: int, wanted: float) -> int:
    """`count`, or so many steps more that `wanted` voxels fit."""
    return count + _STEP * max(0, int(np.ceil((wanted - count) / _STEP - 1e-6)))


def window_starts(total: int, window: int) -> tuple[int, ...]:
    """First voxels of the windows along one axis.

    Args:
        total: voxels to cover.
        window: voxels of each window, at most `total`.

    Returns:
        As few as cover it with neighbours that share a quarter of a window or more,
        evenly spread.

    Raises:
        ValueError: the window is larger than what it covers.
    """
    if window > total:
        raise ValueError(f"window must be at most {total} voxels, got {window}")
    free = window - int(np.ceil(_SHARED * window))
    count = 1 + -(-(total - window) // free)
    return tuple(int(round(s)) for s in np.linspace(0, total - window, count))


def blend_weights(starts: Sequence[int], window: int) -> np.ndarray:
    """Weights of the windows along one axis.

    Args:
        starts: from `window_starts`.
        window: voxels of each.

    Returns:
        [n, window] float32; over all windows they sum to 1 at every voxel.
    """
    place = np.asarray(starts)[:, None] + np.arange(window)
    weights = np.ones((len(starts), window))
    for i, (left, right) in enumerate(itertools.pairwise(starts)):
        shared = left + window - right
        middle = (left + window + right - 1) / 2
        half = min(shared * (0.5 - _MARGIN), window * _RAMP / 2)
        for k in (i, i + 1):
            along = np.clip((place[k] - middle) / (2 * half) + 0.5, 0, 1)
            rise = 0.5 - 0.5 * np.cos(np.pi * along)
            weights[k] *= rise if k > i else 1 - rise
    return weights.astype(np.float32)


class Blend:
    """Sums fields of windows by their weights, as they come."""

    def __init__(self, layout: Layout):
        """Begins with nothing.

        Args:
            layout: of the windows.
        """
        self._layout = layout
        self._axes = [sorted(set(axis)) for axis in zip(*layout.starts, strict=True)]
        self._weights = [
            blend_weights(axis, n)
            for axis, n in zip(self._axes, layout.window, strict=True)
        ]
        self.disp = np.zeros((*layout.grid.shape, 3), np.float32)

    def add(self, start: Sequence[int], disp: np.ndarray) -> None:
        """Adds the field of one window.

        Args:
            start: one of layout.starts.
            disp: [X, Y, Z, 3] float32, voxels, on that window.
        """
        x, y, z = (
            weights[axis.index(a)]
            for weights, axis, a in zip(self._weights, self._axes, start, strict=True)
        )
        weight = x[:, None, None] * y[:, None] * z
        self.disp[self._layout.part(start)] += weight[..., None] * disp
