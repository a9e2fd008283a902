"""Distances between surfaces of labels.

The surface S of a label is the set of its voxels with a face neighbour that is not of
the label (the outside of the array counts as other), each a point at the voxel's centre
that weighs as much as any other, whatever area it covers.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

# Headers hold spacings as float32: without slack, voxels of 2 mm would now and then lie
# 2.0000001 mm apart and fall beyond a tolerance of 2 mm.
SLACK_MM = 1e-4


class SurfaceDistances(NamedTuple):
    """From every point of each surface to the nearest point of the other.

    Attributes:
        a_to_b: [N] float64, mm, N points of the surface of A.
        b_to_a: [M] float64, mm.
    """

    a_to_b: np.ndarray
    b_to_a: np.ndarray


def surface_distances(
    mask_a: np.ndarray,
    mask_b: np.ndarray,
    spacing_mm: tuple[float, float, float] | np.ndarray,
) -> SurfaceDistances:
    """Measures the distances between two surfaces, once for all metrics of them.

    Args:
        mask_a: [X, Y, Z] bool.
        mask_b: the same, on the same grid.
        spacing_mm: (x, y, z) mm, positive; or [3, 3], voxel -> mm, of axes that are
            not perpendicular.

    Returns:
        SurfaceDistances; infinite where the other mask is empty.

    Raises:
        ValueError: shapes differ or are not 3-D, spacing_mm is not three positive mm.
    """
    steps = np.asarray(spacing_mm, np.float64)
    lengths = np.linalg.norm(steps, axis=0) if steps.ndim == 2 else steps
    _check(mask_a, mask_b, tuple(lengths.tolist()))
    surface_a, surface_b = _surface(mask_a), _surface(mask_b)
    if not (surface_a.any() and surface_b.any()):
        empty = [np.full(np.count_nonzero(s), np.inf) for s in (surface_a, surface_b)]
        return SurfaceDistances(*empty)
    return SurfaceDistances(
        _distances(surface_a, surface_b, steps),
        _distances(surface_b, surface_a, steps),
    )


def hd95(distances: SurfaceDistances) -> float:
    """The 95 % Hausdorff distance.

    max(P95 over a in S_A of d(a, S_B), P95 over b in S_B of d(b, S_A)), where P95 is
    the linearly interpolated 95th percentile. The maximum of two percentiles, not the
    percentile of both sets joined.

    Args:
        distances: of the two surfaces.

    Returns:
        Distance in mm; NaN when either surface is empty.
    """
    if not (distances.a_to_b.size and distances.b_to_a.size):
        return math.nan
    return float(max(np.percentile(d, 95) for d in distances))


def nsd(distances: SurfaceDistances, tolerance_mm: float) -> float:
    """Normalised surface dice: the share of both surfaces that lies near the other.

    (#{a in S_A: d(a, S_B) <= tolerance} + #{b in S_B: d(b, S_A) <= tolerance})
    / (#S_A + #S_B), with SLACK_MM for distances equal to the tolerance

    Args:
        distances: of the two surfaces.
        tolerance_mm: 0 or more, mm.

    Returns:
        Share in [0, 1]; 0 when one surface is empty, NaN when both are.

    Raises:
        ValueError: tolerance_mm is negative or not finite.
    """
    if not 0 <= tolerance_mm < math.inf:
        raise ValueError(
            f"tolerance_mm must be 0 or more, got {tolerance_mm}; 2 mm is usual for CT"
        )
    total = distances.a_to_b.size + distances.b_to_a.size
    if total == 0:
        return math.nan
    limit = tolerance_mm + SLACK_MM
    return float(sum(np.count_nonzero(d <= limit) for d in distances) / total)


def _check(a: np.ndarray, b: np.ndarray, spacing_mm: tuple) -> None:
    if a.ndim != 3 or a.shape != b.shape:
        raise ValueError(
            f"labels must be two equal (X, Y, Z), got {a.shape} and {b.shape}; "
            "resample one onto the other"
        )
    if len(spacing_mm) != 3 or not min(spacing_mm) > 0:
        raise ValueError(
            f"spacing_mm must be three positive mm, got {spacing_mm}; see the affine"
        )


def _surface(mask: np.ndarray) -> np.ndarray:
    """Voxels with a face neighbour outside the mask, or at the border."""
    inner = np.zeros(mask.shape, bool)
    core = mask[1:-1, 1:-1, 1:-1].copy()
    for axis in range(3):
        for start in (0, 2):
            window = [slice(1, -1)] * 3
            window[axis] = slice(start, start - 2 or None)
            core &= mask[tuple(window)]
    inner[1:-1, 1:-1, 1:-1] = core
    return mask & ~inner


def _distances(origin: np.ndarray, target: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """From every True voxel of `origin` to the nearest of `target`, mm.

    A tree of the surface's points, not a distance transform of the box around it: 0.08
    against 0.97 s per direction of a liver of 90 000 surface voxels, one CPU core.
    """

    def place(index: np.ndarray) -> np.ndarray:
        return index * steps if steps.ndim == 1 else index @ steps.T

    points = np.argwhere(origin)
    out = np.zeros(len(points))
    apart = ~target[origin]  # the others lie on both: distance 0
    if apart.any():
        tree = cKDTree(place(np.argwhere(target)))
        out[apart] = tree.query(place(points[apart]))[0]
    return out
