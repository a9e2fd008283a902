"""Maps between scans: read from any spelling, applied, inverted, composed.

A Mapping sends a point of the fixed scan, in LPS mm, to the point where the moving scan
is read. It keeps its parts, affines and displacement fields in the order in which they
act, because they differ where a field ends: as in ITK, a displacement is zero further
than half a voxel beyond the outermost voxel centres of its grid, while an affine acts
everywhere.
"""

import concurrent.futures
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from unireg_jax.errors import NUMERICAL, USAGE, UserError, shown
from unireg_jax.imaging import transforms
from unireg_jax.imaging.nifti import Volume

# Spelling -> endings of its files; see `write`.
SPELLINGS = {
    "itk": (".h5",),
    "ants": (".nii.gz", ".nii"),
    "nifti1007": (".nii.gz", ".nii"),
    "nifti1006": (".nii.gz", ".nii"),
    "l2r": (".nii.gz", ".nii", ".npz"),
    "slicer": (".nrrd",),
    "affine-txt": (".txt", ".tfm"),
    "bids": (".h5", ".txt"),
}
USUAL = {
    ".h5": "itk",
    ".nii.gz": "nifti1007",
    ".nii": "nifti1007",
    ".npz": "l2r",
    ".nrrd": "slicer",
    ".txt": "affine-txt",
    ".tfm": "affine-txt",
}
_BIDS = re.compile(
    r"([A-Za-z0-9]+-[A-Za-z0-9+]+_)*from-[A-Za-z0-9+]+_to-[A-Za-z0-9+]+_mode-image_"
    r"([A-Za-z0-9]+-[A-Za-z0-9+]+_)*xfm\.(h5|txt)"
)
INTERPOLATIONS = ("linear", "nearest", "label")
AIR_HU = -1000.0
_SLAB_POINTS = 2**19  # some 40 MiB of float64 per worker
_SAME_MM = 1e-4  # grids whose corners agree so well are one grid
NAN = float("nan")


class Grid(NamedTuple):
    """Where the voxels of an array lie.

    Attributes:
        shape: (X, Y, Z) voxels.
        vox2world: [4, 4] float64, voxel index -> LPS mm.
    """

    shape: tuple[int, int, int]
    vox2world: np.ndarray


class Field(NamedTuple):
    """Displacements on a grid: x -> x + disp_mm(x), linear between voxels.

    Attributes:
        disp_mm: [X, Y, Z, 3] float32, LPS mm.
        vox2world: [4, 4] float64, voxel index -> LPS mm.
    """

    disp_mm: np.ndarray
    vox2world: np.ndarray

    @property
    def grid(self) -> Grid:
        """Its grid."""
        return Grid(self.disp_mm.shape[:3], self.vox2world)


class Mapping(NamedTuple):
    """Parts of a map in the order in which they act on a point of the fixed scan.

    Attributes:
        parts: each a Field, or an affine [4, 4] float64, LPS mm -> LPS mm.
    """

    parts: tuple[Field | np.ndarray, ...]

    @property
    def fields(self) -> list[Field]:
        """Those parts that are fields."""
        return [part for part in self.parts if isinstance(part, Field)]


class Inverse(NamedTuple):
    """A map back, and how well it leads back.

    Attributes:
        mapping: one field on the grid asked for, then the inverse of the map's affines
            if it has any, which acts beyond the grid too; or one affine.
        residual_mm: [X, Y, Z] float32 on that grid, |T(S(y)) - y| for the map T and its
            inverse S; NaN where no voxel of T's fields leads: there S is continued.
        stats: see `invert`.
    """

    mapping: Mapping
    residual_mm: np.ndarray
    stats: dict[str, float]


# --- making -------------------------------------------------------------------------


def kind_of(part: Field | np.ndarray) -> str:
    """Names a part of a Mapping.

    Args:
        part: of `Mapping.parts`.

    Returns:
        "field" or "affine".
    """
    return "field" if isinstance(part, Field) else "affine"


def grid_of(volume: Volume) -> Grid:
    """Gives the grid of a volume, on its LPS+ axes.

    Args:
        volume: Volume.

    Returns:
        Grid.
    """
    return Grid(volume.data.shape[:3], volume.vox2world)


def same(a: Grid, b: Grid) -> bool:
    """Says whether the voxels of two grids lie at the same places.

    Args:
        a: Grid.
        b: Grid.

    Returns:
        Whether shapes are equal and no voxel is off by more than 1e-4 mm.
    """
    if tuple(a.shape) != tuple(b.shape):
        return False
    gap = np.abs(a.vox2world - b.vox2world)
    return bool((gap[:3] @ np.array([*a.shape, 1])).max() < _SAME_MM)


