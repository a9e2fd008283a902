"""Displacement fields as NIfTI: intent 1007 with LPS vectors, or 1006 with RAS ones."""

import os

import nibabel as nib
import numpy as np

from unireg_jax.errors import bad_file
from unireg_jax.imaging import nifti, orientation
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.transforms import checks

_TURN = (np.float32(-1), np.float32(-1), np.float32(1))  # LPS <-> RAS, of vectors
# Intent names of files that say 1007, too.
_OTHERS = {"NREG_TRANS": "a transform of NiftyReg", "Mapping": "positions of SPM"}


def write_field(
    path: str | os.PathLike,
    disp_mm: np.ndarray,
    vox2world: np.ndarray,
    *,
    like: Volume | None = None,
    intent: int = nifti.INTENT_VECTOR,
) -> None:
    """Writes a displacement field that ITK, ANTs and Slicer read.

    moving is read at x + disp_mm(x), x in LPS mm; NIfTI (X, Y, Z, 1, 3).

    Args:
        path: `.nii` or `.nii.gz`.
        disp_mm: [X, Y, Z, 3] float, LPS mm.
        vox2world: [4, 4] float, voxel index of disp_mm -> LPS mm.
        intent: of the file: 1007 with vectors in LPS mm, which ANTs needs, or 1006 with
            vectors in RAS mm, which ITK turns as it reads.
        like: the fixed image when disp_mm lies on its LPS+ axes: the file then has the
            grid and the geometry of that image's own file.

    Raises:
        ValueError: shapes disagree, values are not finite or over 1 km.
        UserError: `storage`.
    """
    if intent not in (nifti.INTENT_VECTOR, nifti.INTENT_DISPVECT):
        raise ValueError(f"intent must be 1007 (LPS) or 1006 (RAS), got {intent}")
    disp_mm, vox2world = checks.to_file_grid(disp_mm, vox2world, like)
    if intent == nifti.INTENT_DISPVECT:
        disp_mm = disp_mm * _TURN
    if like is None or like.header is None:
        header = nib.Nifti1Header()
        nifti.set_geometry(header, vox2world)
    else:
        header = nifti.clean_header(like.header)
    header["intent_code"] = intent
    header["pixdim"][4:6] = 1
    nifti.write_array(path, disp_mm[:, :, :, None, :], header, dtype="f4")


def read_field(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Reads a displacement field, axes brought to LPS+.

    Args:
        path: NIfTI (X, Y, Z, 1, 3): intent 1007 holds LPS mm, 1006 RAS mm.

    Returns:
        disp_mm [X, Y, Z, 3] float32, LPS mm; vox2world [4, 4] float64, LPS mm.

    Raises:
        UserError: as `nifti.read_image`; `dtype` for another intent, `schema` for a
            transform of NiftyReg or SPM, `field_nonfinite`, `field_range` beyond 1 km.
    """
    header, disp_mm, native = nifti.read_vectors(path)
    intent = int(header["intent_code"])
    if intent not in (nifti.INTENT_VECTOR, nifti.INTENT_DISPVECT):
        raise bad_file(
            path,
            "dtype",
            "intent code 1007 (LPS mm) or 1006 (RAS mm)",
            str(intent),
            "set the code that says in which frame the vectors are",
        )
    # Both say 1007 and hold positions, splines or RAS vectors.
    name = bytes(header["intent_name"].tobytes()).rstrip(b"\0").decode("latin-1")
    if name in _OTHERS:
        raise bad_file(
            path,
            "schema",
            "a displacement field as of ITK",
            f"{_OTHERS[name]} (intent name {name})",
            "convert it with that tool, or with ITK",
        )
    checks.refuse_vectors(disp_mm, path)
    if intent == nifti.INTENT_DISPVECT:
        disp_mm = disp_mm * _TURN
    return orientation.reorient(disp_mm, native.vox2world)
