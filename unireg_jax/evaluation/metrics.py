"""Judges any transform: overlap, surfaces, landmarks and regularity of the map.

Each metric has one name and one definition, in DEFINITIONS. The transform may come from
any tool that writes ITK's files.
"""

import os
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np
from scipy import ndimage

from unireg_jax.errors import UserError
from unireg_jax.imaging import nifti, orientation, transforms
from unireg_jax.imaging.nifti import Volume, shown
from unireg_jax.imaging.surface import hd95_mm

DEFINITIONS = {
    "dsc": "2 |F and W| / (|F| + |W|); null when absent in both, 0 when in one",
    "hd95_mm": "larger of the two 95th percentiles of surface distances, mm; null when "
    "absent in either",
    "tre_mm": "distance of fixed point + displacement to the moving point, mm",
    "sdlogj": "standard deviation of log max(J, 1e-9), central differences, over the "
    "foreground (fixed labels above 0, or the mask) without the outermost voxels",
    "sdlogj_whole": "sdlogj over the whole grid of the field",
    "sdlogj_l2r": "Learn2Reg: standard deviation of log clip(J + 3, 1e-9, 1e9) over "
    "the grid without 2 voxels per side; not comparable with sdlogj",
    "fold_percent": "share of voxels of the foreground with J <= 0, percent",
    "fold_percent_whole": "fold_percent over the whole grid of the field",
    "max_mm": "length of the longest displacement vector, mm",
}
_AFFINES = ("AffineTransform", "MatrixOffsetTransformBase")
_FIELD = "DisplacementFieldTransform"
_SLAB_VOXELS = 2**21


