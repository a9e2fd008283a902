"""Landmark tables: corresponding points of two scans in LPS mm."""

import csv
import os
from typing import NamedTuple

import numpy as np

from unireg_jax.errors import UserError
from unireg_jax.imaging import nifti
from unireg_jax.imaging.nifti import Volume

_FIXED = ("fixed_x_mm", "fixed_y_mm", "fixed_z_mm")
_MOVING = ("moving_x_mm", "moving_y_mm", "moving_z_mm")
_NAMES = ("name", "label", "id")
# Coordinates of `read_table`: world, or indices of the voxels as stored.
FRAMES = ("lps_mm", "voxel_from_0", "voxel_from_1")


class PointPairs(NamedTuple):
    """Corresponding points; the i-th of `fixed` and of `moving` are the same spot.

    Attributes:
        names: N strings; "1", "2", ... when the file has none.
        fixed: [N, 3] float64, LPS mm, in the fixed scan.
        moving: [N, 3] float64, LPS mm, in the moving scan.
    """

    names: list[str]
    fixed: np.ndarray
    moving: np.ndarray


def read_points(path: str | os.PathLike) -> PointPairs:
    """Reads landmarks from a CSV file.

    Args:
        path: columns fixed_x_mm, fixed_y_mm, fixed_z_mm, moving_x_mm, moving_y_mm,
            moving_z_mm in LPS mm, optionally name (or label, id); others are ignored.

    Returns:
        PointPairs.

    Raises:
        UserError: `not_found`, `not_a_file`, `permission`, `empty` for no point,
            `schema` for a missing column or a cell that is no finite number.
    """
    nifti.check_file(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = reader.fieldnames or []
            rows = list(reader)
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise _schema(path, "a CSV table in UTF-8", str(error)) from error
    missing = [name for name in _FIXED + _MOVING if name not in columns]
    if missing:
        got = f"no {', '.join(missing)} among {columns[:12]}"
        raise _schema(path, "columns fixed_x_mm ... moving_z_mm (LPS mm)", got)
    if not rows:
        raise UserError(
            "empty",
            f"{nifti.shown(path)}: empty: expected one point or more, got none; write "
            "one per line",
        )
    points = np.array([_numbers(path, n, row) for n, row in enumerate(rows, start=2)])
    column = next((name for name in _NAMES if name in columns), None)
    names = [row[column] if column else str(n) for n, row in enumerate(rows, start=1)]
    return PointPairs(names, points[:, :3], points[:, 3:])


def read_table(path: str | os.PathLike, frame: str, volume: Volume) -> np.ndarray:
    """Reads the points of one scan; points of two scans correspond line by line.

    Args:
        path: three numbers a line, separated by commas, tabs or spaces; a first line
            of words (x_mm, y_mm, z_mm) is skipped, further columns are ignored.
        frame: one of FRAMES; voxel indices count along the axes as stored.
        volume: the scan, whose grid gives voxels their place.

    Returns:
        [N, 3] float64, LPS mm.

    Raises:
        ValueError: frame is none of FRAMES.
        UserError: `not_found`, `not_a_file`, `permission`, `empty`; `schema` for a line
            that is no point.
    """
    if frame not in FRAMES:
        raise ValueError(f"frame must be one of {FRAMES}, got {frame!r}")
    nifti.check_file(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.replace(",", " ").split() for line in file]
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    except UnicodeDecodeError as error:
        raise _schema(path, "a table of numbers in UTF-8", str(error)) from error
    points = []
    for number, cells in enumerate(lines, start=1):
        try:
            point = [float(cell) for cell in cells[:3]]
        except ValueError:
            point = []
        if len(point) == 3 and np.isfinite(point).all():
            points.append(point)
        elif cells and (number > 1 or not cells[0][0].isalpha()):
            got = f"{' '.join(cells)[:40]!r} in line {number}"
            raise _schema(path, "three finite numbers a line", got)
    if not points:
        raise UserError(
            "empty",
            f"{nifti.shown(path)}: empty: expected one point or more, got none; write "
            "one per line",
        )
    table = np.array(points)
    if frame == "lps_mm":
        return table
    vox2world = volume.native.vox2world if volume.native else volume.vox2world
    indices = table - (frame == "voxel_from_1")
    return indices @ vox2world[:3, :3].T + vox2world[:3, 3]


def write_points(path: str | os.PathLike, points: PointPairs) -> None:
    """Writes landmarks as `read_points` reads them.

    Args:
        path: name of the CSV file.
        points: names, fixed [N, 3] and moving [N, 3], LPS mm.

    Raises:
        ValueError: the three do not have N entries.
        UserError: `storage`.
    """
    count = len(points.names)
    if points.fixed.shape != (count, 3) or points.moving.shape != (count, 3):
        raise ValueError(
            f"points must be ({count}, 3) in mm, got fixed {points.fixed.shape} and "
            f"moving {points.moving.shape}; one row per name"
        )
    with (
        nifti.atomic_path(path) as temp,
        open(temp, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("name", *_FIXED, *_MOVING))
        for name, fixed, moving in zip(*points, strict=True):
            numbers = (repr(float(value)) for value in (*fixed, *moving))
            writer.writerow((name, *numbers))


def _numbers(path: str | os.PathLike, line: int, row: dict) -> list[float]:
    """The six coordinates of one line."""
    values = []
    for name in _FIXED + _MOVING:
        try:
            value = float(row[name])
        except (TypeError, ValueError):
            value = np.nan
        if not np.isfinite(value):
            got = f"{row[name]!r} in line {line}, column {name}"
            raise _schema(path, "a finite number of mm", got)
        values.append(value)
    return values


def _schema(path: str | os.PathLike, expected: str, got: str) -> UserError:
    return UserError(
        "schema",
        f"{nifti.shown(path)}: schema: expected {expected}, got {got}; mend the table",
    )
