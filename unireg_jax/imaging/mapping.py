"""Maps between scans: read and written in any spelling, applied, composed.

A Mapping sends a point of the fixed scan, in LPS mm, to the point where the moving scan
is read. It keeps its parts, affines and displacement fields in the order in which they
act, because they differ where a field ends: as in ITK, a displacement is zero further
than half a voxel beyond the outermost voxel centres of its grid, while an affine acts
everywhere.
"""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unireg_jax.errors import NUMERICAL, USAGE, UserError, bad_file, shown
from unireg_jax.imaging import grids, transforms
from unireg_jax.imaging.grids import Field, Grid
from unireg_jax.imaging.nifti import Volume

# Spelling -> endings of its files; see `write`.
SPELLINGS = {
    "itk": (".h5", ".hdf5"),
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
    ".hdf5": "itk",
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
            field (4-D NIfTI or `.npz`); "identity" where no such file is.
        fixed: the fixed scan, which a Learn2Reg field needs: its file tells no world.
        moving: the moving scan; a Learn2Reg field without it lies on one grid with it.

    Returns:
        Mapping.

    Raises:
        UserError: the file is no such transform; reason says why.
    """
    kind = transforms.spelling(path)
    if kind == transforms.IDENTITY:
        return Mapping(())
    if kind == "l2r":
        if fixed is None:
            raise bad_file(
                path,
                "schema",
                "the fixed scan beside a Learn2Reg field, whose voxels have no place "
                "in the world",
                "none",
                "name the fixed and the moving scan",
                USAGE,
            )
        places = [v and (v.native or v).vox2world for v in (fixed, moving)]
        found = Field(*transforms.read_l2r(path, places[0], moving_vox2world=places[1]))
        if found.grid.shape != fixed.data.shape:
            raise bad_file(
                path,
                "grid_mismatch",
                f"a Learn2Reg field of shape {fixed.data.shape} on LPS axes, as the "
                "fixed scan",
                str(found.grid.shape),
                "name the scans it was made for, or resize it and its vectors",
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
        raise bad_file(
            path,
            "name_mismatch",
            expected,
            shown(name),
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

    itk, bids: composite with all parts, exactly (bids `.txt`: one affine).
    nifti1007 (= ants), nifti1006, slicer: one field in mm on the grid of the fixed
    scan. l2r: one field in voxels, from the fixed file's grid to the moving file's.
    affine-txt: a map without fields.

    Args:
        path: name of the file; one of SPELLINGS[to] at its end.
        mapping: Mapping.
        to: one of SPELLINGS; None for the usual one of the name's ending.
        fixed: the scan on whose stored grid a field is written; l2r needs it. None: the
            grid of the first part where that is a field, on LPS+ axes.
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
        if any(transforms.has_shear(f.vox2world) for f in mapping.fields):
            raise _cannot(path, "grids of perpendicular axes", "a shear", "use .nii.gz")
        parts = [p if isinstance(p, np.ndarray) else tuple(p) for p in mapping.parts]
        transforms.write_parts(path, parts or [np.eye(4)])
        return
    if fixed is not None:
        disp_mm, vox2world = flatten(mapping, grid_of(fixed)), fixed.vox2world
    elif to != "l2r" and mapping.parts and isinstance(mapping.parts[0], Field):
        grid = mapping.parts[0].grid
        disp_mm, vox2world = flatten(mapping, grid), grid.vox2world
    else:
        raise _cannot(path, "the fixed scan, whose grid is needed", "none", "name it")
    _check_range(path, disp_mm)
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


def _check_range(path: str | os.PathLike, disp_mm: np.ndarray) -> None:
    """Raises UserError, exit code 8, for a field that no reader would take."""
    longest = max(float(disp_mm.max()), -float(disp_mm.min()))
    if longest > transforms.RANGE_MM:
        raise bad_file(
            path,
            "field_range",
            "displacements within 1 km",
            f"{longest:.4g} mm",
            "check the order and frames of the transforms, or write an .h5, which "
            "keeps affines apart",
            NUMERICAL,
        )


def _cannot(path: str | os.PathLike, expected: str, got: str, remedy: str) -> UserError:
    return bad_file(path, "schema", expected, got, remedy, USAGE)


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
    moved, _ = grids.through(mapping.parts, xyz.reshape(-1, 3).T)
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
    _, inside = grids.through(mapping.parts, xyz.reshape(-1, 3).T)
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
    coords = grids.apply(np.linalg.inv(volume.vox2world), xyz.reshape(-1, 3).T)
    known = grids.inside(coords, volume.data.shape)
    values = np.where(known, grids.linear(volume.data, coords), np.nan)
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
    readers = {"linear": grids.linear, "nearest": grids.nearest, "label": grids.vote}
    read_at = readers[interp]

    def work(part: slice) -> None:
        xyz, _ = grids.through(
            mapping.parts, grids.positions(grid, part), on=grid, part=part
        )
        coords = grids.apply(to_voxel, xyz)
        inside = grids.inside(coords, data.shape)
        values = np.where(inside, read_at(data, coords), data.dtype.type(fill))
        out[part] = values.reshape(out[part].shape)

    grids.slabs(work, grid.shape, threads)
    return out


def fill_of(data: np.ndarray) -> float:
    """Gives the usual value beyond a scan.

    Args:
        data: its voxels.

    Returns:
        Air for a CT; the smallest value of an image that holds no air.
    """
    low = float(data.min())
    return AIR_HU if low < AIR_HU / 2 else low


def flatten(mapping: Mapping, grid: Grid, *, threads: int | None = None) -> np.ndarray:
    """Samples the whole map as one displacement field.

    Args:
        mapping: Mapping.
        grid: where to sample it.
        threads: workers; None for one per core, 8 at most.

    Returns:
        [X, Y, Z, 3] float32, LPS mm; of one field on this very grid its own array.
    """
    if (
        len(mapping.parts) == 1
        and mapping.fields
        and grids.same(mapping.fields[0].grid, grid)
    ):
        return mapping.fields[0].disp_mm  # no copy: a large one has 0.9 GiB
    out = np.empty((*grid.shape, 3), np.float32)

    def work(part: slice) -> None:
        xyz = grids.positions(grid, part)
        moved, _ = grids.through(mapping.parts, xyz, on=grid, part=part)
        out[part] = (moved - xyz).T.reshape(out[part].shape)

    grids.slabs(work, grid.shape, threads)
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
        around = slice(max(part.start - 1, 0), min(part.stop + 1, grid.shape[0]))
        xyz = grids.positions(grid, around)
        moved, _ = grids.through(mapping.parts, xyz, on=grid, part=around)
        disp_mm = (moved - xyz).astype(np.float32).reshape(3, -1, *grid.shape[1:])
        inner = slice(part.start - around.start, part.stop - around.start)
        rows = [
            [np.gradient(disp_mm[i], axis=j)[inner] + steps[i, j] for j in range(3)]
            for i in range(3)
        ]
        (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = rows
        cross = xx * (yy * zz - yz * zy) - xy * (yx * zz - yz * zx)
        out[part] = (cross + xz * (yx * zy - yy * zx)) / size

    # Thicker slabs: each also needs the slices on both sides of it.
    grids.slabs(work, grid.shape, threads, 16 * grids.SLAB_POINTS)
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
        _, inside = grids.through(mapping.parts, grids.positions(grid, part))
        out[part] = inside.reshape(out[part].shape)

    grids.slabs(work, grid.shape, threads)
    return out
