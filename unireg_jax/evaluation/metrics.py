"""Judges any transform: overlap, surfaces and landmarks.

Each metric has one name and one definition, in DEFINITIONS. The regularity of the map:
regularity.py; whole pairs from their files: cases.py.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from unireg_jax.evaluation.tables import as_json
from unireg_jax.imaging import mapping, transforms
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.surface import hd95, nsd, surface_distances

DEFINITIONS = {
    "dsc": "2 |F and W| / (|F| + |W|); null when absent in both, 0 when in one",
    "hd95_mm": "larger of the two 95th percentiles of surface distances, mm; null when "
    "absent in either",
    "nsd": "share of both surfaces within tolerance_mm of the other; null when absent "
    "in both, 0 when in one",
    "tre_mm": "distance of fixed point + displacement to the moving point, mm",
    "sdlogj": "standard deviation of log max(J, 1e-9), central differences, over the "
    "foreground (fixed labels above 0, or the mask) without the outermost voxels",
    "sdlogj_whole": "sdlogj over the whole grid of the field",
    "sdlogj_l2r": "Learn2Reg: standard deviation of log clip(J + 3, 1e-9, 1e9) over "
    "the grid without 2 voxels per side, within the mask if one is given; not "
    "comparable with sdlogj",
    "fold_percent": "share of voxels of the foreground with J <= 0, percent",
    "fold_percent_whole": "fold_percent over the whole grid of the field",
    "nd_percent": "share of voxels of the foreground with a flat or turned tetrahedron "
    "among the ten at the voxel (no digital diffeomorphism), percent",
    "nd_percent_whole": "nd_percent over the whole grid of the field",
    "ndv_percent": "non-diffeomorphic volume: volume of the turned tetrahedra after "
    "the map, in percent of the foreground",
    "ndv_percent_whole": "ndv_percent over the whole grid of the field",
    "max_mm": "length of the longest displacement vector, mm",
}
TOLERANCE_MM = 2.0  # of nsd
_MAX_ID = 65535
_BLOCK = 2**22


def target_errors(
    transform: mapping.Mapping, fixed_points: np.ndarray, moving_points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Measures target registration errors, without and with a transform.

    Args:
        transform: fixed -> moving.
        fixed_points: [N, 3] LPS mm.
        moving_points: [N, 3] LPS mm, the same spots in the moving scan.

    Returns:
        before and after, each [N] float64, mm.

    Raises:
        ValueError: not two equal [N, 3].
    """
    if fixed_points.ndim != 2 or fixed_points.shape[1] != 3:
        raise ValueError(f"fixed_points must be (N, 3) in mm, got {fixed_points.shape}")
    if moving_points.shape != fixed_points.shape:
        raise ValueError(
            f"moving_points must be {fixed_points.shape} in mm, got "
            f"{moving_points.shape}; one row per fixed point"
        )
    warped = mapping.points(transform, fixed_points)
    before = np.linalg.norm(fixed_points - moving_points, axis=1)
    return before, np.linalg.norm(warped - moving_points, axis=1)


