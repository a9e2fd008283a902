"""Whether a transform belongs to two scans, told by their grids and a few voxels.

A lattice of some 48 points along each axis of the fixed scan stands for it, so that the
look costs the same for every size of scan.
"""

from typing import NamedTuple

import numpy as np

from unireg_jax.errors import bad_file
from unireg_jax.imaging import grids
from unireg_jax.imaging.grids import Field, Grid
from unireg_jax.imaging.mapping import Mapping, grid_of, points, sample
from unireg_jax.imaging.nifti import Volume

_LATTICE = 48  # points along an axis
_COVERED = 50.0  # percent of the fixed scan; a field of the pair has 100
_REACHED = 10.0  # percent of the fixed scan; heads are found in whole bodies
WORSE = 0.01  # of a correlation: a smaller loss says nothing
_AIR_HU = -500.0


class Fit(NamedTuple):
    """How a transform lies to two scans.

    Attributes:
        covered_percent: of the fixed scan, where the transform's fields have a value.
        reached_percent: of the fixed scan, which the transform leads into the moving
            scan; None without one.
        exchanged: whether the transform starts from the moving scan.
    """

    covered_percent: float
    reached_percent: float | None
    exchanged: bool

    @property
    def warnings(self) -> list[str]:
        """One line for each thing that is not as it should be."""
        lines = []
        if self.exchanged:
            lines.append(
                "grid_mismatch: scans exchanged? The field lies on the grid of the "
                "moving scan and not on that of the fixed one; name the two the other "
                "way round, or make the way back with `unireg invert`"
            )
        elif self.covered_percent < _COVERED:
            lines.append(
                f"grid_mismatch: the field covers {self.covered_percent:.3g} % of the "
                "fixed scan: the transform of another pair, or the way back?"
            )
        if self.reached_percent is not None and self.reached_percent < _REACHED:
            lines.append(
                f"no_overlap: {self.reached_percent:.3g} % of the fixed scan is led "
                "into the moving one: scans of another pair, or the way back?"
            )
        return lines


def fit(whole: Mapping, fixed: Grid, moving: Grid | None = None) -> Fit:
    """Holds a transform against the grids of two scans.

    Args:
        whole: fixed -> moving.
        fixed: grid of the fixed scan, or of its labels.
        moving: the same of the moving scan; None if unknown.

    Returns:
        Fit; 0 % means no voxel at all, not merely none of the lattice.
    """
    first = whole.parts[0] if whole.parts else None
    known, inside = _met(whole, lattice(fixed).T, moving)
    if not (known.any() and inside.any()):
        known, inside = _met_by_any(whole, fixed, moving)
    exchanged = False
    if isinstance(first, Field) and moving is not None:
        exchanged = _starts_from(first.grid, moving, fixed)
    reached = None if moving is None else 100 * float(inside.mean())
    return Fit(100 * float(known.mean()), reached, exchanged)


def check(found: Fit, path: str) -> None:
    """Refuses a transform that cannot belong to the scans.

    Args:
        found: of `fit`.
        path: of the transform, for the message.

    Raises:
        UserError: `grid_mismatch` when its fields cover no voxel of the fixed scan,
            `no_overlap` when it leads none into the moving scan.
    """
    if not found.covered_percent:
        raise bad_file(
            path,
            "grid_mismatch",
            "a field on the fixed scan",
            "one that covers none of its voxels",
            "name the transform of this pair, or exchange the scans",
        )
    if found.reached_percent == 0:
        raise bad_file(
            path,
            "no_overlap",
            "a map into the moving scan",
            "none of its voxels",
            "check the order and the direction of the transforms with `unireg "
            "check-transform`",
        )


def similarity_warnings(whole: Mapping, fixed: Volume, moving: Volume) -> list[str]:
    """Warns when two CT scans agree better without the transform.

    Args:
        whole: fixed -> moving.
        fixed: scan.
        moving: scan.

    Returns:
        No or one line. None for scans without air at -1000 HU, whose values may mean
        different things.
    """
    xyz = lattice(grid_of(fixed))
    there = sample(fixed, xyz)
    still = sample(moving, xyz)
    if not max(there.min(), moving.data.min()) < _AIR_HU:
        return []
    before = correlation(there, still)
    after = correlation(there, sample(moving, points(whole, xyz)))
    if before is None or after is None or before <= after + WORSE:
        return []
    return [
        f"similarity: the scans agree better without the transform ({before:.3f}) "
        f"than with it ({after:.3f}): the transform of another pair, or the way back?"
    ]


def lattice(grid: Grid) -> np.ndarray:
    """Chooses points that stand for a grid.

    Args:
        grid: Grid.

    Returns:
        [N, 3] float64, LPS mm, of some 48 voxels along each axis.
    """
    axes = [np.arange(0, n, max(1, n // _LATTICE)) for n in grid.shape]
    index = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    return index @ grid.vox2world[:3, :3].T + grid.vox2world[:3, 3]


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Correlates what two scans have at the same points, HU clipped.

    Args:
        a: [N] float, NaN beyond the scan.
        b: [N] float, NaN beyond the scan.

    Returns:
        Pearson's, -1 to 1; None for too few points or a constant scan.
    """
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < _REACHED / 100 * both.size:
        return None
    a, b = (np.clip(v[both], -1000, 1000).astype(np.float64) for v in (a, b))
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _met(
    whole: Mapping, xyz: np.ndarray, moving: Grid | None
) -> tuple[np.ndarray, np.ndarray]:
    """Which points [3, N] the fields cover, and which are led into the moving scan."""
    there, known = grids.through(whole.parts, xyz)
    if moving is None:
        return known, np.ones_like(known)
    coords = grids.apply(np.linalg.inv(moving.vox2world), there)
    return known, grids.inside(coords, moving.shape)


def _met_by_any(
    whole: Mapping, fixed: Grid, moving: Grid | None
) -> tuple[np.ndarray, np.ndarray]:
    """The same of every voxel, slab by slab."""
    known, inside = (np.empty(fixed.shape, bool) for _ in range(2))

    def work(part: slice) -> None:
        found = _met(whole, grids.positions(fixed, part), moving)
        for values, out in zip(found, (known, inside), strict=True):
            out[part] = values.reshape(out[part].shape)

    grids.slabs(work, fixed.shape, None)
    return known, inside


def _same_box(a: Grid, b: Grid) -> bool:
    """Whether two grids on LPS+ axes fill the same space, to a voxel."""
    ends = np.array(list(np.ndindex(2, 2, 2)))
    here, there = (
        grids.apply(g.vox2world, (ends * np.array(g.shape) - 0.5).T) for g in (a, b)
    )
    largest = max(np.linalg.norm(g.vox2world[:3, :3], axis=0).max() for g in (a, b))
    return bool(np.linalg.norm(here - there, axis=0).max() < largest)


def _starts_from(field: Grid, moving: Grid, fixed: Grid) -> bool:
    """Whether a field that acts first lies on the moving scan, not on the fixed one."""
    if _same_box(field, fixed):  # another resolution is no other scan
        return False
    if grids.same(field, moving):
        return True
    to_voxel = np.linalg.inv(field.vox2world)
    on_fixed, on_moving = (
        100 * grids.inside(grids.apply(to_voxel, lattice(g).T), field.shape).mean()
        for g in (fixed, moving)
    )
    return bool(on_fixed < _COVERED and on_moving > 100 - _REACHED)