def read_transform(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Reads a displacement field, or an ITK composite of a field and affines.

    Args:
        path: `.nii`, `.nii.gz` (see imaging/transforms.py) or ITK composite `.h5`. In a
            composite the field must act first, as is usual.

    Returns:
        disp_mm [X, Y, Z, 3] float32, LPS mm, the whole map on the field's grid, LPS+
        axes; vox2world [4, 4] float64.

    Raises:
        UserError: the file is not such a transform; reason says why.
    """
    if not os.fspath(path).lower().endswith((".h5", ".hdf5")):
        return transforms.read_field(path)
    parts = _read_composite(path)
    kinds = [kind for kind, _, _ in parts]
    # The last one listed acts first.
    if not kinds or kinds[-1] != _FIELD or any(k not in _AFFINES for k in kinds[:-1]):
        raise _not_composite(path, ", ".join(kinds) or "no transform")
    _, grid, vectors = parts[-1]
    if grid.size != 18 or vectors.size != 3 * np.prod(grid[:3]):
        raise _not_composite(path, f"a field of {vectors.size} numbers")
    shape = tuple(int(n) for n in grid[:3])
    vox2world = np.eye(4)
    vox2world[:3, :3] = grid[9:].reshape(3, 3) * grid[None, 6:9]
    vox2world[:3, 3] = grid[3:6]
    disp_mm = vectors.reshape(*shape[::-1], 3).transpose(2, 1, 0, 3)
    matrix = np.eye(4)
    for _, center, parameters in reversed(parts[:-1]):
        matrix = _itk_matrix(center, parameters) @ matrix
    if not (np.isfinite(disp_mm).all() and np.isfinite(matrix).all()):
        raise UserError(
            "field_nonfinite",
            f"{shown(path)}: field_nonfinite: expected finite numbers, got NaN or "
            "infinity; register again",
        )
    rigid = (matrix - np.eye(4)) @ vox2world
    total = np.empty(disp_mm.shape, np.float32)
    for k in range(shape[2]):
        shift = disp_mm[:, :, k] @ matrix[:3, :3].T
        total[:, :, k] = shift + slice_positions(rigid, shape[:2], k)
    return orientation.reorient(total, vox2world)


def field_scores(
    disp_mm: np.ndarray, vox2world: np.ndarray, *, mask: np.ndarray | None = None
) -> dict[str, float]:
    """Measures the regularity of a map.

    Args:
        disp_mm: [X, Y, Z, 3] float32, LPS mm.
        vox2world: [4, 4], voxel -> LPS mm, of its grid.
        mask: [X, Y, Z] bool, the foreground; None leaves out its two metrics.

    Returns:
        max_mm, sdlogj_whole, sdlogj_l2r, fold_percent_whole and, with a mask, sdlogj
        and fold_percent; see DEFINITIONS. NaN where undefined.

    Raises:
        ValueError: shapes disagree, or fewer than 5 voxels along an axis.
    """
    if disp_mm.ndim != 4 or disp_mm.shape[3] != 3 or min(disp_mm.shape[:3]) < 5:
        raise ValueError(
            f"disp_mm must be (X, Y, Z, 3) with 5 voxels or more along each axis, got "
            f"{disp_mm.shape}; channels last"
        )
    if mask is not None and mask.shape != disp_mm.shape[:3]:
        raise ValueError(
            f"mask must be {disp_mm.shape[:3]} on the field's grid, got {mask.shape}"
        )
    detj = jacobian_determinant(disp_mm, vox2world)
    rim = detj[1:-1, 1:-1, 1:-1]
    longest = max(
        float(np.square(disp_mm[:, :, k]).sum(axis=-1).max())
        for k in range(disp_mm.shape[2])
    )
    scores = {
        "max_mm": float(np.sqrt(longest)),
        "sdlogj_whole": _std_log(np.maximum(detj, 1e-9)),
        "sdlogj_l2r": _std_log(np.clip(rim + 3, 1e-9, 1e9)),
        "fold_percent_whole": 100 * float((detj <= 0).mean()),
    }
    if mask is not None:
        inner = detj[mask[1:-1, 1:-1, 1:-1]]
        some = inner.size > 0
        scores["sdlogj"] = _std_log(np.maximum(inner, 1e-9)) if some else np.nan
        folds = (inner <= 0).mean() if some else np.nan
        scores["fold_percent"] = 100 * float(folds)
    return scores


def landmark_errors(
    disp_mm: np.ndarray,
    vox2world: np.ndarray,
    fixed_points: np.ndarray,
    moving_points: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Measures target registration errors, without and with the transform.

    Args:
        disp_mm: [X, Y, Z, 3] float32, LPS mm.
        vox2world: [4, 4], voxel -> LPS mm, of its grid.
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
    warped = fixed_points + _sample(disp_mm, vox2world, fixed_points)
    before = np.linalg.norm(fixed_points - moving_points, axis=1)
    return before, np.linalg.norm(warped - moving_points, axis=1)


def warp_labels(
    disp_mm: np.ndarray, vox2world: np.ndarray, moving: Volume, fixed: Volume
) -> np.ndarray:
    """Brings labels of the moving scan onto the grid of the fixed ones, nearest.

    Args:
        disp_mm: [X, Y, Z, 3] float32, LPS mm; its grid need not be that of `fixed`.
            Beyond it the outermost vector holds.
        vox2world: [4, 4], voxel of disp_mm -> LPS mm.
        moving: labels.
        fixed: labels that give the grid.

    Returns:
        [X', Y', Z'] on fixed's grid, dtype of moving's data; 0 beyond the moving scan.
    """
    shape, limit = fixed.data.shape, np.array(moving.data.shape)
    to_moving = np.linalg.inv(moving.vox2world)
    straight = to_moving @ fixed.vox2world
    same = disp_mm.shape[:3] == shape and np.allclose(
        vox2world, fixed.vox2world, rtol=0, atol=1e-4
    )
    out = np.empty(shape, moving.data.dtype)
    for k in range(shape[2]):
        if same:
            vectors = disp_mm[:, :, k]
        else:
            vectors = _sample(
                disp_mm, vox2world, slice_positions(fixed.vox2world, shape[:2], k)
            )
        coords = vectors @ to_moving[:3, :3].T + slice_positions(straight, shape[:2], k)
        index = np.floor(coords + 0.5).astype(np.int64)
        inside = ((index >= 0) & (index < limit)).all(axis=-1)
        x, y, z = np.moveaxis(np.clip(index, 0, limit - 1), -1, 0)
        out[:, :, k] = np.where(inside, moving.data[x, y, z], 0)
    return out


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
    still = np.broadcast_to(np.float32(0), disp_mm.shape)
    # The affine alone: the same voxels, seen from the fixed world.
    placed = moving._replace(vox2world=np.linalg.inv(affine) @ moving.vox2world)
    return {
        "initial": warp_labels(still, vox2world, moving, fixed),
        "affine": warp_labels(still, vox2world, placed, fixed),
        "network": warp_labels(disp_mm, vox2world, moving, fixed),
    }


def label_scores(
    fixed_labels: np.ndarray,
    warped_labels: np.ndarray,
    spacing_mm: tuple[float, float, float],
    *,
    ids: list[int] | None = None,
    surface: bool = True,
) -> dict[int, dict[str, float]]:
    """Measures overlap and surface distance of every label.

    Args:
        fixed_labels: [X, Y, Z] whole numbers, 0 background.
        warped_labels: the same, on the same grid.
        spacing_mm: (x, y, z) mm.
        ids: labels to report; None for those in either map.
        surface: whether to measure hd95_mm, which takes longer.

    Returns:
        id -> {"dsc": ..., "hd95_mm": ...}, see DEFINITIONS; NaN where undefined.

    Raises:
        ValueError: shapes differ.
    """
    if fixed_labels.shape != warped_labels.shape:
        raise ValueError(
            f"warped_labels must be {fixed_labels.shape}, got {warped_labels.shape}; "
            "resample them onto the fixed grid"
        )
    if ids is None:
        present = np.union1d(np.unique(fixed_labels), np.unique(warped_labels))
        ids = [int(i) for i in present if i != 0]
    both = fixed_labels[fixed_labels == warped_labels]
    counts = [_counts(labels) for labels in (both, fixed_labels, warped_labels)]
    scores = {}
    for i in ids:
        common, fixed, warped = (count.get(i, 0) for count in counts)
        total = fixed + warped
        scores[i] = {"dsc": 2 * common / total if total else float("nan")}
    for i in ids if surface else []:
        scores[i]["hd95_mm"] = hd95_mm(fixed_labels, warped_labels, i, spacing_mm)
    return scores


def overlap(
    fixed: Volume,
    moving: Volume,
    warped: Mapping[str, np.ndarray],
    *,
    surface: bool = True,
) -> dict[str, Any]:
    """Compares the labels of two scans before and after a transform.

    Args:
        fixed: labels that give the grid.
        moving: labels as they were; those in either map are reported.
        warped: name -> [X, Y, Z], moving labels on the fixed grid; metrics of "before"
            are called dsc_before and so on, those of "" plain dsc.
        surface: whether to measure hd95_mm, which takes longer.

    Returns:
        labels: id -> metric -> value; mean: metric -> mean over the labels where it is
        defined. None where undefined.
    """
    ids = np.union1d(np.unique(fixed.data), np.unique(moving.data))
    ids = [int(i) for i in ids if i != 0]
    rows: dict[int, dict[str, float]] = {i: {} for i in ids}
    for name, labels in warped.items():
        ending = f"_{name}" if name else ""
        scores = label_scores(
            fixed.data, labels, fixed.spacing_mm, ids=ids, surface=surface
        )
        for i in ids:
            rows[i] |= {f"{key}{ending}": value for key, value in scores[i].items()}
    names = next(iter(rows.values()), {})
    mean = {name: _mean([row[name] for row in rows.values()]) for name in names}
    return as_json({"labels": rows, "mean": mean})


def summarize_errors(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Summarises landmark errors.

    Args:
        before: [N] mm.
        after: [N] mm.

    Returns:
        points, and mean, standard deviation, median and maximum of tre_mm before and
        after, mm.
    """
    out: dict[str, float] = {"points": len(after)}
    for name, errors in (("tre_mm_before", before), ("tre_mm", after)):
        out[name] = float(np.mean(errors))
        out[f"{name}_std"] = float(np.std(errors))
        out[f"{name}_median"] = float(np.median(errors))
        out[f"{name}_max"] = float(np.max(errors))
    return out


def slice_positions(matrix: np.ndarray, shape: tuple[int, int], k: int) -> np.ndarray:
    """Maps the voxels of one slice through a matrix.

    Args:
        matrix: [4, 4].
        shape: (X, Y) of the slice.
        k: index of the slice along the third axis.

    Returns:
        [X, Y, 3] float64, matrix @ (x, y, k, 1).
    """
    x, y = np.ogrid[: shape[0], : shape[1]]
    rows = [row[0] * x + row[1] * y + (row[2] * k + row[3]) for row in matrix[:3]]
    return np.stack(rows, axis=-1)


def _mean(values: list[float]) -> float:
    """Mean of what is defined; NaN when nothing is."""
    values = [v for v in values if v == v]
    return float(np.mean(values)) if values else float("nan")


def _counts(labels: np.ndarray) -> dict[int, int]:
    """Voxels per label."""
    values, counts = np.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def jacobian_determinant(disp_mm: np.ndarray, vox2world: np.ndarray) -> np.ndarray:
    """Determinant of the Jacobian of x + disp_mm(x), central differences.

    Slab by slab: bounded memory.

    Args:
        disp_mm: [X, Y, Z, 3] float32, LPS mm, 3 voxels or more along each axis.
        vox2world: [4, 4], voxel -> LPS mm.

    Returns:
        [X-2, Y-2, Z-2] float32, no unit; entry i belongs to voxel i + 1.
    """
    x, y, z = disp_mm.shape[:3]
    depth = max(1, _SLAB_VOXELS // (x * y))
    to_voxel = np.linalg.inv(vox2world[:3, :3]).astype(np.float32)
    out = np.empty((x - 2, y - 2, z - 2), np.float32)
    for k in range(0, z - 2, depth):
        disp = disp_mm[:, :, k : k + depth + 2] @ to_voxel.T
        out[:, :, k : k + depth] = _interior_determinant(disp)
    return out


def _interior_determinant(disp: np.ndarray) -> np.ndarray:
    """Of x + disp(x), in voxels, at interior voxels."""
    inner = slice(1, -1)
    rows = []  # of the Jacobian: derivatives of one component
    for i in range(3):
        row = []
        for axis in range(3):
            ends = [inner, inner, inner]
            ends[axis] = slice(2, None)
            after = disp[(*ends, i)]
            ends[axis] = slice(None, -2)
            row.append((after - disp[(*ends, i)]) * np.float32(0.5))
        row[i] += 1
        rows.append(row)
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = rows
    return (
        xx * (yy * zz - yz * zy) - xy * (yx * zz - yz * zx) + xz * (yx * zy - yy * zx)
    )


def _std_log(values: np.ndarray) -> float:
    """Population standard deviation of the logarithm, summed in float64."""
    return float(np.std(np.log(values), dtype=np.float64))


def _sample(disp_mm: np.ndarray, vox2world: np.ndarray, points: np.ndarray):
    """Field at world points [..., 3], linear; beyond the grid its edge."""
    to_voxel = np.linalg.inv(vox2world)
    coords = points @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    coords = np.moveaxis(coords, -1, 0)
    parts = [
        ndimage.map_coordinates(disp_mm[..., i], coords, order=1, mode="nearest")
        for i in range(3)
    ]
    return np.stack(parts, axis=-1)


def _itk_matrix(center: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    """y = A (x - c) + t + c as 4 x 4."""
    matrix = np.eye(4)
    matrix[:3, :3] = parameters[:9].reshape(3, 3)
    matrix[:3, 3] = parameters[9:] + center - matrix[:3, :3] @ center
    return matrix


def _read_composite(
    path: str | os.PathLike,
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Kind, fixed parameters and parameters of each transform, in the file's order."""
    nifti.check_file(path)
    parts = []
    try:
        with h5py.File(path, "r") as file:
            root = file["TransformGroup"]
            for number in sorted(root, key=int):
                group = root[number]
                kind = group["TransformType"][0].decode("ascii").split("_")[0]
                if kind == "CompositeTransform":
                    continue
                # SimpleITK spells fixed parameters so; others with their typing error.
                names = ("TransformFixedParameters", "TranformFixedParameters")
                fixed = next(group[n] for n in names if n in group)
                names = ("TransformParameters", "TranformParameters")
                values = next(group[n] for n in names if n in group)
                center = np.asarray(fixed[()], np.float64)
                if kind in _AFFINES and (center.size, values.size) != (3, 12):
                    raise ValueError(f"an affine of {values.size} numbers")
                parts.append((kind, center, np.asarray(values[()], np.float64)))
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    except (
        OSError,
        KeyError,
        ValueError,
        IndexError,
        StopIteration,
        AttributeError,
        TypeError,
        RuntimeError,
    ) as error:
        raise _not_composite(path, " ".join(str(error).split())[:120]) from error
    return parts


def _not_composite(path: str | os.PathLike, got: str) -> UserError:
    return UserError(
        "schema",
        f"{shown(path)}: schema: expected an ITK composite (.h5) of affines and one "
        f"displacement field that acts first, got {got}; convert it to .nii.gz",
    )


def as_json(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON does not have, by None.

    Args:
        value: nested dicts and lists of plain values.

    Returns:
        The same, with string keys.
    """
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
