"""Displacement fields and affines as ITK, ANTs, Slicer and Learn2Reg spell them.

Files only; what a transform does to points and scans is in mapping.py.

One meaning throughout: a sampling map (pull-back) that sends a point of the fixed image
to the point where the moving image is read. Inside, vectors are LPS mm on LPS+ axes. In
files the grid is that of the fixed image as stored, and the vectors stay LPS mm however
its axes run.
"""

import gzip
import importlib.util
import math
import os
import struct
import uuid
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import h5py
import nibabel as nib
import numpy as np

from unireg_jax.errors import LIMIT, USAGE, UserError
from unireg_jax.imaging import itk_files, nifti, orientation
from unireg_jax.imaging.nifti import Volume, shown

_AFFINE_KINDS = ("AffineTransform", "MatrixOffsetTransformBase")
_FIELD_KIND = "DisplacementFieldTransform"
# kind, fixed parameters, parameters
_Listed = tuple[str, np.ndarray, np.ndarray]
RANGE_MM = 1e6  # 1 km: scans' table zeros may lie metres apart, not that far
_TURN = (np.float32(-1), np.float32(-1), np.float32(1))  # LPS <-> RAS, of vectors
_MAX_NUMBERS = 3 * 2**29
_NRRD_RESAMPLING = "displacement field type"  # Slicer: resampling, or modelling


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
    disp_mm, vox2world = _to_file_grid(disp_mm, vox2world, like)
    if intent == nifti.INTENT_DISPVECT:
        disp_mm = disp_mm * _TURN
    if like is None or like.header is None:
        header = nib.Nifti1Header()
        nifti.set_geometry(header, vox2world)
    else:
        header = nifti.clean_header(like.header)
    header["intent_code"] = intent
    header["pixdim"][4:6] = 1
    nifti.write_array(path, disp_mm[:, :, :, None, :], header, dtype="f4", level=1)


