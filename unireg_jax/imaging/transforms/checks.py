"""What a transform must hold, however it is spelled, and how others are refused."""

import os

import numpy as np

from unireg_jax.errors import LIMIT, UserError, bad_file
from unireg_jax.imaging import nifti, orientation
from unireg_jax.imaging.nifti import Volume

RANGE_MM = 1e6  # 1 km: scans' table zeros may lie metres apart, not that far
MAX_NUMBERS = 3 * 2**29


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


def has_shear(vox2world: np.ndarray) -> bool:
    """Says whether a grid's axes are not perpendicular, which ITK cannot hold.

    Args:
        vox2world: [4, 4] float, voxel index -> LPS mm.

    Returns:
        Whether two axes are off by more than 1e-4 (cosine).
    """
    cosines = vox2world[:3, :3] / np.array(orientation.spacing_mm(vox2world))
    return bool(np.abs(cosines.T @ cosines - np.eye(3)).max() > 1e-4)


def to_file_grid(
    disp_mm: np.ndarray, vox2world: np.ndarray, like: Volume | None
) -> tuple[np.ndarray, np.ndarray]:
    """Checks a field and brings it to the axes of the file.

    Args:
        disp_mm: [X, Y, Z, 3] float, LPS mm.
        vox2world: [4, 4] float, voxel index of disp_mm -> LPS mm.
        like: the fixed image when disp_mm lies on its LPS+ axes, or None.

    Returns:
        disp_mm and vox2world on the axes of that image's own file; without it as given.

    Raises:
        ValueError: shapes disagree, values are not finite or over 1 km.
    """
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


def checked_matrix(matrix: np.ndarray, path: str | os.PathLike) -> np.ndarray:
    """Refuses a matrix from a file that cannot be inverted.

    Args:
        matrix: [4, 4] float64.
        path: of the file, for the message.

    Returns:
        The same.

    Raises:
        UserError: `affine_singular`.
    """
    determinant = np.linalg.det(matrix[:3, :3])
    if not 1e-6 <= abs(determinant) < np.inf:  # NaN fails as well
        got = f"determinant {determinant:.2g}"
        raise bad_file(
            *(path, "affine_singular", "an invertible matrix", got, "register again")
        )
    return matrix


def refuse_vectors(disp_mm: np.ndarray, path: str | os.PathLike) -> None:
    """Refuses vectors from a file that are not finite or longer than 1 km.

    Args:
        disp_mm: [X, Y, Z, 3] float, LPS mm.
        path: of the file, for the message.

    Raises:
        UserError: `field_nonfinite`, `field_range`.
    """
    # No copy of a large field.
    longest = np.maximum(np.abs(disp_mm.max()), np.abs(disp_mm.min()))
    if not np.isfinite(longest):
        got = "NaN or infinity"
        raise bad_file(
            *(path, "field_nonfinite", "finite vectors", got, "register again")
        )
    if longest > RANGE_MM:
        got, remedy = f"{longest:.4g} mm", "check the unit of the field"
        raise bad_file(path, "field_range", "vectors within 1 km", got, remedy)


def refuse_far(matrix: np.ndarray, path: str | os.PathLike) -> None:
    """Refuses an affine from a file that leads further than 1 km.

    Args:
        matrix: [4, 4] float64, LPS mm -> LPS mm.
        path: of the file, for the message.

    Raises:
        UserError: `field_range`.
    """
    largest = np.abs(matrix).max()
    if not largest <= RANGE_MM:  # NaN fails as well
        expected = f"an affine of numbers within {RANGE_MM:g} (1 km)"
        got, remedy = f"{largest:.4g}", "check the unit of the affine"
        raise bad_file(path, "field_range", expected, got, remedy)


def not_finite(path: str | os.PathLike) -> UserError:
    """Makes the UserError of an affine with NaN or infinity.

    Args:
        path: of the file.

    Returns:
        UserError, `affine_nonfinite`.
    """
    expected, got = "finite parameters", "NaN or infinity"
    return bad_file(path, "affine_nonfinite", expected, got, "register again")


def too_large(path: str | os.PathLike, numbers: float) -> UserError:
    """Makes the UserError of a file that claims too many numbers.

    Args:
        path: of the file.
        numbers: that it claims.

    Returns:
        UserError, `too_large`, exit code 7.
    """
    expected, got = f"at most {MAX_NUMBERS} numbers", f"{numbers:.0f}"
    remedy = "crop or resample the field"
    return bad_file(path, "too_large", expected, got, remedy, LIMIT)


def ends(path: str | os.PathLike, endings: str | tuple[str, ...]) -> bool:
    """Says whether a name ends so, in either case.

    Args:
        path: the name.
        endings: in lower case.

    Returns:
        Whether it does.
    """
    return os.fspath(path).lower().endswith(endings)
