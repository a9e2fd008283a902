"""Smooth random fields without folds, known both ways.

A stationary velocity is drawn on a coarse grid, integrated there by scaling and
squaring (Arsigny et al., MICCAI 2006) and brought onto the volume's grid by cubic
splines. The way back starts as the flow of the negative velocity and is then corrected
against the way there, so that the two undo each other to about 0.1 mm.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

_COARSE_MM = 6.0  # knots: much closer than the field's own scales
_SQUARINGS = 6
_CORRECTIONS = 12


def coarse_grid(
    shape: Sequence[int], spacing_mm: Sequence[float]
) -> tuple[tuple[int, ...], np.ndarray]:
    """Lays a coarse grid over a volume, corner on corner.

    Args:
        shape: (X, Y, Z) voxels.
        spacing_mm: their edge lengths, mm.

    Returns:
        (x, y, z) knots, and how many mm lie between them, [3] float.
    """
    extent = (np.asarray(shape) - 1) * np.asarray(spacing_mm, float)
    knots = np.minimum(np.ceil(extent / _COARSE_MM).astype(int) + 1, shape)
    knots = np.maximum(knots, 4)
    return tuple(int(n) for n in knots), extent / (knots - 1)


def random_velocity(
    rng: np.random.Generator,
    knots: Sequence[int],
    knot_mm: Sequence[float],
    *,
    scale_mm: float,
    rms_mm: float,
) -> np.ndarray:
    """Draws a smooth velocity.

    Args:
        rng: source of the numbers.
        knots, knot_mm: from `coarse_grid`.
        scale_mm: standard deviation of the Gaussian that smooths white noise, mm.
        rms_mm: root mean square of each component on a large grid, mm.

    Returns:
        [x, y, z, 3] float32, mm per unit time.
    """
    sigma = scale_mm / np.asarray(knot_mm)
    pad = np.ceil(2 * sigma).astype(int)
    out = np.empty((*knots, 3), np.float32)
    inner = tuple(slice(p, p + n) for p, n in zip(pad, knots, strict=True))
    # White noise smoothed by sigma has variance prod(1 / (2 sqrt(pi) sigma)).
    gain = rms_mm / np.sqrt(np.prod(1 / (2 * np.sqrt(np.pi) * sigma)))
    for axis in range(3):
        white = rng.standard_normal(np.add(knots, 2 * pad), dtype=np.float32)
        out[..., axis] = gain * ndimage.gaussian_filter(white, sigma)[inner]
    return out


def flow(
    velocity: np.ndarray,
    knot_mm: Sequence[float],
    *,
    shape: Sequence[int],
    spacing_mm: Sequence[float],
) -> tuple[np.ndarray, np.ndarray]:
    """Integrates a velocity over unit time, forwards and back.

    Args:
        velocity: [x, y, z, 3] float32, mm per unit time, on `coarse_grid(shape, …)`.
        knot_mm: mm between its knots.
        shape: (X, Y, Z) voxels of the volume.
        spacing_mm: their edge lengths, mm.

    Returns:
        disp_fm, disp_mf: [X, Y, Z, 3] float32, voxels; x + disp_fm(x) and
        y + disp_mf(y) undo each other; see `residual_mm`.

    Raises:
        ValueError: velocity does not lie on the coarse grid of the volume.
    """
    knots, expected_mm = coarse_grid(shape, spacing_mm)
    if velocity.shape != (*knots, 3) or not np.allclose(knot_mm, expected_mm):
        raise ValueError(
            f"velocity must be {(*knots, 3)} on coarse_grid(shape, spacing_mm), got "
            f"{velocity.shape}"
        )
    there = velocity / np.asarray(knot_mm, np.float32)
    out = _exponential(there)
    back = _exponential(-there)
    spline = [ndimage.spline_filter(out[..., i], mode="nearest") for i in range(3)]
    for _ in range(_CORRECTIONS):
        at = np.indices(knots) + np.moveaxis(back, -1, 0)
        found = [_sample(part, at, order=3, prefilter=False) for part in spline]
        before, back = back, -np.stack(found, -1)
        if np.abs(back - before).max() < 1e-3:  # knots: a few micrometres
            break
    scale = (np.asarray(shape) - 1) / (np.asarray(knots) - 1)  # knots -> voxels
    out, back = (field * scale.astype(np.float32) for field in (out, back))
    return _refined(out, shape), _refined(back, shape)


def residual_mm(
    disp_fm: np.ndarray, disp_mf: np.ndarray, spacing_mm: Sequence[float]
) -> np.ndarray:
    """How far one field misses to undo the other.

    out[x] = | disp_fm(x) + disp_mf(x + disp_fm(x)) |

    Args:
        disp_fm, disp_mf: [X, Y, Z, 3] float32, voxels.
        spacing_mm: voxel edge lengths, mm.

    Returns:
        [X, Y, Z] float32, mm; NaN where x + disp_fm(x) leaves the grid.
    """
    shape = disp_fm.shape[:3]
    at = np.indices(shape) + np.moveaxis(disp_fm, -1, 0)
    last = np.reshape(shape, (3, 1, 1, 1)) - 1
    inside = np.all((at >= 0) & (at <= last), axis=0)
    back = np.stack([_sample(disp_mf[..., i], at) for i in range(3)], -1)
    missed = (disp_fm + back) * np.asarray(spacing_mm, np.float32)
    return np.where(inside, np.linalg.norm(missed, axis=-1), np.nan).astype(np.float32)


def determinant(disp: np.ndarray) -> np.ndarray:
    """Jacobian determinant of x + disp(x), by central differences.

    Args:
        disp: [X, Y, Z, 3] float, voxels.

    Returns:
        [X, Y, Z] float.
    """
    jac = [np.gradient(disp[..., i], axis=(0, 1, 2)) for i in range(3)]
    (a, b, c), (d, e, f), (g, h, i) = jac
    a, e, i = a + 1, e + 1, i + 1
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def warp(volume: np.ndarray, disp: np.ndarray, *, order: int = 1) -> np.ndarray:
    """Samples a volume at x + disp(x) (pull-back); outside, the edge value holds.

    Args:
        volume: [X, Y, Z].
        disp: [X, Y, Z, 3] float32, voxels.
        order: 1 trilinear (float32), 0 nearest (dtype of volume).

    Returns:
        [X, Y, Z].
    """
    at = np.indices(disp.shape[:3], np.float32) + np.moveaxis(disp, -1, 0)
    if order == 0:
        return ndimage.map_coordinates(volume, at, order=0, mode="nearest")
    return _sample(volume.astype(np.float32, copy=False), at)


def _exponential(velocity: np.ndarray) -> np.ndarray:
    """Scaling and squaring, all in knots."""
    disp = velocity / np.float32(2**_SQUARINGS)
    start = np.indices(velocity.shape[:3], np.float32)
    for _ in range(_SQUARINGS):
        at = start + np.moveaxis(disp, -1, 0)
        disp = disp + np.stack([_sample(disp[..., i], at) for i in range(3)], -1)
    return disp


def _refined(coarse: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Cubic splines from the knots [x, y, z, 3] to voxels, corner on corner.

    One matrix per axis does what `ndimage.zoom` does, in a tenth of the time.
    """
    out = coarse
    for axis, n in enumerate(shape):
        knots = coarse.shape[axis]
        matrix = ndimage.zoom(np.eye(knots), (n / knots, 1), mode="nearest")
        out = np.moveaxis(
            np.tensordot(matrix.astype(np.float32), out, (1, axis)), 0, axis
        )
    return np.ascontiguousarray(out)


def _sample(volume: np.ndarray, at: np.ndarray, order: int = 1, **options):
    return ndimage.map_coordinates(
        volume, at, order=order, mode="nearest", output=np.float32, **options
    )
