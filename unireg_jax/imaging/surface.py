"""Distances between surfaces of labels."""

import numpy as np
from scipy import ndimage


def hd95_mm(
    labels_a: np.ndarray,
    labels_b: np.ndarray,
    label: int,
    spacing_mm: tuple[float, float, float],
) -> float:
    """Measures the 95 % Hausdorff distance of one label.

    max(P95 over a in S_A of d(a, S_B), P95 over b in S_B of d(b, S_A)), where S is the
    set of voxels of the label with a face neighbour that is not (the outside of the
    array counts as other), d the distance of voxel centres in mm and P95 the linearly
    interpolated 95th percentile. The maximum of two percentiles, not the percentile of
    both sets joined; boundary voxels weigh alike, whatever surface they cover.

    Args:
        labels_a: [X, Y, Z] whole numbers or bool.
        labels_b: the same, on the same grid.
        label: id to measure.
        spacing_mm: (x, y, z) mm, positive.

    Returns:
        Distance in mm; NaN when the label is absent in either array.

    Raises:
        ValueError: shapes differ or are not 3-D, spacing_mm is not three positive mm.
    """
    if labels_a.ndim != 3 or labels_a.shape != labels_b.shape:
        raise ValueError(
            f"labels must be two equal (X, Y, Z), got {labels_a.shape} and "
            f"{labels_b.shape}; resample one onto the other"
        )
    if len(spacing_mm) != 3 or not min(spacing_mm) > 0:
        raise ValueError(
            f"spacing_mm must be three positive mm, got {spacing_mm}; see the affine"
        )
    a, b = labels_a == label, labels_b == label
    if not a.any() or not b.any():
        return float("nan")
    box = _bounding_box(a | b)
    surface_a, surface_b = _surface(a[box]), _surface(b[box])
    to_b = _distance(surface_b, spacing_mm)[surface_a]
    to_a = _distance(surface_a, spacing_mm)[surface_b]
    return float(max(np.percentile(to_b, 95), np.percentile(to_a, 95)))


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Slices of the smallest box around a mask: both surfaces lie inside."""
    return ndimage.find_objects(mask.astype(np.uint8))[0]


def _surface(mask: np.ndarray) -> np.ndarray:
    """Voxels with a face neighbour outside the mask, or at the border."""
    return mask & ~ndimage.binary_erosion(mask)


def _distance(surface: np.ndarray, spacing_mm: tuple) -> np.ndarray:
    """Distance in mm of every voxel to the nearest True one."""
    return ndimage.distance_transform_edt(~surface, sampling=spacing_mm)
