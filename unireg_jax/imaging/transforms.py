"""Displacement fields and affines as ITK, ANTs, Slicer and Learn2Reg spell them.

One meaning throughout: a sampling map (pull-back) that sends a point of the fixed image
to the point where the moving image is read. Inside, vectors are LPS mm on LPS+ axes. In
files the grid is that of the fixed image as stored, and the vectors stay LPS mm however
its axes run.
"""

import os
import uuid
import zipfile
import zlib
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np

from unireg_jax.errors import UserError
from unireg_jax.imaging import nifti, orientation
from unireg_jax.imaging.nifti import Volume, shown

_AFFINE_KINDS = ("AffineTransform", "MatrixOffsetTransformBase")
_RANGE_MM = 1000.0  # no vector between two scans of a body is longer


def write_field(
    path: str | os.PathLike,
    disp_mm: np.ndarray,
    vox2world: np.ndarray,
    *,
    like: Volume | None = None,
) -> None:
    """Writes a displacement field that ITK, ANTs and Slicer read.

    moving is read at x + disp_mm(x), x in LPS mm; NIfTI (X, Y, Z, 1, 3), intent 1007.

    Args:
        path: `.nii` or `.nii.gz`.
        disp_mm: [X, Y, Z, 3] float, LPS mm.
        vox2world: [4, 4] float, voxel index of disp_mm -> LPS mm.
        like: the fixed image when disp_mm lies on its LPS+ axes: the file then has the
            grid and the geometry of that image's own file.

    Raises:
        ValueError: shapes disagree, values are not finite or over 1 km.
        UserError: `storage`.
    """
    disp_mm, vox2world = _to_file_grid(disp_mm, vox2world, like)
    if like is None or like.header is None:
        header = nib.Nifti1Header()
        nifti.set_geometry(header, vox2world)
    else:
        header = nifti.clean_header(like.header)
    header["intent_code"] = nifti.INTENT_VECTOR
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
        disp_mm = disp_mm * np.array([-1, -1, 1], np.float32)[None, None, None, :]
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
    kinds, fields = [], {}
    for line in _read_text(path).splitlines():
        key, _, value = line.partition(":")
        if key == "Transform":
            kinds.append(value.strip())
        elif key in ("Parameters", "FixedParameters"):
            try:
                fields[key] = np.array([float(word) for word in value.split()])
            except ValueError as error:
                raise _not_itk(path, f"{key} that are no numbers") from error
    if len(kinds) != 1:
        raise _not_itk(path, f"{len(kinds)} transforms")
    if kinds[0].split("_")[0] not in _AFFINE_KINDS or not kinds[0].endswith("_3_3"):
        raise _not_itk(path, kinds[0][:60])
    parameters = fields.get("Parameters", np.empty(0))
    center = fields.get("FixedParameters", np.zeros(3))
    if parameters.size != 12 or center.size != 3:
        raise _not_itk(path, f"{parameters.size} and {center.size} numbers")
    matrix = np.eye(4)
    matrix[:3, :3] = parameters[:9].reshape(3, 3)
    matrix[:3, 3] = parameters[9:] + center - matrix[:3, :3] @ center
    if not np.isfinite(matrix).all():
        raise UserError(
            "affine_nonfinite",
            f"{shown(path)}: affine_nonfinite: expected finite parameters, got NaN or "
            "infinity; register again",
        )
    if abs(np.linalg.det(matrix[:3, :3])) < 1e-6:
        raise UserError(
            "affine_singular",
            f"{shown(path)}: affine_singular: expected an invertible matrix, got "
            f"determinant {np.linalg.det(matrix[:3, :3]):.2g}; register again",
        )
    return matrix


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
    if not os.fspath(path).lower().endswith((".h5", ".hdf5")):
        raise ValueError(f"path must end in .h5, got {shown(path)}; rename it")
    disp_mm, vox2world = _to_file_grid(disp_mm, vox2world, like)
    spacing = np.array(orientation.spacing_mm(vox2world))
    cosines = vox2world[:3, :3] / spacing[None, :]
    if np.abs(cosines.T @ cosines - np.eye(3)).max() > 1e-4:
        raise ValueError(
            "vox2world must have perpendicular axes, got a shear, which ITK cannot "
            "hold; resample the field to a grid without shear"
        )
    # ITK wants a direction that is orthonormal to its last digits: the nearest one.
    left, _, right = np.linalg.svd(cosines)
    grid = [*disp_mm.shape[:3], *vox2world[:3, 3], *spacing, *(left @ right).ravel()]
    # Component fastest, then x, y, z.
    vectors = disp_mm.transpose(2, 1, 0, 3).astype(np.float64).ravel()
    center = np.zeros(3)
    # Made in memory: on a full disk the HDF5 library ends the process. It knows even
    # such a file by its name, which two threads must not share.
    name = f"{uuid.uuid4().hex}.h5"
    with h5py.File(name, "w", driver="core", backing_store=False) as file:
        root = file.create_group("TransformGroup")
        _add_transform(root, 0, "CompositeTransform_double_3_3", None, None)
        parameters = _affine_parameters(affine, center)
        _add_transform(root, 1, "AffineTransform_double_3_3", center, parameters)
        kind = "DisplacementFieldTransform_double_3_3"
        _add_transform(root, 2, kind, np.array(grid, np.float64), vectors)
        file.flush()
        image = file.id.get_file_image()
    with nifti.atomic_path(path) as temp:
        temp.write_bytes(image)


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
    to_voxel = np.linalg.inv(_affine(moving, "moving_vox2world"))
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
    vox2world = _affine(vox2world, "vox2world")
    moving = vox2world if moving_vox2world is None else moving_vox2world
    moving = _affine(moving, "moving_vox2world")
    disp = _read_l2r_array(path)
    change = moving - vox2world
    disp_mm = disp @ moving[:3, :3].T + _linear(change, disp.shape[:3])
    disp_mm = disp_mm.astype(np.float32)
    _refuse_bad_vectors(disp_mm, path)
    return orientation.reorient(disp_mm, vox2world)


