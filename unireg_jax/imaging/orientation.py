"""Axis codes, RAS+ <-> LPS+, axis order: the only converter of frames.

World coordinates are LPS millimetres everywhere inside (x to the left, y to the back, z
to the head), as in ITK and DICOM. nibabel speaks RAS+. A code such as `LPS` names the
direction in which each array axis increases.
"""

import nibabel as nib
import numpy as np

_NAMES = (("L", "R"), ("P", "A"), ("I", "S"))


def lps_from_ras(affine: np.ndarray) -> np.ndarray:
    """Turns a voxel -> RAS mm affine (nibabel) into voxel -> LPS mm (ITK).

    lps = diag(-1, -1, 1, 1) @ ras

    Args:
        affine: [4, 4] float, voxel index -> RAS+ mm.

    Returns:
        [4, 4] float64, voxel index -> LPS+ mm.

    Raises:
        ValueError: affine is not 4 x 4.
    """
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ _square(affine, "affine")


def ras_from_lps(affine: np.ndarray) -> np.ndarray:
    """Turns a voxel -> LPS mm affine (ITK) into voxel -> RAS mm (nibabel).

    ras = diag(-1, -1, 1, 1) @ lps

    Args:
        affine: [4, 4] float, voxel index -> LPS+ mm.

    Returns:
        [4, 4] float64, voxel index -> RAS+ mm.

    Raises:
        ValueError: affine is not 4 x 4.
    """
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ _square(affine, "affine")


def axis_codes(vox2world: np.ndarray) -> str:
    """Names the direction in which each array axis increases, such as `LPS`.

    Args:
        vox2world: [4, 4] float, voxel index -> LPS mm; an oblique axis gets the letter
            of the nearest world axis.

    Returns:
        Three letters, one each of L/R, P/A and I/S.

    Raises:
        ValueError: vox2world is not 4 x 4.
    """
    return "".join(nib.orientations.ornt2axcodes(_orientation(vox2world), _NAMES))


def spacing_mm(vox2world: np.ndarray) -> tuple[float, float, float]:
    """Gives the voxel edge lengths: the lengths of the affine's columns.

    Args:
        vox2world: [4, 4] float, voxel index -> mm.

    Returns:
        (x, y, z) mm, in the order of the array axes.

    Raises:
        ValueError: vox2world is not 4 x 4.
    """
    x, y, z = np.linalg.norm(_square(vox2world, "vox2world")[:3, :3], axis=0)
    return float(x), float(y), float(z)


def reorient(
    data: np.ndarray, vox2world: np.ndarray, codes: str = "LPS"
) -> tuple[np.ndarray, np.ndarray]:
    """Permutes and flips the first three axes until they increase along `codes`.

    out[j] = data[i] with vox2world_out @ j = vox2world @ i: no voxel moves in the world
    and none is interpolated.

    Args:
        data: [X, Y, Z, ...] any dtype; further axes stay. Vector components are world
            quantities and stay as they are.
        vox2world: [4, 4] float, voxel index -> LPS mm.
        codes: three letters, one each of L/R, P/A and I/S.

    Returns:
        data [X', Y', Z', ...] (contiguous) and its vox2world [4, 4] float64, LPS mm.

    Raises:
        ValueError: fewer than three axes, not a 4 x 4 affine, or bad codes.
    """
    if data.ndim < 3:
        raise ValueError(f"data must be (X, Y, Z, ...), got {data.shape}; add axes")
    change = nib.orientations.ornt_transform(
        _orientation(vox2world),
        nib.orientations.axcodes2ornt(tuple(check_codes(codes)), _NAMES),
    )
    back = nib.orientations.inv_ornt_aff(change, data.shape[:3])
    # +0.0 turns the -0.0 left by flips into 0.0, so that equal affines print equal.
    affine = _square(vox2world, "vox2world") @ back + 0.0
    return _turned(data, change), affine


def restore(data: np.ndarray, vox2world: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Permutes and flips the first three axes back to those of a stored grid.

    By the grids themselves: of an axis at 45 degrees to the world's the codes of one
    grid need not lead back to the other.

    Args:
        data: [X, Y, Z, ...], on the grid of vox2world.
        vox2world: [4, 4] float, voxel index -> LPS mm, as `reorient` gave it.
        stored: [4, 4] float, voxel index -> LPS mm, what `reorient` was given.

    Returns:
        [X', Y', Z', ...] (contiguous) on the stored grid.

    Raises:
        ValueError: axes of the two grids that are no permutation of each other.
    """
    step = np.eye(4)
    linear = (_square(m, "vox2world")[:3, :3] for m in (stored, vox2world))
    step[:3, :3] = np.rint(np.linalg.solve(*linear))
    if not np.array_equal(step @ step.T, np.eye(4)):
        raise ValueError("vox2world and stored must differ by the order of axes alone")
    return _turned(data, nib.orientations.io_orientation(step))


def _turned(data: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Contiguous copy with nibabel's table of axes and flips applied."""
    turned = nib.orientations.apply_orientation(data, change)
    # Files keep the first axis fastest. In slabs of 8 the transposed copy of a whole CT
    # stays in the cache: 0.3 s against 2 s for 512 x 512 x 300.
    out = np.empty(turned.shape, turned.dtype)
    for k in range(0, turned.shape[2], 8):
        out[:, :, k : k + 8] = turned[:, :, k : k + 8]
    return out


def check_codes(codes: str) -> str:
    """Returns `codes` when it names each of the three directions once.

    Args:
        codes: such as `LPS`.

    Returns:
        The same string.

    Raises:
        ValueError: a letter is unknown, or a direction is missing or named twice.
    """
    axes = sorted("LRPAIS".find(letter) // 2 for letter in codes)
    if axes != [0, 1, 2]:
        raise ValueError(
            f"codes must hold one each of L/R, P/A, I/S, got {codes!r}; use 'LPS'"
        )
    return codes


def direction(codes: str) -> np.ndarray:
    """Gives the unit vectors of array axes that increase along `codes`.

    Args:
        codes: such as `LPS`, which gives the identity.

    Returns:
        [3, 3] float64; column j is the direction of axis j in LPS.

    Raises:
        ValueError: see `check_codes`.
    """
    columns = np.zeros((3, 3))
    for axis, letter in enumerate(check_codes(codes)):
        columns["LRPASI".find(letter) // 2, axis] = 1.0 if letter in "LPS" else -1.0
    return columns


def _orientation(vox2world: np.ndarray) -> np.ndarray:
    """nibabel's [3, 2] axis and flip table, which lives in RAS+."""
    return nib.orientations.io_orientation(ras_from_lps(vox2world))


def _square(matrix: np.ndarray, name: str) -> np.ndarray:
    """float64 copy of a 4 x 4 matrix."""
    matrix = np.asarray(matrix, np.float64)
    if matrix.shape != (4, 4):
        raise ValueError(
            f"{name} must be (4, 4), got {matrix.shape}; pass one homogeneous matrix"
        )
    return matrix
