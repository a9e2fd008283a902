"""Displacement fields as NRRD, for Slicer, and MetaImage."""

import math
import os

import numpy as np

from unireg_jax.errors import UserError, bad_file
from unireg_jax.imaging import itk_files, nifti, orientation
from unireg_jax.imaging.nifti import Volume, shown
from unireg_jax.imaging.transforms import checks

_RESAMPLING = "displacement field type"  # Slicer: resampling, or modelling


def write_nrrd(
    path: str | os.PathLike,
    disp_mm: np.ndarray,
    vox2world: np.ndarray,
    *,
    like: Volume | None = None,
) -> None:
    """Writes a displacement field as NRRD, for Slicer.

    Args:
        path: name that ends in `.nrrd`.
        disp_mm: [X, Y, Z, 3] float, LPS mm.
        vox2world: [4, 4] float, voxel index of disp_mm -> LPS mm.
        like: see `write_field`.

    Raises:
        ValueError: shapes disagree, values are not finite or over 1 km, a wrong name.
        UserError: `storage`.
    """
    if not checks.ends(path, ".nrrd"):
        raise ValueError(f"path must end in .nrrd, got {shown(path)}; rename it")
    disp_mm, vox2world = checks.to_file_grid(disp_mm, vox2world, like)
    columns = [
        f"({','.join(repr(v) for v in column)})" for column in vox2world[:3].T.tolist()
    ]
    header = (
        "NRRD0005\n"
        "type: float\ndimension: 4\nspace: left-posterior-superior\n"
        f"sizes: 3 {' '.join(map(str, disp_mm.shape[:3]))}\n"
        f"space directions: none {' '.join(columns[:3])}\n"
        "kinds: vector domain domain domain\nendian: little\nencoding: gzip\n"
        f"space origin: {columns[3]}\n"
        f"{_RESAMPLING}:=resampling\n\n"
    )
    with nifti.atomic_path(path) as temp, open(temp, "wb") as file:
        file.write(header.encode("ascii"))
        with nifti.packing(file) as packed:
            for k in range(disp_mm.shape[2]):  # component fastest, then x, y, z
                slab = disp_mm[:, :, k].transpose(1, 0, 2)
                packed.write(slab.astype("<f4").tobytes())


def read_itk_image(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Reads a displacement field that ITK or Slicer wrote as NRRD or MetaImage.

    Args:
        path: `.nrrd`, `.mha` or `.mhd` with 3 components per voxel, LPS mm.

    Returns:
        disp_mm [X, Y, Z, 3] float32, LPS mm, on LPS+ axes; vox2world [4, 4] float64.

    Raises:
        UserError: as `itk_files.read`; `ndim` for another shape; `schema` for an NRRD
            space other than LPS or a field that is meant the other way round;
            `field_nonfinite`, `field_range`.
    """

    def check(size: tuple[int, ...], components: int) -> None:
        if len(size) != 3 or components != 3:
            raise bad_file(
                path,
                "ndim",
                "a 3-D image of 3 components",
                f"{len(size)}-D of {components}",
                "write one displacement field",
            )
        if 3 * math.prod(size) > checks.MAX_NUMBERS:
            raise checks.too_large(path, 3 * math.prod(size))

    image = itk_files.read(path, check)
    # ITK turns the grid to LPS, but not the vectors.
    if image.space not in ("left-posterior-superior", "lps"):
        raise _not_field(path, "vectors in LPS", image.space)
    if image.told.get(_RESAMPLING, "resampling") != "resampling":
        raise _not_field(path, "a resampling field", image.told[_RESAMPLING])
    disp_mm, vox2world = orientation.reorient(image.voxels, image.vox2world)
    with np.errstate(over="ignore"):  # infinite, and refused as such
        disp_mm = disp_mm.astype(np.float32, copy=False)
    checks.refuse_vectors(disp_mm, path)
    return disp_mm, vox2world


def _not_field(path: str | os.PathLike, expected: str, got: str) -> UserError:
    return bad_file(path, "schema", expected, got, "export it again")
