"""ITK's transforms, affines and fields in any order: what their numbers mean."""

import math
import os
from collections.abc import Sequence

import nibabel as nib
import numpy as np

from unireg_jax.errors import UserError, bad_file
from unireg_jax.imaging import orientation
from unireg_jax.imaging.nifti import Volume, shown
from unireg_jax.imaging.transforms import checks, itk_containers
from unireg_jax.imaging.transforms.spelling import spelling

_AFFINE_KINDS = ("AffineTransform", "MatrixOffsetTransformBase")


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
    listed = ("AffineTransform_double_3_3", np.asarray(center), parameters)
    itk_containers.write_text(path, listed)


def read_affine(path: str | os.PathLike) -> np.ndarray:
    """Reads the affines of an ITK transform file as one.

    Args:
        path: as of `read_parts`, told by its content; no field.

    Returns:
        [4, 4] float64, fixed world -> moving world, LPS mm: the product of all parts.

    Raises:
        UserError: `not_found`, `not_a_file`, `permission`; `schema` for a field and any
            other content; `affine_nonfinite`, `affine_singular`, `field_range`.
    """
    if spelling(path) in ("nifti", "l2r", "itk_image"):
        raise _no_affine(path, "an image or a displacement field")
    whole = np.eye(4)
    for part in read_parts(path):
        if not isinstance(part, np.ndarray):
            raise _no_affine(path, "a displacement field")
        whole = part @ whole
    return checks.checked_matrix(whole, path)


def _no_affine(path: str | os.PathLike, got: str) -> UserError:
    expected = "an ITK transform of affines alone (.txt, .tfm, .h5, .mat)"
    remedy = (
        "name an affine; to begin with a field, warp the moving scan by it, register "
        "that, and compose the two"
    )
    return bad_file(path, "schema", expected, got, remedy)


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
            `field_nonfinite`; `field_range` also for affines; `checksum`.
    """
    listed = itk_containers.read(path)
    composite = bool(listed) and listed[0][0].startswith("CompositeTransform")
    listed = listed[1:] if composite else listed
    if not listed or (len(listed) > 1 and not composite):
        raise itk_containers.not_parts(path, f"{len(listed)} transforms")
    parts = []
    for kind, fixed, parameters in reversed(listed):
        dims = kind.split("_")[2:]
        if dims and dims != ["3", "3"]:
            raise itk_containers.not_parts(path, kind[:60])
        if kind.split("_")[0] == itk_containers.FIELD_KIND:
            parts.append(_itk_field(path, fixed, parameters))
            continue
        if not (np.isfinite(fixed).all() and np.isfinite(parameters).all()):
            raise checks.not_finite(path)
        with np.errstate(over="ignore", invalid="ignore"):  # infinity: refused below
            matrix = _matrix(path, kind, fixed, parameters)
        if matrix is None:
            got = f"{kind[:60]} of {parameters.size} and {fixed.size} numbers"
            raise itk_containers.not_parts(path, got)
        checks.refuse_far(matrix, path)
        parts.append(checks.checked_matrix(matrix, path))
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
        path: name that ends in `.h5` or `.hdf5`.
        parts: in the order in which they act: affines [4, 4], LPS mm; fields as
            (disp_mm [X, Y, Z, 3], LPS mm, vox2world [4, 4], no shear).
        like: see `write_field`, for the fields.

    Raises:
        ValueError: no part, shapes disagree, values not finite, axes not perpendicular.
        UserError: `storage`.
    """
    if not checks.ends(path, (".h5", ".hdf5")):
        raise ValueError(f"path must end in .h5, got {shown(path)}; rename it")
    if not parts:
        raise ValueError("parts must be one or more, got none; pass the identity")
    listed = []
    for part in reversed(parts):
        if isinstance(part, np.ndarray):
            center = np.zeros(3)
            kind, numbers = "AffineTransform", _affine_parameters(part, center)
        else:
            kind = itk_containers.FIELD_KIND
            center, numbers = _field_parameters(*checks.to_file_grid(*part, like))
        listed.append((f"{kind}_double_3_3", center, numbers))
    itk_containers.write_h5(path, listed)


def _affine_parameters(matrix: np.ndarray, center: np.ndarray) -> np.ndarray:
    """ITK's 12 numbers: matrix row by row, then the translation about a centre."""
    matrix = checks.check_affine(matrix, "affine")
    turn = matrix[:3, :3]
    return np.concatenate([turn.ravel(), matrix[:3, 3] - center + turn @ center])


def _field_parameters(
    disp_mm: np.ndarray, vox2world: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """ITK's 18 numbers of the grid, and the vectors, [Z, Y, X, 3], not copied."""
    spacing = np.array(orientation.spacing_mm(vox2world))
    if checks.has_shear(vox2world):
        raise ValueError(
            "vox2world must have perpendicular axes, got a shear, which ITK cannot "
            "hold; resample the field to a grid without shear"
        )
    # ITK wants a direction that is orthonormal to its last digits: the nearest one.
    left, _, right = np.linalg.svd(vox2world[:3, :3] / spacing)
    grid = [*disp_mm.shape[:3], *vox2world[:3, 3], *spacing, *(left @ right).ravel()]
    # Component fastest, then x, y, z.
    return np.array(grid, np.float64), disp_mm.transpose(2, 1, 0, 3)


def _itk_field(
    path: str | os.PathLike, grid: np.ndarray, vectors: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """disp_mm and vox2world of a DisplacementFieldTransform, on LPS+ axes."""
    if (
        grid.size != 18
        or not np.isfinite(grid).all()
        or min(grid[:3]) < 1
        or vectors.size != 3 * math.prod(grid[:3].tolist())
    ):
        raise itk_containers.not_parts(
            path, f"a field of {vectors.size} and {grid.size} numbers"
        )
    vox2world = np.eye(4)
    vox2world[:3, 3] = grid[3:6]
    with np.errstate(over="ignore", invalid="ignore"):  # infinity: refused here
        vox2world[:3, :3] = grid[9:].reshape(3, 3) * grid[None, 6:9]
        checks.checked_matrix(vox2world, path)
    shape = tuple(int(n) for n in grid[:3])
    disp_mm = vectors.reshape(*shape[::-1], 3).transpose(2, 1, 0, 3)
    checks.refuse_vectors(disp_mm, path)
    return orientation.reorient(disp_mm.astype(np.float32, copy=False), vox2world)


def _matrix(
    path: str | os.PathLike, kind: str, center: np.ndarray, parameters: np.ndarray
) -> np.ndarray | None:
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
        length = np.linalg.norm(p[:3])
        if length > 1 + 1e-6:  # more than its decimal spelling rounds
            expected, got = "a versor of length 1 at most", f"{length:.4g}"
            raise bad_file(path, "field_range", expected, got, "register again")
        w = np.sqrt(max(0.0, 1 - length**2))
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
