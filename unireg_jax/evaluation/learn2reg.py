"""Scores as the Learn2Reg challenge's script computes them, to be held against its own.

Not the definitions of metrics.py: distances of surfaces count voxels, labels absent in
one scan leave the mean, landmarks are looked up by cubic splines that are zero outside
the grid, 3 is added to every determinant, and folds are counted after that, so that
none is ever found. Only for comparison with published numbers of the challenge.
"""

import importlib
import importlib.util
import math
import warnings
from typing import Any

import numpy as np
from scipy import ndimage

from unireg_jax.errors import USAGE, UserError
from unireg_jax.evaluation.tables import as_json

DEFINITIONS = {
    "dsc_l2r": "Learn2Reg: as dsc, null when absent in the fixed or the moving labels; "
    "labels warped by rounding, 0 beyond the moving grid's voxel centres",
    "hd95_voxel_l2r": "Learn2Reg: 95 % Hausdorff distance of surface elements weighted "
    "by area (package surface-distance) with unit spacing, voxels; null as dsc_l2r and "
    "when the warp lost the label, where the challenge has infinity",
    "tre_mm_l2r": "Learn2Reg: mean landmark error, displacement by cubic spline, 0 "
    "outside the grid; voxel error times the moving scan's spacing, mm",
    "sdlogj_l2r": "Learn2Reg: standard deviation of log clip(J + 3, 1e-9, 1e9) over "
    "the grid without 2 voxels per side, within the mask if one is given",
    "folds_l2r": "Learn2Reg: voxels with J + 3, clipped to 1e-9 or more, at most 0: "
    "none, whatever the field; see fold_percent",
}
_LOST = "lost by the warp: infinite in the challenge"


def check_installed() -> None:
    """Refuses to go on without the package whose surfaces the challenge measures.

    Raises:
        UserError: `not_installed`, exit code 2.
    """
    if importlib.util.find_spec("surface_distance") is None:
        raise UserError(
            "not_installed",
            "not_installed: --l2r-compat with labels needs the package "
            "surface-distance, as the challenge's script; `pip install "
            "unireg-jax[eval]`",
            USAGE,
        )


def scores(
    disp: np.ndarray,
    *,
    fixed_labels: np.ndarray | None = None,
    moving_labels: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    fixed_points: np.ndarray | None = None,
    moving_points: np.ndarray | None = None,
    moving_spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ids: list[int] | None = None,
) -> dict[str, Any]:
    """Scores one pair as the challenge does.

    Args:
        disp: [X, Y, Z, 3] float, voxels of the moving scan along the array axes, on
            the fixed grid: warped(x) = moving(x + disp(x)).
        fixed_labels: [X, Y, Z] whole numbers, 0 background; with moving_labels.
        moving_labels: [X', Y', Z'] whole numbers.
        mask: [X, Y, Z] bool, of the fixed scan, where sdlogj_l2r is taken.
        fixed_points: [N, 3] voxel indices of the fixed grid; with moving_points.
        moving_points: [N, 3] voxel indices of the moving grid.
        moving_spacing_mm: (x, y, z) mm of the moving scan.
        ids: labels to report; None: those in either scan.

    Returns:
        labels: id -> dsc_l2r, hd95_voxel_l2r; mean: the same over the labels where
        defined, tre_mm_l2r, sdlogj_l2r, folds_l2r; undefined: metric -> id -> reason.
        None where undefined.

    Raises:
        ValueError: shapes disagree.
        UserError: `not_installed`, exit code 2: labels without surface-distance.
    """
    if disp.ndim != 4 or disp.shape[3] != 3:
        raise ValueError(f"disp must be (X, Y, Z, 3) in voxels, got {disp.shape}")
    for name, given in (("fixed_labels", fixed_labels), ("mask", mask)):
        if given is not None and given.shape != disp.shape[:3]:
            raise ValueError(
                f"{name} must be {disp.shape[:3]} on the grid of disp, got "
                f"{given.shape}; resample it"
            )
    rows: dict[int, dict[str, float]] = {}
    undefined: dict[str, dict[int, str]] = {}
    if fixed_labels is not None and moving_labels is not None:
        warped = _warp(moving_labels, disp)
        if ids is None:
            both = np.union1d(np.unique(fixed_labels), np.unique(moving_labels))
            ids = [int(i) for i in both if i != 0]
        for i in ids:
            rows[i], reasons = _label(i, fixed_labels, moving_labels, warped)
            for name, reason in reasons.items():
                undefined.setdefault(name, {})[i] = reason
    mean = {
        name: _mean([row[name] for row in rows.values()])
        for name in ("dsc_l2r", "hd95_voxel_l2r")
        if rows
    }
    if fixed_points is not None and moving_points is not None:
        errors = _errors(disp, fixed_points, moving_points, moving_spacing_mm)
        mean["tre_mm_l2r"] = float(errors.mean())
    mean |= _spread(disp, mask)
    return as_json({"labels": rows, "mean": mean, "undefined": undefined})