def _to_file_grid(
    disp_mm: np.ndarray, vox2world: np.ndarray, like: Volume | None
) -> tuple[np.ndarray, np.ndarray]:
    """Checks a field and brings it to the axes of the file."""
    if disp_mm.ndim != 4 or disp_mm.shape[3] != 3:
        raise ValueError(
            f"disp_mm must be (X, Y, Z, 3) in mm, got {disp_mm.shape}; no batch, "
            "channels last"
        )
    longest = np.abs(disp_mm).max()
    if not longest <= _RANGE_MM:  # NaN fails as well
        raise ValueError(
            f"disp_mm must be finite and within {_RANGE_MM:g} mm, got {longest}; "
            "convert voxels to mm or mend the field"
        )
    vox2world = _affine(vox2world, "vox2world")
    if like is None:
        return disp_mm, vox2world
    if not np.allclose(vox2world, like.vox2world, rtol=0, atol=1e-3):
        raise ValueError(
            f"vox2world must be that of like, {like.vox2world.tolist()}, got "
            f"{vox2world.tolist()}; resample the field to the fixed image's grid"
        )
    disp_mm = nifti.to_native(disp_mm, like)
    return disp_mm, like.vox2world if like.native is None else like.native.vox2world


def _affine(matrix: np.ndarray, name: str) -> np.ndarray:
    """Finite, invertible 4 x 4 in float64."""
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
    matrix = _affine(matrix, "affine")
    turn = matrix[:3, :3]
    return np.concatenate([turn.ravel(), matrix[:3, 3] - center + turn @ center])


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
        group.create_dataset("TransformParameters", data=parameters, **packed)


def _refuse_bad_vectors(disp_mm: np.ndarray, path: str | os.PathLike) -> None:
    """Vectors from a file must be finite and shorter than 1 km."""
    longest = np.abs(disp_mm).max()
    if not np.isfinite(longest):
        raise UserError(
            "field_nonfinite",
            f"{shown(path)}: field_nonfinite: expected finite vectors, got NaN or "
            "infinity; register again",
        )
    if longest > _RANGE_MM:
        raise UserError(
            "field_range",
            f"{shown(path)}: field_range: expected vectors within {_RANGE_MM:g} mm, "
            f"got {longest:.4g} mm; check the unit of the field",
        )


def _not_itk(path: str | os.PathLike, got: str) -> UserError:
    return UserError(
        "schema",
        f"{shown(path)}: schema: expected one 3-D affine as ITK text, got {got}; "
        "convert it with ITK or ANTs",
    )


def _read_text(path: str | os.PathLike) -> str:
    """A small text file whole."""
    nifti.check_file(path)
    try:
        text = Path(path).read_bytes()[: 1 << 16].decode("ascii")
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    except UnicodeDecodeError as error:
        raise _not_itk(path, "binary data") from error
    if not text.startswith("#Insight Transform File"):
        raise _not_itk(path, "no '#Insight Transform File' line")
    return text


def _read_l2r_array(path: str | os.PathLike) -> np.ndarray:
    """[X, Y, Z, 3] float64 voxels."""
    if not os.fspath(path).lower().endswith(".npz"):
        return nifti.read_vectors(path, frames=False)[1].astype(np.float64)
    nifti.check_file(path)
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            with archive.open(archive.namelist()[0]) as member:
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