def affine(matrix: np.ndarray) -> Mapping:
    """Makes the map of one matrix.

    Args:
        matrix: [4, 4] float, fixed LPS mm -> moving LPS mm.

    Returns:
        Mapping.

    Raises:
        ValueError: not a finite, invertible 4 x 4.
    """
    return Mapping((transforms.check_affine(matrix, "matrix"),))


def field(disp_mm: np.ndarray, vox2world: np.ndarray) -> Mapping:
    """Makes the map x -> x + disp_mm(x).

    Args:
        disp_mm: [X, Y, Z, 3] float, LPS mm.
        vox2world: [4, 4] float, voxel index -> LPS mm.

    Returns:
        Mapping.

    Raises:
        ValueError: shapes disagree, or vectors not finite or over 1 km.
    """
    transforms.check_field(disp_mm)
    vox2world = transforms.check_affine(vox2world, "vox2world")
    return Mapping((Field(np.asarray(disp_mm, np.float32), vox2world),))


def read(
    path: str | os.PathLike,
    *,
    fixed: Volume | None = None,
    moving: Volume | None = None,
) -> Mapping:
    """Reads a transform in any spelling, told by its content.

    Args:
        path: displacement field as 5-D NIfTI (intent 1007 LPS mm, 1006 RAS mm), NRRD or
            MetaImage (extra `itk`); ITK transform file (`.h5`, `.txt`, `.tfm`) of
            affines and fields in any order; ANTs' binary affine (`.mat`); Learn2Reg
            field (4-D NIfTI or `.npz`).
        fixed: the fixed scan, which a Learn2Reg field needs: its file tells no world.
        moving: the moving scan; a Learn2Reg field without it lies on one grid with it.

    Returns:
        Mapping.

    Raises:
        UserError: the file is no such transform; reason says why.
    """
    kind = transforms.spelling(path)
    if kind == "l2r":
        if fixed is None:
            raise UserError(
                "schema",
                f"{shown(path)}: schema: expected the fixed scan beside a Learn2Reg "
                "field, whose voxels have no place in the world, got none; name the "
                "fixed and the moving scan",
                USAGE,
            )
        places = [v and (v.native or v).vox2world for v in (fixed, moving)]
        found = Field(*transforms.read_l2r(path, places[0], moving_vox2world=places[1]))
        if found.grid.shape != fixed.data.shape:
            raise UserError(
                "grid_mismatch",
                f"{shown(path)}: grid_mismatch: expected a Learn2Reg field of shape "
                f"{fixed.data.shape} on LPS axes, as the fixed scan, got "
                f"{found.grid.shape}; name the scans it was made for, or resize it "
                "and its vectors",
            )
        return Mapping((found,))
    if kind == "nifti":
        return Mapping((Field(*transforms.read_field(path)),))
    if kind == "itk_image":
        return Mapping((Field(*transforms.read_itk_image(path)),))
    parts = transforms.read_parts(path)
    return Mapping(tuple(p if isinstance(p, np.ndarray) else Field(*p) for p in parts))


def compose(mappings: Sequence[Mapping], grid: Grid | None = None) -> Mapping:
    """Chains maps: the first one listed acts first on a point of the fixed scan.

    compose([a, b])(x) = b(a(x)): a leads from the fixed scan to a scan between, b from
    there to the moving scan. antsApplyTransforms lists them in the same order.

    Args:
        mappings: one or more.
        grid: None keeps the parts, exactly; else the whole is sampled as one field.

    Returns:
        Mapping.

    Raises:
        ValueError: no mapping.
    """
    if not mappings:
        raise ValueError("mappings must be one or more, got none; pass a list")
    parts: list[Field | np.ndarray] = []
    for part in (part for mapping in mappings for part in mapping.parts):
        if parts and not isinstance(part, Field) and not isinstance(parts[-1], Field):
            parts[-1] = part @ parts[-1]
        else:
            parts.append(part)
    whole = Mapping(tuple(parts))
    if grid is None:
        return whole
    return Mapping((Field(flatten(whole, grid), grid.vox2world),))


# --- writing ------------------------------------------------------------------------