def voxel_displacement(
    disp_mm: np.ndarray, fixed_vox2world: np.ndarray, moving_vox2world: np.ndarray
) -> np.ndarray:
    """Displacement as the challenge's files hold it.

    disp(x) = world2vox_moving @ (vox2world_fixed @ x + disp_mm(x)) - x

    Args:
        disp_mm: [X, Y, Z, 3] float32, LPS mm, on the fixed grid.
        fixed_vox2world: [4, 4], voxel -> LPS mm.
        moving_vox2world: [4, 4], voxel -> LPS mm.

    Returns:
        [X, Y, Z, 3] float64, voxels of the moving scan.
    """
    to_moving = np.linalg.inv(moving_vox2world)
    change = to_moving @ fixed_vox2world - np.eye(4)
    out = disp_mm @ to_moving[:3, :3].T
    x, y, z = np.ogrid[tuple(slice(n) for n in disp_mm.shape[:3])]
    for axis in range(3):
        row = change[axis]
        out[..., axis] += row[0] * x + row[1] * y + row[2] * z + row[3]
    return out


def _warp(labels: np.ndarray, disp: np.ndarray) -> np.ndarray:
    grid = np.meshgrid(
        *(np.arange(n) for n in disp.shape[:3]), indexing="ij", sparse=True
    )
    coords = np.stack([g + disp[..., i] for i, g in enumerate(grid)])
    return ndimage.map_coordinates(labels, coords, order=0)


def _label(
    i: int, fixed: np.ndarray, moving: np.ndarray, warped: np.ndarray
) -> tuple[dict[str, float], dict[str, str]]:
    """Scores of one label, and why one has none."""
    a, b = fixed == i, warped == i
    absent = [
        name for name, mask in (("fixed", a), ("moving", moving == i)) if not mask.any()
    ]
    if absent:
        names = ("dsc_l2r", "hd95_voxel_l2r")
        reason = f"absent in {' and '.join(absent)}"
        return dict.fromkeys(names, math.nan), dict.fromkeys(names, reason)
    row = {"dsc_l2r": float(2 * (a & b).sum() / (a.sum() + b.sum()))}
    if not b.any():
        return row | {"hd95_voxel_l2r": math.nan}, {"hd95_voxel_l2r": _LOST}
    return row | {"hd95_voxel_l2r": _hd95(a, b)}, {}


def _hd95(a: np.ndarray, b: np.ndarray) -> float:
    """Of surface elements, unit spacing."""
    check_installed()
    package = importlib.import_module("surface_distance")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # names of old SciPy
        distances = package.compute_surface_distances(a, b, np.ones(3))
    return float(package.compute_robust_hausdorff(distances, 95.0))


def _errors(
    disp: np.ndarray,
    fixed: np.ndarray,
    moving: np.ndarray,
    spacing_mm: tuple[float, float, float],
) -> np.ndarray:
    shift = [ndimage.map_coordinates(disp[..., i], fixed.T) for i in range(3)]
    gap = fixed + np.stack(shift, axis=-1) - moving
    return np.linalg.norm(gap * np.array(spacing_mm), axis=1)


def _spread(disp: np.ndarray, mask: np.ndarray | None) -> dict[str, float]:
    """sdlogj_l2r and folds_l2r."""
    if min(disp.shape[:3]) < 5:
        return {"sdlogj_l2r": math.nan, "folds_l2r": math.nan}
    inner = (slice(2, -2),) * 3
    jac = np.empty((*(n - 4 for n in disp.shape[:3]), 3, 3))
    for axis in range(3):
        slope = np.gradient(disp, axis=axis)  # central, off the border
        jac[..., axis] = slope[inner]
    detj = np.clip(np.linalg.det(jac + np.eye(3)) + 3, 1e-9, 1e9)
    if mask is not None:
        detj = detj[mask[inner]]
    some = detj.size > 0
    return {
        "sdlogj_l2r": float(np.log(detj).std()) if some else math.nan,
        "folds_l2r": int((detj <= 0).sum()),
    }


def _mean(values: list[float]) -> float:
    values = [v for v in values if v == v]
    return float(np.mean(values)) if values else math.nan
