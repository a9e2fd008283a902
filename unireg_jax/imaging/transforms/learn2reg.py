"""Displacement fields as the Learn2Reg challenge has them: voxels, no world."""

import math
import os
import zipfile
from typing import IO

import nibabel as nib
import numpy as np

from unireg_jax.errors import UserError, bad_file
from unireg_jax.imaging import nifti, orientation
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.transforms import checks

_INTENT_FSL = 2006  # its displacements, and coefficients above


def write_l2r(
    path: str | os.PathLike,
    disp_mm: np.ndarray,
    vox2world: np.ndarray,
    *,
    moving_vox2world: np.ndarray | None = None,
    like: Volume | None = None,
) -> None:
    """Writes a Learn2Reg submission: voxels of the moving image, along array axes.

    moving is read at index x + disp(x), which also holds the change of grid:
    disp(x) = world2vox_moving @ (vox2world @ x + disp_mm(x)) - x

    Args:
        path: `.nii.gz`, `.nii`, or `.npz` (array `arr_0`), as
            `disp_{fixed}_{moving}.nii.gz`.
        disp_mm: [X, Y, Z, 3] float, LPS mm.
        vox2world: [4, 4] float, voxel index of disp_mm -> LPS mm.
        moving_vox2world: [4, 4] float, the moving file's stored voxel index -> LPS mm;
            None: the moving image lies on the grid of the field, as in the challenge.
        like: see `write_field`.

    Raises:
        ValueError: shapes disagree or values are not finite.
        UserError: `storage`.
    """
    disp_mm, vox2world = checks.to_file_grid(disp_mm, vox2world, like)
    moving = vox2world if moving_vox2world is None else moving_vox2world
    to_voxel = np.linalg.inv(checks.check_affine(moving, "moving_vox2world"))
    change = to_voxel @ vox2world - np.eye(4)
    disp = disp_mm @ to_voxel[:3, :3].T + _linear(change, disp_mm.shape[:3])
    disp = disp.astype(np.float32)
    if os.fspath(path).lower().endswith(".npz"):
        with nifti.atomic_path(path) as temp, open(temp, "wb") as file:
            np.savez_compressed(file, disp)
        return
    if like is None or like.header is None:
        header = nib.Nifti1Header()
        nifti.set_geometry(header, vox2world)
    else:
        header = nifti.clean_header(like.header)
    header["pixdim"][4] = 1
    nifti.write_array(path, disp, header, dtype="f4")


def read_l2r(
    path: str | os.PathLike,
    vox2world: np.ndarray,
    *,
    moving_vox2world: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a Learn2Reg field; its file says nothing about the world.

    Args:
        path: `.nii.gz`, `.nii` or `.npz` with (X, Y, Z, 3) voxels.
        vox2world: [4, 4] float, the fixed file's stored voxel index -> LPS mm, such as
            `volume.native.vox2world`.
        moving_vox2world: the same of the moving file; None: as vox2world.

    Returns:
        disp_mm [X, Y, Z, 3] float32, LPS mm, axes brought to LPS+; its vox2world
        [4, 4] float64, LPS mm.

    Raises:
        UserError: the file is not such a field; reason says why.
    """
    vox2world = checks.check_affine(vox2world, "vox2world")
    moving = vox2world if moving_vox2world is None else moving_vox2world
    moving = checks.check_affine(moving, "moving_vox2world")
    disp = _read_l2r_array(path)
    change = moving - vox2world
    with np.errstate(over="ignore", invalid="ignore"):  # infinity: refused below
        disp_mm = disp @ moving[:3, :3].T + _linear(change, disp.shape[:3])
        disp_mm = disp_mm.astype(np.float32)
    checks.refuse_vectors(disp_mm, path)
    return orientation.reorient(disp_mm, vox2world)


def _linear(matrix: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """[X, Y, Z, 3] of matrix @ x over all voxel indices x."""
    i, j, k = np.ogrid[: shape[0], : shape[1], : shape[2]]
    rows = (row[0] * i + row[1] * j + row[2] * k + row[3] for row in matrix[:3])
    return np.stack(list(rows), axis=-1)


def _read_l2r_array(path: str | os.PathLike) -> np.ndarray:
    """[X, Y, Z, 3] float64 voxels."""
    if not os.fspath(path).lower().endswith(".npz"):
        header, disp, _ = nifti.read_vectors(path, frames=False)
        intent = int(header["intent_code"])
        if intent == nifti.INTENT_DISPVECT or intent >= _INTENT_FSL:
            raise bad_file(
                path,
                "dtype",
                "voxels as of Learn2Reg, which has no intent code",
                f"{intent}: mm, or a transform of FSL",
                "convert it to a field of ITK",
            )
        return disp.astype(np.float64)
    nifti.check_file(path)
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            name = archive.namelist()[0]
            with archive.open(name) as member:
                _check_claim(path, member, archive.getinfo(name).file_size)
            with archive.open(name) as member:
                disp = np.lib.format.read_array(member, allow_pickle=False)
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    except (UserError, MemoryError):
        raise
    # Encrypted, of an unknown method, tokens that do not end: a dozen kinds, as the
    # bytes fall, of zipfile, its methods and NumPy.
    except Exception as error:
        raise bad_file(
            path,
            "truncated",
            "an .npz archive with one array",
            " ".join(str(error).split())[:120] or type(error).__name__,
            "write it again",
        ) from error
    if disp.ndim != 4 or disp.shape[3] != 3 or disp.dtype.kind != "f":
        raise bad_file(
            path,
            "ndim",
            "real numbers of shape (X, Y, Z, 3)",
            f"{disp.dtype} {disp.shape}",
            "write voxel displacements, channels last",
        )
    return disp.astype(np.float64)


def _check_claim(path: str | os.PathLike, member: IO[bytes], size: int) -> None:
    """Refuses a NumPy array whose header claims more than there can be."""
    first = np.lib.format.read_magic(member) == (1, 0)
    form = np.lib.format
    read = form.read_array_header_1_0 if first else form.read_array_header_2_0
    shape, _, dtype = read(member)
    count = math.prod(shape)
    if count > checks.MAX_NUMBERS:
        raise checks.too_large(path, count)
    if count * dtype.itemsize > size:
        raise ValueError(f"{size} bytes for numbers of shape {shape}")