def landmark_errors(
    disp_mm: np.ndarray,
    vox2world: np.ndarray,
    fixed_points: np.ndarray,
    moving_points: np.ndarray,
    affine: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """As `target_errors`, of a displacement field.

    Args:
        disp_mm: [X, Y, Z, 3] float32, LPS mm.
        vox2world: [4, 4], voxel -> LPS mm, of its grid.
        fixed_points: [N, 3] LPS mm.
        moving_points: [N, 3] LPS mm, the same spots in the moving scan.
        affine: [4, 4], LPS mm -> LPS mm, which acts beyond the grid, where alone a
            transform of both parts goes on; None: nothing does.

    Returns:
        before and after, each [N] float64, mm.

    Raises:
        ValueError: not two equal [N, 3].
    """
    transform = mapping.field(disp_mm, vox2world)
    before, after = target_errors(transform, fixed_points, moving_points)
    if affine is not None:
        beyond = ~mapping.within(transform, fixed_points)
        given = mapping.affine(affine), fixed_points[beyond], moving_points[beyond]
        after[beyond] = target_errors(*given)[1]
    return before, after


def landmark_warnings(
    transform: mapping.Mapping,
    fixed_points: np.ndarray,
    moving_points: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
) -> list[str]:
    """Warns of landmarks that a transform does not reach, or takes apart.

    Args:
        transform: fixed -> moving.
        fixed_points, moving_points: [N, 3] LPS mm.
        before, after: [N] mm, their errors without and with it.

    Returns:
        One line each.
    """
    lines = []
    if count := np.count_nonzero(~mapping.within(transform, fixed_points)):
        lines.append(
            f"fov: {count} of {len(before)} fixed landmarks lie beyond the field, "
            "which is zero there; are they in LPS mm?"
        )
    if after.mean() > before.mean() + 0.5:  # mm: not for a hair
        _, swapped = target_errors(transform, moving_points, fixed_points)
        why = "of another pair?"
        if swapped.mean() < before.mean():
            why = f"scans exchanged? The other way round it is {swapped.mean():.3g} mm"
        lines.append(
            f"similarity: the landmarks lie further apart with the transform "
            f"({after.mean():.3g} mm) than without it ({before.mean():.3g} mm): {why}"
        )
    return lines


def warp_labels(
    disp_mm: np.ndarray, vox2world: np.ndarray, moving: Volume, fixed: Volume
) -> np.ndarray:
    """Brings labels of the moving scan onto the grid of the fixed ones, nearest.

    Args:
        disp_mm: [X, Y, Z, 3] float32, LPS mm; its grid need not be that of `fixed`; 0
            beyond it.
        vox2world: [4, 4], voxel of disp_mm -> LPS mm.
        moving: labels.
        fixed: labels that give the grid.

    Returns:
        [X', Y', Z'] on fixed's grid, dtype of moving's data; 0 beyond the moving scan.
    """
    return _nearest(mapping.field(disp_mm, vox2world), moving, fixed)


def warp_stages(
    disp_mm: np.ndarray,
    vox2world: np.ndarray,
    affine: np.ndarray,
    moving: Volume,
    fixed: Volume,
) -> dict[str, np.ndarray]:
    """Brings labels onto the fixed grid as they lie, pre-aligned, and registered.

    Args:
        disp_mm, vox2world, affine: of a Registration; the whole map and its affine.
        moving: labels.
        fixed: labels that give the grid.

    Returns:
        "initial", "affine" and "network", see `warp_labels`.
    """
    return {
        "initial": _nearest(mapping.Mapping(()), moving, fixed),
        "affine": _nearest(mapping.affine(affine), moving, fixed),
        "network": warp_labels(disp_mm, vox2world, moving, fixed),
    }


def label_scores(
    fixed_labels: np.ndarray,
    warped_labels: np.ndarray,
    spacing_mm: tuple[float, float, float] | np.ndarray,
    *,
    ids: Iterable[int] | None = None,
    surface: bool = True,
    tolerance_mm: float = TOLERANCE_MM,
) -> dict[int, dict[str, float]]:
    """Measures overlap and surface distance of every label.

    Args:
        fixed_labels: [X, Y, Z] whole numbers from 0 to 65535, 0 background.
        warped_labels: the same, on the same grid.
        spacing_mm: (x, y, z) mm, or see `surface.surface_distances`.
        ids: labels to report; None for those in either map.
        surface: whether to measure hd95_mm and nsd, which takes longer.
        tolerance_mm: of nsd, mm.

    Returns:
        id -> {"dsc": ..., "hd95_mm": ..., "nsd": ...}, see DEFINITIONS; NaN where
        undefined.

    Raises:
        ValueError: shapes differ, or ids are no such numbers.
    """
    if fixed_labels.shape != warped_labels.shape:
        raise ValueError(
            f"warped_labels must be {fixed_labels.shape}, got {warped_labels.shape}; "
            "resample them onto the fixed grid"
        )
    fixed_labels, warped_labels = _ids(fixed_labels), _ids(warped_labels)
    both = fixed_labels[fixed_labels == warped_labels]
    common = _counts(both)
    counts = [_counts(labels) for labels in (fixed_labels, warped_labels)]
    if ids is None:
        ids = [int(i) for i in np.flatnonzero(counts[0] + counts[1]) if i != 0]
    ids = list(ids)
    if strange := [i for i in ids if not 0 < i <= _MAX_ID]:
        raise ValueError(f"ids must be from 1 to {_MAX_ID}, got {strange[0]}")
    boxes = [
        ndimage.find_objects(a) if surface else []
        for a in (fixed_labels, warped_labels)
    ]
    scores = {}
    for i in ids:
        fixed, warped = (int(count[i]) for count in counts)
        total = fixed + warped
        row = {"dsc": 2 * int(common[i]) / total if total else math.nan}
        if surface:
            box = _union(
                *(found[i - 1] if i <= len(found) else None for found in boxes)
            )
            distances = surface_distances(
                fixed_labels[box] == i, warped_labels[box] == i, spacing_mm
            )
            row |= {"hd95_mm": hd95(distances), "nsd": nsd(distances, tolerance_mm)}
        scores[i] = row
    return scores


def overlap(
    fixed: Volume,
    moving: Volume,
    warped: Mapping[str, np.ndarray],
    *,
    surface: bool = True,
    tolerance_mm: float = TOLERANCE_MM,
) -> dict[str, Any]:
    """Compares the labels of two scans before and after a transform.

    Args:
        fixed: labels that give the grid.
        moving: labels as they were; those in either map are reported.
        warped: name -> [X, Y, Z], moving labels on the fixed grid; metrics of "before"
            are called dsc_before and so on, those of "" plain dsc.
        surface: whether to measure hd95_mm and nsd, which takes longer.
        tolerance_mm: of nsd, mm.

    Returns:
        labels: id -> metric -> value, None where undefined; mean: metric -> mean over
        the labels where it is defined; n: metric -> how many those are; undefined:
        metric -> id -> reason.
    """
    fixed_counts, moving_counts = _counts(_ids(fixed.data)), _counts(_ids(moving.data))
    ids = [int(i) for i in np.flatnonzero(fixed_counts + moving_counts) if i != 0]
    steps = fixed.spacing_mm
    if transforms.has_shear(fixed.vox2world):
        steps = fixed.vox2world[:3, :3]
    rows: dict[int, dict[str, float]] = {i: {} for i in ids}
    undefined: dict[str, dict[int, str]] = {}
    for name, labels in warped.items():
        ending = f"_{name}" if name else ""
        scores = label_scores(
            fixed.data,
            labels,
            steps,
            ids=ids,
            surface=surface,
            tolerance_mm=tolerance_mm,
        )
        lost = _counts(_ids(labels)) == 0
        for i in ids:
            rows[i] |= {f"{key}{ending}": value for key, value in scores[i].items()}
            for key in (k for k, value in scores[i].items() if math.isnan(value)):
                where = _absence(fixed_counts[i] == 0, lost[i])
                undefined.setdefault(f"{key}{ending}", {})[i] = where
    # Two maps without a label have these, too: undefined.
    metrics = ("dsc", "hd95_mm", "nsd") if surface else ("dsc",)
    names = [f"{m}_{name}" if name else m for name in warped for m in metrics]
    columns = {name: [row[name] for row in rows.values()] for name in names}
    n = {name: sum(v == v for v in values) for name, values in columns.items()}
    mean = {name: _mean(values) for name, values in columns.items()}
    return as_json({"labels": rows, "mean": mean, "n": n, "undefined": undefined})


def shared_means(
    labels: Mapping[int, Mapping[str, float | None]], names: Sequence[str]
) -> list[float] | None:
    """Means of several scores over the same labels, so that they can be compared.

    A label that comes into view counts after and not before: `overlap`'s own means
    fall by it.

    Args:
        labels: of `overlap`.
        names: of scores.

    Returns:
        One mean per name, over the labels that have all of them; None without any.
    """
    rows = [[row.get(name) for name in names] for row in labels.values()]
    rows = [row for row in rows if None not in row]
    return np.mean(rows, axis=0).tolist() if rows else None


def summarize_errors(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Summarises landmark errors.

    Args:
        before: [N] mm.
        after: [N] mm.

    Returns:
        points, and mean, standard deviation (over N - 1; NaN for one point), median and
        maximum of tre_mm before and after, mm.
    """
    out: dict[str, float] = {"points": len(after)}
    for name, errors in (("tre_mm_before", before), ("tre_mm", after)):
        out[name] = float(np.mean(errors))
        out[f"{name}_std"] = (
            float(np.std(errors, ddof=1)) if len(errors) > 1 else math.nan
        )
        out[f"{name}_median"] = float(np.median(errors))
        out[f"{name}_max"] = float(np.max(errors))
    return out


def _mean(values: list[float]) -> float:
    """Mean of what is defined; NaN when nothing is."""
    values = [v for v in values if v == v]
    return float(np.mean(values)) if values else float("nan")


def _ids(labels: np.ndarray) -> np.ndarray:
    """Labels as uint8 or uint16."""
    if labels.dtype == bool:
        return labels.view(np.uint8)
    if labels.dtype in (np.uint8, np.uint16):
        return labels
    kind = np.issubdtype(labels.dtype, np.integer)
    if not kind or (labels.size and not 0 <= labels.min() <= labels.max() <= _MAX_ID):
        raise ValueError(
            f"labels must be whole numbers from 0 to {_MAX_ID}, got {labels.dtype}; "
            "convert them"
        )
    return labels.astype(np.uint16)


def _counts(labels: np.ndarray) -> np.ndarray:
    """[65536] voxels per id, in blocks: bincount makes int64 of what it counts."""
    flat, counts = labels.reshape(-1, order="A"), np.zeros(_MAX_ID + 1, np.int64)
    for start in range(0, flat.size, _BLOCK):
        found = np.bincount(flat[start : start + _BLOCK])
        counts[: found.size] += found
    return counts


def _union(a: tuple | None, b: tuple | None) -> tuple[slice, ...]:
    """The smallest box around two; an empty one around none."""
    if a is None or b is None:
        return a or b or (slice(0, 0),) * 3
    return tuple(
        slice(min(s.start, t.start), max(s.stop, t.stop))
        for s, t in zip(a, b, strict=True)
    )


def _absence(in_fixed: bool, in_warped: bool) -> str:
    """Why a metric of a label is undefined."""
    if in_fixed and in_warped:
        return "absent in fixed and warped"
    return "absent in fixed" if in_fixed else "absent in warped"


def _nearest(transform: mapping.Mapping, moving: Volume, fixed: Volume) -> np.ndarray:
    grid = mapping.grid_of(fixed)
    return mapping.resample(transform, moving, grid, interp="nearest")