def spelling_of(path: str | os.PathLike, to: str | None = None) -> str:
    """Chooses how to spell a transform, by the name of its file.

    Args:
        path: name of the file.
        to: one of SPELLINGS; None for the usual one of the name's ending.

    Returns:
        One of SPELLINGS.

    Raises:
        ValueError: unknown `to`.
        UserError: `name_mismatch`, exit code 2: the name does not fit.
    """
    if to is not None and to not in SPELLINGS:
        raise ValueError(f"to must be one of {tuple(SPELLINGS)}, got {to!r}")
    name = os.path.basename(os.fspath(path))
    endings = SPELLINGS[to] if to else tuple(USUAL)
    ending = next((e for e in endings if name.lower().endswith(e)), None)
    fits = ending is not None
    expected = f"a name that ends in {' or '.join(endings)}"
    if to == "bids":
        fits = _BIDS.fullmatch(name) is not None
        expected = "a name such as sub-01_from-MOVING_to-FIXED_mode-image_xfm.h5"
    if not fits:
        raise UserError(
            "name_mismatch",
            f"{shown(path)}: name_mismatch: expected {expected}, got {shown(name)}; "
            "rename it",
            USAGE,
        )
    return to or USUAL[ending]


def write(
    path: str | os.PathLike,
    mapping: Mapping,
    to: str | None = None,
    *,
    fixed: Volume | None = None,
    moving: Volume | None = None,
) -> None:
    """Writes a map in the spelling of another tool.

    itk, bids: composite with all parts, exactly, unless `fixed` asks for one field
    on its grid (bids `.txt`: one affine).
    nifti1007 (= ants), nifti1006, slicer: one field in mm on the grid of the fixed
    scan. l2r: one field in voxels, from the fixed file's grid to the moving file's.
    affine-txt: a map without fields.

    Args:
        path: name of the file; one of SPELLINGS[to] at its end.
        mapping: Mapping.
        to: one of SPELLINGS; None for the usual one of the name's ending.
        fixed: the scan on whose stored grid a field is written. None: the grid of the
            first part where that is a field, on LPS+ axes.
        moving: for l2r; None: on one grid with the fixed scan.

    Raises:
        ValueError: unknown `to`.
        UserError: `name_mismatch`, `schema`, exit code 2: the name does not fit, the
            spelling cannot hold this map, or a scan is missing; `field_range`, exit
            code 8, for a field of more than 1 km; `storage`.
    """
    to = spelling_of(path, to)
    if to == "bids":
        to = "itk" if os.fspath(path).endswith(".h5") else "affine-txt"
    if to == "affine-txt":
        if mapping.fields:
            raise _cannot(path, "a map without displacements", "a field", "use .h5")
        matrix = compose([mapping]).parts
        transforms.write_affine_txt(path, matrix[0] if matrix else np.eye(4))
        return
    if to == "itk":
        if fixed is not None:
            mapping = compose([mapping], grid_of(fixed))
        if any(transforms.has_shear(f.vox2world) for f in mapping.fields):
            raise _cannot(
                path, "grids of perpendicular axes", "a shear", "name another grid"
            )
        parts = [p if isinstance(p, np.ndarray) else tuple(p) for p in mapping.parts]
        transforms.write_parts(path, parts or [np.eye(4)])
        return
    if fixed is not None:
        disp_mm, vox2world = flatten(mapping, grid_of(fixed)), fixed.vox2world
    elif mapping.parts and isinstance(mapping.parts[0], Field):
        grid = mapping.parts[0].grid
        disp_mm, vox2world = flatten(mapping, grid), grid.vox2world
    else:
        raise _cannot(path, "the fixed scan, whose grid is needed", "none", "name it")
    longest = max(float(disp_mm.max()), -float(disp_mm.min()))
    if longest > transforms.RANGE_MM:
        raise UserError(
            "field_range",
            f"{shown(path)}: field_range: expected displacements within "
            f"{transforms.RANGE_MM:g} mm, got {longest:.4g} mm; check the order and "
            "frames of the transforms, or write an .h5, which keeps affines apart",
            NUMERICAL,
        )
    if to == "l2r":
        place = moving and (moving.native or moving).vox2world
        transforms.write_l2r(
            path, disp_mm, vox2world, moving_vox2world=place, like=fixed
        )
    elif to == "slicer":
        transforms.write_nrrd(path, disp_mm, vox2world, like=fixed)
    else:
        intent = 1006 if to == "nifti1006" else 1007
        transforms.write_field(path, disp_mm, vox2world, like=fixed, intent=intent)