def read_field(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Reads a displacement field, axes brought to LPS+.

    Args:
        path: NIfTI (X, Y, Z, 1, 3): intent 1007 holds LPS mm, 1006 RAS mm.

    Returns:
        disp_mm [X, Y, Z, 3] float32, LPS mm; vox2world [4, 4] float64, LPS mm.

    Raises:
        UserError: as `nifti.read_image`; `dtype` for another intent, `field_nonfinite`,
            `field_range` beyond 1 km.
    """
    header, disp_mm, native = nifti.read_vectors(path)
    intent = int(header["intent_code"])
    if intent not in (nifti.INTENT_VECTOR, nifti.INTENT_DISPVECT):
        raise UserError(
            "dtype",
            f"{shown(path)}: dtype: expected intent code 1007 (LPS mm) or 1006 (RAS "
            f"mm), got {intent}; set the code that says in which frame the vectors are",
        )
    _refuse_bad_vectors(disp_mm, path)
    if intent == nifti.INTENT_DISPVECT:
        disp_mm = disp_mm * _TURN
    return orientation.reorient(disp_mm, native.vox2world)


def write_affine_txt(
    path: str | os.PathLike,
    matrix: np.ndarray,
    *,
    center: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> None:
    """Writes an affine as ITK text (`.txt`, `.tfm`), which ANTs and Slicer read.

    y = A (x - c) + t + c, the form of ITK, with t such that y = matrix @ x.

    Args:
        path: name of the file.
        matrix: [4, 4] float, fixed world -> moving world, LPS mm.
        center: c, LPS mm; changes the spelling and not the map.

    Raises:
        ValueError: matrix is not a finite, invertible 4 x 4.
        UserError: `storage`.
    """
    parameters = _affine_parameters(matrix, np.asarray(center, np.float64))
    text = (
        "#Insight Transform File V1.0\n"
        "#Transform 0\n"
        "Transform: AffineTransform_double_3_3\n"
        f"Parameters: {_numbers(parameters)}\n"
        f"FixedParameters: {_numbers(center)}\n"
    )
    with nifti.atomic_path(path) as temp:
        temp.write_text(text, encoding="ascii")


def read_affine_txt(path: str | os.PathLike) -> np.ndarray:
    """Reads an affine from ITK text.

    Args:
        path: file with one AffineTransform or MatrixOffsetTransformBase in 3-D.

    Returns:
        [4, 4] float64, fixed world -> moving world, LPS mm.

    Raises:
        UserError: `not_found`, `not_a_file`, `permission`, `schema` for any other
            content, `affine_nonfinite`, `affine_singular`.
    """
    listed = _text_transforms(path)
    if len(listed) != 1:
        raise _not_itk(path, f"{len(listed)} transforms")
    kind, center, parameters = listed[0]
    if kind.split("_")[0] not in _AFFINE_KINDS or not kind.endswith("_3_3"):
        raise _not_itk(path, kind[:60])
    center = center if center.size else np.zeros(3)
    if parameters.size != 12 or center.size != 3:
        raise _not_itk(path, f"{parameters.size} and {center.size} numbers")
    if not (np.isfinite(center).all() and np.isfinite(parameters).all()):
        raise _not_finite(path)
    return _checked_matrix(_matrix(kind, center, parameters), path)


def spelling(path: str | os.PathLike) -> str:
    """Tells by its content how a transform is spelled.

    Args:
        path: any file.

    Returns:
        "nifti", a 5-D field; "l2r", a Learn2Reg field (4-D NIfTI, `.npz`); "itk", a
        transform file (`.h5`, text, `.mat`); "itk_image", NRRD or MetaImage.

    Raises:
        UserError: `not_found`, `not_a_file`, `permission`, `empty`; `schema` for what
            is no transform; `name_mismatch` for NRRD or MetaImage under another name.
    """
    nifti.check_file(path)
    try:
        with open(path, "rb") as file:
            head = file.read(348)
        if head[:2] == b"\x1f\x8b":
            with gzip.open(path) as file:
                head = file.read(348)
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    except (OSError, EOFError, zlib.error):
        return "nifti"  # whose reader says what is wrong with it
    for order in "<>":
        size = struct.unpack(order + "i", head[:4].ljust(4, b"\0"))[0]
        if size in (348, 540) and len(head) == 348:
            place, number = (40, "8h") if size == 348 else (16, "8q")
            dim = struct.unpack_from(order + number, head, place)
            return "l2r" if dim[0] == 4 and dim[4] == 3 else "nifti"
    if head.startswith((b"NRRD", b"ObjectType")):
        if not _ends(path, tuple(itk_files.IMAGE_IO)):
            raise UserError(
                "name_mismatch",
                f"{shown(path)}: name_mismatch: expected a name in "
                f"{', '.join(itk_files.IMAGE_IO)}, got {nifti.looks_like(head)}; "
                "rename the file",
            )
        return "itk_image"
    if head.startswith(b"PK\x03\x04"):
        return "l2r"
    text = head.startswith(b"#Insight Transform File")
    if text or head.startswith(b"\x89HDF") or _ends(path, ".mat"):
        return "itk"
    raise UserError(
        "schema",
        f"{shown(path)}: schema: expected a displacement field (NIfTI, NRRD), an ITK "
        "transform (.h5, .txt, .tfm, .mat) or a Learn2Reg field (.nii.gz, .npz), got "
        f"{nifti.looks_like(head)}; name the transform itself",
    )


def read_parts(
    path: str | os.PathLike,
) -> list[np.ndarray | tuple[np.ndarray, np.ndarray]]:
    """Reads an ITK transform file: affines and fields in any order.

    Args:
        path: HDF5 (`.h5`), ITK text (`.txt`, `.tfm`) or ANTs' binary affine (`.mat`)
            with one transform or one composite. Linear kinds become affines: Affine,
            MatrixOffset, Translation, Scale, Euler3D, Versor, VersorRigid3D,
            Similarity3D, Identity.

    Returns:
        Parts in the order in which they act on a point of the fixed scan (ITK lists
        them the other way round): affines [4, 4] float64, LPS mm; fields as disp_mm
        [X, Y, Z, 3] float32, LPS mm, on LPS+ axes, with vox2world [4, 4] float64.

    Raises:
        UserError: `schema` for another content, `affine_nonfinite`, `affine_singular`,
            `field_nonfinite`, `field_range`.
    """
    nifti.check_file(path)
    if _ends(path, ".mat"):
        listed = _mat_transforms(path)
    elif _magic(path) == b"\x89HDF":
        listed = _h5_transforms(path)
    else:
        listed = _text_transforms(path)
    composite = bool(listed) and listed[0][0].startswith("CompositeTransform")
    listed = listed[1:] if composite else listed
    if not listed or (len(listed) > 1 and not composite):
        raise _not_parts(path, f"{len(listed)} transforms")
    parts = []
    for kind, fixed, parameters in reversed(listed):
        dims = kind.split("_")[2:]
        if dims and dims != ["3", "3"]:
            raise _not_parts(path, kind[:60])
        if kind.split("_")[0] == _FIELD_KIND:
            parts.append(_itk_field(path, fixed, parameters))
            continue
        if not (np.isfinite(fixed).all() and np.isfinite(parameters).all()):
            raise _not_finite(path)
        matrix = _matrix(kind, fixed, parameters)
        if matrix is None:
            got = f"{kind[:60]} of {parameters.size} and {fixed.size} numbers"
            raise _not_parts(path, got)
        parts.append(_checked_matrix(matrix, path))
    return parts


def write_composite(
    path: str | os.PathLike,
    affine: np.ndarray,
    disp_mm: np.ndarray,
    vox2world: np.ndarray,
    *,
    like: Volume | None = None,
) -> None:
    """Writes affine and field in one ITK composite (`.h5`).

    y = affine @ (x + disp_mm(x)): the field, listed last, acts first. Beyond its grid
    the field is zero.

    Args:
        path: name that ends in `.h5`.
        affine: [4, 4] float, LPS mm -> LPS mm of the moving image, after the field.
        disp_mm: [X, Y, Z, 3] float, LPS mm.
        vox2world: [4, 4] float, voxel index of disp_mm -> LPS mm; no shear.
        like: see `write_field`.

    Raises:
        ValueError: shapes disagree, values are not finite, axes not perpendicular.
        UserError: `storage`.
    """
    write_parts(path, [(disp_mm, vox2world), affine], like=like)


def write_parts(
    path: str | os.PathLike,
    parts: Sequence[np.ndarray | tuple[np.ndarray, np.ndarray]],
    *,
    like: Volume | None = None,
) -> None:
    """Writes affines and fields, in any order, as one ITK composite (`.h5`).

    Args:
        path: name that ends in `.h5`.
        parts: in the order in which they act: affines [4, 4], LPS mm; fields as
            (disp_mm [X, Y, Z, 3], LPS mm, vox2world [4, 4], no shear).
        like: see `write_field`, for the fields.

    Raises:
        ValueError: no part, shapes disagree, values not finite, axes not perpendicular.
        UserError: `storage`.
    """
    if not _ends(path, (".h5", ".hdf5")):
        raise ValueError(f"path must end in .h5, got {shown(path)}; rename it")
    if not parts:
        raise ValueError("parts must be one or more, got none; pass the identity")
    listed = []
    for part in reversed(parts):
        if isinstance(part, np.ndarray):
            center = np.zeros(3)
            kind, numbers = "AffineTransform", _affine_parameters(part, center)
        else:
            kind = _FIELD_KIND
            center, numbers = _field_parameters(*_to_file_grid(*part, like))
        listed.append((f"{kind}_double_3_3", center, numbers))
    # Made in memory: on a full disk the HDF5 library ends the process. It knows even
    # such a file by its name, which two threads must not share.
    name = f"{uuid.uuid4().hex}.h5"
    with h5py.File(name, "w", driver="core", backing_store=False) as file:
        root = file.create_group("TransformGroup")
        _add_transform(root, 0, "CompositeTransform_double_3_3", None, None)
        for number, entry in enumerate(listed, start=1):
            _add_transform(root, number, *entry)
        file.flush()
        image = file.id.get_file_image()
    with nifti.atomic_path(path) as temp:
        temp.write_bytes(image)


def has_shear(vox2world: np.ndarray) -> bool:
    """Says whether a grid's axes are not perpendicular, which ITK cannot hold.

    Args:
        vox2world: [4, 4] float, voxel index -> LPS mm.

    Returns:
        Whether two axes are off by more than 1e-4 (cosine).
    """
    cosines = vox2world[:3, :3] / np.array(orientation.spacing_mm(vox2world))
    return bool(np.abs(cosines.T @ cosines - np.eye(3)).max() > 1e-4)


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
    if not _ends(path, ".nrrd"):
        raise ValueError(f"path must end in .nrrd, got {shown(path)}; rename it")
    disp_mm, vox2world = _to_file_grid(disp_mm, vox2world, like)
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
        f"{_NRRD_RESAMPLING}:=resampling\n\n"
    )
    with nifti.atomic_path(path) as temp, open(temp, "wb") as file:
        file.write(header.encode("ascii"))
        with gzip.GzipFile("", "wb", 1, file, mtime=0) as packed:
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
        UserError: `not_installed`, exit code 2, without SimpleITK; `truncated` when
            ITK cannot read it; `ndim` for another shape; `schema` for an NRRD space
            other than LPS or a field that is meant the other way round;
            `field_nonfinite`, `field_range`.
    """
    nifti.check_file(path)
    if importlib.util.find_spec("SimpleITK") is None:
        raise UserError(
            "not_installed",
            f"{shown(path)}: package SimpleITK expected, got none; run "
            "`pip install unireg-jax[itk]`, or convert the field to .nii.gz",
            USAGE,
        )
    import SimpleITK as sitk  # an extra: only who reads NRRD or MetaImage needs it

    itk_files.check_own_voxels(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(itk_files.IMAGE_IO[Path(path).suffix.lower()])
    reader.SetFileName(os.fspath(path))
    try:
        reader.ReadImageInformation()
        count = reader.GetNumberOfComponents() * np.prod(reader.GetSize(), dtype=float)
        if count > _MAX_NUMBERS:
            raise _too_large(path, count)
        image = reader.Execute()
    except RuntimeError as error:
        raise UserError(
            "truncated",
            f"{shown(path)}: truncated: expected an image that ITK reads, got "
            f"{' '.join(str(error).split())[-160:]}; write it again",
        ) from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 3:
        raise UserError(
            "ndim",
            f"{shown(path)}: ndim: expected a 3-D image of 3 components, got "
            f"{image.GetDimension()}-D of {image.GetNumberOfComponentsPerPixel()}; "
            "write one displacement field",
        )
    told = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}
    space = _nrrd_space(path)
    if space not in ("left-posterior-superior", "lps"):
        raise _not_field(path, "vectors in LPS", space)
    if told.get(_NRRD_RESAMPLING, "resampling") != "resampling":
        raise _not_field(path, "a resampling field", told[_NRRD_RESAMPLING])
    vox2world = np.eye(4)
    turn = np.array(image.GetDirection()).reshape(3, 3)
    vox2world[:3, :3] = turn * np.array(image.GetSpacing())[None, :]
    vox2world[:3, 3] = image.GetOrigin()
    vectors = sitk.GetArrayViewFromImage(image).transpose(2, 1, 0, 3)
    disp_mm, vox2world = orientation.reorient(vectors, vox2world)
    disp_mm = disp_mm.astype(np.float32, copy=False)
    _refuse_bad_vectors(disp_mm, path)
    return disp_mm, vox2world


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
    disp_mm, vox2world = _to_file_grid(disp_mm, vox2world, like)
    moving = vox2world if moving_vox2world is None else moving_vox2world
    to_voxel = np.linalg.inv(check_affine(moving, "moving_vox2world"))
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
    nifti.write_array(path, disp, header, dtype="f4", level=1)


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
    vox2world = check_affine(vox2world, "vox2world")
    moving = vox2world if moving_vox2world is None else moving_vox2world
    moving = check_affine(moving, "moving_vox2world")
    disp = _read_l2r_array(path)
    change = moving - vox2world
    with np.errstate(over="ignore", invalid="ignore"):  # infinity: refused below
        disp_mm = disp @ moving[:3, :3].T + _linear(change, disp.shape[:3])
        disp_mm = disp_mm.astype(np.float32)
    _refuse_bad_vectors(disp_mm, path)
    return orientation.reorient(disp_mm, vox2world)


def _to_file_grid(
    disp_mm: np.ndarray, vox2world: np.ndarray, like: Volume | None
) -> tuple[np.ndarray, np.ndarray]:
    """Checks a field and brings it to the axes of the file."""
    check_field(disp_mm)
    vox2world = check_affine(vox2world, "vox2world")
    if like is None:
        return disp_mm, vox2world
    if not np.allclose(vox2world, like.vox2world, rtol=0, atol=1e-3):
        raise ValueError(
            f"vox2world must be that of like, {like.vox2world.tolist()}, got "
            f"{vox2world.tolist()}; resample the field to the fixed image's grid"
        )
    disp_mm = nifti.to_native(disp_mm, like)
    return disp_mm, like.vox2world if like.native is None else like.native.vox2world


def check_field(disp_mm: np.ndarray) -> None:
    """Refuses an array that is no displacement field in mm.

    Args:
        disp_mm: [X, Y, Z, 3] float, LPS mm.

    Raises:
        ValueError: another shape, values that are not finite or over 1 km.
    """
    if disp_mm.ndim != 4 or disp_mm.shape[3] != 3:
        raise ValueError(
            f"disp_mm must be (X, Y, Z, 3) in mm, got {disp_mm.shape}; no batch, "
            "channels last"
        )
    longest = max(abs(float(disp_mm.max())), abs(float(disp_mm.min())))
    if not longest <= RANGE_MM:  # NaN fails as well
        raise ValueError(
            f"disp_mm must be finite and within 1 km, got {longest} mm; "
            "convert voxels to mm or mend the field"
        )


def check_affine(matrix: np.ndarray, name: str) -> np.ndarray:
    """Refuses what is no finite, invertible 4 x 4.

    Args:
        matrix: [4, 4] numbers.
        name: for the message.

    Returns:
        The same, float64.

    Raises:
        ValueError: it is none, or its last row is not 0 0 0 1.
    """
    matrix = np.asarray(matrix, np.float64)
    if (
        matrix.shape != (4, 4)
        or not np.isfinite(matrix).all()
        or np.linalg.det(matrix[:3, :3]) == 0
        or not np.array_equal(matrix[3], [0, 0, 0, 1])
    ):
        raise ValueError(
            f"{name} must be a finite invertible (4, 4) with last row 0 0 0 1, got "
            f"{matrix.tolist()}; pass one homogeneous matrix"
        )
    return matrix


def _affine_parameters(matrix: np.ndarray, center: np.ndarray) -> np.ndarray:
    """ITK's 12 numbers: matrix row by row, then the translation about a centre."""
    matrix = check_affine(matrix, "affine")
    turn = matrix[:3, :3]
    return np.concatenate([turn.ravel(), matrix[:3, 3] - center + turn @ center])


def _field_parameters(
    disp_mm: np.ndarray, vox2world: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """ITK's 18 numbers of the grid, and the vectors."""
    spacing = np.array(orientation.spacing_mm(vox2world))
    if has_shear(vox2world):
        raise ValueError(
            "vox2world must have perpendicular axes, got a shear, which ITK cannot "
            "hold; resample the field to a grid without shear"
        )
    # ITK wants a direction that is orthonormal to its last digits: the nearest one.
    left, _, right = np.linalg.svd(vox2world[:3, :3] / spacing)
    grid = [*disp_mm.shape[:3], *vox2world[:3, 3], *spacing, *(left @ right).ravel()]
    # Component fastest, then x, y, z.
    vectors = disp_mm.transpose(2, 1, 0, 3).ravel()
    return np.array(grid, np.float64), vectors


def _numbers(values) -> str:
    """Shortest decimal spelling that reads back to the same float64."""
    return " ".join(repr(float(v)) for v in values)


def _linear(matrix: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """[X, Y, Z, 3] of matrix @ x over all voxel indices x."""
    i, j, k = np.ogrid[: shape[0], : shape[1], : shape[2]]
    rows = (row[0] * i + row[1] * j + row[2] * k + row[3] for row in matrix[:3])
    return np.stack(list(rows), axis=-1)


def _add_transform(
    root: h5py.Group,
    number: int,
    kind: str,
    fixed: np.ndarray | None,
    parameters: np.ndarray | None,
) -> None:
    """One numbered group in ITK's HDF5 layout."""
    group = root.create_group(str(number))
    # An array of one variable-length string, as ITK writes it.
    group.create_dataset("TransformType", data=[kind], dtype=h5py.string_dtype("ascii"))
    if parameters is not None:
        group["TransformFixedParameters"] = fixed
        packed = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
        packed = packed if parameters.size > 1000 else {}
        numbers = group.create_dataset(
            "TransformParameters", parameters.shape, np.float64, **packed
        )
        # Widened by HDF5, chunk by chunk: no second copy of a large field.
        numbers[...] = parameters


def _text_transforms(path: str | os.PathLike) -> list[_Listed]:
    """Those of an ITK text file."""
    kinds: list[str] = []
    numbers: list[dict[str, np.ndarray]] = []
    for line in _read_text(path).splitlines():
        key, _, value = line.partition(":")
        if key == "Transform":
            kinds.append(value.strip())
            numbers.append({})
        elif key in ("Parameters", "FixedParameters") and kinds:
            try:
                numbers[-1][key] = np.array([float(word) for word in value.split()])
            except ValueError as error:
                raise _not_itk(path, f"{key} that are no numbers") from error
    none = np.empty(0)
    return [
        (kind, found.get("FixedParameters", none), found.get("Parameters", none))
        for kind, found in zip(kinds, numbers, strict=True)
    ]


def _h5_transforms(path: str | os.PathLike) -> list[_Listed]:
    """Those of an ITK HDF5 file; a field's vectors in float32."""
    listed, total = [], 0
    try:
        with h5py.File(path, "r") as file:
            root = file["TransformGroup"]
            for number in sorted(root, key=int):
                group = root[number]
                kind = group["TransformType"][0].decode("ascii")
                numbers = []
                # SimpleITK spells fixed parameters so; others with their typing error.
                for name in ("FixedParameters", "Parameters"):
                    names = (f"Transform{name}", f"Tranform{name}")
                    found = next((group[n] for n in names if n in group), None)
                    total += 0 if found is None else found.size
                    if total > _MAX_NUMBERS:
                        raise _too_large(path, total)
                    if found is not None and _elsewhere(found, file):
                        raise ValueError(f"{name} that lie in another file")
                    field = name == "Parameters" and kind.startswith(_FIELD_KIND)
                    dtype = np.float32 if field else np.float64
                    numbers.append(
                        np.empty(0) if found is None else found.astype(dtype)[()]
                    )
                listed.append((kind, *numbers))
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    except (
        OSError,
        KeyError,
        ValueError,
        IndexError,
        AttributeError,
        TypeError,
        RuntimeError,
    ) as error:
        raise _not_parts(path, " ".join(str(error).split())[:120]) from error
    return listed


def _mat_transforms(path: str | os.PathLike) -> list[_Listed]:
    """The one of an ANTs `.mat`: two named columns, as MATLAB 4 wrote them."""
    found: dict[str, np.ndarray] = {}
    try:
        data = _beginning(path)
        place = 0
        while place < len(data) and len(found) < 2:
            kind, rows, columns, imaginary, length = struct.unpack_from(
                "<5i", data, place
            )
            place += 20
            # Little-endian, full matrix: thousands and units are 0, tens the type.
            if kind not in (0, 10) or imaginary or not 0 < length < 200:
                raise ValueError("another kind of MATLAB file")
            name = data[place : place + length].rstrip(b"\0").decode("ascii")
            place += length
            dtype = np.dtype("<f8" if kind == 0 else "<f4")
            if not 0 <= rows * columns <= 1000:
                raise ValueError(f"a matrix of {rows} x {columns}")
            found[name] = np.frombuffer(data, dtype, rows * columns, place).astype(
                np.float64
            )
            place += rows * columns * dtype.itemsize
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    except (OSError, ValueError, struct.error, UnicodeDecodeError) as error:
        raise _not_parts(path, str(error)) from error
    center = found.pop("fixed", np.empty(0))
    return [(kind, center, numbers) for kind, numbers in found.items()]


def _itk_field(
    path: str | os.PathLike, grid: np.ndarray, vectors: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """disp_mm and vox2world of a DisplacementFieldTransform, on LPS+ axes."""
    if (
        grid.size != 18
        or not np.isfinite(grid).all()
        or min(grid[:3]) < 1
        or vectors.size != 3 * np.prod(grid[:3])
    ):
        raise _not_parts(path, f"a field of {vectors.size} and {grid.size} numbers")
    vox2world = np.eye(4)
    vox2world[:3, :3] = grid[9:].reshape(3, 3) * grid[None, 6:9]
    vox2world[:3, 3] = grid[3:6]
    _checked_matrix(vox2world, path)
    shape = tuple(int(n) for n in grid[:3])
    disp_mm = vectors.reshape(*shape[::-1], 3).transpose(2, 1, 0, 3)
    _refuse_bad_vectors(disp_mm, path)
    return orientation.reorient(disp_mm.astype(np.float32, copy=False), vox2world)


def _matrix(kind: str, center: np.ndarray, parameters: np.ndarray) -> np.ndarray | None:
    """y = A (x - c) + t + c of a linear kind as 4 x 4; None for another."""
    kind, p = kind.split("_")[0], parameters
    sizes = {
        "IdentityTransform": 0,
        "TranslationTransform": 3,
        "ScaleTransform": 3,
        "Euler3DTransform": 6,
        "VersorTransform": 3,
        "VersorRigid3DTransform": 6,
        "Similarity3DTransform": 7,
        **dict.fromkeys(_AFFINE_KINDS, 12),
    }
    c = center[:3] if center.size else np.zeros(3)
    if sizes.get(kind) != p.size or center.size not in (0, 3, 4):
        return None
    turn, t = np.eye(3), np.zeros(3)
    if kind in _AFFINE_KINDS:
        turn, t = p[:9].reshape(3, 3), p[9:]
    elif kind == "TranslationTransform":
        t = p
    elif kind == "ScaleTransform":
        turn = np.diag(p)
    elif kind == "Euler3DTransform":
        x, y, z = (_rotation(angle, axis) for axis, angle in enumerate(p[:3]))
        # The fourth fixed number says in which order the angles act.
        turn = z @ y @ x if center.size == 4 and center[3] else z @ x @ y
        t = p[3:]
    elif kind != "IdentityTransform":
        w = np.sqrt(max(0.0, 1 - p[:3] @ p[:3]))
        turn = nib.quaternions.quat2mat([w, *p[:3]]) * (p[6] if p.size == 7 else 1)
        t = p[3:6] if p.size > 3 else t
    matrix = np.eye(4)
    matrix[:3, :3] = turn
    matrix[:3, 3] = t + c - turn @ c
    return matrix


def _rotation(angle: float, axis: int) -> np.ndarray:
    """3 x 3 about one axis, right-handed, radians."""
    turn = np.eye(3)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    turn[i, i] = turn[j, j] = np.cos(angle)
    turn[j, i], turn[i, j] = np.sin(angle), -np.sin(angle)
    return turn


def _checked_matrix(matrix: np.ndarray, path: str | os.PathLike) -> np.ndarray:
    """A matrix from a file must be invertible."""
    if abs(np.linalg.det(matrix[:3, :3])) < 1e-6:
        raise UserError(
            "affine_singular",
            f"{shown(path)}: affine_singular: expected an invertible matrix, got "
            f"determinant {np.linalg.det(matrix[:3, :3]):.2g}; register again",
        )
    return matrix


def _not_finite(path: str | os.PathLike) -> UserError:
    return UserError(
        "affine_nonfinite",
        f"{shown(path)}: affine_nonfinite: expected finite parameters, got NaN or "
        "infinity; register again",
    )


def _ends(path: str | os.PathLike, endings: str | tuple[str, ...]) -> bool:
    return os.fspath(path).lower().endswith(endings)


def _magic(path: str | os.PathLike) -> bytes:
    """The first four bytes."""
    try:
        with open(path, "rb") as file:
            return file.read(4)
    except PermissionError as error:
        raise nifti.permission_error(path) from error


def _refuse_bad_vectors(disp_mm: np.ndarray, path: str | os.PathLike) -> None:
    """Vectors from a file must be finite and shorter than 1 km."""
    # No copy of a large field.
    longest = np.maximum(np.abs(disp_mm.max()), np.abs(disp_mm.min()))
    if not np.isfinite(longest):
        raise UserError(
            "field_nonfinite",
            f"{shown(path)}: field_nonfinite: expected finite vectors, got NaN or "
            "infinity; register again",
        )
    if longest > RANGE_MM:
        raise UserError(
            "field_range",
            f"{shown(path)}: field_range: expected vectors within 1 km, "
            f"got {longest:.4g} mm; check the unit of the field",
        )


def _not_itk(path: str | os.PathLike, got: str) -> UserError:
    return UserError(
        "schema",
        f"{shown(path)}: schema: expected one 3-D affine as ITK text, got {got}; "
        "convert it with ITK or ANTs",
    )


def _nrrd_space(path: str | os.PathLike) -> str:
    """As the header has it: ITK turns the grid to LPS, but not the vectors."""
    with open(path, "rb") as file:
        head = file.read(1 << 16).split(b"\n\n")[0].decode("ascii", "replace")
    for line in head.splitlines():
        key, _, value = line.partition(":")
        if key == "space" and head.startswith("NRRD"):
            return value.strip().lower()
    return "lps"  # MetaImage, or the file does not tell


def _not_parts(path: str | os.PathLike, got: str) -> UserError:
    return UserError(
        "schema",
        f"{shown(path)}: schema: expected an ITK transform file of affines and "
        f"displacement fields in 3-D, got {got}; sample other kinds as a displacement "
        "field with ITK",
    )


def _not_field(path: str | os.PathLike, expected: str, got: str) -> UserError:
    return UserError(
        "schema",
        f"{shown(path)}: schema: expected {expected}, got {got}; export it again",
    )


def _read_text(path: str | os.PathLike) -> str:
    """A small text file whole."""
    nifti.check_file(path)
    try:
        text = _beginning(path).decode("ascii")
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    except UnicodeDecodeError as error:
        raise _not_itk(path, "binary data") from error
    if not text.startswith("#Insight Transform File"):
        raise _not_itk(path, "no '#Insight Transform File' line")
    return text


def _beginning(path: str | os.PathLike) -> bytes:
    """As much as a transform without a field can have."""
    with open(path, "rb") as file:
        return file.read(1 << 16)


def _too_large(path: str | os.PathLike, numbers: float) -> UserError:
    return UserError(
        "too_large",
        f"{shown(path)}: too_large: expected at most {_MAX_NUMBERS} numbers, got "
        f"{numbers:.0f}; crop or resample the field",
        LIMIT,
    )


def _check_claim(path: str | os.PathLike, member: IO[bytes], size: int) -> None:
    """Refuses a NumPy array whose header claims more than there can be."""
    first = np.lib.format.read_magic(member) == (1, 0)
    form = np.lib.format
    read = form.read_array_header_1_0 if first else form.read_array_header_2_0
    shape, _, dtype = read(member)
    count = math.prod(shape)
    if count > _MAX_NUMBERS:
        raise _too_large(path, count)
    if count * dtype.itemsize > size:
        raise ValueError(f"{size} bytes for numbers of shape {shape}")


def _elsewhere(found: h5py.Dataset, file: h5py.File) -> bool:
    """Whether a dataset's numbers come of a file that the HDF5 file only names."""
    return bool(
        found.external or found.is_virtual or found.file.filename != file.filename
    )


def _read_l2r_array(path: str | os.PathLike) -> np.ndarray:
    """[X, Y, Z, 3] float64 voxels."""
    if not os.fspath(path).lower().endswith(".npz"):
        return nifti.read_vectors(path, frames=False)[1].astype(np.float64)
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
    except (
        OSError,
        EOFError,
        ValueError,
        IndexError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(
            "truncated",
            f"{shown(path)}: truncated: expected an .npz archive with one array, got "
            f"{error}; write it again",
        ) from error
    if disp.ndim != 4 or disp.shape[3] != 3 or disp.dtype.kind != "f":
        raise UserError(
            "ndim",
            f"{shown(path)}: ndim: expected real numbers of shape (X, Y, Z, 3), got "
            f"{disp.dtype} {disp.shape}; write voxel displacements, channels last",
        )
    return disp.astype(np.float64)
