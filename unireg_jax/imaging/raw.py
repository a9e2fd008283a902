"""Reads headerless volumes whose grid is published beside them (DIR-Lab)."""

import os
from typing import NamedTuple

import numpy as np

from unireg_jax.errors import bad_file
from unireg_jax.imaging import nifti, orientation
from unireg_jax.imaging.nifti import Native, Volume


class RawGrid(NamedTuple):
    """What a headerless file does not say.

    Attributes:
        shape: (X, Y, Z) voxels, X fastest.
        spacing_mm: voxel edge lengths, mm.
        offset_hu: added to the stored values.
        codes: direction in which each axis increases.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    offset_hu: int
    codes: str = "LPS"


def read_raw(path: str | os.PathLike, grid: RawGrid) -> Volume:
    """Reads little-endian int16 voxels and nothing else.

    hu = stored + grid.offset_hu

    Args:
        path: the file.
        grid: shape, spacing and offset.

    Returns:
        Volume; data int16 HU on LPS+ axes, the first stored voxel at the world's
        origin.

    Raises:
        UserError: `not_found`, `not_a_file`, `empty`, `permission`; `dims` when the
            file's size is not that of the grid.
    """
    size, wanted = nifti.check_file(path), 2 * int(np.prod(grid.shape))
    if size != wanted:
        raise bad_file(
            path,
            "dims",
            f"{wanted} bytes ({grid.shape} int16)",
            str(size),
            "unpack the file again",
        )
    try:
        stored = np.fromfile(path, "<i2")
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    hu = np.clip(stored.astype(np.int32) + grid.offset_hu, -32768, 32767)
    native = np.diag([*grid.spacing_mm, 1.0])
    native[:3, :3] = orientation.direction(grid.codes) @ native[:3, :3]
    data, vox2world = orientation.reorient(
        hu.astype(np.int16).reshape(grid.shape, order="F"), native
    )
    return Volume(
        data=data,
        vox2world=vox2world,
        path=os.fspath(path),
        native=Native(grid.shape, native),
        warnings=tuple(nifti.intensity_warnings(data)),
    )