def _cannot(path: str | os.PathLike, expected: str, got: str, remedy: str) -> UserError:
    line = f"{shown(path)}: schema: expected {expected}, got {got}; {remedy}"
    return UserError("schema", line, USAGE)


# --- applying -----------------------------------------------------------------------


def points(mapping: Mapping, xyz: np.ndarray) -> np.ndarray:
    """Maps points of the fixed scan to the moving scan.

    Args:
        mapping: Mapping; for points of the moving scan, its inverse.
        xyz: [..., 3] float, LPS mm.

    Returns:
        [..., 3] float64, LPS mm.

    Raises:
        ValueError: the last axis is not 3.
    """
    xyz = np.asarray(xyz, np.float64)
    if xyz.ndim < 1 or xyz.shape[-1] != 3:
        raise ValueError(f"xyz must be (..., 3) in LPS mm, got {xyz.shape}; turn axes")
    moved, _ = _through(mapping.parts, xyz.reshape(-1, 3).T)
    return moved.T.reshape(xyz.shape)


def within(mapping: Mapping, xyz: np.ndarray) -> np.ndarray:
    """Says which points lie within the grid of every field that they meet.

    Args:
        mapping: Mapping.
        xyz: [..., 3] float, LPS mm, of the fixed scan.

    Returns:
        [...] bool; where False, a displacement was zero for want of a value.
    """
    xyz = np.asarray(xyz, np.float64)
    _, inside = _through(mapping.parts, xyz.reshape(-1, 3).T)
    return inside.reshape(xyz.shape[:-1])


def sample(volume: Volume, xyz: np.ndarray) -> np.ndarray:
    """Reads a scan at points, linearly.

    Args:
        volume: image.
        xyz: [..., 3] float, LPS mm.

    Returns:
        [...] float32, NaN further than half a voxel beyond the voxel centres.
    """
    xyz = np.asarray(xyz, np.float64)
    coords = _apply(np.linalg.inv(volume.vox2world), xyz.reshape(-1, 3).T)
    values = np.where(
        _inside(coords, volume.data.shape), _linear(volume.data, coords), np.nan
    )
    return values.astype(np.float32).reshape(xyz.shape[:-1])


def resample(
    mapping: Mapping,
    moving: Volume,
    grid: Grid,
    *,
    interp: str = "linear",
    fill: float = 0,
    threads: int | None = None,
) -> np.ndarray:
    """Brings a scan or labels onto the grid of the fixed scan, slab by slab.

    Args:
        mapping: fixed -> moving.
        moving: image or labels.
        grid: of the fixed scan, or any other.
        interp: "linear"; "nearest", halves up; "label", the id with the largest share
            of the trilinear weights, the smallest such id.
        fill: value further than half a voxel beyond the moving scan's voxel centres.
        threads: workers; None for one per core, 8 at most.

    Returns:
        [X, Y, Z] on grid, dtype of moving's data; whole numbers are rounded.

    Raises:
        ValueError: unknown interp, fractions in "label", a fill that the dtype cannot
            hold.
    """
    data = moving.data
    if interp not in INTERPOLATIONS:
        raise ValueError(f"interp must be one of {INTERPOLATIONS}, got {interp!r}")
    if interp == "label" and data.dtype.kind not in "iu":
        raise ValueError(f"moving must hold whole ids for 'label', got {data.dtype}")
    if data.dtype.kind in "iu" and np.array(fill).astype(data.dtype) != fill:
        raise ValueError(f"fill must be a value of {data.dtype}, got {fill}; change it")
    to_voxel = np.linalg.inv(moving.vox2world)
    out = np.empty(grid.shape, data.dtype)
    sample = {"linear": _linear, "nearest": _nearest, "label": _vote}[interp]

    def work(part: slice) -> None:
        xyz, _ = _through(mapping.parts, _positions(grid, part), on=grid, part=part)
        coords = _apply(to_voxel, xyz)
        inside = _inside(coords, data.shape)
        values = np.where(inside, sample(data, coords), data.dtype.type(fill))
        out[:, :, part] = values.reshape(out[:, :, part].shape)

    _slabs(work, grid.shape, threads)
    return out


def flatten(mapping: Mapping, grid: Grid, *, threads: int | None = None) -> np.ndarray:
    """Samples the whole map as one displacement field.

    Args:
        mapping: Mapping.
        grid: where to sample it.
        threads: workers; None for one per core, 8 at most.

    Returns:
        [X, Y, Z, 3] float32, LPS mm.
    """
    out = np.empty((*grid.shape, 3), np.float32)
    if (
        len(mapping.parts) == 1
        and mapping.fields
        and same(mapping.fields[0].grid, grid)
    ):
        out[:] = mapping.fields[0].disp_mm
        return out

    def work(part: slice) -> None:
        xyz = _positions(grid, part)
        moved, _ = _through(mapping.parts, xyz, on=grid, part=part)
        out[:, :, part] = (moved - xyz).T.reshape(out[:, :, part].shape)

    _slabs(work, grid.shape, threads)
    return out


def jacobian(mapping: Mapping, grid: Grid, *, threads: int | None = None) -> np.ndarray:
    """Determinant of the Jacobian of the whole map, slab by slab.

    Central differences over one voxel on each side, one-sided at the border of grid.
    Where a field ends within the grid the map jumps, which looks like folds there: see
    `coverage`.

    Args:
        mapping: Mapping.
        grid: where to measure, 2 voxels or more along each axis.
        threads: workers; None for one per core, 8 at most.

    Returns:
        [X, Y, Z] float32, no unit: local volume in the moving scan over that in the
        fixed one; 0 or less where the map folds.

    Raises:
        ValueError: an axis of one voxel.
    """
    if min(grid.shape) < 2:
        raise ValueError(f"grid must have 2 voxels or more per axis, got {grid.shape}")
    size = np.linalg.det(grid.vox2world[:3, :3])
    steps = grid.vox2world[:3, :3].astype(np.float32)  # of x, by voxel
    out = np.empty(grid.shape, np.float32)

    def work(part: slice) -> None:
        around = slice(max(part.start - 1, 0), min(part.stop + 1, grid.shape[2]))
        xyz = _positions(grid, around)
        moved, _ = _through(mapping.parts, xyz, on=grid, part=around)
        disp_mm = (moved - xyz).astype(np.float32).reshape(3, *grid.shape[:2], -1)
        inner = slice(part.start - around.start, part.stop - around.start)
        rows = [
            [
                np.gradient(disp_mm[i], axis=j)[..., inner] + steps[i, j]
                for j in range(3)
            ]
            for i in range(3)
        ]
        (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = rows
        cross = xx * (yy * zz - yz * zy) - xy * (yx * zz - yz * zx)
        out[:, :, part] = (cross + xz * (yx * zy - yy * zx)) / size

    # Thicker slabs: each also needs the slices on both sides of it.
    _slabs(work, grid.shape, threads, 4 * _SLAB_POINTS)
    return out


def coverage(mapping: Mapping, grid: Grid, *, threads: int | None = None) -> np.ndarray:
    """Says where a grid lies within the fields of a map, slab by slab.

    Args:
        mapping: Mapping.
        grid: of the fixed scan, or any other.
        threads: workers; None for one per core, 8 at most.

    Returns:
        [X, Y, Z] bool, see `within`.
    """
    out = np.empty(grid.shape, bool)

    def work(part: slice) -> None:
        _, inside = _through(mapping.parts, _positions(grid, part))
        out[:, :, part] = inside.reshape(out[:, :, part].shape)

    _slabs(work, grid.shape, threads)
    return out


# --- inverting ----------------------------------------------------------------------


def invert(
    mapping: Mapping,
    grid: Grid,
    *,
    tolerance_mm: float = 0.01,
    iterations: int = 30,
    threads: int | None = None,
) -> Inverse:
    """Finds the map from the moving scan back to the fixed one.

    Solves T(x) = y for every voxel y by the fixed point x <- x - A^-1 (T(x) - y), A
    the affine nearest to T, a step halved where it leads away; what is left after
    `iterations` by Newton's method. While solving, a field's edge is continued, so that
    the inverse has no seam. Never by negation.

    Args:
        mapping: T, fixed -> moving.
        grid: of the moving scan; unused for an affine, whose inverse is exact.
        tolerance_mm: largest |T(x) - y| that counts as solved.
        iterations: of the fixed point, and a third as many of Newton's.
        threads: workers; None for one per core, 8 at most.

    Returns:
        Inverse. stats: tolerance_mm; covered_percent, voxels that some point within T's
        fields reaches; of these unsolved_percent, residual_mean_mm, residual_p95_mm,
        residual_max_mm; and between_mean_mm, between_max_mm, the same halfway between
        voxels, where the inverse field is interpolated. NaN where none is covered.
    """
    if not mapping.fields:
        matrix = np.linalg.inv(compose([mapping]).parts[0]) if mapping.parts else None
        exact = Mapping(() if matrix is None else (matrix,))
        zero = np.broadcast_to(np.float32(0), grid.shape)
        return Inverse(exact, zero, _residual_stats(zero, zero, tolerance_mm))
    nearest = np.linalg.inv(_nearest_affine(mapping))
    affines = np.eye(4)
    for matrix in (p for p in mapping.parts if not isinstance(p, Field)):
        affines = matrix @ affines
    after = np.linalg.inv(affines)
    disp_mm = np.empty((*grid.shape, 3), np.float32)
    residual = np.empty(grid.shape, np.float32)

    def work(part: slice) -> None:
        y = _positions(grid, part)
        x = _solve(mapping.parts, y, nearest, tolerance_mm, iterations)
        # The residual of what is stored, float32.
        stored = (_apply(affines, x) - y).astype(np.float32)
        moved, covered = _through(mapping.parts, _apply(after, y + stored), edge=True)
        gap = np.where(covered, np.linalg.norm(moved - y, axis=0), np.nan)
        disp_mm[:, :, part] = stored.T.reshape(disp_mm[:, :, part].shape)
        residual[:, :, part] = gap.reshape(residual[:, :, part].shape)

    _slabs(work, grid.shape, threads)
    back = (Field(disp_mm, grid.vox2world), after)
    inverse = Mapping(back if len(mapping.parts) > len(mapping.fields) else back[:1])
    between = _between(mapping, inverse, grid, threads)
    return Inverse(inverse, residual, _residual_stats(residual, between, tolerance_mm))


def check_inverse(inverse: Inverse, path: str, limit_percent: float) -> None:
    """Refuses an inverse that leads back for too few voxels.

    Args:
        inverse: of `invert`.
        path: of the transform, for the message.
        limit_percent: largest share of covered voxels that may stay unsolved.

    Raises:
        UserError: `folding`, exit code 8; `no_overlap` when nothing is covered.
    """
    stats = inverse.stats
    if not stats["covered_percent"] > 0:
        raise UserError(
            "no_overlap",
            f"{shown(path)}: no_overlap: expected a grid that the transform leads to, "
            "got none of its voxels; name the moving scan as --reference",
        )
    if stats["unsolved_percent"] > limit_percent:
        raise UserError(
            "folding",
            f"{shown(path)}: folding: expected at most {limit_percent:g} % of voxels "
            f"off by more than {stats['tolerance_mm']:g} mm, got "
            f"{stats['unsolved_percent']:.3g} %: the map folds or is too steep to be "
            "inverted; register again with more smoothness, or raise --max-unsolved",
            NUMERICAL,
        )


def _solve(
    parts: Iterable[Field | np.ndarray],
    y: np.ndarray,
    nearest: np.ndarray,
    tolerance_mm: float,
    iterations: int,
) -> np.ndarray:
    """x [3, N] with T(x) = y, as near as it gets."""

    def fixed_point(x, gap):
        return nearest[:3, :3] @ gap

    def newton(x, gap):
        return _newton_step(parts, x, gap, nearest)

    x = _apply(nearest, y)
    # Well below the tolerance, so that the error of most voxels is no matter at all.
    x = _descend(parts, x, y, fixed_point, 0.1 * tolerance_mm, iterations)
    return _descend(parts, x, y, newton, tolerance_mm, iterations // 3)


def _descend(
    parts: Iterable[Field | np.ndarray],
    x: np.ndarray,
    y: np.ndarray,
    direction: Callable[[np.ndarray, np.ndarray], np.ndarray],
    goal_mm: float,
    iterations: int,
) -> np.ndarray:
    """Steps each point while |T(x) - y| falls; a step that fails is halved."""
    gap = _through(parts, x, edge=True)[0] - y
    size = np.linalg.norm(gap, axis=0)
    step = np.ones(size.shape)
    for _ in range(iterations):
        left = np.flatnonzero((size > goal_mm) & (step > 1e-3))
        if not left.size:
            break
        here, was = x[:, left], gap[:, left]
        tried = here - step[left] * direction(here, was)
        gaps = _through(parts, tried, edge=True)[0] - y[:, left]
        sizes = np.linalg.norm(gaps, axis=0)
        better = sizes < size[left]
        won = left[better]
        x[:, won], gap[:, won], size[won] = (
            tried[:, better],
            gaps[:, better],
            sizes[better],
        )
        step[left] = np.where(better, np.minimum(1, 2 * step[left]), step[left] / 2)
    return x


def _newton_step(
    parts: Iterable[Field | np.ndarray],
    x: np.ndarray,
    gap: np.ndarray,
    nearest: np.ndarray,
) -> np.ndarray:
    """J^-1 gap, J by differences; the affine's where J is singular."""
    columns = []
    for shift in 0.05 * np.eye(3):  # mm: within one voxel, where a field is smooth
        ahead, behind = (
            _through(parts, x + sign * shift[:, None], edge=True)[0] for sign in (1, -1)
        )
        columns.append((ahead - behind) / 0.1)
    jac = np.moveaxis(np.stack(columns, axis=1), -1, 0)  # [N, component, axis]
    singular = np.abs(np.linalg.det(jac)) < 1e-3
    jac[singular] = np.linalg.inv(nearest[:3, :3])
    return np.linalg.solve(jac, gap.T[..., None])[..., 0].T


def _nearest_affine(mapping: Mapping) -> np.ndarray:
    """An affine near the map: the product of each part's best fit."""
    whole = np.eye(4)
    for part in mapping.parts:
        matrix = _fit(part) if isinstance(part, Field) else part
        whole = matrix @ whole
    return whole


def _fit(part: Field) -> np.ndarray:
    """Least squares over some 12 voxels along each axis."""
    axes = [np.arange(0, n, -(-n // 12)) for n in part.grid.shape]
    index = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    disp_mm = part.disp_mm[tuple(index.T)].astype(np.float64)
    xyz = _apply(part.vox2world, index.T).T
    middle = xyz.mean(axis=0)
    known = np.hstack([xyz - middle, np.ones((len(xyz), 1))])
    fit = np.linalg.lstsq(known, disp_mm, rcond=None)[0]
    matrix = np.eye(4)
    matrix[:3, :3] += fit[:3].T
    matrix[:3, 3] = fit[3] - fit[:3].T @ middle
    # A field that folds as a whole has no such affine: the shift alone.
    if np.linalg.det(matrix[:3, :3]) < 0.05:
        matrix = np.eye(4)
        matrix[:3, 3] = fit[3]
    return matrix


def _between(
    mapping: Mapping, inverse: Mapping, grid: Grid, threads: int | None
) -> np.ndarray:
    """|T(S(y)) - y| halfway between voxels, NaN where S leads out of T's fields."""
    shape = tuple(max(n - 1, 1) for n in grid.shape)
    middle = grid.vox2world.copy()
    middle[:3, 3] += grid.vox2world[:3, :3] @ (np.array(grid.shape) > 1) / 2
    # Every second one along each axis: an eighth of the work, the same statistics.
    half = Grid(tuple(-(-n // 2) for n in shape), middle @ np.diag([2, 2, 2, 1]))
    out = np.empty(half.shape, np.float32)

    def work(part: slice) -> None:
        y = _positions(half, part)
        x, _ = _through(inverse.parts, y)
        back, covered = _through(mapping.parts, x)
        gap = np.where(covered, np.linalg.norm(back - y, axis=0), np.nan)
        out[:, :, part] = gap.reshape(out[:, :, part].shape)

    _slabs(work, half.shape, threads)
    return out


def _residual_stats(
    residual: np.ndarray, between: np.ndarray, tolerance_mm: float
) -> dict[str, float]:
    """Numbers of `invert`."""
    known = residual[~np.isnan(residual)]
    halfway = between[~np.isnan(between)]
    some = known.size > 0
    return {
        "tolerance_mm": tolerance_mm,
        "covered_percent": 100 * known.size / residual.size,
        "unsolved_percent": 100 * float((known > tolerance_mm).mean()) if some else NAN,
        "residual_mean_mm": float(known.mean(dtype=np.float64)) if some else NAN,
        "residual_p95_mm": float(np.percentile(known, 95)) if some else NAN,
        "residual_max_mm": float(known.max()) if some else NAN,
        "between_mean_mm": float(halfway.mean(dtype=np.float64))
        if halfway.size
        else NAN,
        "between_max_mm": float(halfway.max()) if halfway.size else NAN,
    }


# --- points, components first: [3, N] float64 ---------------------------------------


def _through(
    parts: Iterable[Field | np.ndarray],
    xyz: np.ndarray,
    *,
    edge: bool = False,
    on: Grid | None = None,
    part: slice | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Points after all parts, and whether each lay within every field it met.

    Args:
        xyz: [3, N] LPS mm; those of `on` and its slices `part`, if named.
        edge: whether a field's edge goes on beyond it, instead of zero.
    """
    inside = np.ones(xyz.shape[1], bool)
    for step in parts:
        if not isinstance(step, Field):
            xyz = _apply(step, xyz)
        elif on is not None and same(step.grid, on):
            xyz = xyz + np.moveaxis(step.disp_mm[:, :, part], -1, 0).reshape(3, -1)
        else:
            coords = _apply(np.linalg.inv(step.vox2world), xyz)
            within = _inside(coords, step.grid.shape)
            shift = [_linear(step.disp_mm[..., i], coords) for i in range(3)]
            xyz = xyz + (np.stack(shift) if edge else np.where(within, shift, 0))
            inside &= within
        on = None  # only the first part acts on the grid itself
    return xyz, inside


def _apply(matrix: np.ndarray, xyz: np.ndarray) -> np.ndarray:
    """4 x 4 times [3, N]."""
    return matrix[:3, :3] @ xyz + matrix[:3, 3:]


def _inside(coords: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Voxel positions within the outer faces, as ITK has it."""
    limits = np.array(shape)[:, None] - 0.5
    return ((coords >= -0.5) & (coords < limits)).all(axis=0)


def _linear(data: np.ndarray, coords: np.ndarray) -> np.ndarray:
    """[N] float32 at voxel positions [3, N]; beyond the grid its edge."""
    values = ndimage.map_coordinates(
        data, coords, output=np.float32, order=1, mode="nearest"
    )
    return np.rint(values) if data.dtype.kind in "iu" else values


def _nearest(data: np.ndarray, coords: np.ndarray) -> np.ndarray:
    """[N] at the nearest voxels, halves up."""
    last = np.array(data.shape)[:, None] - 1
    x, y, z = np.clip(np.floor(coords + 0.5), 0, last).astype(np.intp)
    return data[x, y, z]


def _vote(data: np.ndarray, coords: np.ndarray) -> np.ndarray:
    """[N] ids with the largest trilinear weight among the eight neighbours."""
    last = np.array(data.shape)[:, None] - 1
    coords = np.clip(coords, 0, last)
    low = np.minimum(np.floor(coords), np.maximum(last - 1, 0)).astype(np.intp)
    share = coords - low
    high = np.minimum(low + 1, last)
    ids, weights = [], []
    for corner in np.ndindex(2, 2, 2):
        x, y, z = (high[a] if c else low[a] for a, c in enumerate(corner))
        ids.append(data[x, y, z])
        factors = (share[a] if c else 1 - share[a] for a, c in enumerate(corner))
        weights.append(np.prod(list(factors), axis=0))
    ids, weights = np.stack(ids), np.stack(weights)
    out = ids[0].copy()
    mixed = np.flatnonzero((ids != ids[0]).any(axis=0))
    ids, weights = ids[:, mixed], weights[:, mixed]
    order = np.argsort(ids, axis=0, kind="stable")
    ids = np.take_along_axis(ids, order, axis=0)
    weights = np.take_along_axis(weights, order, axis=0)
    # Of equal sums the first wins, which is the smallest id.
    sums = np.stack([np.where(ids == one, weights, 0).sum(axis=0) for one in ids])
    best = np.round(sums, 12).argmax(axis=0)
    out[mixed] = np.take_along_axis(ids, best[None], axis=0)[0]
    return out


# --- slabs --------------------------------------------------------------------------


def _slabs(
    work: Callable[[slice], None],
    shape: tuple[int, int, int],
    threads: int | None,
    points: int | None = None,
) -> None:
    """Calls `work` for slices of the third axis, several at a time."""
    depth = max(1, (points or _SLAB_POINTS) // (shape[0] * shape[1]))
    parts = [slice(k, min(k + depth, shape[2])) for k in range(0, shape[2], depth)]
    with concurrent.futures.ThreadPoolExecutor(threads or _cores()) as pool:
        for _ in pool.map(work, parts):
            pass


def _cores() -> int:
    """Those of this process, 8 at most: each worker holds a slab."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    return min(8, cores)


def _positions(grid: Grid, part: slice) -> np.ndarray:
    """[3, N] LPS mm of the voxels of some slices."""
    x, y, z = (np.arange(n) for n in grid.shape)
    z = z[part]
    out = np.empty((3, x.size, y.size, z.size))
    for row, values in zip(grid.vox2world[:3], out, strict=True):
        plane = row[0] * x[:, None] + row[1] * y[None, :] + row[3]
        np.add(plane[:, :, None], row[2] * z, out=values)
    return out.reshape(3, -1)
